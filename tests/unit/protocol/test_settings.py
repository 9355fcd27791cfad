"""Files and flags become one configuration; every mistake is one line that names what to write instead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from learner.config import LearnerConfig
from protocol.errors import ConfigError
from protocol.flags import all_fields
from protocol.foreign_names import FOREIGN_NAMES, explain_foreign
from protocol.settings import load_settings
from rollout_server.config import ServerConfig


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Engine(Section):
    """How it drives."""

    speed_s: float = Field(1.0, ge=0)
    """Seconds."""


class BaseOptions(Section):
    """The base."""

    max_staleness: int = Field(4, ge=0)
    """How old."""
    shuffle: bool = True
    """Mix."""


class Config(BaseOptions):
    """All of it."""

    name: str = ""
    """A name."""
    mode: Literal["slow", "fast"] = "slow"
    """A mode."""
    stop: list[str] = Field(default_factory=list)
    """Texts."""
    weights: list[float] = Field(default_factory=list)
    """Numbers."""
    table: dict[str, Any] = Field(default_factory=dict)
    """Anything."""
    limit: float | None = Field(None, gt=0)
    """A limit."""
    path: Path | None = None
    """A path."""
    engine: Engine = Field(default_factory=Engine)
    """The engine."""

    @model_validator(mode="after")
    def _check_pairs(self) -> Config:
        if self.mode == "fast" and self.max_staleness == 0:
            raise ValueError(f"mode {self.mode!r} needs max_staleness above {self.max_staleness}")
        return self


TomlWriter = Callable[..., str]


@pytest.fixture
def toml(tmp_path: Path) -> TomlWriter:
    def write(text: str, name: str = "a.toml") -> str:
        (tmp_path / name).write_text(text, "utf-8")
        return str(tmp_path / name)

    return write


def load(*argv: str) -> Config:
    return load_settings(Config, argv, prog="try")


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    text = str(caught.value)
    assert "\n" not in text
    assert "pydantic" not in text
    return text


def test_defaults_without_any_argument() -> None:
    assert load() == Config()
    assert load().model_fields_set == set()


def test_every_kind_of_flag() -> None:
    config = load(
        "--max-staleness", "2", "--no-shuffle", "--name", "a b", "--mode", "fast", "--stop", "\n", "END",
        "--weights", "1", "0.5", "--table", '{"size": 3}', "--limit", "1e-3", "--path", "x/y",
        "--engine.speed-s", "0.25",
    )  # fmt: skip
    assert config == Config(
        max_staleness=2, shuffle=False, name="a b", mode="fast", stop=["\n", "END"], weights=[1.0, 0.5],
        table={"size": 3}, limit=1e-3, path=Path("x/y"), engine=Engine(speed_s=0.25),
    )  # fmt: skip


@pytest.mark.parametrize(
    "argv",
    [["--max-staleness", "2"], ["--max_staleness", "2"], ["--max-staleness=2"], ["--max_staleness=2"],
     ["--max-staleness", "7", "--max-staleness", "2"]],
)  # fmt: skip
def test_spellings_of_a_flag(argv: list[str]) -> None:
    assert load(*argv).max_staleness == 2


@pytest.mark.parametrize(
    ("argv", "value"),
    [(["--shuffle"], True), (["--shuffle", "true"], True), (["--shuffle", "False"], False),
     (["--no-shuffle"], False), (["--no_shuffle"], False), (["--shuffle=false"], False)],
)  # fmt: skip
def test_spellings_of_a_boolean(argv: list[str], value: bool) -> None:
    assert load(*argv).shuffle is value


def test_a_negative_number_is_a_value_not_a_flag() -> None:
    assert "--max-staleness -2: must be greater than or equal to 0" in refused("--max-staleness", "-2")


def test_files_merge_left_to_right_and_flags_win(toml: TomlWriter) -> None:
    first = toml('name = "first"\nmax_staleness = 1\nmode = "fast"\n[engine]\nspeed_s = 3\n', "1.toml")
    second = toml('name = "second"\nmax_staleness = 2\n', "2.toml")
    config = load("--config", first, "--max-staleness", "3", "--config", second)
    assert (config.name, config.max_staleness, config.mode) == ("second", 3, "fast")
    assert config.engine.speed_s == 3.0


def test_a_nested_flag_overrides_one_key_of_a_files_table(toml: TomlWriter) -> None:
    file = toml("[engine]\nspeed_s = 3\n[table]\na = 1\n")
    config = load("--config", file, "--engine.speed_s", "5")
    assert config.engine.speed_s == 5.0
    assert config.table == {"a": 1}


def test_a_later_table_replaces_a_free_one_whole(toml: TomlWriter) -> None:
    """Arguments of one data set make no sense with another's."""
    first, second = toml("table = {a = 1, b = 2}", "1.toml"), toml("table = {c = 3}", "2.toml")
    assert load("--config", first, "--config", second).table == {"c": 3}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], True), (["2"], 2), (["-1"], -1), (["0.5"], 0.5), (["1e-3"], 1e-3), (["true"], True), (["false"], False),
        (["fa3"], "fa3"), (['"2"'], "2"), (["a", "2"], ["a", 2]), ([""], ""), (["-"], "-"), (["null"], "null"),
        (['{"a": 1}'], '{"a": 1}'), (["NaN"], "NaN"), (["Infinity"], "Infinity"), (["007"], "007"), (["a=b"], "a=b"),
    ],
)  # fmt: skip
def test_the_flag_of_a_tables_key(words: list[str], value: Any) -> None:
    table = load("--name", "n", "--table.tp-size", *words, "--stop", "x").table
    assert table == {"tp-size": value}
    assert type(table["tp-size"]) is type(value)


