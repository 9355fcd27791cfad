"""The shipped ledger and fleet, driven at random and by an adversary, and judged from outside.

The machine is the world: it knows which version every token was really sampled by, which ordinals are under way, and
counts nothing by the ledger's own word. It runs in rounds; each lets some groups finish, some steps train, some
servers swap. How eagerly is a *mood*, drawn anew every few rounds: among them one that keeps back whatever could still
become as old as the bound allows, and one in which servers swap only when nothing else can happen. A round in which
nothing moves is followed by one in which everything does that may; when nothing moves even then, the run is stuck, and
says so.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from learner.dropping import DroppingLedger
from learner.fleet import Fleet
from learner.ledger import End, Entry, Ledger, LedgerSnapshot, State, Verdict
from learner.staleness import Bounds
from protocol.messages import Hello
from protocol.versions import Lineage, Version

MOOD_ROUNDS = 25
NOW_S, LIVENESS_S = 0.0, 10.0
"""Time stands still: who is silent is not the ledger's business."""
LATE_KEPT = 8
"""Answers of lost leases that may still come."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is driven, and what goes wrong. Probabilities are per group (filter, lose), step (skip) or round."""

    name: str
    bounds: Bounds
    """Of which a restart may choose one of `others` in the place."""
    others: tuple[Bounds, ...] = ()
    servers: int = 1
    room: int = 1 << 20
    """Groups that a server decodes at once."""
    ledger: type[Ledger] = Ledger
    filter: float = 0.0
    lose: float = 0.0
    skip: float = 0.0
    leave: float = 0.0
    restart: float = 0.0
    depth: float = 0.0
    max_refill_ratio: int = 4

    @property
    def drops(self) -> bool:
        """Whether groups may end stale."""
        return issubclass(self.ledger, DroppingLedger)


@dataclass
class Tally:
    """What happened. Adds up over machines."""

    counts: Counter[str] = field(default_factory=Counter)
    staleness: Counter[int] = field(default_factory=Counter)
    """Groups trained, by their staleness."""

    @property
    def groups(self) -> int:
        """Groups that ended, whichever way."""
        return sum(self.counts[end] for end in End)

    def add(self, other: Tally) -> None:
        """Count another machine's in."""
        self.counts.update(other.counts)
        self.staleness.update(other.staleness)


class Broken(AssertionError):
    """An invariant does not hold, or nothing moves."""


@dataclass
class Mood:
    """How eager everybody is for a while."""

    finish: float
    train: float
    swap: float
    hold: bool
    """Keep back what could become as old as the bound."""

    @staticmethod
    def draw(dice: random.Random) -> Mood:
        return Mood(
            finish=dice.choice((0.2, 0.6, 1.0)),
            train=dice.choice((0.3, 1.0, 1.0)),
            swap=dice.choice((0.0, 0.0, 0.2, 1.0)),
            hold=dice.random() < 0.5,
        )


ALL_AT_ONCE = Mood(finish=1.0, train=1.0, swap=1.0, hold=False)


