"""The ledger by example: each transition, the bound reached exactly, and what each violation says.

The state machine under random driving is tests/property/test_ledger_machine.py; here are the plain cases.
"""

from __future__ import annotations

import pytest

from learner.ledger import End, Ledger, State, Verdict
from learner.staleness import derive_bounds
from protocol.errors import InvariantViolation, StalenessViolation


def make_ledger(
    max_staleness: int = 2,
    prompts_per_step: int = 2,
    *,
    window: int | None = None,
    sync_steps: int = 1,
    max_attempts: int = 3,
    max_refill_ratio: int = 4,
) -> Ledger:
    bounds = derive_bounds(
        max_staleness=max_staleness,
        prompts_per_step=prompts_per_step,
        reorder_window=window,
        weight_sync_steps=sync_steps,
    )
    return Ledger(bounds, max_attempts=max_attempts, max_refill_ratio=max_refill_ratio)


def fill(ledger: Ledger, live: int = 0, server: str = "north") -> list[int]:
    """Grant every free slot and lease all that is pending to a server live at `live`."""
    while ledger.can_grant():
        ledger.grant()
    return [ledger.dispatched(entry.sequence, server, live).sequence for entry in ledger.pending()]


def deliver(ledger: Ledger, *sequences: int, oldest: int = 0) -> None:
    for sequence in sequences:
        ledger.delivered(ledger.entries[sequence].ordinal, oldest)


def train(ledger: Ledger, *, live: bool = True) -> list[int]:
    """Form the next batch, train it; with `live`, a server goes live at the new version at once."""
    sequences = ledger.select()
    ledger.batch(sequences)
    ledger.check_staleness(sequences)
    ledger.trained(sequences, ledger.policy_version + 1)
    if live:
        ledger.live(ledger.policy_version)
    return sequences


def test_a_group_goes_from_grant_to_trained_and_its_slot_frees_when_the_version_is_live():
    ledger = make_ledger(max_staleness=0, prompts_per_step=1)
    entry = ledger.grant()
    assert (entry.ordinal, entry.sequence, entry.state, entry.attempt) == (0, 0, State.PENDING, 0)
    assert [e.sequence for e in ledger.pending()] == [0]

    leased = ledger.dispatched(0, "north", 0)
    assert (leased.state, leased.server, leased.floor, leased.attempt) == (State.LEASED, "north", 0, 1)
    assert ledger.pending() == []
    assert ledger.judge(0, 0) is Verdict.ACCEPT

    delivered = ledger.delivered(0, 0)
    assert (delivered.state, delivered.server) == (State.BUFFERED, "")
    assert ledger.judge(0, 0) is Verdict.DUPLICATE

    assert train(ledger, live=False) == [0]
    assert ledger.counts() == {
        "pending": 0, "leased": 0, "buffered": 0, "batched": 0,
        "trained": 1, "filtered": 0, "quarantined": 0, "stale": 0, "skipped": 0,
    }  # fmt: skip
    assert (ledger.slots_in_use, ledger.can_grant()) == (1, False), "I2: until its version is live"
    ledger.live(0)
    assert not ledger.can_grant(), "an older version frees nothing"
    ledger.live(1)
    assert (ledger.slots_in_use, ledger.can_grant(), ledger.unaccounted) == (0, True, 0)


def test_a_live_version_frees_the_slots_of_every_step_up_to_it():
    ledger = make_ledger(max_staleness=2, prompts_per_step=1)
    deliver(ledger, *fill(ledger))
    for _ in range(3):
        train(ledger, live=False)
    assert ledger.slots_in_use == 3
    ledger.live(2)
    assert ledger.slots_in_use == 1
    ledger.live(2)
    assert ledger.slots_in_use == 1


def test_i1_no_grant_beyond_the_slots():
    ledger = make_ledger(max_staleness=1, prompts_per_step=2)
    assert len(fill(ledger)) == ledger.bounds.slots_total == 4
    with pytest.raises(InvariantViolation, match="I1: 4 slots in use of 4"):
        ledger.grant()


def test_a_row_too_long_ends_filtered_without_a_slot():
    ledger = make_ledger()
    assert ledger.filter_unleased() == 0
    assert (ledger.slots_in_use, ledger.ends[End.FILTERED], ledger.unaccounted) == (0, 1, 0)
    entry = ledger.grant()
    assert (entry.ordinal, entry.sequence) == (1, 0), "it keeps its ordinal and uses no sequence number"
    assert ledger.judge(0, 0) is Verdict.DUPLICATE
    assert ledger.filtered_since_batch == 0, "it does not count as a filtered group of this step"


