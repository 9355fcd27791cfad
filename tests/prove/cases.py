"""What is searched exhaustively, what each search must find, and the rejected rules with what breaks them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from learner.dropping import DroppingLedger
from learner.ledger import Ledger
from learner.staleness import Bounds
from tests.prove.exhaustive import Found
from tests.prove.world import Case, bounds_of
from tests.prove.wrong import (
    FreedAtOptimizerStep,
    LateSamplesCredited,
    LostToTheTail,
    SlotsAlone,
    WindowOfPositions,
)

B = bounds_of

PLAIN = [
    B(1, 0), B(1, 1), B(1, 2), B(2, 0), B(2, 1), B(3, 0),
    B(1, 1, 2), B(1, 1, 3), B(1, 2, 2), B(2, 1, 2), B(2, 1, 3),
    B(1, 1, 1, 2), B(1, 2, 1, 2), B(1, 2, 2, 2), B(1, 2, 1, 3), B(1, 3, 1, 3), B(2, 1, 1, 2),
]  # fmt: skip
USELESS_WINDOW = [B(1, 0, 2), B(1, 1, 2, 2), B(1, 2, 2, 3), B(2, 1, 3, 2), B(2, 0, 3)]
"""S = k - 1: derive_bounds refuses a window here, because S is all that is ever reached."""
NO_PROGRESS = [B(1, 0, 1, 2), B(1, 1, 1, 3), B(2, 0, 1, 2), B(1, 0, 1, 3)]
"""S < k - 1: derive_bounds refuses it."""

SMALL = [
    *(Case(bounds=bounds) for bounds in [*PLAIN, *USELESS_WINDOW, *NO_PROGRESS]),
    *(Case(bounds=bounds, servers=2) for bounds in PLAIN if bounds not in (B(2, 1, 2), B(2, 1, 3))),
    *(Case(bounds=bounds, servers=2) for bounds in [*USELESS_WINDOW[:2], *NO_PROGRESS]),
    Case(bounds=B(1, 1), servers=2, losses=True, filters=True, skips=True),
    Case(bounds=B(1, 1, 2), servers=2, losses=True, filters=True, skips=True),
    Case(bounds=B(2, 1), losses=True, filters=True, skips=True),
    Case(bounds=B(1, 2, 1, 2), servers=2, losses=True, filters=True, skips=True),
    Case(bounds=B(1, 1), servers=2, losses=True, depths=True),
    Case(bounds=B(1, 2), depths=True),
    Case(bounds=B(1, 2, 2), depths=True),
    Case(bounds=B(2, 1), losses=True, depths=True),
    Case(bounds=B(1, 2, 1, 2), servers=2, depths=True),
    Case(bounds=B(2, 0), servers=2, losses=True, filters=True, max_refill_ratio=0),
    Case(bounds=B(2, 1), losses=True, filters=True, max_refill_ratio=0),
    Case(bounds=B(2, 1), filters=True, skips=True, max_refill_ratio=1),
    *(Case(bounds=B(*numbers), ledger=SlotsAlone) for numbers in [(1, 2), (2, 1), (1, 1, 3), (2, 1, 2), (1, 2, 1, 2)]),
    *(Case(bounds=B(*numbers), ledger=DroppingLedger) for numbers in [(1, 0), (1, 1), (1, 2), (2, 1), (1, 2, 1, 2)]),
    Case(bounds=B(1, 1), ledger=DroppingLedger, servers=2, losses=True, filters=True, skips=True, depths=True),
    Case(bounds=B(2, 1), ledger=DroppingLedger, filters=True, max_refill_ratio=0),
]  # fmt: skip
"""A few seconds together: part of `make test`."""

LARGE = [
    *(Case(bounds=B(*numbers), servers=2) for numbers in [(2, 1, 2), (2, 1, 3), (1, 2, 3), (1, 3), (1, 3, 2, 2)]),
    *(Case(bounds=B(*numbers)) for numbers in [(2, 2), (3, 1), (2, 2, 1, 2), (2, 2, 3, 2), (1, 3, 2), (1, 4, 2, 3)]),
    Case(bounds=B(2, 1, 3), losses=True, filters=True, skips=True),
    Case(bounds=B(2, 1), servers=2, losses=True, filters=True, skips=True),
    Case(bounds=B(2, 1, 3), filters=True, max_refill_ratio=0),
    Case(bounds=B(1, 2, 2), servers=2, losses=True, filters=True, skips=True),
    Case(bounds=B(2, 1, 3), depths=True),
    Case(bounds=B(1, 2, 2), servers=2, losses=True, depths=True),
    Case(bounds=B(2, 1), ledger=DroppingLedger, servers=2, losses=True, filters=True, skips=True),
]
"""About a minute together: part of `make prove`."""


EXAMPLE = Case(bounds=B(2, 1, 3))
"""The worked example of learner/staleness.md."""


def expected_staleness(case: Case) -> int | None:
    """The oldest that any group trains with, exactly. None where no run gets anywhere."""
    s, k = case.bounds.steps_ahead, case.bounds.weight_sync_steps
    if s < k - 1:
        return None
    return case.bounds.max_staleness if s >= k else s


def problems(case: Case, found: Found) -> list[str]:
    """What a search found that the note does not say."""
    expected = expected_staleness(case)
    wrong = [found.violation] if found.violation else []
    if expected is None:
        return wrong if found.dead_ends else [*wrong, "no dead end, and S < k - 1 should have some"]
    if found.dead_ends:
        wrong.append(f"{found.dead_ends} states from which no step can train")
    if not found.violation and found.staleness_max != expected:
        wrong.append(f"staleness {found.staleness_max} is reached, {expected} should be")
    return wrong


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A rule that was not taken."""

    name: str
    holds: tuple[Case, ...]
    """Smaller cases in which it does no harm."""
    breaks: Case
    """The smallest in which it breaks the bound, in order of slots, then window."""


def _rejected(name: str, ledger: type[Ledger], holds: list[Bounds], breaks: Bounds, like: Case) -> Rejected:
    def case(bounds: Bounds) -> Case:
        return replace(like, bounds=bounds, ledger=ledger)

    return Rejected(name=name, holds=tuple(case(bounds) for bounds in holds), breaks=case(breaks))


ONE = Case(bounds=B(1, 0))
REJECTED = [
    _rejected("a slot frees at the first live server, any server gets leases", SlotsAlone, [], B(1, 0),
              replace(ONE, servers=2)),
    _rejected("a slot frees at the optimizer step", FreedAtOptimizerStep, [], B(1, 0), ONE),
    _rejected("the window counts places in the queue", WindowOfPositions, [B(1, 0, 2), B(1, 0, 3)], B(1, 1, 2), ONE),
    _rejected("a lost group goes to the tail with its tokens", LostToTheTail, [B(1, 0), B(2, 0)], B(1, 1),
              replace(ONE, losses=True, keeps_tokens=True)),
    _rejected("late samples train when they come", LateSamplesCredited, [], B(1, 0), ONE),
    _rejected("prompts_per_step 2 -> 1 at once", Ledger, [], B(2, 0), replace(ONE, turned_to=B(1, 0))),
    _rejected("S 1, W 1 -> S 0, W 2 at once", Ledger, [], B(1, 1), replace(ONE, turned_to=B(1, 0, 2))),
]  # fmt: skip
