"""`python -m tests.bench [--only NAME ...] [--json FILE] [--quick]`: run the rows, print and write the verdicts.

Exit code 1 when a row misses its target. Rows come from every module of this folder that exports ROWS.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import pkgutil
import sys
from pathlib import Path

from tests.bench.harness import Result, Row, run_contest, to_json

MACHINERY = (
    "__main__", "harness", "links", "memory", "meter", "peers_groups", "peers_own", "peers_trl", "side",
    "regime_run", "regime_trace", "sleeping_learner",
)  # fmt: skip
BOUNDS = {"higher": ">=", "lower": "<=", "near": "1 +-"}
HEADINGS = ("row", "control", "median", "worst", "target", "verdict")
LAYOUT = "{:<28} {:<38} {:>9} {:>9} {:>9}  {}"


def discover() -> list[Row]:
    """Return the rows of all modules beside this one, in the order of their names."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(f"tests.bench.{name}") for name in names if name not in MACHINERY]
    return [row for module in modules for row in module.ROWS]


def print_result(result: Result) -> None:
    numbers = ["-" if x is None else f"{x:.3g}" for x in (result.ratio, result.worst)]
    bound = f"{BOUNDS[result.sense]} {result.target:g}"
    print(LAYOUT.format(result.name, result.control, *numbers, bound, result.verdict.upper()))
    if result.reason:
        print(f"    {result.reason}")
    elif result.ours is not None:
        print(
            f"    ours {result.ours:.4g}, control {result.baseline:.4g} {result.unit}; CPU s"
            f" {result.ours_cpu_s:.3g} / {result.baseline_cpu_s:.3g}; {result.rounds} rounds,"
            f" loadavg {result.loadavg:.1f}",
            flush=True,
        )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Speed, as ratios against controls.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these rows only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--quick", action="store_true", help="less work and fewer rounds: a look, not a verdict")
    options = parser.parse_args(arguments)
    rows = discover()
    unknown = set(options.only or ()) - {row.name for row in rows}
    if unknown:
        parser.error(f"no row named {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in rows)}")
    print(f"{os.cpu_count()} cores, loadavg {os.getloadavg()[0]:.1f}; each side in a fresh process, in turning order")
    print(LAYOUT.format(*HEADINGS))
    results = []
    chosen = [row for row in rows if not options.only or row.name in options.only]
    for _, contest in itertools.groupby(chosen, lambda row: row.contest or row.name):
        for result in run_contest(list(contest), quick=options.quick):
            results.append(result)
            print_result(result)
    if options.json:
        options.json.write_text(to_json(results))
    return int(any(result.verdict == "miss" for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
