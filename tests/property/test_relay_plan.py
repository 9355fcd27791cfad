"""Whoever joins, leaves, or is slow: one copy leaves the learner, nobody waits in a circle, and nobody is left out."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from learner.relay_plan import ANCESTORS, LEARNER, Fetched, Holder, plan_relay, route
from protocol.weights.manifest import BLOCK_BYTES

NAMES = [f"s{number:02}" for number in range(24)]
names = st.sampled_from(NAMES)


class RelayPlanMachine(RuleBasedStateMachine):
    """A learner's fleet over many versions. The test keeps its own book of who is told what."""

    def __init__(self):
        super().__init__()
        self.holders = {}
        """name -> Holder, in the order of joining."""
        self.fetched = {}
        self.parents = {}
        """Of the version before, as it was announced."""

    def plan(self):
        return plan_relay(list(self.holders.values()), self.fetched)

    @rule(name=names, relays=st.integers(0, 4))
    def joins(self, name, relays):
        before = self.plan()
        new = name not in self.holders
        self.holders.setdefault(name, Holder(name, f"tcp://10.0.0.{NAMES.index(name)}:5560" if relays else ""))
        if new and self.fetched.get(name) is None and all(f.nbytes == 0 for f in self.fetched.values()):
            after = self.plan()
            trunk = [n for n in before if self.holders[n].address]
            assert all(after[n] == before[n] for n in trunk), "who passes on keeps its parent when others join"

    @rule(name=names)
    def leaves(self, name):
        self.holders.pop(name, None)

    @rule(data=st.data(), blocks=st.integers(0, 500))
    def version_comes(self, data, blocks):
        """Everybody fetches it, from whom they are told, at most at the speed of their source."""
        self.parents = self.plan()
        for name in self.parents:
            seconds = data.draw(st.sampled_from([0.1, 1.0, 1.1, 5.0, 50.0]))
            self.fetched[name] = Fetched(blocks * BLOCK_BYTES, seconds, self.parents[name])

    @invariant()
    def everybody_is_reached_and_the_learner_feeds_few(self):
        plan = self.plan()
        assert set(plan) == set(self.holders)
        fed = [name for name, parent in plan.items() if parent == LEARNER]
        if any(holder.address for holder in self.holders.values()):
            assert len(fed) == 1
        else:
            assert len(fed) == len(self.holders)

    @invariant()
    def nobody_waits_in_a_circle_and_only_who_passes_on_is_asked(self):
        plan = self.plan()
        for name in plan:
            seen, at = set(), name
            while at != LEARNER:
                assert at not in seen
                seen.add(at)
                at = plan[at]
                assert at == LEARNER or self.holders[at].address
            ancestors = [holder.name for holder in route(name, plan, self.holders)]
            assert len(ancestors) <= ANCESTORS
            assert name not in ancestors
            assert set(ancestors) <= seen
            assert ancestors[:1] == [plan[name]][: len(ancestors)]

    @invariant()
    def nobody_feeds_many(self):
        children = {}
        for parent in self.plan().values():
            children[parent] = children.get(parent, 0) + 1
        children.pop(LEARNER, None)
        slow_or_silent = sum(1 for name in self.plan() if name not in children)
        assert all(count <= 2 + slow_or_silent for count in children.values())

    @invariant()
    def same_facts_same_plan(self):
        assert self.plan() == self.plan()


RelayPlanMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestRelayPlan = RelayPlanMachine.TestCase


@given(slow=st.integers(1, 7), servers=st.integers(3, 8))
def test_a_slow_server_becomes_the_last_and_those_behind_it_do_not(slow, servers):
    slow = min(slow, servers - 1)
    holders = [Holder(str(number), f"tcp://10.0.0.{number}:5560") for number in range(servers)]
    parents = plan_relay(holders, {})
    assert [parents[h.name] for h in holders] == [LEARNER, *(h.name for h in holders[:-1])]
    seconds = [1.0 if number < slow else 10.0 for number in range(servers)]
    fetched = {h.name: Fetched(100 * BLOCK_BYTES, s, parents[h.name]) for h, s in zip(holders, seconds, strict=True)}
    again = plan_relay(holders, fetched)
    others = [h.name for h in holders if h.name != str(slow)]
    assert [again[name] for name in others] == [LEARNER, *others[:-1]]
    assert again[str(slow)] == others[-1]


def test_a_slow_server_that_is_fast_again_comes_back():
    holders = [Holder(name, f"tcp://10.0.0.1:{port}") for port, name in enumerate("abc", 1)]
    slow = {"a": Fetched(1 << 30, 1.0, ""), "b": Fetched(1 << 30, 10.0, "a"), "c": Fetched(1 << 30, 10.0, "b")}
    assert plan_relay(holders, slow) == {"a": "", "c": "a", "b": "c"}
    fast = {"a": Fetched(1 << 30, 1.0, ""), "c": Fetched(1 << 30, 1.0, "a"), "b": Fetched(1 << 30, 1.1, "c")}
    assert plan_relay(holders, fast) == {"a": "", "b": "a", "c": "b"}


def test_a_slow_first_server_is_told_from_the_learners_link():
    """Those behind it moved on during the fetch, and were faster."""
    holders = [Holder(name, f"tcp://10.0.0.1:{port}") for port, name in enumerate("abc", 1)]
    fetched = {"a": Fetched(1 << 30, 10.0, ""), "b": Fetched(1 << 30, 2.0, "a"), "c": Fetched(1 << 30, 2.0, "b")}
    assert plan_relay(holders, fetched) == {"b": "", "c": "b", "a": "c"}


def test_many_servers_and_a_small_version_make_a_tree():
    holders = [Holder(str(number), f"tcp://10.0.0.1:{number}") for number in range(1, 64)]
    small = {"1": Fetched(5 * BLOCK_BYTES, 1.0, "")}
    parents = plan_relay(holders, small)
    depth = {"": 0}
    for name, parent in parents.items():
        depth[name] = depth[parent] + 1
    assert max(depth.values()) == 6
    large = {"1": Fetched(1000 * BLOCK_BYTES, 1.0, "")}
    assert list(plan_relay(holders, large).values()) == ["", *(str(number) for number in range(1, 63))]