@pytest.mark.parametrize("how", [End.FILTERED, End.STALE, End.QUARANTINED])
def test_i2_an_untaken_group_that_ends_frees_its_slot_at_once(how):
    ledger = make_ledger()
    fill(ledger)
    deliver(ledger, 0)
    ledger.end(0, how)
    assert (ledger.can_grant(), ledger.ends[how], ledger.unaccounted) == (True, 1, 0)
    with pytest.raises(InvariantViolation, match=f"I3: sequence 0 cannot end {how}: it is not untaken"):
        ledger.end(0, how)


def test_a_batched_group_can_only_be_trained_or_skipped():
    ledger = make_ledger(prompts_per_step=1)
    fill(ledger)
    deliver(ledger, 0)
    ledger.batch([0])
    with pytest.raises(InvariantViolation, match="cannot end filtered"):
        ledger.end(0, End.FILTERED)


def test_i2_a_skipped_batch_frees_its_slots_at_once_and_the_version_stays():
    ledger = make_ledger(max_staleness=1, prompts_per_step=2)
    deliver(ledger, *fill(ledger))
    batch = ledger.select()
    ledger.batch(batch)
    assert ledger.slots_in_use == 4
    ledger.skip(batch)
    assert (ledger.slots_in_use, ledger.policy_version, ledger.batches_formed) == (2, 0, 0)
    assert (ledger.ends[End.SKIPPED], ledger.unaccounted) == (2, 0)


def test_a_lost_lease_keeps_ordinal_and_sequence_and_counts_only_faults():
    ledger = make_ledger(max_attempts=2)
    fill(ledger)
    for _ in range(5):  # drains and reconnects: no fault of the group
        entry = ledger.lost(0, fault=False)
        assert entry is not None
        assert (entry.ordinal, entry.sequence, entry.state, entry.server) == (0, 0, State.PENDING, "")
        ledger.dispatched(0, "south", 0)
    assert (ledger.entries[0].attempt, ledger.entries[0].faults) == (6, 0)
    assert ledger.lost(0, fault=True) is not None
    ledger.dispatched(0, "south", 0)
    assert ledger.lost(0, fault=True) is None, "the second fault of two"
    assert (ledger.ends[End.QUARANTINED], ledger.find(0), ledger.unaccounted) == (1, None, 0)
    assert ledger.judge(0, 0) is Verdict.DUPLICATE
    assert ledger.can_grant(), "I2"


def test_a_late_answer_is_as_good_as_any():
    ledger = make_ledger()
    fill(ledger)
    ledger.lost(0, fault=True)
    assert ledger.judge(0, 0) is Verdict.ACCEPT, "pending again, and here it is"
    deliver(ledger, 0)
    assert [e.sequence for e in ledger.pending()] == []
    with pytest.raises(InvariantViolation, match="I3: sequence 0 is buffered, not pending"):
        ledger.dispatched(0, "south", 0)


def test_transitions_out_of_order_are_bugs_and_say_so():
    ledger = make_ledger()
    fill(ledger)
    with pytest.raises(InvariantViolation, match="I3: sequence 0 is leased, not buffered"):
        ledger.batch([0])
    with pytest.raises(InvariantViolation, match="I3: sequence 99 is ended, not leased"):
        ledger.lost(99, fault=True)
    deliver(ledger, 0)
    with pytest.raises(InvariantViolation, match="I3: group 0 delivered, but it is buffered"):
        ledger.delivered(0, 0)
    with pytest.raises(InvariantViolation, match="I3: group 77 delivered, but it is ended"):
        ledger.delivered(77, 0)
    with pytest.raises(InvariantViolation, match="I3: sequence 0 is buffered, not batched"):
        ledger.trained([0], 1)


def test_i5_policy_version_grows_by_one():
    ledger = make_ledger(prompts_per_step=1)
    fill(ledger)
    deliver(ledger, 0)
    ledger.batch([0])
    with pytest.raises(InvariantViolation, match="I5: policy_version 0 -> 2"):
        ledger.trained([0], 2)


def test_judging_what_this_run_never_leased():
    ledger = make_ledger()
    assert ledger.judge(0, 0) is Verdict.UNKNOWN
    ledger.grant()
    assert ledger.judge(1, 0) is Verdict.UNKNOWN


