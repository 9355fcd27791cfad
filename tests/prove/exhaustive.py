"""All interleavings of a small case: every state that can be reached, the oldest group trained, and dead ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from protocol.errors import StalenessViolation
from tests.prove.world import Case, Move, World

FAULTS = frozenset({"filter", "lose", "skip", "turn", "depth", "short"})
"""Moves that nothing may depend on: progress must be possible without them."""


@dataclass
class Found:
    """What a search found."""

    states: int = 0
    transitions: int = 0
    staleness_max: int = 0
    dead_ends: int = 0
    """States from which, with no fault ever again, no step can train."""
    violation: str = ""
    trace: list[Move] = field(default_factory=list)
    """Shortest way to the violation, else to the oldest group that trains, else to a dead end."""


def search(case: Case, *, most_states: int = 2_000_000) -> Found:
    """Go through all that can happen, breadth first; stop at the first violation of I4."""
    first = World(case)
    ids: dict[Hashable, int] = {first.key(): 0}
    came: list[tuple[int, Move]] = [(0, ())]
    back: list[list[int]] = [[]]  # by state: those that get there without a fault
    trains: list[int] = []
    queue = deque([(0, first)])
    found = Found()
    while queue:
        here, world = queue.popleft()
        for move in world.moves():
            after = world.fork()
            found.transitions += 1
            try:
                staleness = after.apply(move)
            except StalenessViolation as error:
                found.violation, found.trace = str(error), trace_to(came, here, move)
                found.states = len(ids)
                return found
            there = ids.setdefault(after.key(), len(ids))
            if there == len(came):
                assert there < most_states, f"{case.name}: more than {most_states} states"
                came.append((here, move))
                back.append([])
                queue.append((there, after))
            if move[0] not in FAULTS:
                back[there].append(here)
            if staleness is not None:
                trains.append(here)
                if staleness > found.staleness_max:
                    found.staleness_max, found.trace = staleness, trace_to(came, here, move)
    stuck = dead_ends(back, trains)
    found.states, found.dead_ends = len(ids), len(stuck)
    if stuck:
        found.trace = trace_to(came, min(stuck), ())
    return found


def dead_ends(back: list[list[int]], trains: list[int]) -> set[int]:
    """States from which none that trains can be reached."""
    alive = set(trains)
    stack = list(alive)
    while stack:
        for before in back[stack.pop()]:
            if before not in alive:
                alive.add(before)
                stack.append(before)
    return set(range(len(back))) - alive


def trace_to(came: list[tuple[int, Move]], state: int, last: Move) -> list[Move]:
    """The moves that lead to a state, and one more."""
    moves = [last] if last else []
    while state:
        state, move = came[state]
        moves.append(move)
    return moves[::-1]
