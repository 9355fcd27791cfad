"""Starts of the real learner without a server: a refused one leaves the disk as it was, and what the others say."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from learner import app
from learner.app import run
from learner.checkpoint import CheckpointState, save_checkpoint
from learner.config import LearnerConfig
from learner.ledger import Ledger
from learner.rundir import RunDirectory
from learner.trainer import Trainer
from protocol.errors import ConfigError, HeadwayError, RunStopped
from protocol.free_address import check_free
from tests.models import build_tiny_model

PPO = {"advantage_estimator": "gae", "filter_zero_std": False}
Make = Callable[..., LearnerConfig]


@pytest.fixture
def make(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Configurations of one run; with server_wait_s it stops soon after it has begun."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} + {i} =", "answer": str(2 * i)}) + "\n" for i in range(8)))
    defaults = {
        "model": str(tiny_model_dir), "dataset": str(data), "output_dir": tmp_path / "runs" / "here", "run_name": "r",
        "max_completion_length": 8, "max_prompt_length": 16, "num_generations": 2, "prompts_per_step": 2,
        "bind": "tcp://127.0.0.1:*", "server_wait_s": 0.1,
    }  # fmt: skip
    return lambda **options: LearnerConfig(**{**defaults, **options})


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield f"tcp://127.0.0.1:{other.getsockname()[1]}"


def begin_with_checkpoint(config: LearnerConfig) -> None:
    """A run that has begun, and has a checkpoint of all weights."""
    directory = RunDirectory.open(config)
    directory.begin_incarnation()
    state = CheckpointState(
        run_id=directory.run_id, incarnation=1, forks=((1, 0),), policy_version=0, config_fingerprint="f",
        ledger=Ledger(config.granted_bounds).snapshot(),
    )  # fmt: skip
    save_checkpoint(directory.checkpoints_dir, 0, Trainer(config).save, state, keep=1)
    directory.close()


def everything(root: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adapter": ({"use_peft": True}, r"adapter"),
    "stop text": ({"stop": ["ab"]}, r"stop 'ab' is 2 tokens"),
    "column": ({"prompt_column": "question"}, r"line 1: no column 'question'"),
    "too long": ({"max_prompt_length": 2}, r"fits max_prompt_length"),
    "evaluation": ({"eval_dataset": "none.jsonl"}, r"none\.jsonl: No such file"),
    "function": ({"loss_function": "no_such_module:f"}, r"importing no_such_module raised"),
}


@pytest.mark.parametrize("continued", [False, True], ids=["new", "continued"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_start_leaves_the_disk_as_it_was(make: Make, tmp_path: Path, what: str, continued: bool) -> None:
    options, says = REFUSED[what]
    if what == "adapter" and not continued:
        options, says = {"use_peft": True, "lora_target_modules": ["none_such"]}, "none_such"
    if continued:
        begin_with_checkpoint(make())
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=says):
        run(make(**options, allow_changed=list(options)))
    assert everything(tmp_path) == before


@pytest.mark.parametrize("late", [False, True], ids=["at once", "while it loads"])
def test_an_address_in_use_leaves_no_run(
    make: Make, tmp_path: Path, taken: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def check(address: str) -> None:
        asked.append(address)
        if len(asked) > late:
            check_free(address)

    monkeypatch.setattr(app, "check_free", check)
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=f"^cannot listen on {taken}: another process has it"):
        run(make(bind=taken))
    assert everything(tmp_path) == before
    assert len(asked) == 1 + late


def test_a_run_that_begins_has_its_places_and_its_log(make: Make, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="server"):
        run(make())
    home = tmp_path / "runs" / "here" / "r"
    assert {path.name for path in home.iterdir()} >= {"config.json", "run.json", "logs", "journal", "checkpoints"}
    assert "event=begun incarnation=1" in (home / "logs" / "learner.log").read_text()


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_another_reference_in_the_same_place_is_noticed(make: Make, tmp_path: Path, beta: float) -> None:
    config = make(model=str(build_tiny_model(tmp_path / "model")), beta=beta)
    with pytest.raises(RunStopped):
        run(config)
    build_tiny_model(tmp_path / "model", seed=1)
    if not beta:
        with pytest.raises(RunStopped):  # its weights were nowhere needed again
            run(config)
        return
    with pytest.raises(
        ConfigError, match=r"model was 'content \w{32}', is 'content \w{32}'.*allow_changed = \['model'\]"
    ):
        run(config)
    with pytest.raises(RunStopped):
        run(config.model_copy(update={"allow_changed": ["model"]}))
    with pytest.raises(RunStopped):
        run(config)


def test_a_reference_that_a_checkpoint_holds_need_not_be_the_models(make: Make, tmp_path: Path) -> None:
    config = make(model=str(build_tiny_model(tmp_path / "model")), beta=0.1, sync_ref_model=True)
    with pytest.raises(RunStopped):
        run(config)
    begin_with_checkpoint(config)
    build_tiny_model(tmp_path / "model", seed=1)
    with pytest.raises(RunStopped):
        run(config)


def test_a_critic_that_begins_in_the_middle_of_a_run_is_said_once(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin_with_checkpoint(make())
    with pytest.raises(RunStopped):
        run(make(**PPO, allow_changed=list(PPO)))
    assert capsys.readouterr().out.count("step-000000 has no critic, so a new one begins") == 1
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(RunStopped):
        run(make(**PPO))
    begin_with_checkpoint(make(**PPO))
    with pytest.raises(RunStopped):
        run(make(**PPO))
    assert "no critic" not in capsys.readouterr().out


def test_what_was_logged_before_a_refusal_is_shown(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin_with_checkpoint(make())
    (tmp_path / "runs" / "here" / "r" / "checkpoints" / "step-000000" / "state.json").write_text("{")
    with pytest.raises(HeadwayError, match=r"no checkpoint in .* can be trusted"):
        run(make())
    assert "WARNING learner checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "here" / "r" / "logs" / "learner.log").exists()