def test_min_version_grows_with_the_place_in_line():
    """m 2, P 2, W 1, six slots at version 0: nobody may be older than what it will meet when it trains."""
    ledger = make_ledger(max_staleness=2, prompts_per_step=2)
    sequences = fill(ledger)
    assert [ledger.latest_version(s) for s in sequences] == [0, 0, 1, 1, 2, 2]
    assert [ledger.min_policy_version(s) for s in sequences] == [0, 0, 0, 0, 0, 0]
    deliver(ledger, 0, 1)
    train(ledger)
    new = [ledger.grant().sequence, ledger.grant().sequence]
    assert [ledger.min_policy_version(s) for s in new] == [1, 1], "they train at version 3 at the latest"
    with pytest.raises(InvariantViolation, match="I4: group 6 leased to slow live at 0, needs >= 1"):
        ledger.dispatched(6, "slow", 0)
    assert ledger.dispatched(6, "north", 1).floor == 1


def test_a_batch_formed_but_not_trained_counts_as_ahead():
    ledger = make_ledger(max_staleness=1, prompts_per_step=1)
    fill(ledger)
    deliver(ledger, 0)
    before = ledger.latest_version(1)
    ledger.batch(ledger.select())
    assert ledger.latest_version(1) == before == 1


def test_a_group_too_old_for_its_place_is_stale():
    ledger = make_ledger(max_staleness=1, prompts_per_step=1)
    deliver(ledger, *fill(ledger))
    train(ledger)
    ledger.grant()
    ledger.dispatched(2, "north", 1)
    assert ledger.judge(2, 0) is Verdict.STALE
    assert ledger.judge(2, 1) is Verdict.ACCEPT


def test_the_bound_is_reached_exactly_with_a_closed_window():
    """W 1, S = m: rollouts never see a new version, and the last batch in the slots trains m versions late."""
    ledger = make_ledger(max_staleness=3, prompts_per_step=2)
    deliver(ledger, *fill(ledger))
    stalenesses = []
    for _ in range(4):
        stalenesses.append(ledger.policy_version - ledger.entries[ledger.select()[0]].floor)
        train(ledger, live=False)
    assert stalenesses == [0, 1, 2, 3]
    assert not ledger.can_grant(), "nothing more can be leased before a version is live"


def test_the_bound_is_reached_exactly_by_overtaking():
    """W = P + 1, S = m - 1: the last group leased at version 0 straggles, and P later ones pass it, no more."""
    p, m = 4, 4
    ledger = make_ledger(max_staleness=m, prompts_per_step=p)
    assert (ledger.bounds.reorder_window, ledger.bounds.steps_ahead) == (p + 1, m - 1)
    straggler = fill(ledger)[-1]
    assert straggler == m * p - 1
    assert ledger.latest_version(straggler) == m, "those that may overtake it are counted in"
    deliver(ledger, *range(straggler))

    for step in range(1, m + 1):
        for entry in [ledger.grant() for _ in range(ledger.bounds.slots_total - ledger.slots_in_use)]:
            ledger.dispatched(entry.sequence, "north", ledger.policy_version)
            deliver(ledger, entry.sequence, oldest=ledger.policy_version)
        taken = train(ledger)
        assert straggler not in taken
        assert len(taken) == p, f"step {step}"

    overtook = [s for s in range(straggler + 1, ledger.next_sequence) if s not in ledger.entries]
    assert overtook == [straggler + 1], "one seat was left in step m"
    assert ledger.select() == [straggler + k for k in range(2, p + 1)], "P - 1 more: not a batch without it"
    assert ledger.judge(ledger.entries[straggler].ordinal, 0) is Verdict.ACCEPT
    deliver(ledger, straggler, oldest=0)
    assert ledger.policy_version - ledger.entries[straggler].floor == m
    assert train(ledger)[0] == straggler, "I4: exactly m, and it trains"


def test_without_the_sequence_window_the_straggler_would_be_passed_for_ever():
    """What the design warns of: positions in the queue instead of sequence numbers."""
    p, m = 2, 4
    ledger = make_ledger(max_staleness=m, prompts_per_step=p)
    straggler = fill(ledger)[0]
    deliver(ledger, *[s for s in ledger.entries if s != straggler])
    assert ledger.select() == [1, 2]
    train(ledger)
    assert ledger.select() == [], "sequence 3 is buffered, but not below 0 + W = 3"


def test_a_closed_window_takes_strictly_in_order():
    ledger = make_ledger(max_staleness=2, prompts_per_step=2)
    fill(ledger)
    deliver(ledger, 1, 2, 3)
    assert ledger.select() == []
    deliver(ledger, 0)
    assert ledger.select() == [0, 1]