def test_flags_of_keys_are_collected_and_the_words_around_them_stay() -> None:
    config = load("--table.a", "1", "--name", "n", "--table.b=x=y", "--table.c", "--no-shuffle", "--table.a=2")
    assert config == Config(name="n", shuffle=False, table={"b": "x=y", "c": True, "a": 2})
    assert load("--table.enable_it", "--table.enable-it", "false").table == {"enable-it": False}
    assert load("--table.a.b", "1").table == {"a.b": 1}


def test_flags_of_keys_merge_over_the_whole_table(toml: TomlWriter) -> None:
    file = toml("[table]\na = 1\ntp_size = 1\nc = 'x'")
    assert load("--config", file, "--table.tp-size", "2").table == {"a": 1, "c": "x", "tp-size": 2}
    assert load("--table.b", "3", "--config", file, "--table", '{"b": 1, "d": 2}').table == {"d": 2, "b": 3}


def test_the_keys_of_other_tables_and_of_sections(capsys: pytest.CaptureFixture[str]) -> None:
    class Numbers(Section):
        per_row: dict[str, int] = Field(default_factory=lambda: {"a": 1})
        """Counts."""

    class Nested(Section):
        numbers: Numbers = Field(default_factory=Numbers)
        """Some."""

    def read(*argv: str) -> Nested:
        return load_settings(Nested, argv, prog="try")

    assert read("--numbers.per-row.b", "2").numbers.per_row == {"a": 1, "b": 2}
    assert read("--numbers.per_row.a", "2").numbers.per_row == {"a": 2}
    with pytest.raises(ConfigError, match=r"^--numbers.per-row.b few: must be a valid integer$"):
        read("--numbers.per-row.b", "few")
    with pytest.raises(SystemExit):
        load("--table.a", "1", "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Anything. Whole, or key by key: --table.KEY VALUE." in shown


def test_a_flag_resets_an_optional_value_of_a_file(toml: TomlWriter) -> None:
    file = toml("limit = 2.0")
    assert load("--config", file, "--limit", "none").limit is None


def test_pairs_are_checked_on_the_merged_whole(toml: TomlWriter) -> None:
    file = toml('mode = "fast"\nmax_staleness = 0')
    assert load("--config", file, "--max-staleness", "1").max_staleness == 1
    assert refused("--config", file) == "mode 'fast' needs max_staleness above 0"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("max_stalenes = 3", 'unknown key "max_stalenes"; did you mean max_staleness?'),
        ("zzz = 3", 'unknown key "zzz"; --help lists them all'),
        ("[rollout]\nn = 3", 'unknown key "rollout.n" (verl\'s name): here it is num_generations'),
        ("lr = 3", "here it is learning_rate, a key of the other process"),
        ("[engine]\nspeed = 3", 'unknown key "engine.speed"; did you mean engine.speed_s?'),
        ("engine = 3", "engine = 3: must be a table, written [engine]"),
        ('max_staleness = "2"', 'max_staleness = "2": must be a valid integer'),
        ("max_staleness = true", "max_staleness = true: must be a valid integer"),
        ("max_staleness = 2.5", "max_staleness = 2.5: must be a valid integer"),
        ("max_staleness = -1", "max_staleness = -1: must be greater than or equal to 0"),
        ("[engine]\nspeed_s = -1", "engine.speed_s = -1: must be greater than or equal to 0"),
        ("limit = nan", "limit = NaN: must be a finite number"),
        ("limit = inf", "limit = Infinity: must be a finite number"),
        ("shuffle = 1", "shuffle = 1: must be a valid boolean"),
        ('mode = "medium"', "mode = \"medium\": must be 'slow' or 'fast'"),
        ('stop = "x"', 'stop = "x": must be a valid array'),
        ('weights = [1, "x"]', 'weights = [1, "x"]: item 1: must be a valid number'),
        ("name = 3", "name = 3: must be a valid string"),
        ("name = ", "not valid TOML: Invalid value (at"),
    ],
)
def test_what_a_file_gets_wrong(toml: TomlWriter, text: str, complaint: str) -> None:
    file = toml(text)
    message = refused("--config", file)
    assert message.startswith(f"{file}: ")
    assert complaint in message


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--max-stalenes", "3"], "unknown flag --max-stalenes; did you mean --max-staleness?"),
        (["--zzz"], "unknown flag --zzz; --help lists them all"),
        (["--rollout.n", "8"], "(verl's name): here it is num_generations, a key of the other process"),
        (["name"], '"name" belongs to no flag'),
        (["max_staleness=3"], '"max_staleness=3" belongs to no flag; write --max-staleness 3'),
        (["max_stalenes=3"], '"max_stalenes=3" belongs to no flag; did you mean --max-staleness?'),
        (["-x"], '"-x" belongs to no flag'),
        (["--max-staleness"], "--max-staleness: takes one value, got 0"),
        (["--max-staleness", "1", "2"], "--max-staleness 1 2: takes one value, got 2"),
        (["--max-staleness", "two"], "--max-staleness two: must be a valid integer"),
        (["--limit", "nan"], "--limit nan: must be a finite number"),
        (["--shuffle", "maybe"], "--shuffle maybe: must be a valid boolean"),
        (["--mode", "medium"], "--mode medium: must be 'slow' or 'fast'"),
        (["--weights", "1", "x"], "--weights 1 x: item 1: must be a valid number"),
        (["--table", "size=3"], "--table size=3: Invalid JSON"),
        (["--table", "[1]"], "--table [1]: must be an object"),
        (["--table.", "1"], "--table.: names no key of table; write --table.KEY VALUE"),
        (["--table.a", "1", "-x"], '"-x" belongs to no flag'),
        (["--tabel.a", "1"], "unknown flag --tabel.a; did you mean --table?"),
        (["--engine.speed", "1"], "unknown flag --engine.speed; did you mean --engine.speed-s?"),
        (["--mode", "fast", "--max-staleness", "0"], "mode 'fast' needs max_staleness above 0"),
        (["--config"], "--config: takes one TOML file, got none"),
        (["--config", "--name", "x"], "--config: takes one TOML file, got none"),
        (["--config", "no/such.toml"], "--config no/such.toml: No such file or directory"),
    ],
)
def test_what_a_command_line_gets_wrong(argv: list[str], complaint: str) -> None:
    assert complaint in refused(*argv)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
    assert "not valid TOML" in refused("--config", str(tmp_path / "a.toml"))


