"""Parts by hand: what a part looks like, and what a decoder refuses before it allocates."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import zstandard

from protocol.errors import MalformedMessage
from protocol.weights import delta
from protocol.weights.delta import apply_tensor, changed_fraction, decode_tensor, encode_tensor

N = 100_000
HEADER = struct.Struct("<BBBxQQ")


def packed(streams: list[bytes], *, changed: int, places: int, item_bytes: int = 1, form: int = 1) -> bytes:
    """Write a part as its header says, true or not."""
    sizes = struct.pack(f"<{len(streams)}Q", *map(len, streams))
    return HEADER.pack(1, item_bytes, form, changed, places) + sizes + b"".join(streams)


def refused(part: bytes, match: str, *, num_elements: int = N, item_bytes: int = 1) -> None:
    with pytest.raises(MalformedMessage, match=match):
        decode_tensor(part, num_elements=num_elements, item_bytes=item_bytes)


@pytest.fixture
def traced() -> Iterator[None]:
    """Trace what Python, numpy and zstandard allocate."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def changed_pair(dtype: str, n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    base = rng.integers(0, np.iinfo(dtype).max, n, dtype)
    return base, base ^ (rng.random(n) < share).astype(dtype)


def test_nothing_changed_is_no_part():
    assert encode_tensor(b"", b"", 4) is None
    assert encode_tensor(bytes(64), bytearray(64), 8) is None


@pytest.mark.parametrize(("base", "new", "item_bytes"), [(8, 9, 1), (9, 9, 2), (12, 12, 8)])
def test_what_is_no_pair_of_whole_elements_is_refused(base, new, item_bytes):
    with pytest.raises(ValueError, match=f"{base} bytes of elements of {item_bytes}, and {new} of their new version"):
        encode_tensor(bytes(base), b"\1" * new, item_bytes)


def test_the_smallest_part():
    ones = np.full(8, 0x3F80, "<u2")
    new = ones.copy()
    new[1] += 1
    part = encode_tensor(ones, new, 2)
    assert part == packed([b"\x01", b"\x01", b"\x00"], changed=1, places=1, item_bytes=2)
    found = decode_tensor(part, num_elements=8, item_bytes=2)
    assert found.indices.tolist() == [1]
    assert found.xor.tolist() == [1]


def test_bits_are_compared_not_numbers():
    base = np.array([0.0, np.nan, 1.0, np.nan], np.float32)
    new = base.copy()
    new[0] = -0.0
    new.view(np.uint32)[1] ^= 5  # another NaN
    found = decode_tensor(encode_tensor(base, new, 4), num_elements=4, item_bytes=4)
    assert found.indices.tolist() == [0, 1]
    apply_tensor(found, base)
    assert base.tobytes() == new.tobytes()


