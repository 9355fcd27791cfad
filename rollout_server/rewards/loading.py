"""From a name in the server's configuration to a reward function. Runs in the workers; the server only reads names.

A specification is a built-in name, `package.module.function`, or `path/to/file.py:function`. Code to run is named in
the server's own configuration and never comes over the wire. No numpy here: a worker must be able to import this
module before it has limited its threads.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from protocol.errors import ConfigError

BUILTINS = {
    "exact_match": ("rollout_server.rewards.builtin", "exact_match"),
    "format": ("rollout_server.rewards.builtin", "think_answer_format"),
    "math_equal": ("rollout_server.rewards.math_equal", "math_equal"),
    "reasoning_gym": ("rollout_server.rewards.gym", "reasoning_gym_score"),
}
"""Name in the configuration -> (module, function). Each module imports at its top what its function needs."""

OPTIONAL_PACKAGES = ("math_verify", "reasoning_gym")


def reward_name(spec: str) -> str:
    """Return the function's own short name: what Hello lists and what metrics are called.

    Example:
        >>> reward_name("rewards/mine.py:brevity"), reward_name("my.package.brevity"), reward_name("format")
        ('brevity', 'brevity', 'format')
    """
    return spec.rpartition(":")[2].rpartition(".")[2]


def load_reward(spec: str) -> Callable[..., Any]:
    """Import a reward function.

    Raises:
        ConfigError: no such built-in, module, file or function, or its import failed. The text says what was found.
    """
    if spec in BUILTINS:
        module_name, function = BUILTINS[spec]
        return _function_of(_import(spec, module_name), function, spec)
    where, colon, function = spec.rpartition(":")
    if colon:
        return _function_of(_import_file(spec, Path(where).expanduser()), function, spec)
    where, dot, function = spec.rpartition(".")
    if not dot:
        raise ConfigError(
            f"reward function {spec!r} is no built-in ({', '.join(BUILTINS)}){_nearest(spec, BUILTINS)};"
            " name one of your own as package.module.function or path/to/file.py:function"
        )
    return _function_of(_import(spec, where), function, spec)


def _import(spec: str, module_name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last: modules of the working directory can be named, and shadow nothing
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(f"reward function {spec!r}: {_import_problem(module_name, error)}") from error


def _import_file(spec: str, path: Path) -> ModuleType:
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"reward function {spec!r}: no file {path.resolve()}; write path/to/file.py:function")
    path = path.resolve()
    name = f"headway_reward_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and typing look their module up there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # its neighbors can be imported, as by a script
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises while it is imported
        raise ConfigError(f"reward function {spec!r}: {_import_problem(str(path), error)}") from error
    return module


def _import_problem(what: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL_PACKAGES:
        return f"needs the package {error.name}: pip install '.[rewards]' in headway's directory"
    first_line = next(iter(str(error).splitlines()), "")
    return f"importing {what} raised {type(error).__name__}: {first_line}"


def _function_of(module: ModuleType, name: str, spec: str) -> Callable[..., Any]:
    found = vars(module)
    if callable(found.get(name)):
        function: Callable[..., Any] = found[name]
        return function
    functions = [key for key, value in found.items() if callable(value) and not key.startswith("_")]
    problem = "is not callable" if name in found else "is not there"
    raise ConfigError(
        f"reward function {spec!r}: {name!r} {problem}; {module.__name__} has"
        f" {', '.join(functions) or 'no functions'}{_nearest(name, functions)}"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" - did you mean {matches[0]!r}?" if matches else ""