def test_the_window_slides_over_what_the_same_batch_takes():
    """With the lowest chosen, the next lowest opens the window further: a batch is P in order, wherever it starts."""
    ledger = make_ledger(max_staleness=5, prompts_per_step=3, window=4)
    fill(ledger)
    deliver(ledger, 1, 2, 3)
    assert ledger.select() == [1, 2, 3], "below 0 + 4"
    ledger.batch([1, 2, 3])
    deliver(ledger, 4, 5)
    assert ledger.select() == [], "0 is still the lowest"
    deliver(ledger, 0)
    assert ledger.select() == [0, 4, 5]


def test_a_sequence_that_ended_holds_no_window_closed():
    ledger = make_ledger(max_staleness=2, prompts_per_step=2)
    fill(ledger)
    deliver(ledger, 0, 1, 2)
    ledger.end(0, End.FILTERED)
    assert ledger.select() == [1, 2]


def test_i4_the_batch_about_to_train_is_checked_again():
    ledger = make_ledger(max_staleness=1, prompts_per_step=1)
    deliver(ledger, *fill(ledger))
    ledger.batch([0])
    ledger.check_staleness([0])
    ledger.entries[0].floor = -1  # poisoned: no transition can do this
    ledger.check_staleness([0])  # at exactly max_staleness it trains
    ledger.entries[0].floor = -2
    with pytest.raises(StalenessViolation, match="I4: group 0 has staleness 2, max_staleness is 1; the run stops"):
        ledger.check_staleness([0])


def test_refills_are_limited():
    ledger = make_ledger(max_staleness=0, prompts_per_step=2, max_refill_ratio=1)
    for filtered in range(1, 4):
        fill(ledger)
        sequence = min(ledger.entries)
        deliver(ledger, sequence)
        ledger.end(sequence, End.FILTERED)
        assert ledger.refill_exhausted is (filtered > 2)
    ledger.batch([])
    assert not ledger.refill_exhausted, "the empty step was counted off"
    assert ledger.batches_formed == 0, "an empty batch trains nothing"
    ledger.skip([])
    assert ledger.batches_formed == 0


def test_a_short_step_is_refused_while_someone_would_get_too_old():
    """P 2, m 1: of four slots at version 0 one has finished. Trained alone, it would push the others over the bound."""
    ledger = make_ledger(max_staleness=1, prompts_per_step=2)
    fill(ledger)
    deliver(ledger, 0)
    assert not ledger.may_train_short([0])  # 1, 2 and 3 remain: sequence 3 would train at version 2, sampled at 0
    ledger.end(3, End.FILTERED)
    assert ledger.may_train_short([0])
    ledger.batch([0])
    ledger.trained([0], 1)
    deliver(ledger, 1, 2)
    ledger.batch([1, 2])
    ledger.check_staleness([1, 2])


def test_a_short_step_does_not_wait_for_what_is_not_leased_yet():
    ledger = make_ledger(max_staleness=0, prompts_per_step=2)
    ledger.grant()
    ledger.grant()
    ledger.dispatched(0, "north", 0)
    deliver(ledger, 0)
    assert ledger.may_train_short([0]), "sequence 1 is pending: its lease will ask for a newer version"
    ledger.dispatched(1, "north", 0)
    assert not ledger.may_train_short([0])


def test_a_restored_ledger_goes_on_where_the_checkpoint_was():
    ledger = make_ledger(max_staleness=2, prompts_per_step=2, max_attempts=2)
    deliver(ledger, *fill(ledger))
    train(ledger)
    ledger.filter_unleased()
    fill(ledger, live=1)
    ledger.lost(7, fault=True)
    ledger.batch(ledger.select())
    deliver(ledger, 6, oldest=1)
    ledger.end(6, End.FILTERED)
    snapshot = ledger.snapshot()

    restored = make_ledger(max_staleness=2, prompts_per_step=2, max_attempts=2)
    restored.restore(snapshot)
    assert restored.snapshot() == snapshot
    assert (restored.policy_version, restored.cursor, restored.next_sequence) == (1, 9, 8)
    assert [e.sequence for e in restored.pending()] == [2, 3, 4, 5, 7], "batched or not, all untrained is pending"
    assert restored.find(6) is None, "the over-long row"
    assert restored.judge(6, 1) is Verdict.DUPLICATE
    assert (restored.unaccounted, restored.slots_in_use, restored.filtered_since_batch) == (0, 5, 1)
    restored.dispatched(7, "north", 1)
    assert restored.lost(7, fault=True) is None, "the fault before the checkpoint counts"
    assert [restored.grant().ordinal, restored.grant().sequence] == [9, 9]
