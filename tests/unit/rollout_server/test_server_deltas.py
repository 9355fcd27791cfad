"""What a chain of deltas changes, taken together."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from rollout_server.deltas import _union

positions = st.sets(st.integers(0, 50), min_size=1).map(lambda found: np.array(sorted(found), np.int64))


@given(st.lists(positions, min_size=1, max_size=4))
def test_changes_of_a_chain_are_those_of_any_of_its_deltas(chain: list[np.ndarray]) -> None:
    together = _union(chain)
    assert together.dtype == np.int64
    assert together.tolist() == sorted(set().union(*(found.tolist() for found in chain)))
