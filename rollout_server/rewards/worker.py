"""What runs inside a reward worker: prepare the process, load the functions once, run calls, check their results.

A worker trusts nobody's function: whatever it raises, prints or returns becomes plain data. Only lists of numbers and
short texts go back to the server, so no object of a user's class is ever unpickled there. Imports nothing heavy: the
thread limits must be in the environment before numpy or torch are loaded.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import math
import numbers
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableSequence, Sequence
from multiprocessing.synchronize import Semaphore
from typing import Any, NamedTuple, TypeAlias

from protocol.errors import ConfigError
from rollout_server.rewards.loading import load_reward

NOTE_LENGTH = 200
"""Characters of a note: it travels with the group and is shown on a terminal."""
LARGEST_REWARD = 1e12
"""Values are float32 on the wire, and their squares must be finite there too."""
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")
PR_SET_PDEATHSIG = 1


Steps: TypeAlias = list[tuple[int, float]]
"""What a process reward function says of a completion: (index of a step's last token, reward), in any order."""


class CallResult(NamedTuple):
    """What one call of a reward function came to."""

    values: list[float | None]
    """One per completion, the sum where it has steps; None where the function said None, and where it failed."""
    steps: dict[int, Steps]
    """Of the completions for which it returned steps."""
    failed: list[int]
    """Indices without a usable result."""
    note: str
    """Why, in short; empty when nothing failed."""
    seconds: float
    """Wall clock of the whole call."""


class LoadedRewards(NamedTuple):
    """The functions of this process, in the order of the configuration, or why there are none."""

    functions: list[Callable[..., Any]]
    pids: MutableSequence[int]
    """Shared with the server: which process works in which slot."""
    problem: str


_loaded: LoadedRewards | None = None


def start(specs: Sequence[str], pids: MutableSequence[int], ready: Semaphore) -> None:
    """Prepare this process and load the reward functions. Run once per worker, before its first call."""
    global _loaded
    _isolate()
    for variable in ONE_THREAD:
        os.environ[variable] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        _loaded = LoadedRewards([load_reward(spec) for spec in specs], pids, "")
    except ConfigError as error:  # kept, and told by `problem`: a pool whose initializer raises only breaks
        _loaded = LoadedRewards([], pids, str(error))
    ready.release()


def problem() -> str:
    """Say why the reward functions could not be loaded; empty when they could."""
    assert _loaded is not None
    return _loaded.problem


def call(slot: int, function: int, arguments: Mapping[str, Any]) -> CallResult:
    """Call one reward function and check what it returns. Never raises because of the function.

    Args:
        slot: where to write this process's id, so that the server can kill what the function may have started.
        function: its index in the configuration.
        arguments: keyword arguments, each a list with one entry per completion.
    """
    assert _loaded is not None
    _loaded.pids[slot] = os.getpid()
    lengths = [len(ids) for ids in arguments["completion_ids"]]
    started = time.perf_counter()
    try:
        if _loaded.problem:
            raise ConfigError(_loaded.problem)
        reward = _loaded.functions[function]
        returned = reward(**_accepted(reward, arguments))
        if inspect.isawaitable(returned):
            returned = asyncio.run(_await(returned))
        values, steps, failed, note = _checked(returned, lengths)
    except BaseException as error:  # noqa: BLE001 - SystemExit and MemoryError of a user's function included
        values, steps, failed, note = [None] * len(lengths), {}, list(range(len(lengths))), _describe(error)
    return CallResult(values, steps, failed, note, time.perf_counter() - started)


def _isolate() -> None:
    """Cut this process off from the server's terminal and process group, and tie its life to the server's."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would not run while C code hangs
    os.setsid()  # so that its children can be killed with it, and Ctrl-C reaches the server alone
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with open("/proc/self/oom_score_adj", "w") as score:  # of all processes, the kernel should end this one
            score.write("1000")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _accepted(reward: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the arguments that the function has parameters for.

    Raises:
        TypeError: it requires one that the row does not have; the text lists those there are.
    """
    parameters = inspect.signature(reward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        accepted = dict(arguments)
    else:
        accepted = {name: value for name, value in arguments.items() if name in parameters}
    required = [
        name for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]  # fmt: skip
    missing = [name for name in required if name not in accepted]
    if missing:
        raise TypeError(f"needs {', '.join(missing)}; the row has {', '.join(sorted(arguments))}")
    return accepted


def _checked(returned: Any, lengths: Sequence[int]) -> tuple[list[float | None], dict[int, Steps], list[int], str]:
    """Turn a function's result into plain floats and steps; say which entries are unusable, and why the first is."""
    if not isinstance(returned, list | tuple):
        raise TypeError(f"returned {type(returned).__name__}; allowed is a list of {len(lengths)} numbers or None")
    if len(returned) != len(lengths):
        raise ValueError(f"returned {len(returned)} values for {len(lengths)} completions")
    values: list[float | None] = []
    steps: dict[int, Steps] = {}
    failed: list[int] = []
    note = ""
    for index, (answer, length) in enumerate(zip(returned, lengths, strict=True)):
        value = None
        try:
            if isinstance(answer, list | tuple):
                steps[index] = _steps(answer, length)
                value = _number(math.fsum(reward for _, reward in steps[index]), "steps worth ")
            elif answer is not None:
                value = _number(answer, "")
        except _Unusable as problem:
            steps.pop(index, None)
            failed.append(index)
            note = note or str(problem)
        values.append(value)
    return values, steps, failed, note


class _Unusable(Exception):
    """What a function returned for a completion is no reward; the text says why."""


def _steps(answer: Sequence[Any], length: int) -> Steps:
    """Check the steps of a completion of `length` tokens.

    Raises:
        _Unusable: they are none.
    """
    if not answer:
        raise _Unusable("returned no step for a completion; allowed is a step at least, or None")
    steps: Steps = []
    for step in answer:
        if not isinstance(step, list | tuple) or len(step) != 2 or not isinstance(step[0], numbers.Integral):
            raise _Unusable(
                f"returned a {type(step).__name__} as a step of a completion; allowed is a pair of the index of its"
                " last token and a number"
            )
        token = int(step[0])
        if not 0 <= token < length:
            raise _Unusable(
                f"returned a step that ends with token {_float(token):g} of a completion of {length} tokens; they are"
                " counted from 0"
            )
        steps.append((token, _number(step[1], "a step worth ")))
    return steps


def _number(value: Any, what: str) -> float:
    """Return a reward as a float.

    Raises:
        _Unusable: it is none, or too large.
    """
    if not isinstance(value, numbers.Real):
        allowed = "a number" if what else "a number, None or a list of steps"
        raise _Unusable(f"returned {what}a {type(value).__name__} for a completion; allowed is {allowed}")
    if not abs(number := _float(value)) <= LARGEST_REWARD:
        raise _Unusable(f"returned {what}{number} for a completion; allowed is up to {LARGEST_REWARD:g} either way")
    return number


def _float(value: numbers.Real | int) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _describe(error: BaseException) -> str:
    """Type and first line, printable and short: the rest may hold text of the model's making."""
    first_line = next(iter(str(error).splitlines()), "")
    text = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:NOTE_LENGTH]
