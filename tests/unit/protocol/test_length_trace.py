"""Traces of completion lengths: what is written is read, and what is no trace is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from protocol.errors import ConfigError
from protocol.identity import group_seed
from protocol.length_trace import LengthTrace, read_length_trace, write_length_trace


def trace() -> LengthTrace:
    return LengthTrace(7, np.array([[3, 1, 4], [1, 5, 9]], np.int32), {"median": 3.0})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "a.lengths"
    write_length_trace(written, trace())
    return written


def test_what_is_written_is_read(path: Path) -> None:
    read = read_length_trace(path)
    assert (read.seed, read.lengths.tolist(), read.origin) == (7, [[3, 1, 4], [1, 5, 9]], {"median": 3.0})


def test_a_group_is_found_by_the_seed_of_its_lease(path: Path) -> None:
    rows = read_length_trace(path).by_group_seed()
    assert rows[group_seed(7, 1)].tolist() == [1, 5, 9]
    assert group_seed(8, 1) not in rows


def test_numbers_are_little_endian_after_one_line(path: Path) -> None:
    _, _, data = path.read_bytes().partition(b"\n")
    assert data[:8] == b"\3\0\0\0\1\0\0\0"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: data[:-1], "expected one line of JSON"),
        (lambda data: data[:-12], "cannot reshape"),
        (lambda data: data.replace(b"lengths 1", b"lengths 2"), "format 'headway lengths 2'"),
        (lambda data: data.replace(b"\4\0\0\0", b"\0\0\0\0"), "shortest length 0"),
        (lambda data: data.partition(b"\n")[2], "expected one line of JSON"),
        (lambda data: data.replace(b'"seed":7', b'"seed":"x"'), "seed"),
    ],
)
def test_what_is_no_trace_is_refused(path: Path, change, why: str) -> None:
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError, match=why):
        read_length_trace(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none: No such file or directory: give a file that exists"):
        read_length_trace(tmp_path / "none")
