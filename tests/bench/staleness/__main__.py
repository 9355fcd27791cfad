"""`python -m tests.bench.staleness`: what staleness costs the learning, as a table and a figure.

Makes the runs that the file of results lacks (all of them: about an hour of one core), then draws. Interrupted, it goes
on where it was; with nothing missing it only draws. `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.bench.staleness.report import draw, table, verdicts
from tests.bench.staleness.runs import CURVE_SEEDS, NUM_SEEDS, TASK, Results, run_missing, settings

FIGURES = Path(__file__).parents[3] / "learner" / "figures"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.staleness", description="Reward against staleness.")
    parser.add_argument("--json", type=Path, metavar="FILE", default=FIGURES / "staleness.json", help="the results")
    parser.add_argument("--png", type=Path, metavar="FILE", default=FIGURES / "staleness.png", help="the figure")
    parser.add_argument("--num-seeds", type=int, default=NUM_SEEDS, help="of the default at staleness 0 and 4")
    parser.add_argument("--curve-seeds", type=int, default=CURVE_SEEDS, help="of every other setting")
    parser.add_argument("--fresh", action="store_true", help="forget the results that are there")
    options = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    from learner.demo import sorting
    from learner.model.host_memory import keep_freed_memory

    torch.set_num_threads(1)  # the same sums in the same order on every machine with as many lanes
    keep_freed_memory()  # as learner/compute.py does
    if options.fresh:
        options.json.unlink(missing_ok=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    results = Results(options.json, TASK)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        sorting.prepare(model)
        wanted = settings(num_seeds=options.num_seeds, curve_seeds=options.curve_seeds)
        run_missing(results, wanted, TASK, model=model, say=lambda line: print(line, flush=True))
    draw(results.outcomes, options.png)
    print(f"\n{table(results.outcomes)}\n\n{verdicts(results.outcomes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
