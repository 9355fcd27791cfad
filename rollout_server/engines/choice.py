"""Which engine serves: what the configuration asks for, and what this machine has. No torch, no SGLang is imported.

The checks that need nothing but the configuration are rollout_server/config.py's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from protocol.errors import ConfigError
from protocol.machine import has_cuda
from rollout_server.config import ServerConfig

SGLANG_FLOOR = (0, 5, 21)
"""Below it one of these: 0.5.20 and older end their own process when weights are loaded while samples wait, 0.5.18 and
older do not say which version of the weights sampled which token."""
CPU_ENGINE_SWITCH = "SGLANG_USE_CPU_ENGINE"
"""SGLang's own variable: 1 lets it run without a GPU."""

EngineName = Literal["sglang", "transformers", "scripted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What decides the choice."""

    has_cuda: bool
    allows_cpu_sglang: bool
    """Whether the user has switched SGLang to its CPU engine."""
    sglang_version: str | None
    """None: not installed."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine, and what the user should know of how it was chosen (empty: nothing)."""

    engine: EngineName
    notice: str = ""


def read_machine(
    environment: Mapping[str, str] = os.environ, *, root: Path = Path("/"), package: str = "sglang"
) -> Machine:
    """Look at device files, the environment and the installed packages."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        version = None
    return Machine(
        has_cuda=has_cuda(environment, root=root),
        allows_cpu_sglang=environment.get(CPU_ENGINE_SWITCH) == "1",
        sglang_version=version,
    )


def choose_engine(config: ServerConfig, machine: Machine | None = None) -> Choice:
    """Resolve `engine`, and refuse what cannot run here.

    Args:
        config: `engine`, `engine_url` and `device` matter.
        machine: default is this one.

    Raises:
        ConfigError: SGLang is wanted and there is no GPU, no SGLang, or one too old.
    """
    if config.engine == "transformers" or config.engine == "scripted":
        return Choice(config.engine)
    if config.engine_url:
        return Choice("sglang")
    machine = machine or read_machine()
    on_cuda = machine.has_cuda if config.device == "auto" else config.device != "cpu"
    if config.engine == "auto":
        if not on_cuda:
            ignored = ", ".join(config.sglang_words)
            notice = "engine auto: no CUDA device here: serving with transformers, where no effect is had by"
            return Choice("transformers", f"{notice} {ignored}" if ignored else "")
        if machine.sglang_version is None:
            return Choice(
                "transformers",
                "engine auto: there is a GPU, and SGLang, which makes the most of it, is not installed (pip install"
                " '.[server]' in headway's directory): serving with transformers",
            )
    _check_sglang(machine, on_cuda=on_cuda)
    return Choice("sglang")


def _check_sglang(machine: Machine, *, on_cuda: bool) -> None:
    if machine.sglang_version is None:
        raise ConfigError(
            "engine sglang: the package sglang is not installed here: pip install '.[server]' in headway's"
            " directory, or take --engine transformers, or name a server that runs elsewhere on this host, --engine-url http://127.0.0.1:PORT"
        )
    if version_numbers(machine.sglang_version) < SGLANG_FLOOR:
        floor = ".".join(map(str, SGLANG_FLOOR))
        raise ConfigError(
            f"engine sglang: sglang {machine.sglang_version} is installed, {floor} or newer is needed (up to 0.5.20 it"
            " kills itself when weights are loaded while samples wait, up to 0.5.18 it does not say which weights"
            f" sampled a token): pip install 'sglang>={floor}', or take --engine transformers"
        )
    if not on_cuda and not machine.allows_cpu_sglang:
        raise ConfigError(
            "engine sglang: no CUDA device here: take --engine transformers, or name a server that has one,"
            " --engine-url http://127.0.0.1:PORT; an SGLang that is built for this CPU runs with"
            f" {CPU_ENGINE_SWITCH}=1 in the environment"
        )


def version_numbers(version: str) -> tuple[int, ...]:
    """Read the release of a version: 0.5.21.post1 is (0, 5, 21)."""
    release = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)", version)
    return tuple(int(number) for number in release.group(1).split(".")) if release else ()
