"""Ratios against a control of the same run: the only way a figure of speed is ever claimed here.

A row compares two sides. Each side is a function that does the work and returns one figure (seconds a step, groups
per second, ...). The harness runs both sides in fresh processes, one after the other, round by round in turning
order, and judges the median of the rounds' ratios; a loaded machine slows both sides alike. To add rows, put a module
into tests/bench/ that exports `ROWS`; there is nothing to register:

    def ours(quick: bool) -> float:
        ...                                    # imports of heavy things belong in here
        return seconds_per_step

    ROWS = [
        Row(
            name="weights_round",              # unique; what --only takes
            control="padded path",             # what the ratio is against, in words
            ours=ours,
            baseline=padded,                   # same signature; may return a computed ideal
            ratio="baseline/ours",             # for figures that should be small; "ours/baseline" for rates
            target=0.8,
            sense="higher",                    # is a higher or a lower ratio better?
        ),
    ]

Rows of the same `contest` run together: a function that several of them name runs once a round, and all of them
take their ratios from the same runs. A side may then return several figures by name, of which a row names its own;
one called "cpu_s" is what the side itself counted of CPU seconds, without its start-up.

A side that raises Skip("reason") skips the row; any other exception (a failed assert is a good one: that decoded
arrays are views, that no bound was broken) is a miss, with its last line as the reason. Sides are module-level
functions of the module that lists the row, or instances of its classes. `quick` asks for less work of the same kind.
A side that measures CPU seconds rather than wall seconds (`cpu_clock()`, children included) says so in `unit`. A side
that draws something takes `round_number()` as its seed, so that all sides of a round are given the same.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROUNDS = 5
QUICK_ROUNDS = 3
SIDE_TIMEOUT_S = 300.0
ROUND_VARIABLE = "HEADWAY_BENCH_ROUND"
ROOT = Path(__file__).parents[2]


Figures = dict[str, float]
Side = Callable[[bool], float | Figures]
Answer = dict[str, Any]
"""Of a side's process: {"figure": its figures, "cpu_s"}, {"skip": why} or {"failed": why}."""
SideKey = tuple[str, int]
"""Which side of a row, and the function's identity."""


class Skip(Exception):
    """Raised by a side that cannot run here; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. See the module's docstring."""

    name: str
    control: str
    ours: Side
    baseline: Side
    ratio: Literal["ours/baseline", "baseline/ours"]
    target: float
    sense: Literal["higher", "lower", "near"] = "higher"
    """near: the target is how far the ratio may be from 1."""
    unit: str = ""
    """Of both sides' figures, for the reader."""
    figure: str = "figure"
    """Which of the figures is compared, where the sides return several."""
    contest: str = ""
    """Rows of the same contest share their runs; empty for a row of its own."""
    rounds: int = ROUNDS
    """Fewer for figures that hardly vary (memory), and for sides that take minutes. A contest takes the most of its
    rows'."""
    quick_rounds: int = QUICK_ROUNDS
    timeout_s: float = SIDE_TIMEOUT_S
    """Of a side."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the report, and one object of the JSON."""

    name: str
    control: str
    ratio: float | None
    """Median of the rounds."""
    worst: float | None
    target: float
    sense: str
    verdict: Literal["pass", "miss", "skip"]
    reason: str = ""
    ours: float | None = None
    """Median figure of our side, in `unit`."""
    baseline: float | None = None
    unit: str = ""
    cpu_ratio: float | None = None
    """Median of our side's CPU seconds / the control's: of the whole process, start-up included, unless the sides
    count themselves."""
    ours_cpu_s: float | None = None
    """Median of our side's CPU seconds."""
    baseline_cpu_s: float | None = None
    rounds: int = 0
    loadavg: float = 0.0


def round_number() -> int:
    """Which round this side is of, from 0."""
    return int(os.environ.get(ROUND_VARIABLE, "0"))


