"""Work on large arrays that several threads share: pure functions of pieces, free of Python's lock while busy."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

MOST_THREADS: Final = 4
"""They work beside an engine or a training step, which need cores too."""

BYTES_A_THREAD: Final = 4 << 20
"""For less a thread is not worth its start: with torch's first call in it, a millisecond."""

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], *, nbytes: int
) -> Generator[tuple[int, Result]]:
    """Yield the index of every piece with what `work` makes of it, as they are done; the first error ends it.

    The thread that asks works along, and yields between its pieces what others have done. No thread is left behind by
    whoever iterates to the end, or closes it. A task of a pool for each piece would cost 40 us, and as many turns with
    Python's lock.

    Args:
        work: Called once for each piece, in any thread.
        pieces: Are begun in their order.
        nbytes: That it goes through, in all.
    """
    left = iter(range(len(pieces)))
    done: deque[tuple[int, Result]] = deque()

    def help_along() -> None:
        try:
            for number in left:
                done.append((number, work(pieces[number])))
        except BaseException:
            deque(left, maxlen=0)
            raise

    helpers = min(MOST_THREADS, _num_cores(), len(pieces), 1 + nbytes // BYTES_A_THREAD) - 1
    with ThreadPoolExecutor(max(1, helpers), "help") as threads:  # starts none before it is given work
        try:
            helping = [threads.submit(help_along) for _ in range(helpers)]
            for number in left:
                yield number, work(pieces[number])
                while done:
                    yield done.popleft()
            for helper in helping:
                helper.result()
            yield from done
        finally:
            deque(left, maxlen=0)  # nobody wants the rest


def _num_cores() -> int:
    """Return how many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
