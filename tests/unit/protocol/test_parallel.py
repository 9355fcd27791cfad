"""Pieces of work shared out: each once, by several threads at once, and no thread left behind."""

import hashlib
import itertools
import threading

import pytest

from protocol import parallel
from protocol.parallel import in_threads

LARGE = 1 << 30


@pytest.fixture(params=[1, 2, 4])
def cores(request, monkeypatch):
    monkeypatch.setattr(parallel, "_num_cores", lambda: request.param)
    return request.param


def helpers_alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith("help")]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 500])
def test_every_piece_once(cores, count):
    pieces = [f"piece {number}" for number in range(count)]
    done = list(in_threads(str.upper, pieces, nbytes=LARGE))
    assert sorted(done) == [(number, piece.upper()) for number, piece in enumerate(pieces)]
    assert helpers_alive() == []


def test_as_many_at_once_as_there_are_cores(cores):
    together = threading.Barrier(cores)
    seen = {
        thread
        for _, thread in in_threads(
            lambda _: together.wait(10.0) >= 0 and threading.get_ident(), [0] * cores, nbytes=LARGE
        )
    }
    assert len(seen) == cores
    assert threading.get_ident() in seen, "who asks works along"


def test_never_more_than_a_few(monkeypatch):
    monkeypatch.setattr(parallel, "_num_cores", lambda: 64)
    together = threading.Barrier(parallel.MOST_THREADS)

    def work(_):
        together.wait(10.0)  # nobody goes on before so many are here
        return threading.get_ident()

    threads = {thread for _, thread in in_threads(work, range(20 * parallel.MOST_THREADS), nbytes=LARGE)}
    assert len(threads) == parallel.MOST_THREADS


@pytest.mark.parametrize("who", ["who asks", "a helper"])
def test_the_first_error_ends_it(cores, who):
    who = who if cores > 1 else "who asks"  # there is nobody else
    asking, begun, block = threading.get_ident(), [], bytes(1 << 20)

    def work(number):
        begun.append(number)
        hashlib.blake2b(block)  # a millisecond: all of them would take minutes
        if (threading.get_ident() == asking) == (who == "who asks"):
            raise ValueError(f"piece {number}")

    with pytest.raises(ValueError, match="piece "):
        list(in_threads(work, range(100_000), nbytes=LARGE))
    assert len(begun) < 50_000
    assert helpers_alive() == []


def test_whoever_has_seen_enough_waits_for_no_piece_that_was_not_begun(cores):
    begun, block = itertools.count(), bytes(1 << 20)

    def work(_):
        hashlib.blake2b(block)  # a millisecond: all of them would take minutes
        return next(begun)

    results = in_threads(work, range(100_000), nbytes=LARGE)
    next(results)
    results.close()
    assert next(begun) < 50_000
    assert helpers_alive() == []


@pytest.mark.parametrize(
    ("nbytes", "helpers"), [(0, 0), (parallel.BYTES_A_THREAD - 1, 0), (parallel.BYTES_A_THREAD, 1)]
)
def test_little_work_starts_no_thread(monkeypatch, nbytes, helpers):
    monkeypatch.setattr(parallel, "_num_cores", lambda: 2)
    together = threading.Barrier(1 + helpers)

    def work(_):
        together.wait(10.0)
        return threading.get_ident()

    assert len(set(dict(in_threads(work, range(2), nbytes=nbytes)).values())) == 1 + helpers