def test_a_refused_value_is_shown_short_and_printable() -> None:
    message = refused("--mode", "\x1b[31m" + "x" * 500)
    assert "\x1b" not in message
    assert "\\u001b[31m" in message
    assert len(message) < 200


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("rollout.n", ("verl", "num_generations")),
        ("actor_rollout_ref.rollout.n", ("verl", "num_generations")),
        ("per-device-train-batch-size", ("TRL", "token_budget")),
        ("critic.optim.lr", ("verl", "value_learning_rate")),
        ("actor_rollout_ref.actor.optim.lr", ("verl and prime-rl", "learning_rate")),
        ("n", None),
        ("", None),
    ],
)
def test_foreign_names_are_found_by_their_tail(key: str, expected: tuple[str, str] | None) -> None:
    assert explain_foreign(key) == expected


def test_foreign_names_lead_to_keys_that_exist_and_hide_none() -> None:
    ours = {name for model in (LearnerConfig, ServerConfig) for name, _ in all_fields(model)}
    assert {ours_name for _, ours_name in FOREIGN_NAMES.values()} <= ours
    assert not ours & FOREIGN_NAMES.keys()


@pytest.mark.parametrize("model", [LearnerConfig, ServerConfig])
def test_help_lists_every_knob_of_the_real_configurations(
    model: type[BaseModel], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # one column
    with pytest.raises(SystemExit) as ended:
        load_settings(model, ["--help"], prog="headway")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.replace("│", " ").split())
    for name, field in all_fields(model):
        assert f"--{name.replace('_', '-')} " in shown
        assert field.description, f"{name} has no docstring"
        assert " ".join(field.description.split())[:40] in words


def test_help_groups_inherited_fields_by_their_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("--help")
    shown = capsys.readouterr().out
    assert "base options" in shown
    assert "(default: 4)" in shown
    assert "--engine.speed-s FLOAT" in shown
    assert shown.index("--name") < shown.index("--max-staleness")


@pytest.mark.parametrize(
    ("model", "argv"),
    [
        (LearnerConfig, ["--dataset-config", '{"size": 10}', "--prompts-per-step", "4", "--epsilon-high", "0.28"]),
        (ServerConfig, ["--engine", "scripted", "--scripted.token-s", "0.01", "--reward-funcs", "exact_match", "format",
                        "--insecure-plaintext"]),
    ],
)  # fmt: skip
def test_the_real_configurations_load(model: type[BaseModel], argv: list[str]) -> None:
    config = load_settings(model, argv, prog="headway")
    assert len(config.model_fields_set) == len([word for word in argv if word.startswith("--")])


def test_importing_the_protocol_needs_neither_pydantic_nor_tyro() -> None:
    program = "import protocol, protocol.settings, sys; print(sorted({'pydantic', 'tyro', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
