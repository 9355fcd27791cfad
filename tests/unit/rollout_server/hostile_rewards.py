"""Reward functions that misbehave, as users' and libraries' do. Loaded by path in the workers, never by the tests."""

import ctypes
import os
import signal
import sys
import threading

import numpy as np


def process_id(completions):
    return [float(os.getpid())] * len(completions)


def obey(completions):
    """Do what each completion says, in the process that scores it."""
    return [do(order) for order in completions]


def do(order):
    match order.partition(" "):
        case "hang", _, _:
            threading.Event().wait()
        case "spin", _, _:  # in C, with the interpreter locked: no Python signal handler ever runs
            return float(len(str(9 ** (9**9))))
        case "deaf", _, _:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            threading.Event().wait()
        case "exit", _, code:
            os._exit(int(code))
        case "segfault", _, _:
            ctypes.string_at(0)
        case "kill", _, _:
            os.kill(os.getpid(), signal.SIGKILL)
        case "number", _, text:
            return float(text)
        case "steps", _, text:
            return list(eval(f"({text})", {})) if text else []
        case "process", _, _:
            return float(os.getpid())
    return {"none": None, "text": "1.0", "list": [1.0], "huge": 10**400, "yes": True, "numpy": np.float32(0.5)}[order]


def hang_with_child(completions, path):
    """Start a process of its own, tell its id through a pipe, and hang."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", "import signal; signal.pause()"], os.environ)
    with open(path[0], "w") as pipe:
        pipe.write(f"{os.getpid()} {pid}")
    threading.Event().wait()


def fail(completions):
    """Fail as a whole, in the way the first completion says."""
    match completions[0]:
        case "value":
            raise ValueError(f"\033[31mcannot read\n{completions[1]}")
        case "memory":
            raise MemoryError
        case "exit":
            sys.exit(0)
        case "unpicklable":
            raise UnpicklableError("not", "yours")
        case "short":
            return [1.0]
        case "scalar":
            return 1.0
    return [1.0] * len(completions)


class UnpicklableError(Exception):
    def __init__(self, first, second):
        super().__init__(first)


async def coroutine(completions):
    return [0.25] * len(completions)


def surroundings(completions):
    """Threads allowed, sockets inherited, whether it leads its group, whether its streams go nowhere."""
    print("to nobody")
    links = [link(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return [
        float(os.environ["OMP_NUM_THREADS"]),
        float(sum("socket:" in target for target in links)),
        float(os.getpgid(0) == os.getpid()),
        float([link(f"/proc/self/fd/{fd}") for fd in range(3)] == ["/dev/null"] * 3),
    ]


def link(path):
    try:
        return os.readlink(path)
    except FileNotFoundError:  # the listing's own descriptor
        return ""


def all_keywords(prompts, completions, **others):
    assert prompts == ["2+2="] * len(completions)
    return [float(sum(map(len, others.values())))] * len(completions)


def some_keywords(finish_reason, completion_ids, answer=None):
    return [float(len(reason) * 10 + len(ids)) for reason, ids in zip(finish_reason, completion_ids, strict=True)]


def needs_column(completions, solution):
    return [1.0] * len(completions)
