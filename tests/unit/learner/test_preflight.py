"""What a dry run checks without torch, and what it says it has not checked."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from learner import preflight
from learner.commands import train
from learner.config import LearnerConfig
from learner.dry_run import describe
from learner.preflight import check_function, check_start, unchecked
from learner.ranks.place import Place
from learner.rundir import RunDirectory
from protocol.errors import ConfigError

TEXT = """
from elsewhere import borrowed as lent
import os.path

if True:
    def mine(tokens): ...
else:
    other = twin = None

class Callable: ...

def outer():
    inner = 1
    def nested(): ...
"""


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules in the working directory, one of which must not be imported."""
    (tmp_path / "my_package" / "deep").mkdir(parents=True)
    (tmp_path / "my_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "my_package" / "deep" / "losses.py").write_text(f"{TEXT}raise RuntimeError('imported')\n")
    (tmp_path / "starred.py").write_text("from os import *")
    (tmp_path / "lazy.py").write_text("def __getattr__(name): ...")
    (tmp_path / "broken.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize(
    "path",
    ["my_package.deep.losses:mine", "my_package.deep.losses:lent", "my_package.deep.losses:os",
     "my_package.deep.losses:twin", "my_package.deep.losses:Callable", "starred:anything", "lazy:anything"],
)  # fmt: skip
def test_a_function_is_found_without_importing_it(path: str) -> None:
    check_function("loss_function", path)
    assert not {"my_package", "starred", "lazy"} & sys.modules.keys()


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("no_such:f", "^loss_function no_such:f: no module no_such here: looked in "),
        ("my_package.shallow:f", "no module my_package.shallow here"),
        ("my_package.deep.losses.more:f", "no module my_package.deep.losses.more here"),
        (
            "my_package.deep.losses:mein",
            r"mein is not there; .*losses\.py has Callable, lent, mine, os, other, outer, twin",
        ),
        ("my_package.deep.losses:nested", "nested is not there"),
        ("broken:f", r"broken\.py is no Python: invalid syntax"),
    ],
)
def test_a_function_that_is_not_there(path: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_function("loss_function", path)


@pytest.mark.parametrize(
    ("options", "missing", "says"),
    [
        ({"use_peft": True}, "peft", r"use_peft needs the package peft, .*: pip install '\.\[peft\]'"),
        ({"optim": "adamw_8bit"}, "bitsandbytes", r"optim 'adamw_8bit' needs the package bitsandbytes, .*\[optim\]"),
        ({"dataset": "reasoning_gym:gcd"}, "reasoning_gym", r"gcd needs the package reasoning-gym, .*\[rewards\]"),
        ({}, "torch", r"training needs the package torch, .*\[learner\]"),
    ],
)
def test_a_missing_package(options, missing, says, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LearnerConfig(**{"model": "m", "dataset": "d.jsonl", "bind": "tcp://127.0.0.1:0", **options})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else sys)
    with pytest.raises(ConfigError, match=says):
        check_start(config, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: sys)
    check_start(config, None)


def test_an_address_in_use_and_what_ranks_cannot_do() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = LearnerConfig(model="m", dataset="d", bind=f"tcp://127.0.0.1:{other.getsockname()[1]}")
        for place in (None, Place(0, 2, 0)):
            with pytest.raises(ConfigError, match="another process has it"):
                check_start(config, place)
    with pytest.raises(ConfigError, match="adapters train on one rank"):
        check_start(LearnerConfig(use_peft=True, bind="tcp://127.0.0.1:0"), Place(0, 2, 0))


def test_what_is_not_checked_is_one_line() -> None:
    plain = LearnerConfig(model="m", dataset="d")
    last = describe(plain).splitlines()[-1]
    assert last == unchecked(plain, None)
    assert last.startswith("not checked: the model's weights and tokenizer, the rows of the data, whether it fits the")
    assert "functions do" not in last
    assert "what your functions do" in unchecked(LearnerConfig(loss_function="m:f"), None)
    assert "whether the ranks agree" in unchecked(plain, Place(0, 2, 0))


def test_signs_of_cuda_and_the_run_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LearnerConfig(model="m", dataset="d", output_dir=tmp_path / "runs", run_name="r")
    monkeypatch.setattr(preflight, "has_cuda", lambda environment: False)
    assert here_of(config) == {"run": ["new", str(config.run_dir)], "CUDA": ["no", *NO_SIGN.split()]}
    assert here_of(config.model_copy(update={"device": "cpu"})).keys() == {"run"}
    run = RunDirectory.open(config)
    run.begin_incarnation()
    run.close()
    monkeypatch.setattr(preflight, "has_cuda", lambda environment: True)
    assert [words[0] for words in here_of(config).values()] == ["continued", "found"]
    with pytest.raises(ConfigError, match="began differently: beta was"):
        describe(config.model_copy(update={"beta": 0.5}))


NO_SIGN = "sign of it device auto; torch has the last word"


def here_of(config: LearnerConfig) -> dict[str, list[str]]:
    lines = describe(config).partition("here:\n")[2].partition("\n\n")[0].splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_a_dry_run_shows_everything_before_it_says_what_is_wrong(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "1"}\n')
    argv = ["--model", str(tiny_model_dir), "--dataset", "d.jsonl", "--bind", "tcp://127.0.0.1:0", "--dry-run"]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert train(argv, prog="headway-learner train") == 0, "without the other rank"
    assert "whether the ranks agree" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no module nowhere here"):
        train([*argv, "--loss-function", "nowhere:f"], prog="headway-learner train")
    assert "slots_total" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert train([*argv, "--loss-function", "nowhere:f"], prog="headway-learner train") == 0
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "runs").exists()
