"""How both processes read their configuration: TOML files, then flags, into one pydantic model.

    config = load_settings(LearnerConfig, sys.argv[1:], prog="headway-learner train")

Files merge left to right, flags win. A free table (`dict[...]`) of a later file replaces the earlier one; flags set
single keys of it, `--table.key VALUE`, or replace it too, `--table '{"key": 1}'`. Every value is checked on its own
where it was written, so that an error names the file or the flag; checks of several fields together run once, on the
merged whole. Every failure is a ConfigError of one line. pydantic and tyro are imported when called: `import protocol`
stays light, and a rollout engine's environment never needs them for the wire.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, get_origin

from protocol.errors import ConfigError
from protocol.foreign_names import explain_foreign

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic.fields import FieldInfo

ConfigT = TypeVar("ConfigT", bound="BaseModel")
SHOWN_CHARACTERS = 80
"""Of a refused value, in its error."""


def load_settings(
    config_type: type[ConfigT], argv: Sequence[str], *, prog: str, description: str | None = None
) -> ConfigT:
    """Read the configuration from `--config FILE` (repeatable) and flags.

    Args:
        config_type: A pydantic model; the docstrings of its fields are the help.
        argv: The command line without the program's name.
        prog: What the user typed, for --help.
        description: First lines of --help; default is the model's docstring.

    Raises:
        ConfigError: An unknown key or flag (names the nearest), a value of the wrong type or range, values that
            do not go together, a file that is missing or no TOML. Always one line.
        SystemExit: With code 0, after --help.
    """
    from protocol.flags import all_fields, parse_flags, put_key

    flags = parse_flags(config_type, argv, prog=prog, description=description or config_type.__doc__ or "")
    fields = dict(all_fields(config_type))
    if flags.unknown:
        raise ConfigError(_unknown_flag(flags.unknown[0], list(fields)))
    values: dict[str, Any] = {}
    for file in flags.config_files:
        values.update(_checked_table(_read_toml(file), fields, file))
    for name, words in flags.words.items():
        values[name] = _checked_words(name, words, fields[name])
    for name, keys in flags.table_words.items():
        values[name] = table = dict(values.get(name) or fields[name].get_default(call_default_factory=True) or {})
        for key, words in keys.items():
            put_key(table, key, _checked_key(name, key, words, fields[name]))
    return _build(config_type, values)


def is_set(config: BaseModel, key: str) -> bool:
    """Tell whether a key has another value than its default.

    Not whether it was written down: a resolved configuration, read back, has every key written down, and must pass.
    """
    return bool(getattr(config, key) != type(config).model_fields[key].get_default(call_default_factory=True))


def no_effect(config: BaseModel, keys: Sequence[str], needs: str) -> Iterator[str]:
    """Yield the reason to refuse each of the keys that is set, for nothing reads it: `needs` is what would."""
    for key in keys:
        if is_set(config, key):
            yield f"{key} has no effect here: it needs {needs}; add that, or leave {key} out"


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError both are
        raise ConfigError(f"{file}: not valid TOML: {error}") from error


def _checked_table(
    table: Mapping[str, Any], fields: Mapping[str, FieldInfo], file: Path, prefix: str = ""
) -> dict[str, Any]:
    """Check every value of a TOML table; return dotted name to value."""
    checked: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key
        if name in fields:
            checked[name] = _checked_value(value, fields[name], where=f"{file}: {name} = {_shown(value)}")
        elif any(field.startswith(f"{name}.") for field in fields):
            if not isinstance(value, dict):
                raise ConfigError(f"{file}: {name} = {_shown(value)}: must be a table, written [{name}]")
            checked |= _checked_table(value, fields, file, f"{name}.")
        else:
            name = next(_leaves(name, value))
            raise ConfigError(f"{file}: unknown key {_shown(name)}{_nearest(name, list(fields))}")
    return checked


def _leaves(name: str, value: Any) -> Iterator[str]:
    """Yield the dotted names inside an unknown table; an empty one is a leaf itself."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name


def _checked_value(value: Any, field: FieldInfo, *, where: str) -> Any:
    """Check a TOML value strictly: a number in quotes is no number. JSON mode lets a string be a Path."""
    from pydantic import ValidationError
    from pydantic_core import to_json

    try:
        return _adapter(field).validate_json(to_json(value, inf_nan_mode="constants"), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_reason(error)}") from error