class Machine:
    """One run. `run` goes on until so many groups have ended."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan = plan
        self.dice = random.Random(seed)
        self.bounds = plan.bounds
        self.most_slots = plan.bounds.slots_total
        """That may be in use: more than slots_total until a run that goes on with a lower bound has drained."""
        self.tally = Tally()
        self.incarnation = 1
        self.lineage = Lineage([(1, 0)])
        self.fleet = Fleet(self.lineage, liveness_s=LIVENESS_S)
        self.ledger = self._new_ledger()
        self.published = Version(1, 0)
        self.batches: list[list[int]] = []
        self.out: dict[int, Entry] = {}
        """Leased groups by sequence, in the order of their leases."""
        self.oldest: dict[int, int] = {}
        """policy_version that the oldest token of a group was really sampled by, by sequence."""
        self.late: list[tuple[int, int]] = []
        self.under_way: set[int] = set()
        self.journal: dict[int, int] = {}
        """Oldest version of the groups that were delivered, by ordinal, while a restart may want them."""
        self.restored: dict[int, int] = {}
        """Of those, what the last restart found and whose prompt has not been granted again."""
        self.checkpoint: tuple[LedgerSnapshot, set[int]] = (self.ledger.snapshot(), set())
        self.moved = False
        for number in range(plan.servers):
            self._join(b"server-%d" % number)

    def run(self, groups: int) -> Tally:
        """Go on until so many groups have ended.

        Raises:
            Broken: I1, I3 or I4 does not hold, or nothing moves (I8).
            StalenessViolation: the ledger's own check found it.
        """
        mood, rounds, idle = Mood.draw(self.dice), 0, 0
        while self.tally.groups < groups:
            rounds += 1
            if rounds % MOOD_ROUNDS == 0:
                mood = Mood.draw(self.dice)
            self.moved = False
            self._round(ALL_AT_ONCE if idle else mood)
            idle = 0 if self.moved else idle + 1
            if idle > 3:
                raise Broken(f"I8: nothing moves: {self.ledger.counts()}, {self.ledger.slots_in_use} slots in use")
        return self.tally

    def _round(self, mood: Mood) -> None:
        dice, plan = self.dice, self.plan
        self._lease()
        self._finish(mood)
        self._form()
        while self.batches and dice.random() < mood.train:
            self._step()
            self._form()
        for peer in list(self.fleet.servers):
            if dice.random() < mood.swap:
                self._swap(peer)
        if plan.leave and dice.random() < plan.leave:
            self._leave(dice.choice(list(self.fleet.servers)))
        if plan.depth and dice.random() < plan.depth:
            self.ledger.limit_depth(dice.randint(self.ledger.bounds.lowest_depth, self.ledger.bounds.steps_ahead))
            self.tally.counts["depths"] += 1
        if plan.restart and dice.random() < plan.restart:
            self._restart()
        if self.ledger.slots_in_use > self.most_slots:
            raise Broken(f"I1: {self.ledger.slots_in_use} slots in use of {self.most_slots}")
        self.most_slots = max(self.bounds.slots_total, self.ledger.slots_in_use)
        if self.ledger.unaccounted or len(self.under_way) != len(self.ledger.entries):
            raise Broken(f"I3: {self.ledger.unaccounted} unaccounted, {self.ledger.counts()}")

    def _lease(self) -> None:
        """As leasing.py does."""
        ledger, fleet = self.ledger, self.fleet
        while ledger.can_grant():
            entry = ledger.grant()
            self.under_way.add(entry.ordinal)
            self._restore(entry)
            self.moved = True
        for entry in ledger.pending():
            needed = ledger.min_policy_version(entry.sequence)
            server = fleet.choose(min_policy_version=needed, samples=1, now_s=NOW_S)
            if server is None or server.live is None:
                return
            version = server.live.policy_version
            ledger.dispatched(entry.sequence, server.name, version)
            fleet.assign(server, str(entry.ordinal), 1)
            self.out[entry.sequence], self.oldest[entry.sequence] = entry, version
            self.moved = True

    def _finish(self, mood: Mood) -> None:
        dice, plan, ledger, bound = self.dice, self.plan, self.ledger, self.bounds.max_staleness
        for sequence, entry in list(self.out.items()):
            if dice.random() >= mood.finish:
                continue
            if mood.hold and ledger.latest_version(sequence) - entry.floor >= bound:
                continue
            if plan.lose and dice.random() < plan.lose:
                self._lose(entry, fault=dice.random() < 0.3)
            elif ledger.find(entry.ordinal) is not None:
                self._deliver(entry, self.oldest[sequence])
        if self.late and dice.random() < 0.5:
            self._late_answer(*self.late.pop(dice.randrange(len(self.late))))

    def _restore(self, entry: Entry) -> None:
        """As arrivals.py does: a group that is in the journal need not be sampled again, if it is not too old."""
        oldest = self.restored.pop(entry.ordinal, None)
        if oldest is not None and self.ledger.judge(entry.ordinal, oldest) is Verdict.ACCEPT:
            self.tally.counts["restored"] += 1
            self._deliver(entry, oldest)

    def _deliver(self, entry: Entry, oldest: int) -> None:
        ledger, sequence = self.ledger, entry.sequence
        if ledger.judge(entry.ordinal, oldest) is not Verdict.ACCEPT:
            raise Broken(f"a group leased by the rules was refused: {entry}, {ledger.latest_version(sequence)}")
        ledger.delivered(entry.ordinal, oldest)
        self.fleet.release(str(entry.ordinal))
        self.out.pop(sequence, None)
        self.oldest[sequence] = oldest
        self.moved = True
        if self.plan.restart:
            self.journal[entry.ordinal] = oldest
        if self.plan.filter and self.dice.random() < self.plan.filter:
            ledger.end(sequence, End.FILTERED)
            self._ended(entry, End.FILTERED)

    def _lose(self, entry: Entry, *, fault: bool) -> None:
        """The lease will not be answered, or late."""
        self.tally.counts["losses"] += 1
        self.fleet.release(str(entry.ordinal))
        del self.out[entry.sequence]
        self.late = [*self.late[1 - LATE_KEPT :], (entry.ordinal, self.oldest[entry.sequence])]
        if self.ledger.lost(entry.sequence, fault=fault) is None:
            self._ended(entry, End.QUARANTINED)
        self.moved = True

    def _late_answer(self, ordinal: int, oldest: int) -> None:
        """Of a lease that was lost: as good as any, if it is not too old by now."""
        entry = self.ledger.find(ordinal)
        if entry is not None and self.ledger.judge(ordinal, oldest) is Verdict.ACCEPT:
            self.tally.counts["late answers"] += 1
            self._deliver(entry, oldest)

    def _form(self) -> None:
        """As batch_loop does."""
        ledger = self.ledger
        while True:
            chosen = ledger.select()
            full = len(chosen) == ledger.bounds.prompts_per_step
            if not full and not (ledger.refill_exhausted and (not chosen or ledger.may_train_short(chosen))):
                return
            self.tally.counts["short steps"] += not full
            ledger.batch(chosen)
            self.batches += [chosen] if chosen else []
            for entry in ledger.expired():
                if not self.plan.drops:
                    raise Broken(f"I3: {entry} is dropped, with staleness_policy wait")
                ledger.end(entry.sequence, End.STALE)
                self.fleet.release(str(entry.ordinal))
                self.out.pop(entry.sequence, None)
                self._ended(entry, End.STALE)
            self.moved = True

    def _step(self) -> None:
        ledger, batch = self.ledger, self.batches.pop(0)
        entries = [ledger.entries[sequence] for sequence in batch]
        ledger.check_staleness(batch)
        self.moved = True
        if self.plan.skip and self.dice.random() < self.plan.skip:
            ledger.skip(batch)
            for entry in entries:
                self._ended(entry, End.SKIPPED)
            return
        for entry in entries:
            staleness = ledger.policy_version - self.oldest[entry.sequence]
            if not 0 <= staleness <= self.bounds.max_staleness:
                raise Broken(f"I4: staleness {staleness}, the bound is {self.bounds.max_staleness}: {entry}")
            self.tally.staleness[staleness] += 1
            self._ended(entry, End.TRAINED)
        ledger.trained(batch, ledger.policy_version + 1)
        self.tally.counts["steps"] += 1
        if ledger.policy_version % self.bounds.weight_sync_steps == 0:
            self.published = Version(self.incarnation, ledger.policy_version)
            if self.plan.restart and self.dice.random() < 0.2:
                self.checkpoint = (ledger.snapshot(), set(self.under_way))
                self.journal = {o: v for o, v in self.journal.items() if o in self.under_way}

    def _ended(self, entry: Entry, how: End) -> None:
        """I3: once."""
        self.under_way.remove(entry.ordinal)
        del self.oldest[entry.sequence]
        self.tally.counts[how] += 1

    def _swap(self, peer: bytes) -> None:
        server = self.fleet.servers[peer]
        if server.live == self.published:
            return
        if not self.fleet.went_live(peer, self.published):
            raise Broken(f"I5: {server.name} cannot go from {server.live} to {self.published}")
        self.ledger.live(self.published.policy_version)
        self.moved = True

    def _join(self, peer: bytes) -> None:
        hello = Hello(
            session="s", server=peer.decode(), engine="none", room=self.plan.room, vocab_size=1, model_digest="",
            tokenizer_digest="", reward_functions=(),
        )  # fmt: skip
        self.fleet.join(peer, hello, NOW_S)

    def _leave(self, peer: bytes) -> None:
        """A server dies with all it holds, and comes back knowing nothing."""
        self.tally.counts["servers lost"] += 1
        for held_id in self.fleet.leave(peer):
            entry = self.ledger.find(int(held_id))
            if entry is not None and entry.state is State.LEASED:
                self._lose(entry, fault=False)
        self._join(peer)

    def _restart(self) -> None:
        """kill -9 of the learner: back to the checkpoint. Tokens of versions after it are orphaned (arrivals.py)."""
        snapshot, under_way = self.checkpoint
        self.tally.counts["restarts"] += 1
        self.incarnation += 1
        self.bounds = self.dice.choice((self.plan.bounds, *self.plan.others))
        self.ledger = self._new_ledger()
        self.ledger.restore(snapshot)
        self.most_slots = max(self.bounds.slots_total, self.ledger.slots_in_use)
        self.lineage = Lineage([(1, 0), (self.incarnation, self.ledger.policy_version)])
        self.fleet = Fleet(self.lineage, liveness_s=LIVENESS_S)
        for number in range(self.plan.servers):
            self._join(b"server-%d" % number)
        self.published = Version(self.incarnation, self.ledger.policy_version)
        self.under_way = set(under_way)
        self.batches, self.out, self.oldest, self.late = [], {}, {}, []
        self.restored = {o: v for o, v in self.journal.items() if v <= self.ledger.policy_version}
        self.journal = dict(self.restored)
        for entry in list(self.ledger.entries.values()):
            self._restore(entry)
        self.moved = True

    def _new_ledger(self) -> Ledger:
        return self.plan.ledger(self.bounds, max_refill_ratio=self.plan.max_refill_ratio)
