"""The configurations that `make prove` drives. Each must reach its bound, and none may pass it."""

from __future__ import annotations

import time

from learner.dropping import DroppingLedger
from protocol.errors import StalenessViolation
from tests.prove.machine import Broken, Machine, Plan, Tally
from tests.prove.world import bounds_of

B = bounds_of
TROUBLE = {"filter": 0.2, "lose": 0.05, "skip": 0.02, "leave": 0.01, "restart": 0.001, "depth": 0.02}

PLANS = [
    Plan(name="synchronous", bounds=B(8, 0), servers=2, **{**TROUBLE, "depth": 0.0}),
    Plan(name="one step ahead", bounds=B(8, 1)),
    Plan(name="three steps, closed window", bounds=B(8, 3), servers=2, **TROUBLE),
    Plan(name="the default", bounds=B(8, 3, 9)),
    Plan(name="the default, trouble", bounds=B(8, 3, 9), servers=3, **TROUBLE),
    Plan(name="window of three steps", bounds=B(4, 2, 13), servers=2, **TROUBLE),
    Plan(
        name="64 prompts, 16 servers",
        bounds=B(64, 3, 65),
        servers=16,
        room=24,
        **{**TROUBLE, "leave": 0.1, "depth": 0.1},
    ),
    Plan(name="one prompt, 8 ahead", bounds=B(1, 8), servers=3, **TROUBLE),
    Plan(name="every 4th version", bounds=B(8, 4, 1, 4), servers=2, **TROUBLE),
    Plan(name="every 4th, least depth", bounds=B(8, 3, 1, 4), **{**TROUBLE, "depth": 0.0}),
    Plan(name="every 2nd, window", bounds=B(4, 3, 5, 2), servers=3, **TROUBLE),
    Plan(name="short steps", bounds=B(4, 3, 5), servers=2, max_refill_ratio=1, **{**TROUBLE, "filter": 0.75}),
    Plan(name="little room", bounds=B(8, 4), servers=3, room=2, **TROUBLE),
    Plan(
        name="other bounds after restarts",
        bounds=B(4, 6),
        others=(B(4, 0), B(4, 1), B(4, 3, 5)),
        servers=2,
        **{**TROUBLE, "depth": 0.0, "restart": 0.02},
    ),
    Plan(name="drop", bounds=B(8, 4), servers=3, ledger=DroppingLedger, **TROUBLE),
    Plan(name="drop, one step ahead", bounds=B(8, 1), ledger=DroppingLedger, **{**TROUBLE, "depth": 0.0}),
]


def drive(job: tuple[int, int, int]) -> tuple[int, Tally, float, str]:
    """One machine, in a process of the pool: (plan, seed, groups) -> (plan, tally, CPU seconds, what broke)."""
    number, seed, groups = job
    machine, begun_s, broke = Machine(PLANS[number], seed), time.process_time(), ""
    try:
        machine.run(groups)
    except (Broken, StalenessViolation) as error:
        broke = f"{PLANS[number].name}, seed {seed}: {error}"
    return number, machine.tally, time.process_time() - begun_s, broke