def cpu_clock() -> float:
    """CPU seconds used so far by this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def run_row(row: Row, *, quick: bool) -> Result:
    """Run all rounds of a row and judge it."""
    return run_contest([row], quick=quick)[0]


def run_contest(rows: Sequence[Row], *, quick: bool) -> list[Result]:
    """Run all rounds of rows that share sides, each side once a round, and judge every row.

    The sides of a round take turns; every other round takes them backwards. A side that fails or skips ends the rows
    that name it; the others go on.
    """
    places = {side: (row, side[0]) for row in rows for side in _sides(row)}
    answers: dict[SideKey, list[Answer]] = {side: [] for side in places}
    going = list(rows)
    rounds = max(row.rounds for row in rows)
    quick_rounds = min(row.quick_rounds for row in rows)
    for number in range(min(rounds, quick_rounds) if quick else rounds):
        for side in places if number % 2 == 0 else reversed(places):
            if any(side in _sides(row) for row in going):
                answers[side].append(_run_side(*places[side], quick=quick, number=number))
                if "figure" not in answers[side][-1]:
                    going = [row for row in going if side not in _sides(row)]
    return [_judge(row, *(answers[side] for side in _sides(row))) for row in rows]


def _sides(row: Row) -> tuple[SideKey, SideKey]:
    return ("ours", id(row.ours)), ("baseline", id(row.baseline))


def _judge(row: Row, ours: list[Answer], baseline: list[Answer]) -> Result:
    for last in (*ours[-1:], *baseline[-1:]):
        if "figure" not in last:
            return _without_figures(row, last)
    pairs = list(zip(ours, baseline, strict=True))
    ratios = [_ratio(row, a["figure"][row.figure], b["figure"][row.figure]) for a, b in pairs]
    median = statistics.median(ratios)
    bad = {"higher": min, "lower": max, "near": lambda many: max(many, key=lambda one: abs(one - 1))}
    passed = {"higher": median >= row.target, "lower": median <= row.target, "near": abs(median - 1) <= row.target}
    return Result(
        name=row.name,
        control=row.control,
        ratio=median,
        worst=bad[row.sense](ratios),
        target=row.target,
        sense=row.sense,
        verdict="pass" if passed[row.sense] else "miss",
        ours=statistics.median(a["figure"][row.figure] for a in ours),
        baseline=statistics.median(b["figure"][row.figure] for b in baseline),
        unit=row.unit,
        cpu_ratio=statistics.median(a["cpu_s"] / b["cpu_s"] for a, b in pairs),
        ours_cpu_s=statistics.median(a["cpu_s"] for a in ours),
        baseline_cpu_s=statistics.median(b["cpu_s"] for b in baseline),
        rounds=len(pairs),
        loadavg=os.getloadavg()[0],
    )


def _ratio(row: Row, ours: float, baseline: float) -> float:
    return ours / baseline if row.ratio == "ours/baseline" else baseline / ours


def _without_figures(row: Row, answer: Answer) -> Result:
    return Result(
        name=row.name,
        control=row.control,
        ratio=None,
        worst=None,
        target=row.target,
        sense=row.sense,
        verdict="skip" if "skip" in answer else "miss",
        reason=answer.get("skip") or answer["failed"],
        unit=row.unit,
        loadavg=os.getloadavg()[0],
    )


def _run_side(row: Row, side: str, *, quick: bool, number: int) -> Answer:
    """Run one side in a fresh process."""
    module = row.ours.__module__
    command = [sys.executable, "-m", "tests.bench.side", module, row.name, side, *(["--quick"] if quick else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", ROUND_VARIABLE: str(number)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=row.timeout_s, env=environment, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"failed": f"{side} took longer than {row.timeout_s:.0f} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": f"{side}: {lines[-1]}"}
    answer: Answer = json.loads(done.stdout.splitlines()[-1])
    return answer


def to_json(results: list[Result]) -> str:
    """Return the results as the JSON list that other tools read."""
    return json.dumps([asdict(result) for result in results], indent=2)
