"""The loops of delta.py, compiled by numba: one walk through a tensor at the speed of memory, where numpy takes five.

They trust what they are given: delta.py has checked the sizes, and the loop that unpacks says what it cannot. They hold
no lock of Python's, so that as many threads as there are cores work on as many tensors. numba is loaded (0.3 s), and a
loop compiled (0.2 s each), when it is first asked for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np

TOO_MANY: Final = -1
"""Of `unpack`: more positions than there is room for, or the last number ends none."""
BEYOND: Final = -2
"""Of `unpack`: a position that is not in the tensor."""
_WORDS: Final = 1024
"""Compared at a time: what is noted of them stays in the cache."""
_compiling = threading.Lock()


def gap_room(most: int, num_elements: int) -> int:
    """Return how many numbers `find` may write of the gaps of `most` elements out of so many."""
    return most + 8 * _WORDS + num_elements // 0xFF


def find() -> Callable[..., tuple[int, int, int]]:
    """(old [n] uint64, new [n], old tail [m], new tail [m], most, out gaps, out planes [bytes, N]).

    The tail is what does not fill a word, and zeros. Writes the byte planes of what differs, XORed, and before each
    element that does the gap since the last one, until more than `most` do: `gap_room` numbers at most. Returns how
    many differ, how many numbers their gaps take, and how many more than K, of two bytes, they would take.
    """
    return _loop(_find, 8)


def widen() -> Callable[..., None]:
    """(gaps [L] uint8, out gaps [L'] uint16): the same in two bytes each."""
    return _loop(_widen, 2)


def unpack(gap_bytes: int) -> Callable[..., int]:
    """(gaps [L], N, out positions [K] int64) -> how many there are, TOO_MANY or BEYOND."""
    return _loop(_unpack, gap_bytes)


def apply(item_bytes: int) -> Callable[..., None]:
    """(elements [n], position of the first, positions [K] int64, xor [K])."""
    return _loop(_apply, item_bytes)


def _loop(loop: Callable[..., Any], item_bytes: int) -> Callable[..., Any]:
    with _compiling:
        return _compiled(loop, item_bytes)


@functools.cache
def _compiled(loop: Callable[..., Any], item_bytes: int) -> Callable[..., Any]:
    """Compile a loop for arrays of items of that width, wherever those lie that are not its own results."""
    import numba
    from numba.core.types import Array, UniTuple, int64, uint8, uint64, void

    item = getattr(numba.core.types, f"uint{8 * item_bytes}")
    items, words, octets, positions = (
        Array(of, 1, "C", readonly=True, aligned=False) for of in (item, uint64, uint8, int64)
    )
    three = UniTuple(int64, 3)  # type: ignore[no-untyped-call]
    signature = {
        _find: lambda: three(words, words, words, words, int64, Array(uint8, 1, "C"), Array(uint8, 2, "C")),
        _widen: lambda: void(octets, Array(item, 1, "C")),
        _unpack: lambda: int64(items, int64, Array(int64, 1, "C")),
        _apply: lambda: void(Array(item, 1, "C", aligned=False), int64, positions, items),
    }[loop]
    return numba.njit([signature()], nogil=True)(loop)  # type: ignore[no-untyped-call]


def _find(old: Any, new: Any, old_tail: Any, new_tail: Any, most: int, gaps: Any, planes: Any) -> tuple[int, int, int]:
    """Every element of a word that differs is noted, and over it the next one where it does not differ itself.

    A branch for each would be guessed wrong half of the time: 30 % changed take 1.7 times as long then.
    """
    item_bytes = planes.shape[0]
    lanes, bits = 8 // item_bytes, np.uint64(8 * item_bytes)
    mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * item_bytes)
    positions, differences = np.empty(_WORDS * lanes + 1, np.int64), np.empty(_WORDS * lanes + 1, np.uint64)
    found, written, more, last, begin = 0, 0, 0, -1, 0
    for before, after in ((old, new), (old_tail, new_tail)):
        for chunk in range(0, before.size, _WORDS):
            count = 0
            for word in range(chunk, min(chunk + _WORDS, before.size)):
                difference = before[word] ^ after[word]
                if difference != 0:
                    first = begin + word * lanes
                    for lane in range(lanes):
                        xor = difference & mask
                        positions[count] = first + lane
                        differences[count] = xor
                        count += 1 if xor != 0 else 0
                        difference >>= bits
            for number in range(count if found <= most else 0):
                gap = positions[number] - last - 1
                last = positions[number]
                if gap >= 0xFF:
                    more += gap // 0xFFFF
                    while gap >= 0xFF:
                        gaps[written] = 0xFF
                        written += 1
                        gap -= 0xFF
                gaps[written] = gap
                written += 1
            for plane in range(item_bytes):
                for number in range(count):
                    planes[plane, found + number] = differences[number] >> np.uint64(8 * plane) & np.uint64(0xFF)
            found += count
        begin = old.size * lanes
    return found, written, more


def _widen(gaps: Any, wide: Any) -> None:
    written, gap = 0, 0
    for number in gaps:
        gap += number
        if number != 0xFF:
            while gap >= 0xFFFF:
                wide[written] = 0xFFFF
                written += 1
                gap -= 0xFFFF
            wide[written] = gap
            written += 1
            gap = 0


def _unpack(gaps: Any, num_elements: int, positions: Any) -> int:
    most = 0xFF if gaps.itemsize == 1 else 0xFFFF
    position, found = -1, 0
    for number in gaps:
        position += number
        if number != most:
            position += 1
            if found == positions.size:
                return TOO_MANY
            if position >= num_elements:
                return BEYOND
            positions[found] = position
            found += 1
    return found if gaps[-1] != most else TOO_MANY


def _apply(elements: Any, first: int, positions: Any, xor: Any) -> None:
    for number in range(positions.size):
        elements[positions[number] - first] ^= xor[number]
