"""Random numbers by counter: one at a time they are the same as many at once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.engines.counters import hash_counter, hash_counters, uniform, uniforms

WORDS = st.integers(0, 2**64 - 1)


@given(WORDS, WORDS)
def test_one_hash_is_that_of_the_arrays(seed: int, counter: int) -> None:
    assert hash_counter(seed, counter) == int(
        hash_counters(np.array([seed], np.uint64), np.array([counter], np.uint64))[0]
    )


@given(WORDS, st.integers(0, 2**40))
def test_one_uniform_is_that_of_the_arrays(seed: int, position: int) -> None:
    assert uniform(seed, position) == float(uniforms(np.array([seed], np.uint64), np.array([position]))[0])
