"""`python -m tests.prove [--groups N] [--only PART ...]`: the bound put to the proof, on the shipped state machines.

    small       every interleaving of small cases: the bound is exact, no state is a dead end
    rejected    how the bound is reached; rules that were not taken, and the shortest way in which each breaks
    machines    N groups at random and by an adversary, with everything that goes wrong: 0 violations, bound reached
    lengths     what trains of what was leased, when groups wait and when they are dropped

Exit code 1 when something is not as learner/staleness.md says. Two processes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from tests.prove.cases import EXAMPLE, LARGE, REJECTED, SMALL, problems
from tests.prove.exhaustive import Found, search
from tests.prove.lengths import play_one
from tests.prove.machine import Tally
from tests.prove.plans import PLANS, drive
from tests.prove.world import Move

PROCESSES = 2
DEFAULT_GROUPS = 10_000_000
CHUNK = 100_000
"""Groups of one machine: then another begins, from another seed."""
LENGTH_STEPS, LENGTH_SEEDS = 200, (1, 2, 3)
FAILED: list[str] = []


def fail(text: str) -> None:
    """Say it, and remember it for the exit code."""
    FAILED.append(text)
    print(f"    NOT AS IT SHOULD BE: {text}", flush=True)


def prove_small(pool: ProcessPoolExecutor) -> None:
    """Exhaustive searches, of those in `make test` and of larger ones."""
    layout = "{:<58} {:>6} {:>8} {:>10} {:>12} {:>10}"
    print(layout.format("every interleaving of", "bound", "reached", "states", "transitions", "dead ends"))
    cases, states, transitions, stuck = [*SMALL, *LARGE], 0, 0, 0
    for case, found in zip(cases, pool.map(search, cases), strict=True):
        name = f"{case.ledger.__name__.removesuffix('Ledger').lower() or 'wait'}: {case.name}"
        print(layout.format(
            name, case.bounds.max_staleness, found.staleness_max, found.states, found.transitions, found.dead_ends
        ), flush=True)  # fmt: skip
        states, transitions, stuck = (
            states + found.states,
            transitions + found.transitions,
            stuck + bool(found.dead_ends),
        )
        for problem in problems(case, found):
            fail(f"{name}: {problem}")
    print(f"{len(cases)} cases, {states:,} states, {transitions:,} transitions; dead ends in {stuck} cases")


def prove_rejected() -> None:
    """How the bound is reached, and the counterexamples."""
    found = search(EXAMPLE)
    print(f"\nthe shortest way to staleness {found.staleness_max} in {EXAMPLE.name}")
    print("    " + "; ".join(told(found)))
    print("\nrejected rules, and the shortest way in which each breaks")
    for rejected in REJECTED:
        harmless = [case for case in rejected.holds if search(case).violation]
        found = search(rejected.breaks)
        print(f"\n  {rejected.name}\n    {rejected.breaks.name}: {found.violation or 'holds'}")
        print("    " + "; ".join(told(found)), flush=True)
        if not found.violation or harmless:
            fail(f"{rejected.name}: it should break here, and in no smaller case")


def told(found: Found) -> Iterator[str]:
    """A trace in words; repeated moves in one."""

    def word(move: Move) -> str:
        what, *args = move
        return f"lease to a server at v{args[1]}" if what == "lease" else str(what)

    for what, group in itertools.groupby(found.trace, word):
        moves = list(group)
        which = ", ".join(str(move[1]) for move in moves if len(move) > 1)
        if what.startswith("lease"):
            yield what.replace("lease", f"lease {which}")
        elif what in ("finish", "lose"):
            yield f"{what} {which}"
        else:
            yield f"{what} {len(moves)} times" if len(moves) > 1 else what


def prove_machines(pool: ProcessPoolExecutor, groups: int) -> None:
    """So many groups over all plans."""
    each = -(-groups // len(PLANS))
    sizes = [CHUNK] * (each // CHUNK) + ([each % CHUNK] if each % CHUNK else [])
    jobs = [(number, seed, size) for number in range(len(PLANS)) for seed, size in enumerate(sizes, start=1)]
    layout = "{:<27} {:>10} {:>9} {:>5} {:>7} {:>5} {:>8} {:>8} {:>7} {:>7} {:>8} {:>8} {:>8}"
    print("\n" + layout.format(
        "driven at random", "groups", "steps", "bound", "reached", "mean", "filtered", "lost", "skipped", "stale",
        "restored", "restarts", "groups/s",
    ))  # fmt: skip
    begun_s, everything, violations = time.monotonic(), Tally(), 0
    results = pool.map(drive, jobs)
    for plan in PLANS:
        tally, cpu_s = Tally(), 0.0
        for _, one, seconds, broke in itertools.islice(results, len(sizes)):
            tally.add(one)
            cpu_s += seconds
            violations += bool(broke)
            if broke:
                fail(broke)
        everything.add(tally)
        counts, ages, bound = tally.counts, tally.staleness, plan.bounds.max_staleness
        mean = sum(age * count for age, count in ages.items()) / ages.total()
        print(layout.format(
            plan.name, f"{tally.groups:,}", f"{counts['steps']:,}", bound, max(ages), f"{mean:.2f}",
            counts["filtered"], counts["losses"], counts["skipped"], counts["stale"], counts["restored"],
            counts["restarts"], f"{tally.groups / cpu_s:,.0f}",
        ), flush=True)  # fmt: skip
        if max(ages) != bound:
            fail(f"{plan.name}: staleness {max(ages)} is reached, {bound} should be; seeds 1 to {len(sizes)}")
        if counts["stale"] and not plan.drops:
            fail(f"{plan.name}: groups are dropped, with staleness_policy wait")
    taken_s = time.monotonic() - begun_s
    print(
        f"{everything.groups:,} groups in {taken_s:.0f} s, {everything.groups / taken_s:,.0f} a second on {PROCESSES}"
        f" processes, loadavg {os.getloadavg()[0]:.1f}; {violations} violations"
    )


def prove_lengths(pool: ProcessPoolExecutor) -> None:
    """The bias of dropping, and what it buys and costs in time."""
    print(
        f"\nmean length of what trained / of what was leased; mean of {len(LENGTH_SEEDS)} seeds, {LENGTH_STEPS} steps"
    )
    layout = "{:<10} {:>8} {:>8} {:>8} {:>22} {:>22}"
    print(layout.format("alike", "bound", "wait", "drop", "drop: tokens wasted", "drop: time / wait's"))
    for alike, bound in itertools.product((0.0, 0.5, 1.0), (1, 2, 4, 8)):
        jobs = [(policy, bound, alike, seed, LENGTH_STEPS) for policy in ("wait", "drop") for seed in LENGTH_SEEDS]
        results = list(pool.map(play_one, jobs))
        wait, drop = ([sum(column) / len(LENGTH_SEEDS) for column in zip(*part, strict=True)]
                      for part in (results[: len(LENGTH_SEEDS)], results[len(LENGTH_SEEDS) :]))  # fmt: skip
        shown = (f"{wait[0]:.3f}", f"{drop[0]:.3f}", f"{drop[1]:.1%}", f"{drop[2] / wait[2]:.2f}")
        print(layout.format(alike, bound, *shown), flush=True)
        if abs(wait[0] - 1.0) > 1e-9 or wait[3]:
            fail(f"wait, bound {bound}: lengths trained are not lengths leased")


def main(arguments: list[str]) -> int:
    parts = ("small", "rejected", "machines", "lengths")
    parser = argparse.ArgumentParser(prog="python -m tests.prove", description="The bound, put to the proof.")
    parser.add_argument("--groups", type=int, default=DEFAULT_GROUPS, help="driven through the machines, in all")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="these parts only")
    options = parser.parse_args(arguments)
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        if "small" in options.only:
            prove_small(pool)
        if "rejected" in options.only:
            prove_rejected()
        if "machines" in options.only:
            prove_machines(pool, options.groups)
        if "lengths" in options.only:
            prove_lengths(pool)
    print(f"\n{len(FAILED)} findings against the note" + "".join(f"\n  {text}" for text in FAILED))
    return int(bool(FAILED))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
