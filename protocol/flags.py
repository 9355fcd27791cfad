"""Command-line flags of a pydantic model: tyro finds them and writes --help, the words come back unconverted.

Why unconverted: a value in a file and the same value in a flag must be judged by the same rule and refused with
the same words (settings.py does both), and only flags that were really given may override a file. So each field
becomes a tyro argument of any number of words, and a flag that was not given keeps its `Default`. The keys of a free
table (`dict[...]`) are nobody's fields: their flags, `--table.key WORDS`, are taken out before tyro looks.

Knows nothing of files and merging. Imports tyro and pydantic, so only settings.py imports it, when called.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from protocol.errors import ConfigError

METAVARS: dict[object, str] = {
    bool: "[true|false]",
    int: "INT",
    float: "FLOAT",
    str: "TEXT",
    Path: "PATH",
    dict: "JSON",
}

Member = tuple[str, Any, Any]
"""Name, annotation and default of a dataclass field to be made."""


@dataclasses.dataclass(frozen=True, slots=True)
class Default:
    """Stands for a flag that was not given; shows the field's default in --help."""

    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class ParsedFlags:
    """What stood on the command line."""

    config_files: list[Path]
    """--config, in order."""
    words: dict[str, list[str]]
    """Dotted field name to the words after its flag; only flags that were given."""
    table_words: dict[str, dict[str, list[str]]]
    """Dotted name of a free table to its keys, as typed, and the words after each one's flag."""
    unknown: list[str]
    """Words that belong to no flag, in order."""


