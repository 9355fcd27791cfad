"""The gate that every new version passes: each way to be refused, and that good versions are not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.engines.sglang.check import FIRST_LIMIT, NOISE, TOLERANCE, Gate, Mismatch, WeightsSuspect, compare


def mismatch(mean: float) -> Mismatch:
    return Mismatch(kl=mean**2, mean=mean)


def passing(gate: Gate, digest: str, checksum: str, mean: float | None = None) -> None:
    gate.check_bytes(digest, checksum, (), exact=True)
    if mean is not None:
        gate.check_canaries(mismatch(mean))
    gate.passed(digest, checksum, None if mean is None else mismatch(mean))


def test_the_checksum_is_named_by_its_kind() -> None:
    assert Gate("k").check_bytes("d", "c", (), exact=True) == "k:c"


def test_a_checksum_that_does_not_move_with_the_weights_is_refused() -> None:
    gate = Gate("k")
    passing(gate, "digest 1", "checksum 1")
    with pytest.raises(WeightsSuspect, match="its checksum is still checksum 1, though the weights differ"):
        gate.check_bytes("digest 2", "checksum 1", (), exact=True)
    gate.check_bytes("digest 2", "checksum 1", (), exact=False)  # a cast may round a step away
    passing(gate, "digest 2", "checksum 2")


def test_a_checksum_that_moves_without_the_weights_is_refused() -> None:
    gate = Gate("k")
    passing(gate, "digest 1", "checksum 1")
    passing(gate, "digest 1", "checksum 1")
    for exact in (True, False):
        with pytest.raises(WeightsSuspect, match="checksum 2 where the same weights had checksum 1 before"):
            gate.check_bytes("digest 1", "checksum 2", (), exact=exact)


def test_engines_of_one_kind_must_agree_and_others_need_not() -> None:
    gate = Gate("k")
    assert gate.check_bytes("d", "c", ("k:c", "other:x"), exact=True) == "k:c"
    with pytest.raises(WeightsSuspect, match="its checksum is c, another engine of its kind has x"):
        gate.check_bytes("d", "c", ("other:c", "k:x"), exact=True)


def test_what_was_refused_is_no_measure_for_the_next() -> None:
    gate = Gate("k")
    passing(gate, "digest 1", "checksum 1")
    with pytest.raises(WeightsSuspect):
        gate.check_bytes("digest 2", "checksum 1", (), exact=True)
    passing(gate, "digest 1", "checksum 1")


@given(st.floats(0, FIRST_LIMIT), st.floats(0, 10))
def test_the_first_version_sets_the_measure(first: float, later: float) -> None:
    gate = Gate("k")
    passing(gate, "d", "c", first)
    passing(gate, "d2", "c2", 0.0)  # a better one does not make it stricter
    if later <= max(TOLERANCE * first, NOISE):
        gate.check_canaries(mismatch(later))
    else:
        with pytest.raises(WeightsSuspect, match=r"nats a token on the canaries; allowed are .* the first one's\)"):
            gate.check_canaries(mismatch(later))


def test_the_first_version_has_a_limit_of_its_own() -> None:
    Gate("k").check_canaries(mismatch(FIRST_LIMIT))
    with pytest.raises(WeightsSuspect, match=r"differ from the learner's by 0.21 nats .* allowed are 0.2$"):
        Gate("k").check_canaries(mismatch(0.21))


@pytest.mark.parametrize("mean", [float("nan"), float("inf")])
def test_logprobs_that_are_no_numbers_are_refused(mean: float) -> None:
    gate = Gate("k")
    with pytest.raises(WeightsSuspect, match="its logprobs differ"):
        gate.check_canaries(mismatch(mean))


def test_a_version_without_canaries_leaves_the_measure_open() -> None:
    gate = Gate("k")
    passing(gate, "d", "c")
    gate.check_canaries(mismatch(FIRST_LIMIT))


@given(st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=20), st.floats(-1, 1, width=32))
def test_the_mismatch_is_zero_for_equals_and_positive_else(values: list[float], shift: float) -> None:
    learner = np.array(values, np.float32)
    same = compare(learner, learner.copy())
    assert (same.kl, same.mean) == (0.0, 0.0)
    moved = compare(learner + np.float32(shift), learner)
    assert moved.kl >= 0
    assert moved.mean == pytest.approx(abs(shift), abs=1e-5)


def test_nan_and_huge_differences_show() -> None:
    learner = np.array([-1.0, -2.0], np.float32)
    assert np.isnan(compare(learner, np.array([np.nan, -2.0], np.float32)).mean)
    assert compare(learner, np.array([-1e6, -2.0], np.float32)).kl == np.inf
