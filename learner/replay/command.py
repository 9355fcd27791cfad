"""headway-learner replay RUN_DIR: train again what a run has trained, and compare; or find where two runs part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from learner.config.section import Section
from learner.replay.recorded import RecordedRun
from protocol.errors import ConfigError
from protocol.settings import load_settings


class ReplayCommand(Section):
    """Train again what a run has trained, from its journal, and compare with what it recorded.

    On a CPU, of a run that trained on a CPU in one process, every bit must be the same. Exits with 1 where not.
    """

    to: int | None = Field(None, ge=1)
    """Step to end with; the last one by default."""
    start: int | None = Field(None, ge=0)
    """Checkpoint to begin with, 0 for the initial weights; the newest before `to` by default."""
    output: str = ""
    """Where to write the weights (and optimizer) of the last step: a directory that does not exist yet."""
    device: str = "cpu"
    """Another device gives other bits: metrics are then only compared to be near."""
    against: str = ""
    """Another run's directory: find the first step at which the two differ, and what differs."""


def replay(argv: Sequence[str], *, prog: str) -> int:
    """Run the command and return its exit code: 1 when something differs.

    Raises:
        ConfigError: no run directory, or steps that cannot be trained again.
        JournalError: a journal of another version.
    """
    usage = f"{prog} RUN_DIR"
    named = 0 if not argv or argv[0].startswith("-") else 1
    options = load_settings(ReplayCommand, argv[named:], prog=usage)
    if not named:
        raise ConfigError(f"no run directory: {usage}, the directory under output_dir that has config.json in it")
    if options.output and Path(options.output).exists():
        raise ConfigError(f"output {options.output} exists: name a directory that does not")
    run = RecordedRun(Path(argv[0]))
    for damage in run.index.damages:
        print(damage)
    return _bisect(run, options) if options.against else _replay(run, options)


def _bisect(run: RecordedRun, options: ReplayCommand) -> int:
    from learner.replay.against import first_difference

    if options.output or options.start is not None:
        raise ConfigError("against compares two runs: it writes no output and chooses its own start")
    other = RecordedRun(Path(options.against))
    try:
        found, last = first_difference(run, other, to=options.to, tell=print)
    finally:
        for refused in (*run.refused, *other.refused):
            print(refused)
    print(f"the first difference is in {found}" if found else f"no difference up to step {last}")
    return int(found is not None)


def _replay(run: RecordedRun, options: ReplayCommand) -> int:
    target = options.to or run.last
    start = run.start_for(target, options.start)
    for refused in run.refused:
        print(refused)
    from learner.replay.compare import difference
    from learner.replay.trained_again import Replay, weights_digest

    again = Replay(run, start, device=options.device)
    origin = run.checkpoints[start].path.name if start else "the initial weights"
    print(f"steps {start + 1} to {target} of {run.path}, from {origin}")
    if not again.exact:
        print("not on what the run trained on: bits may differ, metrics are compared to be near")
    checked = {"metrics": 0, "weights": 0, "checkpoints": 0}
    for step in again.train(target):
        number, recorded = step.batch.step, run.outcome(step.batch.step)
        names = ("in the run", "here")
        if found := difference(number, recorded, step.outcome, exact=again.exact, names=names):
            print(f"the first difference is in {found}")
            return 1
        checked["metrics"] += bool(recorded.metrics)
        checked["weights"] += bool(recorded.weights) and again.exact
        checked["checkpoints"] += bool(recorded.files) and again.exact
    if options.output:
        again.save(Path(options.output))
    print(
        f"the same: {checked['metrics']} rows of metrics, {checked['weights']} published versions,"
        f" {checked['checkpoints']} checkpoints; step {target} is {weights_digest(again.trainer, 'xxh3_128')}"
        f"{f', in {options.output}' if options.output else ''}"
    )
    return 0
