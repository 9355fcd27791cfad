"""One small world around a ledger: what can happen next, and when two worlds have the same future.

Everything that a run can do to the ledger is a move. Left out, because it commutes with the moves that are here:
slots that are granted later than they could be (a group not yet granted counts as one that may overtake, and only
grants take slots), and servers that go live at another version than the newest published one (the swap might as well
have come first). A finished group is as old as it may be: as its server was when it got the lease.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from learner.ledger import End, Entry, Ledger, State
from learner.staleness import Bounds
from tests.prove.wrong import LateSamplesCredited

Move = tuple[str | int, ...]
PLENTY = 1_000_000
"""max_refill_ratio of cases without short steps."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is searched: the bounds, how many servers, and which misfortunes are among the moves."""

    bounds: Bounds
    servers: int = 1
    ledger: type[Ledger] = Ledger
    losses: bool = False
    filters: bool = False
    skips: bool = False
    keeps_tokens: bool = False
    """A lost group goes on from the tokens it has (no shipped rule does that)."""
    max_refill_ratio: int = PLENTY
    """Below PLENTY: short and empty steps once so many groups per trained one were filtered."""
    depths: bool = False
    """The depth may change at any moment, to any that is allowed."""
    turned_to: Bounds | None = None
    """A live knob: at any moment, once, these become the ledger's bounds."""

    @property
    def name(self) -> str:
        """The numbers that matter, in one line."""
        b = self.bounds
        flags = [word for word in ("losses", "filters", "skips", "depths") if vars(self)[word]]
        short = ["short steps"] if self.max_refill_ratio < PLENTY else []
        numbers = f"P {b.prompts_per_step} S {b.steps_ahead} W {b.reorder_window} k {b.weight_sync_steps}"
        return f"{numbers}, servers {self.servers}" + "".join(f", {flag}" for flag in flags + short)


