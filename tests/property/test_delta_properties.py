"""Any change of any tensor arrives bit for bit; whatever else arrives is refused, and soon (I5)."""

from __future__ import annotations

import tracemalloc

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, given, settings

from protocol.errors import MalformedMessage
from protocol.weights.delta import TensorDelta, apply_tensor, decode_tensor, encode_tensor

ITEM_BYTES = st.sampled_from([1, 2, 4, 8])
CAP_BYTES_PER_ELEMENT = 48
"""What decoding may allocate for each element of the tensor; besides, a little for Python's own objects."""
CAP_BYTES = 64 << 10


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Draw a tensor's bits and those of its next version: any share changed, a little or beyond recognition."""
    dtype = f"u{draw(ITEM_BYTES)}"
    num_elements = draw(st.one_of(st.integers(0, 40), st.integers(0, 5000), st.just(70_000)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    base = rng.integers(0, np.iinfo(dtype).max, num_elements, dtype, endpoint=True)
    share = draw(st.one_of(st.sampled_from([0.0, 1e-4, 0.01, 0.12, 0.125, 0.13, 1.0]), st.floats(0, 1)))
    most = draw(st.sampled_from([1, 7, np.iinfo(dtype).max]))
    noise = rng.integers(0, most, num_elements, dtype, endpoint=True)
    return base, base ^ np.where(rng.random(num_elements) < share, noise, noise.dtype.type(0))


def decoded(part: bytes, base: np.ndarray) -> TensorDelta:
    return decode_tensor(part, num_elements=base.size, item_bytes=base.itemsize)


@given(pairs(), st.integers(1, 7))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_new_version_arrives_and_the_old_one_comes_back(pair, odd):
    base, new = pair
    part = encode_tensor(base.data, new.data, base.itemsize)
    if part is None:
        assert np.array_equal(base, new)
        return
    found = decoded(memoryview(bytes(odd) + part)[odd:], base)
    assert np.array_equal(found.indices, np.flatnonzero(base != new))
    assert np.array_equal(found.xor, (base ^ new)[found.indices])
    around = bytearray(base.nbytes + odd)
    target = memoryview(around)[odd:]
    target[:] = base.tobytes()
    apply_tensor(found, target)
    assert bytes(target) == new.tobytes()
    apply_tensor(found, target)
    assert bytes(target) == base.tobytes()


def survives(part: bytes, base: np.ndarray) -> None:
    """Decode it: either it is refused, or what it says can be applied; the memory it took is bounded."""
    tracemalloc.start()
    try:
        found = decoded(part, base)
        assert found.indices.size == found.xor.size > 0
        assert np.all(np.diff(found.indices.astype(np.int64)) > 0)
        apply_tensor(found, bytearray(base.tobytes()))
    except MalformedMessage:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak <= CAP_BYTES + CAP_BYTES_PER_ELEMENT * base.size


@given(st.binary(max_size=200), ITEM_BYTES, st.integers(0, 100_000))
@settings(deadline=None)
def test_arbitrary_bytes_do_no_harm(part, item_bytes, num_elements):
    survives(b"\x01" + bytes([item_bytes]) + part, np.zeros(num_elements, f"u{item_bytes}"))
    survives(part, np.zeros(num_elements, f"u{item_bytes}"))


@given(pairs(), st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_a_part_with_a_fault_does_no_harm(pair, data):
    base, new = pair
    part = encode_tensor(base, new, base.itemsize)
    if part is None:
        return
    broken = bytearray(part)
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.one_of(st.integers(0, len(part) - 1), st.integers(0, min(len(part) - 1, 100))))
        broken[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del broken[data.draw(st.integers(0, len(part) - 1)) :]
    survives(bytes(broken), base)
