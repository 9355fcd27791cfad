"""The fresh process of one side of a row: `python -m tests.bench.side MODULE ROW ours|baseline [--quick]`."""

from __future__ import annotations

import importlib
import json
import sys

from tests.bench.harness import Answer, Skip, cpu_clock


def main(module: str, name: str, side: str, *options: str) -> None:
    """Run the side and print its answer as the last line of stdout."""
    row = next(row for row in importlib.import_module(module).ROWS if row.name == name)
    function = row.ours if side == "ours" else row.baseline
    started_s = cpu_clock()
    try:
        figure = function("--quick" in options)
        figures = figure if isinstance(figure, dict) else {"figure": figure}
        answer: Answer = {"figure": figures, "cpu_s": figures.get("cpu_s", cpu_clock() - started_s)}
    except Skip as skip:
        answer = {"skip": str(skip)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
