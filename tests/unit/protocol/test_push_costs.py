"""Which way a push goes, on speeds that were measured."""

from __future__ import annotations

import math

import pytest

from protocol.weights.push_costs import Costs, LinkSpeed, choose

GB = 10**9
COSTS = Costs()
SHARED_MEMORY = LinkSpeed(math.inf)


def chosen(share: float, bytes_per_s: float, *, delta_bytes: int | None = None) -> str:
    """Push 1 GB of bf16."""
    return choose(
        dense_bytes=GB, num_elements=GB // 2, num_changed=share * GB / 2, link=LinkSpeed(bytes_per_s), costs=COSTS,
        delta_bytes=delta_bytes,
    )  # fmt: skip


def test_nothing_beats_memory_that_both_ends_map():
    assert [chosen(share, math.inf) for share in (0, 1e-6, 0.01)] == ["dense"] * 3
    assert chosen(0.01, math.inf, delta_bytes=0) == "dense"


def test_a_slow_link_wants_the_difference():
    assert [chosen(share, 12.5e6) for share in (0, 0.001, 0.03, 0.3)] == ["delta"] * 4
    assert chosen(1.0, 125e6) == "dense"


def test_more_changes_and_faster_links_never_turn_dense_into_delta():
    shares = [0, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.6]
    links = [12.5e6, 125e6, 1.25e9, 5e9, math.inf]
    for table in ([[chosen(s, b) for s in shares] for b in links], [[chosen(s, b) for b in links] for s in shares]):
        for line in table:
            assert line == sorted(line, key=["delta", "dense"].index), line


def test_what_is_encoded_already_costs_no_encoding():
    assert chosen(0.01, 5e9) == "dense"
    assert chosen(0.01, 5e9, delta_bytes=7_000_000) == "delta"


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.5, 1.0])
def test_bytes_are_the_entropy_of_the_places_and_the_values(share):
    places = COSTS.delta_bytes(1000, share * 1000) - share * 1000 * COSTS.value_bytes
    assert 0 <= places <= 1000 / 8
    assert (places == 0) == (share in (0.0, 1.0))


def test_costs_move_toward_what_is_seen():
    costs, link = COSTS, LinkSpeed(1e9)
    for _ in range(40):
        costs = costs.after_encoding(
            dense_bytes=GB, num_elements=GB // 2, num_changed=5_000_000, delta_bytes=9_000_000, s=1.5
        )
        costs = costs.after_applying(num_changed=5_000_000, s=0.25).after_hashing(num_bytes=GB, s=0.5)
        link = link.after_transfer(125_000_000, 1.0)
    assert costs.encode_s(GB, 5_000_000) == pytest.approx(1.5, rel=0.01)
    assert costs.delta_bytes(GB // 2, 5_000_000) == pytest.approx(9_000_000)
    assert costs.apply_s_per_change == pytest.approx(0.25 / 5e6)
    assert costs.hash_s_per_byte == pytest.approx(0.5 / GB)
    assert link.bytes_per_s == pytest.approx(125e6, rel=1e-4)


def test_a_push_of_few_changes_says_little_about_what_a_change_costs():
    few = {"num_elements": GB // 2, "num_changed": 1000, "delta_bytes": 2000}
    slow = COSTS.after_encoding(dense_bytes=GB, s=3 * COSTS.encode_s(GB, 1000), **few)
    assert slow.compare_s_per_byte == pytest.approx(3**0.3 * COSTS.compare_s_per_byte, rel=0.01)
    assert slow.encode_s_per_change == pytest.approx(COSTS.encode_s_per_change, rel=0.01)


def test_one_odd_push_does_not_turn_the_tables():
    slow = COSTS.after_applying(num_changed=1000, s=3600)
    assert slow.apply_s_per_change < 10 * COSTS.apply_s_per_change
    assert LinkSpeed(1e9).after_transfer(0, 1.0).bytes_per_s > 1e8


def test_memory_that_is_shared_stays_infinitely_fast():
    assert SHARED_MEMORY.after_transfer(0, 0.0) == SHARED_MEMORY
    assert SHARED_MEMORY.after_transfer(GB, 0.1) == SHARED_MEMORY
