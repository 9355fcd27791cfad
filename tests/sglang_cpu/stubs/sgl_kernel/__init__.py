"""Stands in for the CUDA kernels on a machine that has none: every name can be imported, and none can be called."""

from __future__ import annotations

from typing import NoReturn


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU; this is the stand-in of tests/sglang_cpu")

    return absent