@pytest.mark.parametrize(
    ("share", "form", "at_most"), [(0.0005, 2, 0.0006), (0.01, 1, 0.0075), (0.03, 1, 0.018), (0.3, 0, 0.1)]
)
def test_positions_take_the_shorter_form(share, form, at_most):
    base, new = changed_pair("u2", 2_000_000, share)
    part = encode_tensor(base, new, 2)
    assert part[2] == form
    assert len(part) <= at_most * base.nbytes
    apply_tensor(decode_tensor(part, num_elements=base.size, item_bytes=2), base)
    assert np.array_equal(base, new)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_lone_change_far_into_a_tensor_of_blocks_and_an_odd_end(size):
    base = np.zeros(3 * (1 << 20) // size + 3, f"u{size}")
    for place in (0, base.size // 2, base.size - 1):
        new = base.copy()
        new[place] = 200
        found = decode_tensor(encode_tensor(base, new, size), num_elements=base.size, item_bytes=size)
        assert (found.indices.tolist(), found.xor.tolist()) == ([place], [200])


def test_rows_that_change_whole_among_many_that_do_not():
    """An embedding, of which a step touches few rows: blocks turn from sparse to dense and back."""
    base, _ = changed_pair("u2", 3_000_000, 0)
    new = base.copy()
    for row in (0, 500_000, 1_300_000, 2_999_000):
        new[row : row + 1000] ^= 3
    part = encode_tensor(base, new, 2)
    assert len(part) < 3000
    apply_tensor(decode_tensor(part, num_elements=base.size, item_bytes=2), base)
    assert np.array_equal(base, new)


def test_noise_travels_as_it_is():
    rng = np.random.default_rng(0)
    base, new = rng.integers(0, 256, (2, N), np.uint8)
    part = encode_tensor(base, new, 1)
    assert len(part) - HEADER.size - 16 <= N // 8 + N, "no stream is longer than its bytes"


FRAME = zstandard.ZstdCompressor().compress


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (b"", "0 bytes"),
        (bytes(19), "19 bytes"),
        (b"\x02" + bytes(40), "format 2: this side reads format 1"),
        (packed([b"\x00", b"\x01"], changed=1, places=1, item_bytes=2), "2 bytes"),
        (packed([b"\x00", b"\x01"], changed=1, places=1, form=3), "form 3"),
        (b"\x01\x01\x01\x07" + packed([b"\x00", b"\x01"], changed=1, places=1)[4:], "not of this tensor"),
        (packed([b"\x00", b"\x01"], changed=0, places=1), "0 changed"),
        (packed([b"\x00", b"\x01"], changed=N + 1, places=N + 1), f"{N + 1} changed"),
        (packed([b"\x00", b"\x01"], changed=2, places=1), "1 places"),
        (packed([b"\x00", b"\x01"], changed=1, places=2 + N // 255), "places"),
        (packed([b"\x00", b"\x01"], changed=1, places=1, form=0), "places"),
        (packed([b"\x00"], changed=1, places=1), "add up|at least"),
        (packed([b"\x00", b"\x01\x01"], changed=1, places=1), "add up"),
        (packed([b"\x00", b"\x01"], changed=1, places=1) + b"\x00", "add up"),
        (packed([b"\xff", b"\x01"], changed=1, places=1), "its gaps"),
        (packed([b"\x00\xff", b"\x01"], changed=1, places=2), "its gaps"),
        (packed([b"\x00\x00", b"\x01"], changed=1, places=2), "its gaps"),
        (packed([b"\xff" * 392 + b"\x28", b"\x01"], changed=1, places=393), "beyond"),
        (packed([bytes(N // 8), b"\x01"], changed=1, places=N // 8, form=0), "its bitmap"),
        (packed([FRAME(bytes(99)), b"\x01" * 100], changed=100, places=100), "no zstd frame of 100"),
        (packed([FRAME(bytes(100)) + b"\x00", b"\x01" * 100], changed=100, places=100), "zstd"),
        (packed([b"\x00" * 20, b"\x01" * 100], changed=100, places=100), "zstd"),
        (packed([b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", b"\x01" * 100], changed=100, places=100), "zstd|bytes"),
    ],
)
def test_what_is_no_part_is_refused(part, match):
    refused(part, match)


def test_more_gaps_than_changes_are_written_nowhere():
    """32 MB of positions where there is room for one: nothing checks what a compiled loop writes over."""
    places = 1 << 22
    refused(packed([bytes(places), b"\x01"], changed=1, places=places), "its gaps", num_elements=1 << 30)


def test_bits_after_the_last_element_are_refused():
    part = packed([b"\x01\x02", b"\x01\x01"], changed=2, places=2, form=0)
    refused(part, "its bitmap", num_elements=9)
    assert decode_tensor(part, num_elements=10, item_bytes=1).indices.tolist() == [0, 9]


def handmade_frame(claimed: int, *, window_log: int, blocks: int, block_bytes: int = 1 << 17) -> bytes:
    """Write a zstd frame of runs of zeros that claims what it likes, with a window of its own."""
    run = block_bytes << 3 | 1 << 1
    body = b"".join((run | last).to_bytes(3, "little") + b"\0" for last in [0] * (blocks - 1) + [1])
    return b"\x28\xb5\x2f\xfd\x80" + bytes([(window_log - 10) << 3]) + struct.pack("<I", claimed) + body


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (handmade_frame(1 << 30, window_log=17, blocks=1 << 13), "no zstd frame of 100000 bytes"),
        (handmade_frame(N, window_log=17, blocks=1 << 13), "should be a zstd frame"),
        (handmade_frame(N, window_log=27, blocks=1, block_bytes=N), "that would be read"),
        (handmade_frame(N, window_log=17, blocks=1, block_bytes=N - 1), "should be a zstd frame"),
    ],
    ids=["claims a gigabyte", "holds a gigabyte", "wants a large window", "holds too little"],
)
def test_a_bomb_is_refused_before_it_takes_memory(traced, frame, match):
    """Of 32 KiB; the library's own limit lets the first one grow to what it claims."""
    part = packed([frame, b"\x01" * N], changed=N, places=N)
    before = tracemalloc.get_traced_memory()[0]
    refused(part, match)
    assert tracemalloc.get_traced_memory()[1] - before < 2 * N + (64 << 10)


def test_a_handmade_frame_is_one():
    frame = handmade_frame(N, window_log=23, blocks=1, block_bytes=N)
    found = decode_tensor(packed([frame, b"\x01" * N], changed=N, places=N), num_elements=N, item_bytes=1)
    assert np.array_equal(found.indices, np.arange(N))


def test_all_elements_changed_is_the_most_that_a_part_can_make_us_allocate(traced):
    part = packed([FRAME(bytes(N))] * 2 + [FRAME(b"\x01" * N)] * 2, changed=N, places=N, item_bytes=2, form=2)
    before = tracemalloc.get_traced_memory()[0]
    assert decode_tensor(part, num_elements=N, item_bytes=2).indices[-1] == N - 1
    assert tracemalloc.get_traced_memory()[1] - before < 17 * N, (
        "positions take 8 bytes, the rest as often as it is turned over"
    )


def test_the_sampled_share_is_near_the_true_one():
    base, new = changed_pair("u2", 8_000_000, 0.02)
    assert changed_fraction(base, new, 2) == pytest.approx(0.02, rel=0.1)
    assert changed_fraction(base[:1000], new[:1000], 2) == np.mean(base[:1000] != new[:1000])
    assert changed_fraction(b"", b"", 4) == 0.0


def test_the_format_is_the_first_byte():
    assert encode_tensor(bytes(8), bytes(7) + b"\x01", 8)[0] == delta.DELTA_FORMAT == 1
