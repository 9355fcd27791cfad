"""The invariants I1 to I9 and where each is held to its word.

    I1  slots in use <= slots_total
    I2  a slot frees when its step's version is live, or at once when its group ends untrained
    I3  every prompt ends exactly once in the lineage of the weights
    I4  no token is trained with staleness > max_staleness
    I5  versions only grow; the bytes served as version v hash to manifest v; never half a version
    I6  what is malformed or out of range is refused with its reason, never trained
    I7  an acknowledged group is on disk
    I8  progress: with a healthy server and no new fault the step advances
    I9  no callback uses more than 50 ms of CPU on the event loop

A state machine or a simulation drives the shipped code at random and judges it from outside; the test named here fails
when its invariant is broken on purpose (each was seen to). README.md says the same sentences to users.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIMULATION = (
    "tests/property/test_simulation.py::test_the_bound_holds_and_the_run_ends_whatever_the_dial_says",
    "tests/property/test_simulation.py::test_the_bound_holds_and_the_run_ends_whatever_goes_wrong",
    "tests/property/test_simulation.py::test_the_bound_holds_and_the_run_ends_when_everything_goes_wrong",
)
LEDGER = "tests/property/test_ledger_machine.py::TestLedger"
HELD_BY = {
    "I1": (LEDGER, *SIMULATION),
    "I2": (LEDGER, "tests/unit/learner/test_loops.py::test_a_version_that_is_live_frees_slots_and_wakes_the_others"),
    "I3": (LEDGER, "tests/property/test_fleet_machine.py::TestFleet", *SIMULATION),
    "I4": (
        LEDGER,
        *SIMULATION,
        "tests/property/test_simulation.py::test_without_the_rule_of_min_versions_the_bound_breaks",
        "tests/unit/learner/test_loops.py::test_i4_a_batch_too_old_is_never_trained",
    ),
    "I5": (
        "tests/property/test_assembly.py::test_what_is_accepted_is_what_the_manifest_says",
        "tests/unit/learner/test_publish.py::test_i5_many_versions_in_a_row_never_touch_what_is_served_or_read",
        "tests/property/test_fleet_machine.py::TestFleet",
    ),
    "I6": (
        "tests/property/test_group_validity.py::test_what_reaches_the_buffer_is_sound",
        "tests/property/test_codec_properties.py::test_damaged_frames_raise_nothing_else",
    ),
    "I7": (
        "tests/property/test_journal_properties.py::TestJournalMachine",
        "tests/unit/learner/test_arrivals.py::test_i7_the_ack_leaves_only_when_the_journal_has_the_group",
        *SIMULATION,
    ),
    "I8": (*SIMULATION, "tests/unit/learner/test_progress.py::test_the_limit_follows_the_median_step"),
    "I9": ("tests/property/test_event_loop_share.py::test_no_callback_holds_the_event_loop",),
}


@pytest.mark.parametrize("invariant", sorted(HELD_BY))
def test_each_invariant_is_held_by_tests_that_exist(invariant):
    for test in HELD_BY[invariant]:
        path, _, name = test.partition("::")
        assert name in top_level_names(ROOT / path), f"{invariant}: no {test}"
    assert any(test.startswith("tests/property/") for test in HELD_BY[invariant])


def test_the_readme_and_this_page_name_the_same_invariants():
    named = set(re.findall(r"^\| (I\d) \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE))
    assert named == set(HELD_BY) == {f"I{number}" for number in range(1, 10)}


def top_level_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
