"""The fleet, driven at random: servers join, leave, fall silent, drain and go live, and groups come and go.

What must hold whatever happens: nobody is chosen who is joining, suspect, draining or gone, below the version asked
for, or who already has as much again waiting as it has room for, by its own word (but for the room reserved for
evaluation); and every group that was assigned is let go exactly once.
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from learner.fleet import EVAL_SHARE, Fleet
from protocol.messages import Hello, ServerStatus
from protocol.versions import Lineage, Version

LIVENESS_S = 4.0
SAMPLES, EVAL_SAMPLES = 4, 1
NAMES = ("north", "south", "east")
names = st.sampled_from(NAMES)


class FleetMachine(RuleBasedStateMachine):
    """The test keeps its own book of every server and every group."""

    def __init__(self):
        super().__init__()
        self.fleet = Fleet(Lineage([(1, 0), (2, 3)]), liveness_s=LIVENESS_S)
        self.now_s = 0.0
        self.servers = {}
        """name -> room, live, heard_s, draining, left: samples that have not ended, as far as the learner can know;
        received: groups that have got there; under_way: statuses that have not come here, with what had got there"""
        self.holders = {}
        """group id -> (name, samples, evaluation)"""
        self.unfinished = {}
        """group id -> samples that have not ended, in truth"""
        self.assigned = 0
        self.let_go = 0

    @rule(name=names, room=st.integers(1, 12), live=st.one_of(st.none(), st.integers(0, 6)), orphaned=st.booleans())
    def join(self, name, room, live, orphaned):
        if name in self.servers:
            self.leave(name)
        # Incarnation 1 was left at version 3: a server that comes with 1.4 has nothing of this lineage.
        version = None if live is None else Version(1 if orphaned else 2, live)
        belongs = live is not None and (live <= 3 if orphaned else live >= 3)
        hello = Hello(
            session="s", server=name, engine="scripted", room=room, vocab_size=8, model_digest="", tokenizer_digest="",
            reward_functions=(), live=version,
        )  # fmt: skip
        self.fleet.join(name.encode(), hello, self.now_s)
        self.servers[name] = {
            "room": room,
            "live": version if belongs else None,
            "heard_s": self.now_s,
            "draining": False,
            "left": None,
            "received": [],
            "under_way": [],
        }

    @rule(name=names)
    def leave(self, name):
        held = self.fleet.leave(name.encode())
        assert sorted(held) == sorted(g for g, (holder, *_) in self.holders.items() if holder == name)
        for group in held:
            self._let_go(group)
        self.servers.pop(name, None)

    @rule(seconds=st.sampled_from((0.5, 1.0, 2.5)), talking=st.sets(names))
    def time_passes(self, seconds, talking):
        self.now_s += seconds
        for name in talking:
            assert (self.fleet.heard(name.encode(), self.now_s) is not None) == (name in self.servers)
            if name in self.servers:
                self.servers[name]["heard_s"] = self.now_s
        silent = {name for name, server in self.servers.items() if self.now_s - server["heard_s"] > LIVENESS_S}
        assert {server.name for server in self.fleet.silent(self.now_s)} == silent
        for name in silent:
            self.leave(name)

    @precondition(lambda self: self.servers)
    @rule(data=st.data(), incarnation=st.sampled_from((1, 2, 2, 2)), policy_version=st.integers(0, 8))
    def goes_live(self, data, incarnation, policy_version):
        name = data.draw(st.sampled_from(sorted(self.servers)))
        version = Version(incarnation, policy_version)
        server = self.servers[name]
        belongs = policy_version <= 3 if incarnation == 1 else policy_version >= 3
        expected = belongs and (server["live"] is None or version >= server["live"])
        assert self.fleet.went_live(name.encode(), version) is expected
        if expected:
            server["live"] = version

    @precondition(lambda self: self.servers)
    @rule(data=st.data())
    def reports(self, data):
        """Some leases have got there, some samples have ended; the server says so, and is heard later."""
        name = data.draw(st.sampled_from(sorted(self.servers)))
        server = self.servers[name]
        in_transit = [group for group in self._groups(name) if group not in server["received"]]
        server["received"] += in_transit[: data.draw(st.integers(0, len(in_transit)))]
        for group in server["received"]:
            self.unfinished[group] -= data.draw(st.integers(0, self.unfinished[group]))
        left = sum(self.unfinished[group] for group in server["received"])
        running = data.draw(st.integers(0, left))
        status = ServerStatus(
            samples_running=running, samples_waiting=left - running, groups_in_flight=len(server["received"])
        )
        server["under_way"].append((status, set(server["received"])))

    @precondition(lambda self: self.servers)
    @rule(data=st.data())
    def is_heard(self, data):
        self._hear(data.draw(st.sampled_from(sorted(self.servers))), most=1)

    def _hear(self, name, most=None):
        """Messages of a connection keep their order: what else it says comes after its statuses."""
        server = self.servers[name]
        for status, received in server["under_way"][:most]:
            self.fleet.reported(self.fleet.servers[name.encode()], status)
            since = sum(self.holders[group][1] for group in self._groups(name) if group not in received)
            server["left"] = status.samples_running + status.samples_waiting + since
        del server["under_way"][:most]

    def _groups(self, name):
        return [group for group, (holder, *_) in self.holders.items() if holder == name]

    @precondition(lambda self: self.servers)
    @rule(data=st.data())
    def drain(self, data):
        name = data.draw(st.sampled_from(sorted(self.servers)))
        self.fleet.servers[name.encode()].draining = True
        self.servers[name]["draining"] = True

    @rule(minimum=st.integers(0, 8), evaluation=st.booleans(), exact=st.booleans(), times=st.integers(1, 6))
    def lease(self, minimum, evaluation, exact, times):
        samples = EVAL_SAMPLES if evaluation else SAMPLES
        exact = exact and evaluation
        for _ in range(times):
            chosen = self.fleet.choose(
                min_policy_version=minimum, samples=samples, now_s=self.now_s, exact=exact, reserve=evaluation
            )
            able = [name for name in self.servers if self._able(name, minimum, samples, evaluation, exact)]
            if chosen is None:
                assert not able, "somebody could have taken it"
                return
            assert chosen.name in able
            assert self._free(chosen.name) == max(self._free(name) for name in able), "most room first"
            group = f"group-{self.assigned}"
            self.assigned += 1
            self.fleet.assign(chosen, group, samples, evaluation=evaluation)
            self.holders[group] = (chosen.name, samples, evaluation)
            self.unfinished[group] = samples
            if self.servers[chosen.name]["left"] is not None:
                self.servers[chosen.name]["left"] += samples

    def _able(self, name, minimum, samples, evaluation, exact):
        server = self.servers[name]
        if server["draining"] or server["live"] is None or self.now_s - server["heard_s"] > LIVENESS_S / 2:
            return False
        live = server["live"].policy_version
        if live < minimum or (exact and live != minimum):
            return False
        if not evaluation:
            return self._left(name) < server["room"] + max(server["room"], samples)
        num_evals = sum(is_eval for holder, _, is_eval in self.holders.values() if holder == name)
        return num_evals * samples < max(samples, server["room"] // EVAL_SHARE)

    def _held(self, name):
        return sum(samples for holder, samples, _ in self.holders.values() if holder == name)

    def _free(self, name):
        return self.servers[name]["room"] - self._left(name)

    def _left(self, name):
        """Samples that have not ended, as far as the server has said."""
        left = self.servers[name]["left"]
        return self._held(name) if left is None else min(left, self._held(name))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), how=st.sampled_from(("release", "answered", "answered by another")))
    def finish(self, data, how):
        group = data.draw(st.sampled_from(sorted(self.holders)))
        name = self.holders[group][0]
        self._hear(name)
        if how == "release":
            released = self.fleet.release(group)
            assert released is not None
            assert released.name == name
        elif how == "answered":
            self.fleet.answered(name.encode(), group)
        else:
            for other in NAMES:
                if other != name:
                    self.fleet.answered(other.encode(), group)
            return
        self._let_go(group)

    def _let_go(self, group):
        received = self.servers[self.holders[group][0]]["received"]
        if group in received:
            received.remove(group)
        del self.holders[group]
        self.let_go += 1
        assert self.fleet.release(group) is None, "exactly once"

    @invariant()
    def the_books_agree(self):
        held = {g: s.name for s in self.fleet.servers.values() for g in s.outstanding}
        assert held == {group: holder for group, (holder, *_) in self.holders.items()}
        assert self.assigned == self.let_go + len(self.holders)
        for server in self.fleet.servers.values():
            assert server.samples == self._held(server.name)
            assert server.eval_outstanding <= set(server.outstanding)
            room, evals = server.hello.room, len(server.eval_outstanding) * EVAL_SAMPLES
            assert evals <= max(EVAL_SAMPLES, room // EVAL_SHARE)
            assert server.load == self._left(server.name)
            unfinished = sum(self.unfinished[group] for group in self._groups(server.name))
            assert unfinished <= server.load, "nothing under way is forgotten"
            assert unfinished - evals < room + max(room, SAMPLES) + SAMPLES, "no group is added beyond that"


FleetMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestFleet = FleetMachine.TestCase
