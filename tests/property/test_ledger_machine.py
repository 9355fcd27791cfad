"""I1-I4 on the shipped ledger, driven at random: several servers, rolling versions, filtered and skipped steps, lost
leases, late and duplicate groups, short steps, restarts from a checkpoint."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from learner.ledger import End, Ledger, State, Verdict
from learner.staleness import derive_bounds
from protocol.errors import ConfigError

SERVERS = ("north", "south", "east")


def possible_bounds():
    def build(args):
        m, p, w, k = args
        try:
            return derive_bounds(max_staleness=m, prompts_per_step=p, reorder_window=w, weight_sync_steps=k)
        except ConfigError:
            return None

    numbers = st.tuples(
        st.integers(0, 5), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 9)), st.integers(1, 3)
    )
    return numbers.map(build).filter(lambda bounds: bounds is not None)


class LedgerMachine(RuleBasedStateMachine):
    """The test is the world: it knows which version every token was really sampled by."""

    @initialize(bounds=possible_bounds(), refill=st.integers(0, 2))
    def start(self, bounds, refill):
        self.bounds = bounds
        self.refill = refill
        self.ledger = Ledger(bounds, max_attempts=3, max_refill_ratio=refill)
        self.live = dict.fromkeys(SERVERS, 0)
        self.published = 0
        self.batches: list[list[int]] = []
        self.trained: list[int] = []
        self.oldest: dict[int, int] = {}  # sequence -> version of its oldest token, once delivered
        self.late: list[tuple[int, int]] = []  # (ordinal, oldest version) of groups that lost servers may still send
        self.checkpoint = None

    @rule()
    def grant(self):
        if self.ledger.can_grant():
            self.ledger.grant()

    @rule()
    def row_is_too_long(self):
        self.ledger.filter_unleased()

    @rule(data=st.data())
    def dispatch(self, data):
        pending = self.ledger.pending()
        if not pending:
            return
        entry = data.draw(st.sampled_from(pending))
        needed = self.ledger.min_policy_version(entry.sequence)
        able = [name for name in SERVERS if self.live[name] >= needed]
        if able:
            server = data.draw(st.sampled_from(able))
            self.ledger.dispatched(entry.sequence, server, self.live[server])

    def _leased(self):
        return [e for e in self.ledger.entries.values() if e.state is State.LEASED]

    @rule(data=st.data(), filtered=st.booleans())
    def deliver(self, data, filtered):
        leased = self._leased()
        if not leased:
            return
        entry = data.draw(st.sampled_from(sorted(leased, key=lambda e: e.sequence)))
        oldest = data.draw(st.integers(entry.floor, self.live[entry.server]))
        # The structural guarantee: what a lease allowed is never too old at delivery.
        assert self.ledger.judge(entry.ordinal, oldest) is Verdict.ACCEPT
        self._take_in(entry.ordinal, oldest, filtered)

    def _take_in(self, ordinal, oldest, filtered):
        entry = self.ledger.delivered(ordinal, oldest)
        self.oldest[entry.sequence] = oldest
        if filtered:
            self.ledger.end(entry.sequence, End.FILTERED)
        assert self.ledger.judge(ordinal, oldest) is Verdict.DUPLICATE

    @rule(data=st.data(), fault=st.booleans())
    def lose(self, data, fault):
        leased = self._leased()
        if leased:
            entry = data.draw(st.sampled_from(sorted(leased, key=lambda e: e.sequence)))
            self.late.append((entry.ordinal, entry.floor))
            self.ledger.lost(entry.sequence, fault=fault)

    @rule(data=st.data())
    def late_group_arrives(self, data):
        if self.late:
            ordinal, oldest = data.draw(st.sampled_from(self.late))
            if self.ledger.judge(ordinal, oldest) is Verdict.ACCEPT:
                self._take_in(ordinal, oldest, False)

    @precondition(lambda self: len(self.batches) < 2)
    @rule()
    def form_batch(self):
        chosen = self.ledger.select()
        full = len(chosen) == self.bounds.prompts_per_step
        short = self.ledger.refill_exhausted and (not chosen or self.ledger.may_train_short(chosen))
        if full or short:
            self.ledger.batch(chosen)
            self.batches.append(chosen)

    @precondition(lambda self: self.batches)
    @rule()
    def train(self):
        batch = self.batches.pop(0)
        if not batch:
            return
        self.ledger.check_staleness(batch)
        for sequence in batch:
            staleness = self.ledger.policy_version - self.oldest[sequence]
            assert staleness <= self.bounds.max_staleness, "I4"
        self.trained += [self.ledger.entries[s].ordinal for s in batch]
        self.ledger.trained(batch, self.ledger.policy_version + 1)
        if self.ledger.policy_version % self.bounds.weight_sync_steps == 0:
            self.published = self.ledger.policy_version

    @precondition(lambda self: self.batches)
    @rule()
    def skip(self):
        self.ledger.skip(self.batches.pop(0))

    @rule(server=st.sampled_from(SERVERS))
    def serve_newest(self, server):
        self.live[server] = self.published
        self.ledger.live(self.published)

    @rule()
    def save(self):
        self.checkpoint = (self.ledger.snapshot(), list(self.trained), self.published)

    @precondition(lambda self: self.checkpoint)
    @rule()
    def restart(self):
        """kill -9: back to the checkpoint. Tokens of versions after it are orphaned, so nothing late is admissible."""
        snapshot, trained, _ = self.checkpoint
        self.ledger = Ledger(self.bounds, max_attempts=3, max_refill_ratio=self.refill)
        self.ledger.restore(snapshot)
        assert self.ledger.snapshot() == snapshot
        self.trained = list(trained)
        version = self.ledger.policy_version
        self.published = version
        self.live = dict.fromkeys(SERVERS, version)
        self.batches.clear()
        self.oldest.clear()
        self.late = [(ordinal, oldest) for ordinal, oldest in self.late if oldest <= version]

    @invariant()
    def counts_add_up(self):
        if not hasattr(self, "ledger"):
            return
        assert self.ledger.slots_in_use <= self.bounds.slots_total, "I1"
        assert self.ledger.unaccounted == 0, "I3"
        assert self.ledger.granted == self.ledger.cursor, "I3"
        assert len(self.trained) == len(set(self.trained)) == self.ledger.ends[End.TRAINED], "I3: none trained twice"
        for entry in self._leased():
            assert self.ledger.latest_version(entry.sequence) - entry.floor <= self.bounds.max_staleness, "I4"

    @invariant()
    def some_server_can_always_take_the_oldest(self):
        """I8: the lowest untaken group never asks for a version that does not exist yet."""
        if not hasattr(self, "ledger") or not self.ledger.pending():
            return
        first = self.ledger.pending()[0]
        if first.sequence == min(e.sequence for e in self.ledger.entries.values()):
            assert self.ledger.min_policy_version(first.sequence) <= self.ledger.policy_version


LedgerMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestLedger = LedgerMachine.TestCase
