"""Policy versions are ordered pairs, and a lineage says which of them still count."""

from __future__ import annotations

import pytest

from protocol.versions import Lineage, Version


def test_versions_are_ordered_by_incarnation_first():
    assert Version(1, 7) < Version(2, 5) < Version(2, 6)
    assert sorted([Version(2, 0), Version(1, 9), Version(1, 1)]) == [Version(1, 1), Version(1, 9), Version(2, 0)]
    assert str(Version(2, 5)) == "2.5"


def test_a_run_that_was_never_cut_off():
    lineage = Lineage([(1, 0)])
    assert Version(1, 0) in lineage
    assert Version(1, 1000) in lineage
    assert Version(2, 0) not in lineage
    assert lineage.at(7) == Version(1, 7)


def test_what_was_trained_after_the_checkpoint_is_orphaned():
    lineage = Lineage([(1, 0)])
    lineage.fork(2, 5)
    for version, belongs in {
        Version(1, 0): True,
        Version(1, 5): True,  # the checkpoint itself
        Version(1, 6): False,  # trained after it, by the learner that died
        Version(2, 4): False,  # incarnation 2 never was there
        Version(2, 5): True,  # the same bytes as 1.5
        Version(2, 6): True,
        Version(3, 6): False,
    }.items():
        assert (version in lineage) is belongs, version


def test_incarnations_that_saved_nothing_leave_no_trace():
    """2 began at 5 and died before its first checkpoint; 3 goes on from 1's, whose forks know nothing of 2."""
    lineage = Lineage([(1, 0)])
    lineage.fork(3, 5)
    assert Version(2, 5) not in lineage
    assert Version(2, 6) not in lineage
    assert lineage.at(6) == Version(3, 6)


def test_falling_back_behind_an_earlier_fork_orphans_that_fork():
    """Checkpoint 5's own state says [(1, 0)]; but were (2, 5) listed, going back to 3 would leave it behind."""
    lineage = Lineage([(1, 0), (2, 5)])
    lineage.fork(3, 3)
    assert Version(1, 3) in lineage
    assert Version(1, 4) not in lineage
    assert Version(2, 5) not in lineage
    assert Version(3, 5) in lineage
    assert [lineage.at(v) for v in (3, 4, 5)] == [Version(1, 3), Version(3, 4), Version(3, 5)]


@pytest.mark.parametrize("forks", [[(1, 0)], [(1, 0), (2, 5)], [(1, 0), (3, 5), (4, 5), (7, 9)], [(2, 0), (3, 0)]])
def test_at_names_the_first_incarnation_that_reached_a_version(forks):
    lineage = Lineage(forks)
    for policy_version in range(12):
        named = lineage.at(policy_version)
        belonging = [
            Version(incarnation, policy_version)
            for incarnation, _ in forks
            if Version(incarnation, policy_version) in lineage
        ]
        assert named == min(belonging)


def test_there_is_nothing_before_the_first_fork():
    with pytest.raises(ValueError, match=r"policy_version 2 is before \(3, 5\)"):
        Lineage([(3, 5)]).at(2)


@pytest.mark.parametrize("incarnation", [1, 2])
def test_incarnations_grow(incarnation):
    lineage = Lineage([(2, 0)])
    with pytest.raises(ValueError, match=f"incarnation {incarnation} must be above 2"):
        lineage.fork(incarnation, 3)


def test_forks_survive_a_round_trip_as_plain_lists():
    assert Lineage([[1, 0], [2, 5]]).forks == [(1, 0), (2, 5)]
