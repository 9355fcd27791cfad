"""Stands in for xgrammar (grammars are off, see README.md beside this folder): SGLang names a few of its classes."""

from __future__ import annotations

from typing import Any, NoReturn

from pydantic import BaseModel


class StructuralTag(BaseModel):
    """Named in annotations that pydantic resolves."""


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    class Absent:
        def __init__(self, *_: object, **__: object) -> NoReturn:
            raise NotImplementedError(f"xgrammar.{name}: this is the stand-in of tests/sglang_cpu")

    return Absent
