"""Ten thousand groups, a server killed with SIGKILL and started again every thousand: nothing grows, nothing is lost.

A learner process (training takes no time) and two server processes with the scripted engine (no delays), small groups.
CPU seconds and resident memory of each process are read from /proc as the learner passes each MARK of groups, and lines
are fitted by least squares to what comes after the warm-up. A slope is a trend when it is larger than the scatter
around the line explains (|t| > T_LIMIT) and adds up to more than LARGEST of the mean from the first mark to the last.
The server that is never killed stands for servers; the killed one is only counted. A run takes about 80 s.

    python -m tests.bench.soak [--quick]    prints the marks
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.bench.harness import Figures, Row

GROUPS, QUICK_GROUPS = 10_000, 6_000
KILL_EVERY, MARK = 1000, 250
WARM_UP = 4000
"""Until each process has kept as many waits as it keeps (protocol/waits.py), which takes 1 to 2 MB."""
PROMPTS_PER_STEP, NUM_GENERATIONS, LENGTH = 10, 4, 8
T_LIMIT = 3.0
LARGEST = {"cpu": 0.03, "rss": 0.01}
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")
LIMIT_S = 280.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A process when so many groups were trained."""

    groups: int
    cpu_s: float
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class Trend:
    """A line through what was measured."""

    total: float
    """What the line rises by from the first point to the last, as a share of the mean."""
    t: float
    """Slope over its standard error."""

    def exceeds(self, largest: float) -> bool:
        """Whether it is a trend."""
        return abs(self.t) > T_LIMIT and abs(self.total) > largest


def fit(x: Sequence[float], y: Sequence[float]) -> Trend:
    """Fit y = a + b x by least squares."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    slope, intercept = np.polyfit(xs, ys, 1)
    residuals = ys - (intercept + slope * xs)
    error = math.sqrt(float(residuals @ residuals) / (len(xs) - 2) / float(((xs - xs.mean()) ** 2).sum()))
    return Trend(
        float(slope * (xs[-1] - xs[0]) / ys.mean()), float(slope) / error if error else math.inf * float(slope)
    )


def cpu_trend(marks: Sequence[Mark]) -> Trend:
    """Of CPU seconds a group, from mark to mark."""
    spent = [(b.cpu_s - a.cpu_s) / (b.groups - a.groups) for a, b in itertools.pairwise(marks)]
    return fit([mark.groups for mark in marks[1:]], spent)


def rss_trend(marks: Sequence[Mark]) -> Trend:
    """Of resident memory."""
    return fit([mark.groups for mark in marks], [mark.rss_bytes for mark in marks])


def read_mark(pid: int, groups: int) -> Mark:
    """Read /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Mark(groups, (int(fields[11]) + int(fields[12])) / TICKS, resident * PAGE)


def run_soak(groups: int) -> dict[str, list[Mark]]:
    """Run the processes; return the marks of those that live from the beginning to the end.

    Raises:
        AssertionError: a group is unaccounted for, the bound was broken, or a process failed.
    """
    from tests.system.harness import Lab

    with tempfile.TemporaryDirectory() as directory, Lab(Path(directory), Path(directory) / "model") as lab:
        config = {
            "bind": lab.address, "model": str(lab.model), "dataset": str(lab.data()),
            "output_dir": str(lab.run.path.parent), "run_name": lab.run.path.name,
            "num_generations": NUM_GENERATIONS, "prompts_per_step": PROMPTS_PER_STEP,
            "max_completion_length": LENGTH, "max_staleness": 2, "max_steps": groups // PROMPTS_PER_STEP,
            "filter_zero_std": False, "heartbeat_s": 0.25, "liveness_s": 4.0,
            "staging_dir": str(lab.directory / "staging"),
        }  # fmt: skip
        module = ["tests.bench.sleeping_learner", "0", "0"]
        learner = lab.start("learner", module, lab.write_config("learner", config), lab.run.path / "logs/learner.log")
        staying, mortal = lab.server("staying"), lab.server("mortal")
        marks: dict[str, list[Mark]] = {"learner": [], "server": []}
        for goal in range(MARK, groups, MARK):
            step = goal // PROMPTS_PER_STEP
            lab.wait_until(
                lambda step=step: newest_step(lab.run.path) >= step, LIMIT_S, f"step {step}", alive=[learner, staying]
            )
            for name, process in (("learner", learner), ("server", staying)):
                marks[name].append(read_mark(process.pid, newest_step(lab.run.path) * PROMPTS_PER_STEP))
            if goal % KILL_EVERY == 0:
                mortal.kill()
                mortal = lab.server("mortal")
        assert learner.wait_exit(LIMIT_S) == staying.wait_exit(LIMIT_S) == 0, "a process failed"
        summary = lab.run.summary()
        left = [event for event in lab.run.events("server_left") if event.get("server") == "mortal"]
    assert len(left) >= (groups - 1) // KILL_EVERY, f"only {len(left)} deaths were noticed"
    assert summary["groups_unaccounted"] == 0, f"{summary['groups_unaccounted']} groups unaccounted"
    assert summary["staleness_max"] <= 2, f"staleness {summary['staleness_max']}"
    return marks


def newest_step(run: Path) -> int:
    """Read the last whole line of metrics.jsonl only: the whole of it grows, and would be this process's trend."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 14)))
        lines = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    return int(lines.partition(b'"step":')[2].partition(b",")[0] or 0)


def trends(quick: bool) -> dict[tuple[str, str], Trend]:
    """Run; return the line of each process and quantity."""
    found = {}
    for name, marks in run_soak(QUICK_GROUPS if quick else GROUPS).items():
        warm = [mark for mark in marks if mark.groups >= WARM_UP]
        found |= {(name, "cpu"): cpu_trend(warm), (name, "rss"): rss_trend(warm)}
    return found


def soak(quick: bool) -> Figures:
    """How many of the four lines are trends."""
    found = trends(quick)
    for (process, what), line in found.items():
        print(f"{process} {what} {line.total:+.2%} over the run, t {line.t:.1f}", file=sys.stderr)
    real = [f"{who} {what} {line.total:+.1%}" for (who, what), line in found.items() if line.exceeds(LARGEST[what])]
    assert not real, f"a trend: {', '.join(real)} over the run"
    return {"figure": float(len(real))}


def lines(quick: bool) -> Figures:
    return {"figure": 2.0 * len(LARGEST)}


ROWS = [
    Row(
        name="soak",
        control="all that is looked at (slope test)",
        ours=soak,
        baseline=lines,
        ratio="ours/baseline",
        target=0.0,
        sense="lower",
        unit="trends",
        rounds=1,
        quick_rounds=1,
    ),
]


if __name__ == "__main__":
    print(soak("--quick" in sys.argv))
