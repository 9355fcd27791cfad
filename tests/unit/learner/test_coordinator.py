"""Who is welcome, who gets which lease, and what becomes of leases when a server goes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from learner.coordinator import LEAST_QUARANTINED
from learner.evaluation import Evaluation
from learner.ledger import End, State
from learner.loops import handle
from protocol.errors import RunStopped
from protocol.identity import group_id
from protocol.messages import Cancel, Drain, Goodbye, Lease, Ping, Purpose, Refused, ServerStatus, WeightsReady, Welcome
from protocol.versions import Lineage, Version
from protocol.waits import Waiting
from tests.factories import RUN_ID
from tests.learners import Desk, answer, make_desk, make_hello


def ready(policy_version: int) -> WeightsReady:
    manifest = np.frombuffer(b"{}", np.uint8)
    return WeightsReady(version=Version(1, policy_version), manifest=manifest, addresses=("tcp://*:1",))


def states(desk: Desk) -> dict[int, tuple[State, str]]:
    return {entry.ordinal: (entry.state, entry.server) for entry in desk.ledger.entries.values()}


# Hello


def test_a_server_that_fits_is_welcomed_and_told_of_the_newest_weights():
    desk = make_desk(heartbeat_s=0.5)
    desk.coordinator.weights.announce(ready(3))
    desk.join("north", live=None)
    (welcome,) = desk.channel.to(b"north", Welcome)
    assert (welcome.session, welcome.run_id, welcome.incarnation) == ("north-session", RUN_ID, 1)
    assert (welcome.keep, welcome.heartbeat_s, welcome.liveness_s) == ((), 0.5, 4.0)
    assert [type(message) for _, message in desk.channel.sent] == [Welcome, WeightsReady], "in this order"
    desk.coordinator.weights.announce(ready(4))
    assert [message.version.policy_version for message in desk.channel.to(b"north", WeightsReady)] == [3, 4]


@pytest.mark.parametrize(
    ("hello", "code", "reason"),
    [
        (
            {"run_id": RUN_ID, "incarnation": 4},
            "incarnation",
            "it has worked for incarnation 4; this is 1",
        ),
        (
            {"engine": "scripted", "vocab_size": 1000, "model_digest": "", "tokenizer_digest": ""},
            "model",
            "it invents 1000 tokens, the model has 32",
        ),
        (
            {"model_digest": "0123456789abcdef"},
            "model",
            "its model has another shape (vocabulary 32, weights 0123456789ab) than the learner's (32, weights-dige):"
            " give both the same --model",
        ),
        (
            {"vocab_size": 33},
            "model",
            "its model has another shape (vocabulary 33, weights weights-dige) than the learner's (32, weights-dige):"
            " give both the same --model",
        ),
        (
            {"tokenizer_digest": "other"},
            "tokenizer",
            "its tokenizer has another vocabulary than the learner's: give both the same --model",
        ),
        (
            {"reward_functions": ("length", "format")},
            "reward_functions",
            "it scores with length, format; this run expects exact_match",
        ),
        ({"reward_functions": ()}, "reward_functions", "it scores with nothing; this run expects exact_match"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_saying_why(hello, code, reason):
    desk = make_desk(reward_funcs=["exact_match"])
    desk.coordinator.hello(b"north", make_hello(**hello))
    (refused,) = desk.channel.to(b"north", Refused)
    assert (refused.code, refused.reason) == (code, reason)
    assert desk.fleet.servers == {}
    assert desk.coordinator.counters["servers_refused"] == 1
    assert list(desk.coordinator.notices) == [f"refused server north: {reason}"]


def test_a_refusal_nobody_waits_for_is_no_error():
    desk = make_desk(reward_funcs=["other"])
    desk.channel.gone.add(b"north")
    desk.coordinator.hello(b"north", make_hello())
    assert desk.fleet.servers == {}


def test_a_scripted_engine_needs_no_model_only_a_vocabulary_that_fits():
    desk = make_desk()
    desk.join("north", live=None, engine="scripted", vocab_size=16, model_digest="", tokenizer_digest="")
    assert desk.fleet.named("north") is not None


def test_the_first_server_sets_what_rewards_are_expected_when_the_user_did_not():
    desk = make_desk()
    desk.join("north", reward_functions=("length",))
    desk.coordinator.hello(b"south", make_hello("south", reward_functions=("exact_match",)))
    (refused,) = desk.channel.to(b"south", Refused)
    assert refused.reason == "it scores with exact_match; this run expects length"


def test_a_server_with_another_key_cannot_take_the_place_of_the_first():
    desk = make_desk()
    desk.channel.owners = {b"first": "gpu-7", b"second": "gpu-8", b"third": "gpu-7"}
    desk.join("north", peer=b"first")
    desk.coordinator.hello(b"second", make_hello("north"))
    (refused,) = desk.channel.to(b"second", Refused)
    assert refused.code == "name_in_use"
    assert "belongs to the key of gpu-7" in refused.reason
    assert list(desk.fleet.servers) == [b"first"]
    desk.join("north", peer=b"third")
    assert list(desk.fleet.servers) == [b"third"]


def test_a_second_server_of_a_name_takes_the_place_of_the_first():
    desk = make_desk()
    desk.join("north", peer=b"first")
    desk.pump()
    held = desk.leases("first")
    desk.join("north", peer=b"second")
    (refused,) = desk.channel.to(b"first", Refused)
    assert (refused.code, refused.reason) == ("name_in_use", "another server named north has joined")
    assert list(desk.fleet.servers) == [b"second"]
    desk.pump()
    assert [lease.ordinal for lease in desk.leases("second")] == [lease.ordinal for lease in held]
    assert {entry.faults for entry in desk.ledger.entries.values()} == {0}


@pytest.mark.parametrize(("run_id", "faults"), [(RUN_ID, 0), ("", 1)])
def test_a_reconnection_is_no_fault_of_the_groups_a_new_process_may_be(run_id, faults):
    """A process that died took its groups with it, and one of them may have killed it."""
    desk = make_desk()
    desk.join("north", peer=b"first")
    desk.pump()
    desk.channel.gone.add(b"first")
    desk.join("north", peer=b"second", run_id=run_id)
    assert {entry.faults for entry in desk.ledger.entries.values() if entry.attempt} == {faults}
    assert list(desk.coordinator.notices) == ["server north left: it joined anew"]


def test_saying_hello_twice_on_one_connection_refuses_nobody():
    desk = make_desk()
    desk.join("north")
    desk.pump()
    desk.join("north")
    assert desk.channel.to(b"north", Refused) == []
    assert len(desk.channel.to(b"north", Welcome)) == 2


# What a server that comes back may keep


def test_finished_groups_that_nobody_has_delivered_are_kept():
    desk = make_desk(filter_zero_std=False)
    desk.join("north")
    desk.pump()
    leases = desk.leases()
    assert len(leases) == 3
    desk.receive(answer(leases[0]))
    desk.accept()
    desk.join("south")
    desk.pump()
    unacked = (*(lease.group_id for lease in leases), group_id("another-run", 0), "nonsense")
    desk.join("north", peer=b"again", unacked=unacked)
    (welcome,) = desk.channel.to(b"again", Welcome)
    assert welcome.keep == (leases[1].group_id, leases[2].group_id), "all but the one delivered, and foreign ones"


def test_a_group_in_flight_goes_on_with_the_server_that_comes_back():
    desk = make_desk()
    desk.join("north")
    desk.pump()
    first, second, third = desk.leases()
    desk.join("north", peer=b"again", in_flight=(first.group_id, second.group_id))
    (welcome,) = desk.channel.to(b"again", Welcome)
    assert welcome.keep == (first.group_id, second.group_id)
    assert desk.fleet.servers[b"again"].samples == 8
    assert states(desk)[0] == (State.LEASED, "north")
    assert states(desk)[2] == (State.PENDING, "")
    desk.pump()
    assert [lease.ordinal for lease in desk.leases("again")] == [third.ordinal], "the others are not leased anew"
    desk.receive(answer(first), "again")
    desk.accept()
    assert states(desk)[0] == (State.BUFFERED, "")


def test_a_group_in_flight_that_another_has_been_given_is_dropped():
    desk = make_desk()
    desk.join("north")
    desk.pump()
    (lease, *_) = desk.leases()
    desk.coordinator.drop_server(desk.fleet.servers[b"north"], "silent")
    desk.join("south")
    desk.pump()
    desk.join("north", peer=b"again", in_flight=(lease.group_id,))
    assert desk.channel.to(b"again", Welcome)[0].keep == ()
    assert states(desk)[0] == (State.LEASED, "south")


def test_nothing_is_adopted_by_weights_too_old_or_left_behind():
    for live in (Version(1, 0), Version(1, 9), None):
        desk = make_desk(lineage=Lineage([(1, 0), (2, 5)]), incarnation=2, policy_version=5)
        desk.join("north", live=None)
        desk.pump()
        in_flight = (desk.coordinator.train_id(0),)
        desk.join("north", peer=b"again", live=live, in_flight=in_flight)
        assert desk.channel.to(b"again", Welcome)[0].keep == (), live
        assert states(desk)[0] == (State.PENDING, "")


def test_nothing_is_adopted_once_training_is_done():
    desk = make_desk()
    server = desk.join("north")
    desk.pump()
    (lease, *_) = desk.leases()
    desk.coordinator.drop_server(server, "silent")
    desk.coordinator.stop_training()
    desk.join("north", peer=b"again", in_flight=(lease.group_id,))
    assert desk.channel.to(b"again", Welcome)[0].keep == ()


def test_what_another_run_has_left_in_a_server_counts_for_nothing():
    desk = make_desk()
    server = desk.join("north", run_id="another-run", incarnation=9, live=Version(1, 7), in_flight=("f" * 32,))
    assert (server.live, desk.channel.to(b"north", Welcome)[0].keep) == (None, ())
    desk.pump()
    assert desk.leases() == []


@pytest.mark.parametrize("live", [Version(1, 1), Version(1, 999)])
def test_a_version_that_was_never_trained_makes_nobody_healthy(live):
    desk = make_desk()
    assert desk.join("north", live=live).live is None
    desk.pump()
    assert desk.leases() == []


def test_going_live_is_heard_of_even_when_its_message_was_lost():
    """I8: the slots of a step would never be free again."""
    desk = make_desk(max_staleness=0)
    desk.join("north", live=0)
    desk.pump()
    for lease in desk.leases():
        desk.receive(answer(lease))
    desk.accept()
    desk.ledger.batch([0, 1])
    desk.ledger.trained([0, 1], 1)
    assert not desk.ledger.can_grant()
    desk.join("north", peer=b"again", live=1)
    assert desk.ledger.can_grant()


# Leases


def test_free_slots_become_leases_in_prompt_order():
    desk = make_desk(num_generations=4, temperature=0.8)
    begun = []
    desk.coordinator.begun = lambda: begun.append(desk.clock())
    desk.join("north", room=100)
    desk.clock.now_s = 101.0
    desk.pump()
    leases = desk.leases()
    assert [(lease.ordinal, lease.sequence, lease.attempt) for lease in leases] == [(i, i, 1) for i in range(6)]
    assert {lease.min_version for lease in leases} == {Version(1, 0)}
    assert leases[3].group_id == group_id(RUN_ID, 3)
    assert json.loads(leases[3].row.tobytes()) == {"prompt": "3 =", "columns": {"answer": 3}}
    assert (leases[0].num_generations, leases[0].sampling.temperature, leases[0].purpose) == (4, 0.8, Purpose.TRAIN)
    assert (begun, desk.coordinator.first_lease_s) == ([101.0], 101.0)
    desk.pump()
    assert desk.leases() == []


def test_nothing_is_leased_before_a_server_is_live():
    desk = make_desk()
    server = desk.join("north", live=None)
    desk.pump()
    assert (desk.leases(), desk.ledger.slots_in_use) == ([], 6)
    assert desk.fleet.went_live(server.peer, Version(1, 0))
    desk.pump()
    assert len(desk.leases()) == 3


def test_a_lease_names_the_oldest_weights_that_may_still_sample():
    desk = make_desk(lineage=Lineage([(1, 0), (2, 5)]), incarnation=2, policy_version=5, max_staleness=0)
    desk.join("north", live=5, room=100)
    desk.pump()
    assert {lease.min_version for lease in desk.leases()} == {Version(1, 5)}, "the checkpoint's own name for it"


def test_over_long_rows_end_filtered_without_a_lease():
    desk = make_desk(too_long=(0, 2, 3), max_prompt_length=5)
    desk.join("north", room=100)
    desk.pump()
    assert [(lease.ordinal, lease.sequence) for lease in desk.leases()] == [
        (1, 0), (4, 1), (5, 2), (6, 3), (7, 4), (8, 5)
    ]  # fmt: skip
    assert desk.coordinator.counters["rows_too_long"] == 3
    records = desk.coordinator.take_unjournaled()
    assert [(record.ordinal, record.sequence, record.end) for record in records] == [
        (ordinal, -1, "filtered") for ordinal in (0, 2, 3)
    ]
    assert records[0].reason == "prompt longer than 5 tokens"
    assert desk.coordinator.take_unjournaled() == []
    assert desk.ledger.unaccounted == 0


def test_leases_of_a_server_that_is_gone_go_to_others():
    desk = make_desk()
    desk.join("north")
    desk.join("south")
    desk.channel.gone.add(b"north")
    desk.pump()
    desk.pump()
    assert list(desk.fleet.servers) == [b"south"]
    assert desk.leases("north") == []
    assert [lease.ordinal for lease in desk.leases("south")][-1] <= 5
    assert {server for state, server in states(desk).values() if state is State.LEASED} == {"south"}
    assert "server north left: its connection is gone" in desk.coordinator.notices


def test_a_silent_server_loses_its_leases_to_others():
    desk = make_desk()
    desk.join("north")
    desk.pump()
    held = desk.leases("north")
    desk.clock.now_s += 4.1
    desk.join("south")
    desk.coordinator.tick([])
    assert list(desk.fleet.servers) == [b"south"]
    assert "server north left: nothing heard for 4 s" in desk.coordinator.notices
    desk.pump()
    again = desk.leases("south")
    assert [lease.ordinal for lease in again] == [lease.ordinal for lease in held]
    assert {(lease.sequence == first.sequence, lease.attempt) for lease, first in zip(again, held, strict=True)} == {
        (True, 2)
    }
    assert [lease.seed for lease in again] == [lease.seed for lease in held]


def test_a_group_is_quarantined_after_max_attempts_and_its_slot_goes_on():
    desk = make_desk(max_attempts=2)
    for attempt in (1, 2):
        server = desk.join("north", room=4)
        desk.pump()
        assert desk.leases("north")[0].ordinal == 0
        desk.coordinator.lost(desk.coordinator.train_id(0), fault=True, reason=f"failure {attempt}")
        desk.fleet.leave(server.peer)
    assert desk.ledger.find(0) is None
    assert desk.ledger.ends[End.QUARANTINED] == 1
    assert "group 0 quarantined: failure 2" in desk.coordinator.notices
    (record,) = desk.coordinator.take_unjournaled()
    assert (record.ordinal, record.sequence, record.end, record.reason) == (0, 0, "quarantined", "failure 2")
    assert 0 not in desk.coordinator.rows
    desk.pump()
    assert desk.ledger.slots_in_use == 6


def test_nothing_but_quarantined_groups_stops_the_run():
    desk = make_desk(max_attempts=1)
    desk.join("north", room=1000)
    for ordinal in range(LEAST_QUARANTINED - 1):
        desk.pump()
        desk.coordinator.lost(desk.coordinator.train_id(ordinal), fault=True, reason="engine failed")
    desk.pump()
    with pytest.raises(RunStopped, match=r"16 groups in a row failed 1 times each, the last one because: engine fail"):
        desk.coordinator.lost(desk.coordinator.train_id(LEAST_QUARANTINED - 1), fault=True, reason="engine failed")


def test_one_good_group_ends_the_row_of_quarantined_ones():
    desk = make_desk(max_attempts=1)
    desk.join("north", room=1000)
    desk.pump()
    for ordinal in range(LEAST_QUARANTINED - 1):
        desk.coordinator.lost(desk.coordinator.train_id(ordinal), fault=True, reason="engine failed")
        desk.pump()
    lease = desk.leases()[-1]
    desk.receive(answer(lease))
    desk.accept()
    assert desk.coordinator.quarantined_in_a_row == 0


def test_losing_what_is_not_leased_changes_nothing():
    desk = make_desk()
    desk.join("north")
    desk.pump()
    before = desk.ledger.snapshot()
    desk.coordinator.lost("nonsense", fault=True, reason="?")
    desk.coordinator.lost(desk.coordinator.train_id(4), fault=True, reason="pending, not leased")
    assert desk.ledger.snapshot() == before


def test_when_training_is_done_what_is_out_is_called_back_and_nothing_more_leased():
    desk = make_desk(eval_rows=2)
    desk.join("north")
    desk.coordinator.evaluation = Evaluation(policy_version=0, pinned=True, num_rows=2)
    desk.pump()
    leases = desk.leases()
    train = [lease.group_id for lease in leases if lease.purpose is Purpose.TRAIN]
    desk.coordinator.stop_training()
    assert [cancel.group_id for cancel in desk.channel.to(b"north", Cancel)] == train
    held = desk.fleet.servers[b"north"].outstanding
    assert [lease.group_id for lease in leases if lease.group_id in held] == [
        desk.coordinator.eval_id(r) for r in (0, 1)
    ]
    desk.pump()
    assert desk.leases() == []
    assert desk.ledger.unaccounted == 0


# Watching


def test_server_wait_s_stops_a_run_without_servers():
    desk = make_desk(server_wait_s=30.0)
    desk.clock.now_s += 30.0
    desk.coordinator.tick([])
    desk.clock.now_s += 1.0
    with pytest.raises(RunStopped, match=r"no rollout server at tcp://127\.0\.0\.1:5555 for 31 s \(server_wait_s\)"):
        desk.coordinator.tick([])


def test_without_server_wait_s_it_waits_for_ever():
    desk = make_desk()
    desk.clock.now_s += 1e6
    desk.coordinator.tick([])
    assert desk.coordinator.counters["stalls"] == 0, "nobody healthy: nothing can advance"


def test_a_server_that_leaves_starts_the_wait_anew():
    desk = make_desk(server_wait_s=30.0)
    server = desk.join("north")
    desk.clock.now_s += 100.0
    desk.fleet.heard(server.peer, desk.clock())
    desk.coordinator.tick([])
    desk.coordinator.drop_server(server, "left", fault=False)
    desk.clock.now_s += 29.0
    desk.coordinator.tick([])


def test_i8_a_stall_is_counted_and_says_what_everyone_waits_for():
    desk = make_desk()
    server = desk.join("north")
    waits = [Waiting("groups", "rollout servers", 100.0, None), Waiting("change", "lease_loop", 220.0, 1.0)]
    for now_s in (100.0, 160.0, 221.0, 222.0):
        desk.clock.now_s = now_s
        desk.fleet.heard(server.peer, now_s)
        desk.coordinator.tick(waits)
    assert desk.coordinator.counters["stalls"] == 1
    said = [notice for notice in desk.coordinator.notices if "no step" in notice]
    assert said == ["no step for 120 s; waits: groups (rollout servers) for 121 s; change (lease_loop) for 1 s of 1 s"]


def test_notices_are_bounded():
    desk = make_desk()
    for number in range(50):
        desk.coordinator.notice("thing", f"thing {number}")
    assert desk.coordinator.notices[0] == "thing 42"


# Evaluation


def evaluate(desk: Desk, policy_version: int = 0, *, pinned: bool = True, num_rows: int = 3) -> Evaluation:
    desk.coordinator.evaluation = Evaluation(policy_version=policy_version, pinned=pinned, num_rows=num_rows)
    return desk.coordinator.evaluation


def test_evaluation_leases_hold_no_slot_and_have_room_when_training_fills_the_server():
    desk = make_desk(eval_rows=3, eval_num_generations=2)
    desk.join("north", room=6)
    desk.pump()
    assert len(desk.leases()) == 3, "training has filled it"
    evaluate(desk)
    desk.pump()
    (lease,) = desk.leases()
    assert (lease.purpose, lease.ordinal, lease.num_generations) == (Purpose.EVAL, 0, 2)
    assert (lease.group_id, lease.sampling.temperature) == (desk.coordinator.eval_id(0), 0.0)
    assert desk.ledger.slots_in_use == 6
    assert desk.coordinator.evaluates(lease.group_id)
    desk.receive(answer(lease))
    desk.accept()
    assert not desk.coordinator.evaluates(lease.group_id)
    desk.pump()
    assert [lease.ordinal for lease in desk.leases()] == [1]


def test_a_pinned_evaluation_goes_only_to_its_own_version():
    desk = make_desk(eval_rows=3, policy_version=4)
    desk.join("older", live=3)
    desk.join("newer", live=4)
    desk.ledger.policy_version = 4
    evaluation = evaluate(desk, 3)
    desk.coordinator.training = False
    desk.pump()
    assert desk.leases("newer") == []
    assert [lease.min_version for lease in desk.leases("older")] == [Version(1, 3)] * len(evaluation.leased)


def test_an_evaluation_that_is_not_pinned_goes_to_its_version_or_newer():
    desk = make_desk(eval_rows=3, policy_version=5)
    desk.join("older", live=3)
    desk.join("newer", live=5)
    evaluate(desk, 4, pinned=False)
    desk.coordinator.training = False
    desk.pump()
    assert desk.leases("older") == []
    assert desk.leases("newer")[0].min_version == Version(1, 4)


def test_evaluation_rows_too_long_are_passed_over():
    desk = make_desk(eval_rows=3, too_long=(1,))
    desk.join("north", room=100)
    evaluation = evaluate(desk)
    desk.coordinator.training = False
    desk.pump()
    assert [lease.ordinal for lease in desk.leases()] == [0, 2]
    assert desk.coordinator.counters["rows_too_long"] == 1
    assert not evaluation.pending


def test_evaluation_rows_of_a_lost_server_are_leased_again():
    desk = make_desk(eval_rows=2)
    server = desk.join("north", room=100)
    evaluation = evaluate(desk, num_rows=2)
    desk.coordinator.training = False
    desk.pump()
    assert [lease.attempt for lease in desk.leases()] == [1, 1]
    desk.coordinator.drop_server(server, "silent")
    assert list(evaluation.pending) == [0, 1]
    desk.join("south", room=100)
    desk.pump()
    assert [(lease.ordinal, lease.attempt) for lease in desk.leases("south")] == [(0, 2), (1, 2)]


def test_ids_of_two_evaluations_differ():
    desk = make_desk(eval_rows=2)
    evaluate(desk, 0)
    first = desk.coordinator.eval_id(0)
    evaluate(desk, 4)
    assert desk.coordinator.eval_id(0) != first
    assert not desk.coordinator.evaluates(first)
    assert isinstance(desk.channel.to(b"north", Lease), list)


def test_a_server_that_drains_and_is_gone_is_dropped_by_its_goodbye():
    """It closes right behind it: an answer to what it said before finds nobody, and the reason is still to be read."""
    desk = make_desk()
    server = desk.join("north", room=100)
    desk.pump()
    handle(desk.coordinator, server, Drain(reason="SIGTERM"))
    desk.channel.gone.add(b"north")
    handle(desk.coordinator, server, Ping(sent_s=1.0, status=ServerStatus()))
    assert b"north" in desk.fleet.servers
    handle(desk.coordinator, server, Goodbye(reason="SIGTERM"))
    assert b"north" not in desk.fleet.servers
    assert "server north left: SIGTERM" in desk.coordinator.notices
    assert desk.ledger.counts()["leased"] == 0, "its leases go to others"
