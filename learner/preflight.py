"""What can be known of a start without torch and without reading a model: for --dry-run.

Cheap on purpose: no user's module is imported, only found and parsed; nothing is opened for long. What stays unknown is
said, in one line.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from learner.config import LearnerConfig
from learner.ranks.place import Place, check_ranks
from learner.rundir import read_run
from protocol.errors import ConfigError
from protocol.free_address import check_free
from protocol.machine import has_cuda

LEARNER_PACKAGES = ("torch", "transformers", "safetensors", "rich", "matplotlib")
"""Of the extra `learner`."""
DYNAMIC = ("__getattr__", "globals")
"""A module whose text has one of these words may have names that its text does not show."""


def found(config: LearnerConfig) -> Iterator[tuple[str, str, str]]:
    """Yield what this machine has for the run: what, found or not, details. Refuses nothing."""
    identity = read_run(config)
    learners = identity.incarnation if identity else 0
    yield "run", "continued" if learners else "new", str(config.run_dir)
    if config.device != "cpu":
        cuda = "found" if has_cuda(os.environ) else "no sign of it"
        yield "CUDA", cuda, f"device {config.device}; torch has the last word"


def check_start(config: LearnerConfig, place: Place | None) -> None:
    """Refuse what a start on this machine would be refused for.

    Raises:
        ConfigError: a package or a user's function is missing, the address is taken, or several ranks cannot do it.
    """
    for module, extra, why in needed_packages(config):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"{why} needs the package {module.replace('_', '-')}, which is not installed here: pip install"
                f" '.[{extra}]' in headway's directory"
            )
    for key, path in (("loss_function", config.loss_function), ("advantage_function", config.advantage_function)):
        if path:
            check_function(key, path)
    check_ranks(config, place)
    if place is None or place.leads:
        check_free(config.bind)


def unchecked(config: LearnerConfig, place: Place | None) -> str:
    """Name what only a start finds out."""
    things = ["the model's weights and tokenizer", "the rows of the data", "whether it fits the device's memory"]
    if config.loss_function or config.advantage_function:
        things.append("what your functions do")
    if place is not None:
        things.append("whether the ranks agree")
    if config.context_parallel_size > 1:
        things.append("whether the model can be divided among ranks")
    return f"not checked: {', '.join(things)}, servers and their reward functions"


def needed_packages(config: LearnerConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (module, the extra that brings it, what needs it)."""
    yield from ((module, "learner", "training") for module in LEARNER_PACKAGES)
    if config.use_peft:
        yield "peft", "peft", "use_peft"
    if config.optim != "adamw":
        yield "bitsandbytes", "optim", f"optim {config.optim!r}"
    for data in (config.dataset, config.eval_dataset):
        if data.startswith("reasoning_gym:"):
            yield "reasoning_gym", "rewards", data


def check_function(key: str, path: str) -> None:
    """Find `module:function` without importing anything.

    Raises:
        ConfigError: there is no such module, its text is no Python, or it has no such name.
    """
    module, _, name = path.partition(":")
    spec = _find(module)
    if spec is None:
        raise ConfigError(
            f"{key} {path}: no module {module} here: looked in {Path.cwd()}, PYTHONPATH and the installed packages"
        )
    if spec.origin is None or not spec.origin.endswith(".py"):
        return
    text = Path(spec.origin).read_bytes()
    try:
        names = set(_names(ast.parse(text)))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{key} {path}: {spec.origin} is no Python: {error}") from error
    if name not in names and "*" not in names and not any(word.encode() in text for word in DYNAMIC):
        shown = ", ".join(sorted(names)) or "no names"
        raise ConfigError(f"{key} {path}: {name} is not there; {spec.origin} has {shown}")


def _find(module: str) -> ModuleSpec | None:
    """Find a module as an import would, parents first, none of them run."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # as user_functions.py does
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    where = list(spec.submodule_search_locations or ()) if spec else []
    for part in parts:
        spec = PathFinder.find_spec(part, where)  # its whole name would have the parents imported
        where = [str(path) for entry in where if (path := Path(entry) / part).is_dir()]
    return spec


def _names(body: ast.AST) -> Iterator[str]:
    """Yield every name that a module binds when it runs; `*` where it takes another module's."""
    for node in ast.iter_child_nodes(body):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.Lambda():
                pass
            case _:
                yield from _names(node)
