"""Stands in for triton, which cannot compile without a GPU: kernels can be declared, and none can be launched."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar, NoReturn

__version__ = "3.7.1"


class Absent:
    """Any object of triton: attributes, subscripts and calls give more of the same; decorating gives a Kernel."""

    def __init__(self, name: str = "triton") -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "backend":  # triton.runtime.driver.active.get_current_target().backend
            return "cpu"
        return Absent(f"{self._name}.{name}")

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        if len(arguments) == 1 and callable(arguments[0]) and not isinstance(arguments[0], Absent):
            return Kernel(arguments[0])
        return Absent(f"{self._name}()")

    def __getitem__(self, _: object) -> Absent:
        return self

    def __mro_entries__(self, _: object) -> tuple[type, ...]:
        return (object,)


class Kernel:
    """A declared kernel."""

    def __init__(self, function: Any) -> None:
        self.fn = function
        self.__name__ = function.__name__

    def __getitem__(self, _: object) -> NoReturn:
        raise NotImplementedError(
            f"triton kernel {self.__name__} needs a GPU; this is the stand-in of tests/sglang_cpu"
        )


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def made_up(module: str, name: str) -> Any:
    """An attribute of a module: a class where the name is one, for those who ask isinstance."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {}) if name[0].isupper() and name != "Config" else Absent(f"{module}.{name}")


class Module(ModuleType):
    """A module of which every attribute exists."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return made_up(self.__name__, name)


class Finder(MetaPathFinder, Loader):
    """Finds every module below triton."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith("triton.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(Finder())


def __getattr__(name: str) -> Any:
    return made_up("triton", name)