def bounds_of(p: int, s: int, w: int = 1, k: int = 1) -> Bounds:
    """Bounds with the max_staleness of the formula, whether or not derive_bounds would have them."""
    return Bounds(
        prompts_per_step=p, max_staleness=s + -(-(w - 1) // p), reorder_window=w, steps_ahead=s, weight_sync_steps=k
    )


class World:
    """A ledger, the versions that servers are live at, and the batches that wait to train."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.ledger = case.ledger(case.bounds, max_refill_ratio=case.max_refill_ratio)
        self.live = [0] * case.servers
        self.published = 0
        self.batches: list[list[int]] = []
        self.turned = False
        self._grant()

    def moves(self) -> Iterator[Move]:
        """Everything that can happen next. Of servers alike one is enough."""
        case, ledger = self.case, self.ledger
        for entry in ledger.pending():
            needed = ledger.min_policy_version(entry.sequence)
            for version in sorted(set(self.live)):
                if version >= needed:
                    yield "lease", entry.sequence, version
        for entry in ledger.entries.values():
            if entry.state is State.LEASED:
                yield "finish", entry.sequence
                if case.filters:
                    yield "filter", entry.sequence
                if case.losses:
                    yield "lose", entry.sequence
        chosen = ledger.select()
        if len(chosen) == ledger.bounds.prompts_per_step:
            yield ("batch",)
        elif ledger.refill_exhausted and (not chosen or ledger.may_train_short(chosen)):
            yield ("short",)
        if self.batches:
            yield ("train",)
            if case.skips:
                yield ("skip",)
        for version in sorted(set(self.live)):
            if version < self.published:
                yield "swap", version
        if case.depths:
            lowest, highest = ledger.bounds.lowest_depth, ledger.bounds.steps_ahead
            yield from (("depth", depth) for depth in range(lowest, highest + 1) if depth != ledger.depth)
        if case.turned_to is not None and not self.turned:
            yield ("turn",)

    def apply(self, move: Move) -> int | None:
        """Do it; return the staleness of the oldest group when it is a step that trains.

        Raises:
            StalenessViolation: the step trains what is too old.
        """
        ledger, (what, *args) = self.ledger, move
        staleness = None
        if what == "lease":
            ledger.dispatched(int(args[0]), "server", int(args[1]))
        elif what in ("finish", "filter"):
            entry = ledger.entries[int(args[0])]
            ledger.delivered(entry.ordinal, entry.floor)
            if what == "filter":
                ledger.end(entry.sequence, End.FILTERED)
        elif what == "lose":
            ledger.lost(int(args[0]), fault=False)
        elif what in ("batch", "short"):
            chosen = ledger.select()
            ledger.batch(chosen)
            self.batches += [chosen] if chosen else []
            for entry in ledger.expired():
                ledger.end(entry.sequence, End.STALE)
        elif what == "train":
            staleness = self._train()
        elif what == "skip":
            ledger.skip(self.batches.pop(0))
        elif what == "swap":
            self.live[self.live.index(int(args[0]))] = self.published
            ledger.live(self.published)
        elif what == "depth":
            ledger.limit_depth(int(args[0]))
        else:
            self.turned = True
            assert self.case.turned_to is not None
            ledger.bounds = self.case.turned_to
            ledger.depth = ledger.bounds.steps_ahead
        self._grant()
        return staleness

    def fork(self) -> World:
        """Another world in the same state."""
        twin = object.__new__(World)
        twin.case, twin.live, twin.published, twin.turned = self.case, [*self.live], self.published, self.turned
        twin.batches = [*self.batches]
        twin.ledger = fork_ledger(self.ledger)
        return twin

    def key(self) -> tuple[object, ...]:
        """Equal for worlds with the same future: versions count from now, and only gaps below W between sequences."""
        ledger, now = self.ledger, self.ledger.policy_version
        window = max(self.case.bounds.reorder_window, ledger.bounds.reorder_window)
        oldest = -1 - ledger.bounds.max_staleness - ledger.bounds.weight_sync_steps
        untaken, last = [], ledger.next_sequence
        for sequence in reversed(ledger._untaken):
            entry = ledger.entries[sequence]
            sampled = entry.state is not State.PENDING or (self.case.keeps_tokens and entry.attempt > 0)
            floor = entry.floor - now if sampled else None
            untaken.append((min(window, last - sequence), entry.state.value, floor))
            last = sequence
        late = ledger.late if isinstance(ledger, LateSamplesCredited) else None
        exhausted = self.case.max_refill_ratio * ledger.bounds.prompts_per_step + 1
        return (
            tuple(untaken),
            tuple(tuple(sorted(ledger.entries[s].floor - now for s in batch)) for batch in self.batches),
            tuple(sorted((step - now, count) for step, count in ledger._awaiting_live.items())),
            tuple(sorted(max(oldest, version - now) for version in self.live)),
            self.published - now,
            self.turned,
            ledger.depth,
            0 if self.case.max_refill_ratio == PLENTY else min(exhausted, ledger.filtered_since_batch),
            None if late is None else late - now,
        )

    def _train(self) -> int:
        ledger, batch = self.ledger, self.batches.pop(0)
        ledger.check_staleness(batch)
        staleness = max(ledger.policy_version - ledger.entries[sequence].floor for sequence in batch)
        ledger.trained(batch, ledger.policy_version + 1)
        if ledger.policy_version % ledger.bounds.weight_sync_steps == 0:
            self.published = ledger.policy_version
        return staleness

    def _grant(self) -> None:
        while self.ledger.can_grant():
            self.ledger.grant()


def fork_ledger(ledger: Ledger) -> Ledger:
    """Copy a ledger of whatever class; what it only counts is shared."""
    twin = object.__new__(type(ledger))
    vars(twin).update(vars(ledger))
    twin.entries = {sequence: fork_entry(entry) for sequence, entry in ledger.entries.items()}
    twin.ends = ledger.ends.copy()
    twin._by_ordinal = ledger._by_ordinal.copy()
    twin._untaken = ledger._untaken.copy()
    twin._pending = ledger._pending.copy()
    twin._awaiting_live = ledger._awaiting_live.copy()
    return twin


def fork_entry(entry: Entry) -> Entry:
    """dataclasses.replace, at a quarter of its time: half of a search is spent here."""
    return Entry(
        ordinal=entry.ordinal, sequence=entry.sequence, state=entry.state, attempt=entry.attempt,
        faults=entry.faults, server=entry.server, floor=entry.floor,
    )  # fmt: skip
