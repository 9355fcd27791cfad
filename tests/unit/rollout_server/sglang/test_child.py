"""The end of a log, and what a process has in shared memory."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from rollout_server.engines.sglang.child import LOG_BYTES, LOG_LINES, log_tail, shared_memory_of


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
