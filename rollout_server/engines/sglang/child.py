"""One SGLang child process: starting it, hearing of its death at once, ending it with all that it started.

SGLang is several processes, and the death of one leaves the others hanging for seconds, sometimes for ever. Each is
watched through a pidfd: the kernel says when it ends, nobody polls. They share one process group, which ends together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from protocol.logs import event

log = logging.getLogger(__name__)

WORKERS = "sglang::"
"""What SGLang's own processes call themselves."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the kernel keeps it
LEFT_BEHIND = "sglang_"
"""How the names of what SGLang makes there begin. It leaves them behind when it is killed."""
TRACKER = "multiprocessing.resource_tracker"
"""A process of Python's that removes other shared names when all who could use them have ended: it ends last."""
TRACKER_S = 5.0
LOG_LINES = 15
LOG_BYTES = 16_384
END_S = 10.0


class Child:
    """A running child. Made by `start`, ended by `kill`; `died` is done when any of its processes has ended."""

    def __init__(self, process: asyncio.subprocess.Process, log_file: Path, log_begin: int) -> None:
        self.pid = process.pid
        self.log_file = log_file
        self._log_begin = log_begin
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """What ended."""
        self._process = process
        self._exit = asyncio.ensure_future(process.wait())
        self._exit.add_done_callback(self._exited)
        self._watched: dict[int, asyncio.Future[None]] = {}
        """pidfd -> done when that process has ended."""
        self._shared: set[Path] = set()

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str], log_file: Path) -> Self:
        """Start the command in a process group of its own; what it prints goes to `log_file`."""
        with log_file.open("ab") as output:
            begin = output.tell()  # lives before this one may have written to it
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=dict(environment),
                start_new_session=True,
            )  # fmt: skip
        event(log, "engine_started", pid=process.pid, log=log_file)
        return cls(process, log_file, begin)

    def watch_workers(self) -> None:
        """Watch the processes that SGLang has started, once it is up, and note what they would leave behind."""
        for process in family(self.pid):
            self._shared |= shared_memory_of(process.pid)
            with contextlib.suppress(psutil.Error):  # it has ended
                name = (" ".join(process.cmdline()).split() or [""])[0]
                if name.startswith(WORKERS):
                    self._watch(process.pid, f"{name} ({process.pid}) died")

    async def kill(self) -> None:
        """End every process of the group, now, and wait until they are gone: they hold the memory of a GPU.

        May be called again, also when a call was cancelled.
        """
        for process in family(self.pid):
            self._shared |= shared_memory_of(process.pid)
        await asyncio.to_thread(kill_group, self.pid)
        ends: list[asyncio.Future[Any]] = [self._exit, *self._watched.values()]
        _, alive = await asyncio.wait(ends, timeout=END_S)
        if alive:
            event(log, "engine_lingers", level=logging.WARNING, pid=self.pid, processes=len(alive))
        for descriptor in self._watched:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
        self._watched.clear()
        for path in self._shared:
            with contextlib.suppress(OSError):  # somebody else has removed it
                path.unlink()

    def tail(self) -> str:
        """The last lines it printed."""
        try:
            return log_tail(self.log_file, self._log_begin)
        except OSError as error:
            return f"(it cannot be read: {error})"

    def _watch(self, pid: int, ended: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended(ended)
            return
        self._watched[descriptor] = loop.create_future()
        loop.add_reader(descriptor, self._worker_ended, descriptor, ended)

    def _exited(self, code: asyncio.Future[int]) -> None:
        if not code.cancelled():
            self._ended(f"exit code {code.result()}")

    def _worker_ended(self, descriptor: int, what: str) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        self._watched[descriptor].set_result(None)
        self._ended(what)

    def _ended(self, what: str) -> None:
        if not self.died.done():
            self.died.set_result(what)


def kill_group(leader: int) -> None:
    """Kill a process group by its leader; the resource tracker in it may tidy up first."""
    trackers = []
    for process in family(leader):
        with contextlib.suppress(psutil.Error):  # it has ended
            if any(TRACKER in word for word in process.cmdline()):
                trackers.append(process)
            else:
                process.kill()
    psutil.wait_procs(trackers, TRACKER_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def family(leader: int) -> list[psutil.Process]:
    """A process and what it has started; nothing once it is gone."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(leader)
        return [process, *process.children(recursive=True)]
    return []


def shared_memory_of(pid: int) -> set[Path]:
    """Files of shared memory that a process has mapped and that go by SGLang's or torch's names."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text("utf-8", "replace").splitlines()
    except OSError:  # it has ended
        return set()
    paths = {Path(line.split(maxsplit=5)[5]) for line in maps if f" {SHARED_MEMORY}/" in line}
    return {path for path in paths if path.parent == SHARED_MEMORY and path.name.startswith(LEFT_BEHIND)}


def log_tail(file: Path, begin: int = 0) -> str:
    """Read the last lines after byte `begin` of a log that may be large; progress bars' carriage returns end lines."""
    with file.open("rb") as content:
        content.seek(max(begin, content.seek(0, os.SEEK_END) - LOG_BYTES))
        lines = content.read().decode("utf-8", "replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-LOG_LINES:])
