"""I1-I4 on the shipped ledger, driven at random: several servers, rolling versions, filtered and skipped steps, lost
leases, late and duplicate groups, short steps, restarts from a checkpoint."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

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
        self.not_live: dict[int, int] = {}  # step -> groups trained in it, until a server is live at it
        self.late: list[tuple[int, int]] = []  # (ordinal, oldest version) of groups that lost servers may still send
        self.checkpoint = None

    @rule(
        data=st.data(),
        stragglers=st.integers(0, 3),
        filter_one_in=st.sampled_from((0, 0, 1, 2, 3)),
        train=st.integers(0, 2),
    )
    def advance(self, data, stragglers, filter_one_in, train):
        """One rule for the ordinary course of things: Hypothesis switches single rules off for whole runs."""
        self._lease(data)
        self._finish(data, stragglers, filter_one_in)
        for _ in range(min(train, len(self.batches))):
            self._train(data.draw(st.lists(st.sampled_from(SERVERS), unique=True)))

    def _lease(self, data):
        """Fill the free slots; every group goes to some server allowed to have it, the most outdated one included."""
        while self.ledger.can_grant():
            self.ledger.grant()
        for entry in self.ledger.pending():
            needed = self.ledger.min_policy_version(entry.sequence)
            able = sorted((name for name in SERVERS if self.live[name] >= needed), key=lambda name: self.live[name])
            if able:
                server = data.draw(st.sampled_from(able))
                self.ledger.dispatched(entry.sequence, server, self.live[server])

    def _leased(self):
        return sorted((e for e in self.ledger.entries.values() if e.state is State.LEASED), key=lambda e: e.sequence)

    def _finish(self, data, stragglers, filter_one_in):
        """All but the oldest few finish (out of order is what makes staleness); some have nothing to train on."""
        for number, entry in enumerate(self._leased()[stragglers:]):
            # Tokens may be as old as the server was at dispatch; the structural guarantee: that is never too old.
            oldest = entry.floor if number % 2 else data.draw(st.integers(entry.floor, self.live[entry.server]))
            assert self.ledger.judge(entry.ordinal, oldest) is Verdict.ACCEPT
            self._take_in(entry.ordinal, oldest, bool(filter_one_in) and number % filter_one_in == 0)
        self._form_batches()

    def _take_in(self, ordinal, oldest, filtered):
        entry = self.ledger.delivered(ordinal, oldest)
        self.oldest[entry.sequence] = oldest
        if filtered:
            self.ledger.end(entry.sequence, End.FILTERED)
        assert self.ledger.judge(ordinal, oldest) is Verdict.DUPLICATE

    def _form_batches(self):
        while len(self.batches) < 2:
            chosen = self.ledger.select()
            full = len(chosen) == self.bounds.prompts_per_step
            short = self.ledger.refill_exhausted and (not chosen or self.ledger.may_train_short(chosen))
            if not (full or short):
                return
            self.ledger.batch(chosen)
            if chosen:
                self.batches.append(chosen)

    def _train(self, publish_to):
        """Train the batch that was formed first; some servers (or none) go live."""
        batch = self.batches.pop(0)
        self.ledger.check_staleness(batch)
        for sequence in batch:
            assert self.ledger.policy_version - self.oldest[sequence] <= self.bounds.max_staleness, "I4"
        self.trained += [self.ledger.entries[s].ordinal for s in batch]
        self.ledger.trained(batch, self.ledger.policy_version + 1)
        self.not_live[self.ledger.policy_version] = len(batch)
        if self.ledger.policy_version % self.bounds.weight_sync_steps == 0:
            self.published = self.ledger.policy_version
        self._form_batches()
        for server in publish_to:
            self.serve_newest(server)

    @rule(server=st.sampled_from(SERVERS))
    def serve_newest(self, server):
        self.live[server] = self.published
        self.ledger.live(self.published)
        self.not_live = {step: count for step, count in self.not_live.items() if step > self.published}

    @rule(data=st.data(), what=st.sampled_from(("lose", "late", "skip", "long row", "save", "restart")))
    def disturb(self, data, what):
        leased = self._leased()
        if what == "lose" and leased:
            entry = data.draw(st.sampled_from(leased))
            self.late.append((entry.ordinal, entry.floor))
            self.ledger.lost(entry.sequence, fault=data.draw(st.booleans()))
        elif what == "late" and self.late:
            ordinal, oldest = data.draw(st.sampled_from(self.late))
            if self.ledger.judge(ordinal, oldest) is Verdict.ACCEPT:
                self._take_in(ordinal, oldest, False)
        elif what == "skip" and self.batches:
            self.ledger.skip(self.batches.pop(0))
        elif what == "long row":
            self.ledger.filter_unleased()
        elif what == "save":
            self.checkpoint = (self.ledger.snapshot(), list(self.trained))
        elif what == "restart" and self.checkpoint:
            self._restart()

    def _restart(self):
        """kill -9: back to the checkpoint. Tokens of versions after it are orphaned, so nothing late is admissible."""
        snapshot, trained = self.checkpoint
        self.ledger = Ledger(self.bounds, max_attempts=3, max_refill_ratio=self.refill)
        self.ledger.restore(snapshot)
        assert self.ledger.snapshot() == snapshot
        self.trained = list(trained)
        self.published = self.ledger.policy_version
        self.live = dict.fromkeys(SERVERS, self.published)
        self.not_live = {}
        self.batches.clear()
        self.oldest.clear()
        self.late = [(ordinal, oldest) for ordinal, oldest in self.late if oldest <= self.published]

    @invariant()
    def counts_add_up(self):
        if not hasattr(self, "ledger"):
            return
        slots = len(self.ledger.entries) + sum(self.not_live.values())
        assert self.ledger.slots_in_use == slots <= self.bounds.slots_total, "I1, I2"
        assert self.ledger.unaccounted == 0, "I3"
        assert self.ledger.granted == self.ledger.cursor, "I3"
        assert len(self.trained) == len(set(self.trained)) == self.ledger.ends[End.TRAINED], "I3: none trained twice"
        waiting = sorted(s for s, entry in self.ledger.entries.items() if entry.state is State.PENDING)
        assert [entry.sequence for entry in self.ledger.pending()] == waiting, "oldest first, none forgotten"
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


LedgerMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestLedger = LedgerMachine.TestCase