def _checked_words(name: str, words: list[str], field: FieldInfo) -> Any:
    """Convert the words after a flag: lists take any number, booleans none or one, all others one."""
    from pydantic import ValidationError

    from protocol.flags import alternatives

    kinds = alternatives(field.annotation)
    where = " ".join([_flag(name), *(_shown(word, quote=False) for word in words)])
    origins = {get_origin(kind) or kind for kind in kinds}
    if bool in origins and not words:
        return True
    try:
        if list in origins:
            return _adapter(field).validate_python(words)
        if len(words) != 1:
            raise ConfigError(f"{where}: takes one value, got {len(words)}")
        if dict in origins:
            return _adapter(field).validate_json(words[0])
        if type(None) in origins and words[0].lower() == "none":
            return None
        return _adapter(field).validate_python(words[0])
    except ValidationError as error:
        raise ConfigError(f"{where}: {_reason(error)}") from error


def _checked_key(name: str, key: str, words: list[str], field: FieldInfo) -> Any:
    """Convert the words after the flag of a table's key: none is true, one a value, more a list."""
    from pydantic import ValidationError

    values = [_plain_value(word) for word in words]
    value = values[0] if len(values) == 1 else values or True
    try:
        return _adapter(field).validate_python({key: value})[key]
    except ValidationError as error:
        shown = " ".join([f"{_flag(name)}.{key}", *(_shown(word, quote=False) for word in words)])
        raise ConfigError(f"{shown}: {_reason(error)}") from error


def _plain_value(word: str) -> str | int | float | bool:
    """A number, true, false or a text in quotes, as JSON writes them; any other word is the text it is."""
    try:
        value = json.loads(word, parse_constant=_no_number)
    except ValueError:
        return word
    return value if isinstance(value, str | int | float) else word


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _adapter(field: FieldInfo) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    annotation: Any = field.annotation
    for constraint in field.metadata:
        annotation = Annotated[annotation, constraint]
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def _build(config_type: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Nest the dotted names and run the checks of several fields together."""
    from pydantic import ValidationError

    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, leaf = name.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[leaf] = value
    try:
        return config_type.model_validate(nested)
    except ValidationError as error:
        raise ConfigError(_reason(error)) from error


def _reason(error: ValidationError) -> str:
    """The first complaint, in one line and without pydantic's frame."""
    first = error.errors(include_url=False)[0]
    text = first["msg"].removeprefix("Value error, ").split(", unable to parse")[0]
    text = text.replace("Input should be", "must be")
    inner = ".".join(str(part) for part in first["loc"] if isinstance(part, int))
    return " ".join((f"item {inner}: {text}" if inner else text).split())


def _unknown_flag(word: str, names: list[str]) -> str:
    if not word.startswith("--"):
        name, assigned, value = word.partition("=")
        hint = f"; write {_flag(name)} {_shown(value, quote=False)}" if assigned and name in names else ""
        foreign = _nearest(name, names, as_flag=True) if assigned and not hint else hint
        return f"{_shown(word)} belongs to no flag{foreign}"
    name = word[2:].partition("=")[0].replace("-", "_")
    return f"unknown flag {_shown(word, quote=False)}{_nearest(name, names, as_flag=True)}"


def _nearest(name: str, names: list[str], *, as_flag: bool = False) -> str:
    """Say what an unknown name probably means, foreign systems' names included."""
    foreign = explain_foreign(name)
    if foreign is not None and foreign[1] in names:
        system, ours = foreign
        return f" ({system}'s name): here it is {_flag(ours) if as_flag else ours}"
    if foreign is not None:
        return f" ({foreign[0]}'s name): here it is {foreign[1]}, a key of the other process"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not close:
        return "; --help lists them all"
    return f"; did you mean {_flag(close[0]) if as_flag else close[0]}?"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any, *, quote: bool = True) -> str:
    """A value for an error text: one line, printable, cut when long."""
    text = json.dumps(value, default=str, ensure_ascii=True)
    if not quote and isinstance(value, str) and text == f'"{value}"' and value and " " not in value:
        text = value
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