def nested_model(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model when the field is a nested section, else None."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def alternatives(annotation: object) -> tuple[object, ...]:
    """Members of a union, or the one type."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def is_table(field: FieldInfo) -> bool:
    """Whether the field is a free table, `dict[...]`."""
    return dict in {typing.get_origin(kind) or kind for kind in alternatives(field.annotation)}


def all_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every field with its dotted name, those of nested sections included."""
    for name, field in model.model_fields.items():
        section = nested_model(field)
        if section is None:
            yield prefix + name, field
        else:
            yield from all_fields(section, f"{prefix}{name}.")


def parse_flags(model: type[BaseModel], argv: Sequence[str], *, prog: str, description: str) -> ParsedFlags:
    """Split the command line into fields' words; `-` and `_` are the same in flag names.

    Raises:
        ConfigError: --config without a file, or the flag of a table's key without the key.
        SystemExit: With code 0, after printing --help.
    """
    for word, following in pairwise([*argv, "--"]):
        if word == "--config" and following.startswith("--"):
            raise ConfigError("--config: takes one TOML file, got none")
    fields = dict(all_fields(model))
    booleans = {name for name, field in fields.items() if bool in alternatives(field.annotation)}
    table_words, argv = _take_table_words(argv, [name for name, field in fields.items() if is_table(field)])
    parsed: Any
    parsed, unknown = tyro.cli(
        _root_class(model),
        args=[word for given in argv for word in _expand_negation(given, booleans)],
        prog=prog,
        description=description,
        return_unknown_args=True,
    )
    words = {name: value for name, value in _flatten(parsed) if not isinstance(value, Default)}
    files = [Path(file) for file in words.pop("config")]
    return ParsedFlags(config_files=files, words=words, table_words=table_words, unknown=unknown)


def _take_table_words(argv: Sequence[str], tables: list[str]) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """Split off every `--table.key` with the words up to the next flag; a key given twice has its last words."""
    taken: dict[str, dict[str, list[str]]] = {}
    rest: list[str] = []
    words = rest
    for word in argv:
        flag, assigned, value = word.partition("=")
        table = next((name for name in tables if flag.replace("-", "_").startswith(f"__{name}.")), None)
        if table is not None:
            key = flag[len(f"--{table}.") :]
            if not key:
                raise ConfigError(f"{flag}: names no key of {table}; write {flag}KEY VALUE")
            words = [value] if assigned else []
            put_key(taken.setdefault(table, {}), key, words)
        else:
            if _is_flag(word):
                words = rest
            words.append(word)
    return taken, rest


def put_key(table: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of a free table; one that is the same but for `-` and `_` goes."""
    for twin in [other for other in table if other.replace("-", "_") == key.replace("-", "_")]:
        del table[twin]
    table[key] = value


def _is_flag(word: str) -> bool:
    """Whether the word begins a flag: -1 and -.5 are numbers, a lone - is a word."""
    return word.startswith("--") or (word[:1] == "-" and word[1:2].isalpha())


def _expand_negation(word: str, booleans: set[str]) -> list[str]:
    """--no-shuffle is --shuffle false."""
    name = word.removeprefix("--no-").removeprefix("--no_").replace("-", "_")
    if word.startswith(("--no-", "--no_")) and name in booleans:
        return [f"--{name}", "false"]
    return [word]


def _root_class(model: type[BaseModel]) -> type:
    """Make a dataclass for tyro: --config, the model's own fields, a group per base class that brings fields."""
    file = Annotated[list[str], tyro.conf.arg(metavar="FILE", help="TOML file; repeatable, later ones win.")]
    members: list[Member] = [("config", tyro.conf.UseAppendAction[file], _default_factory(list))]
    groups: dict[type[BaseModel], list[str]] = {}
    for name in model.model_fields:
        groups.setdefault(_owner(model, name), []).append(name)
    members += _members(model, groups.pop(model, []))
    for owner in (base for base in model.__mro__ if base in groups):
        names = groups[owner]
        group: Any = _dataclass(owner, _members(model, names))
        title = tyro.conf.arg(name=owner.__name__.removesuffix("Options").lower())
        grouped = Annotated[group, tyro.conf.OmitArgPrefixes, title]
        members.append((f"{owner.__name__}_", grouped, _default_factory(group)))
    return _dataclass(model, members)


def _owner(model: type[BaseModel], name: str) -> type[BaseModel]:
    """The base class that introduces the field."""
    return next(base for base in reversed(model.__mro__) if issubclass(base, BaseModel) and name in base.model_fields)


def _members(model: type[BaseModel], names: list[str]) -> list[Member]:
    members: list[Member] = []
    for name in names:
        field = model.model_fields[name]
        section = nested_model(field)
        if section is None:
            default = Default(field.get_default(call_default_factory=True))
            members.append((name, _argument(name, field), dataclasses.field(default=default)))
        else:
            nested = _dataclass(section, _members(section, list(section.model_fields)))
            members.append((name, nested, _default_factory(nested)))
    return members


def _dataclass(model: type[BaseModel], members: list[Member]) -> type:
    made = dataclasses.make_dataclass(model.__name__, members)
    made.__doc__ = model.__doc__
    return made


def _default_factory(factory: type) -> Any:
    return dataclasses.field(default_factory=factory)


def _argument(name: str, field: FieldInfo) -> Any:
    text = " ".join((field.description or "").split())
    if is_table(field):
        text += f" Whole, or key by key: --{name.replace('_', '-')}.KEY VALUE."
    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=_metavar(field.annotation),
        instance_from_str=list,
        is_instance=lambda _: True,
        str_from_instance=_words_of_default,
    )
    return Annotated[Any, spec, tyro.conf.arg(help=text)]


def _metavar(annotation: object) -> str:
    kinds = [kind for kind in alternatives(annotation) if kind is not type(None)]
    return "|".join(_metavar_of_one(kind) for kind in kinds)


def _metavar_of_one(kind: object) -> str:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "{" + ",".join(str(choice) for choice in typing.get_args(kind)) + "}"
    if origin is list:
        return f"[{_metavar(typing.get_args(kind)[0])} ...]"
    return METAVARS[origin or kind]


def _words_of_default(default: Any) -> list[str]:
    """What --help shows as the default (tyro adds quotes where a shell needs them)."""
    if isinstance(default.value, list):
        return [str(item) for item in default.value] or ["none"]
    if default.value is None or isinstance(default.value, bool | dict):
        return [json.dumps(default.value).replace("null", "none")]
    return [str(default.value)]


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, words); groups (their names end in _) add nothing to the name."""
    for member in dataclasses.fields(value):
        inner = getattr(value, member.name)
        if isinstance(inner, Default) or not dataclasses.is_dataclass(inner):
            yield prefix + member.name, inner
        else:
            yield from _flatten(inner, prefix if member.name.endswith("_") else f"{prefix}{member.name}.")
