"""Turns, driven at random: servers join, leave, stage, answer or do not, and newer versions are announced.

What must hold whatever happens: of the servers that serve, never more swap at once than the fleet's size allows; nobody
gets a turn who does not wait, or for anything but the newest version; nobody waits while a turn is free. And in a fleet
in which everyone answers, everyone comes to the newest version, however often it is superseded on the way.
"""

from __future__ import annotations

from statistics import median

import hypothesis.strategies as st
from hypothesis import example, given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from learner.rollover import MAX_TURN_S, TURN_S, Rollover
from protocol.versions import Version

NAMES = [f"s{index:02}".encode() for index in range(20)]
names = st.sampled_from(NAMES)


class RolloverMachine(RuleBasedStateMachine):
    """The test keeps its own book of every server."""

    def __init__(self):
        super().__init__()
        self.rollover = Rollover()
        self.now_s = 0.0
        self.version = 0
        self.live = {}
        """name -> Version or None, of the connected ones."""
        self.waiting = set()
        self.turns = {}
        """name -> (version, from, until, whether it served)"""
        self.late = {}
        """The same, of turns that are over and not answered."""
        self.swaps_s = []
        self.last_turn, self.turns_given = {}, 0
        """Those who had a turn for the newest version already: they come last."""

    @rule(count=st.integers(1, 20), live=st.none() | st.integers(0, 3))
    def join(self, count, live):
        for name in NAMES[:count]:
            if name not in self.live:
                version = None if live is None else Version(1, min(live, self.version))
                self.live[name] = version

    @rule(name=names)
    def leave(self, name):
        self.rollover.left(name)
        self.live.pop(name, None)
        self.waiting.discard(name)
        self.forget(name)
        self.last_turn.pop(name, None)

    @rule()
    def announce(self):
        self.version += 1
        self.rollover.begin(Version(1, self.version))
        self.waiting.clear()

    @precondition(lambda self: self.live and self.version)
    @rule(data=st.data(), behind=st.sampled_from((0, 0, 0, 1)))
    def stage(self, data, behind):
        chosen = data.draw(st.sets(st.sampled_from(sorted(self.live)), min_size=1))
        for name in sorted(chosen):
            assert self.rollover.staged(name, Version(1, self.version - behind)) is (behind == 0)
            self.forget(name)
            if behind == 0:
                self.waiting.add(name)
        self.grant()

    def forget(self, name):
        self.turns.pop(name, None)
        self.late.pop(name, None)

    @precondition(lambda self: self.turns or self.late)
    @rule(data=st.data(), how=st.sampled_from(("live", "failed", "lost")))
    def answer(self, data, how):
        turns = self.turns | self.late
        name = data.draw(st.sampled_from(sorted(turns)))
        version, begun_s, _, served = turns[name]
        self.forget(name)
        if how == "live":
            self.rollover.swapped(name, version, self.now_s)
            self.swaps_s += [self.now_s - begun_s] * served
        else:
            self.rollover.failed(name, None if how == "lost" else version)
        if how != "failed":
            self.live[name] = version if how == "live" else None
        self.grant()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def lose(self, data):
        name = data.draw(st.sampled_from(sorted(self.live)))
        self.rollover.failed(name)
        self.forget(name)
        self.live[name] = None
        self.grant()

    @rule(seconds=st.sampled_from((1.0, TURN_S / 2, TURN_S)))
    def time_passes(self, seconds):
        self.now_s += seconds
        late = {name for name, (_, _, until_s, _) in self.turns.items() if self.now_s >= until_s}
        assert set(self.rollover.expire(self.now_s)) == late
        for name in late:
            self.late[name] = self.turns.pop(name)
        self.grant()

    @rule()
    def grant(self):
        allowed = max(1, len(self.live) // 8)
        granted = self.rollover.grant(self.live, len(self.live), self.now_s)
        ages = [(self.last_turn.get(name, 0), self.live[name] or Version(-1, -1)) for name in granted]
        assert ages == sorted(ages), "who waits longest first"
        serving = [(self.last_turn.get(name, 0), self.live[name]) for name in granted if self.live[name] is not None]
        for name in granted:
            assert name in self.waiting, "nobody gets a turn twice, or without waiting"
            self.waiting.discard(name)
            self.late.pop(name, None)
            until_s = self.now_s + self.turn_s()
            self.turns[name] = (Version(1, self.version), self.now_s, until_s, self.live[name] is not None)
        pausing = sum(served for _, _, _, served in self.turns.values())
        assert not serving or pausing <= allowed
        for name in self.waiting:
            assert self.live[name] is not None, "who serves nothing waits for nobody"
            assert pausing >= allowed, "a turn is free and somebody waits"
            assert all((self.last_turn.get(name, 0), self.live[name]) >= age for age in serving), (
                "and nobody who waits longer waits on"
            )
        for name in granted:
            self.turns_given += 1
            self.last_turn[name] = self.turns_given

    def turn_s(self):
        return min(MAX_TURN_S, max(TURN_S, 3 * median(self.swaps_s[-16:] or [0.0])))

    @invariant()
    def the_books_agree(self):
        assert set(self.rollover.waiting) == self.waiting
        turns = self.rollover.turns.items()
        assert {name: (t.version, t.begun_s, t.ends_s, t.pauses) for name, t in turns} == self.turns
        assert TURN_S <= self.rollover.turn_s == self.turn_s() <= MAX_TURN_S


RolloverMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRollover = RolloverMachine.TestCase


@given(
    servers=st.integers(1, 40),
    announced_every=st.integers(2, 30),
    fetches=st.lists(st.integers(0, 1), min_size=40, max_size=40),
    failing=st.sets(st.integers(0, 39), max_size=8),
)
@example(servers=3, announced_every=2, fetches=[0] * 40, failing={0, 1})  # two that fail are all turns of a version
@settings(deadline=None)
def test_nobody_starves_however_often_the_version_is_superseded(servers, announced_every, fetches, failing):
    """Versions last shorter than a round of the fleet, and some servers fail at each: all the same everyone moves.

    Every second, in this order: a version is announced, the turns of the last second are answered, fetches end
    (`fetches` seconds after the announcement), turns are given.
    """
    rollover, now_s, version = Rollover(), 0, Version(1, 0)
    live = {f"s{index:02}".encode(): version for index in range(servers)}
    failing = {name for index, name in enumerate(live) if index in failing}
    moved_s = dict.fromkeys(live, 0)
    turns = {}
    while now_s < 3 * (servers + 2) * announced_every:
        if now_s % announced_every == 0:
            version = Version(1, version.policy_version + 1)
            rollover.begin(version)
        for name, granted in turns.items():
            moved_s[name] = now_s
            if name in failing:
                rollover.failed(name, granted)
            else:
                rollover.swapped(name, granted, now_s)
                live[name] = granted
        for index, name in enumerate(live):
            if live[name] < version and now_s % announced_every >= fetches[index]:
                rollover.staged(name, version)
        turns = dict.fromkeys(rollover.grant(live, len(live), now_s), version)
        for name, last_s in moved_s.items():
            assert now_s - last_s <= (servers + 2) * announced_every, f"{name} starves"
        now_s += 1
