"""A server process and a learner process that live and end together.

Each child leads its own process group, so that its workers end with it; Ctrl-C reaches only this process, which then
ends both in order. The two are told apart by how they may end: the learner's end ends the demonstration, the server's
is a failure unless it says 0 (the learner told it to go).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

LEARNER_GRACE_S = 30.0
"""For a checkpoint after an interrupt."""
SERVER_GRACE_S = 15.0
LOG_LINES_SHOWN = 20
EXIT_TERMINATED = 128 + signal.SIGTERM


def run_pair(
    server: Sequence[str], learner: Sequence[str], *, server_log: Path, learner_log: Path | None = None
) -> int:
    """Run both commands until the learner ends; return the exit code of the one that failed, or 0.

    What the server prints goes to `server_log`. The learner has this process's terminal unless it has a log, too. The
    ends of the logs are shown when either fails.

    Raises:
        KeyboardInterrupt: After both have ended.
    """
    signal.signal(signal.SIGTERM, _terminate)
    server_log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(server_log.open("ab"))
        serving = subprocess.Popen(server, stdout=log, stderr=log, stdin=subprocess.DEVNULL, process_group=0)
        stack.callback(end, serving, signal.SIGTERM, SERVER_GRACE_S)
        terminal = stack.enter_context(learner_log.open("ab")) if learner_log else None
        learning = subprocess.Popen(
            learner, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL, process_group=0
        )
        stack.callback(end, learning, signal.SIGINT, LEARNER_GRACE_S)
        code = _wait_for_end(serving, learning)
    if code:
        for file in filter(None, (learner_log, server_log)):
            print(f"\nlast lines of {file}:", file=sys.stderr)
            print("\n".join(last_lines(file)), file=sys.stderr)
    return code


def _wait_for_end(serving: subprocess.Popen[bytes], learning: subprocess.Popen[bytes]) -> int:
    while learning.poll() is None:
        if serving.poll() not in (None, 0):
            print(f"the server ended with exit code {serving.returncode}", file=sys.stderr)
            return serving.returncode
        if serving.returncode == 0:
            learning.wait()
        else:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # returns when either has ended, and leaves it to poll()
    if learning.returncode == 0:
        # The server has been told to go; what it still does is its own affair, for as long as `end` allows.
        with contextlib.suppress(subprocess.TimeoutExpired):
            serving.wait(SERVER_GRACE_S)
    return learning.returncode


def end(child: subprocess.Popen[bytes], polite: signal.Signals, grace_s: float) -> None:
    """End a child and everything in its process group: ask, wait, then kill."""
    try:
        if child.poll() is None:
            os.killpg(child.pid, polite)
            child.wait(grace_s)
    except subprocess.TimeoutExpired:
        print(f"process {child.pid} did not end within {grace_s:g} s of {polite.name}: killed", file=sys.stderr)
    finally:  # also when the user lost patience and interrupted the wait
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def last_lines(file: Path, count: int = LOG_LINES_SHOWN) -> list[str]:
    """Return the last lines of a small text file."""
    return file.read_text("utf-8", errors="replace").splitlines()[-count:]


def free_port_pair() -> int:
    """Find a loopback port that is free together with the one after it (control and bulk plane)."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):  # the neighbor is taken, or there is none
                second.bind(("127.0.0.1", port + 1))
                return port


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds the stack, so that both children end."""
    sys.exit(EXIT_TERMINATED)
