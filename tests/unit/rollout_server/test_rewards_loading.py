import sys

import pytest

from protocol.errors import ConfigError
from rollout_server.rewards import builtin
from rollout_server.rewards.loading import BUILTINS, load_reward, reward_name


@pytest.fixture(autouse=True)
def untouched_imports(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("exact_match", "exact_match"),
        ("format", "format"),
        ("package.module.brevity", "brevity"),
        ("file.py:brevity", "brevity"),
        ("/a.b/file.v2.py:brevity", "brevity"),
        ("C:\\rewards\\file.py:brevity", "brevity"),
    ],
)
def test_the_short_name_is_the_functions_own(spec, name):
    assert reward_name(spec) == name


@pytest.mark.parametrize("name", ["exact_match", "format"])
def test_built_ins_load_by_name(name):
    assert vars(builtin)[BUILTINS[name][1]] is load_reward(name)


def test_a_function_of_a_file_is_loaded_with_its_neighbors_importable(tmp_path):
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "constants_of_mine.py").write_text("BEST = 3.0")
    (tmp_path / "rules" / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from constants_of_mine import BEST\n"
        "@dataclass\n"
        "class Rule:\n    weight: float\n"
        "def brevity(completions):\n    return [BEST] * len(completions)\n"
    )
    assert load_reward("rules/mine.py:brevity")(["a", "b"]) == [3.0, 3.0]


def test_a_module_of_the_working_directory_is_found(tmp_path):
    (tmp_path / "rules_here.py").write_text("def brevity(completions):\n    return [1.0]")
    assert load_reward("rules_here.brevity")(["a"]) == [1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exactmatch", r"'exactmatch' is no built-in \(exact_match, format, .*did you mean 'exact_match'\?; name one"),
        ("zzz", r"'zzz' is no built-in \([a-z_, ]+\); name one of your own as package.module.function"),
        (
            "no_such_package.f",
            "importing no_such_package raised ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("missing.py:f", "no file .*/missing.py; write path/to/file.py:function"),
        ("notes.txt:f", "no file .*/notes.txt; write"),
        ("mine.py:brevty", "'brevty' is not there; headway_reward_mine has brevity, length - did you mean 'brevity'"),
        ("mine.py:LIMIT", "'LIMIT' is not callable; headway_reward_mine has brevity, length$"),
        ("empty.py:f", "'f' is not there; headway_reward_empty has no functions$"),
        ("broken.py:f", "importing .*/broken.py raised ZeroDivisionError: division by zero$"),
        ("syntax.py:f", "importing .*/syntax.py raised SyntaxError"),
        ("gym_less.py:f", r"needs the package math_verify: pip install '\.\[rewards\]'"),
    ],
)
def test_what_cannot_be_loaded_says_what_was_found(tmp_path, spec, message):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "mine.py").write_text("LIMIT = 3\ndef brevity(): ...\ndef length(): ...\ndef _hidden(): ...")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "syntax.py").write_text("def f(:")
    (tmp_path / "gym_less.py").write_text("raise ModuleNotFoundError('gone', name='math_verify')")
    with pytest.raises(ConfigError, match=message) as error:
        load_reward(spec)
    assert "\n" not in str(error.value)
    assert repr(spec) in str(error.value)
