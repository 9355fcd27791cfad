"""A child and what it has started; the end of its log; what a process has in shared memory."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
from pathlib import Path

import psutil
import pytest

from rollout_server.engines.sglang import child as child_module
from rollout_server.engines.sglang.child import LOG_BYTES, LOG_LINES, Child, log_tail, shared_memory_of
from tests.fake_sglang.driving import run, until


def test_the_end_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n\n" for i in range(50)))
    assert log_tail(log).splitlines() == [f"line {i}" for i in range(50 - LOG_LINES, 50)]
    log.write_text("")
    assert log_tail(log) == ""


def test_a_log_may_be_large_and_need_not_be_text(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 10 * LOG_BYTES + b"\nloading:  10%\rloading: 100%\n\xff\xfe the end")
    lines = log_tail(log).splitlines()
    assert lines[-3:] == ["loading:  10%", "loading: 100%", "\ufffd\ufffd the end"]
    assert len(lines[0]) < LOG_BYTES


def test_lives_before_are_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("the life before\n")
    begin = log.stat().st_size
    with log.open("a") as file:
        file.write("this life\n")
    assert log_tail(log, begin) == "this life"


def test_shared_memory_is_found_by_who_has_it_and_by_its_name() -> None:
    ours, others = Path(f"/dev/shm/sglang_test_{os.getpid()}"), Path(f"/dev/shm/test_sglang_{os.getpid()}")
    try:
        maps = []
        for path in (ours, others):
            with path.open("w+b") as file:
                file.truncate(4096)
                maps.append(mmap.mmap(file.fileno(), 4096))
        assert ours in shared_memory_of(os.getpid())
        assert others not in shared_memory_of(os.getpid())
        assert shared_memory_of(2**22 + 1) == set()
    finally:
        ours.unlink()
        others.unlink()


WORKER = "exec -a sglang::scheduler sleep 600 & echo started; wait"


def test_ending_a_child_is_over_when_its_workers_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that is still on its way out holds the memory that the next one needs."""

    async def case() -> None:
        child = await Child.start(["bash", "-c", WORKER], os.environ, tmp_path / "log")
        leader = psutil.Process(child.pid)
        await until(lambda: child.tail() == "started" and is_worker(leader.children()))
        child.watch_workers()
        loop = asyncio.get_running_loop()
        worker = leader.children()[0].pid

        def leader_first(leader: int) -> None:
            os.kill(leader, signal.SIGKILL)
            loop.call_soon_threadsafe(loop.call_later, 0.1, os.kill, worker, signal.SIGKILL)

        monkeypatch.setattr(child_module, "kill_group", leader_first)
        ended = os.pidfd_open(worker)
        try:
            await child.kill()
            assert child.died.result() == "exit code -9"
            assert is_over(ended)
        finally:
            os.close(ended)

    run(case())


def is_worker(processes: list[psutil.Process]) -> bool:
    """Whether the shell's child is no longer a shell."""
    return [process.cmdline()[:1] for process in processes] == [["sglang::scheduler"]]


def is_over(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    return psutil.Process(int(pid_of(pidfd))).status() == psutil.STATUS_ZOMBIE


def pid_of(pidfd: int) -> str:
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    return dict(line.split(":\t") for line in lines)["Pid"]


def test_a_worker_that_ends_before_it_is_watched_is_a_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(pid: int) -> int:
        raise ProcessLookupError(pid)

    async def case() -> None:
        child = await Child.start(["bash", "-c", WORKER], os.environ, tmp_path / "log")
        leader = psutil.Process(child.pid)
        await until(lambda: child.tail() == "started" and is_worker(leader.children()))
        monkeypatch.setattr(os, "pidfd_open", ended)
        child.watch_workers()
        assert child.died.done()
        assert child.died.result().startswith("sglang::scheduler (")
        await child.kill()

    run(case())


def test_a_child_that_has_gone_can_be_watched_and_ended(tmp_path: Path) -> None:
    async def case() -> None:
        child = await Child.start(["true"], os.environ, tmp_path / "log")
        assert await child.died == "exit code 0"
        child.watch_workers()
        await child.kill()
        child.log_file.unlink()
        assert child.tail().startswith("(it cannot be read: ")

    run(case())
