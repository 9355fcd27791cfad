"""A learner process that also says what it held and took: `python -m learner.demo.metered FILE --config learner.toml`.

It runs what `headway-learner train` runs, and writes to FILE the parameters of every model, how far the resident set
rose above what it was before the first of them was made (null where there is no /proc), and each step's CPU seconds:
on a machine with other work only they are the step's own.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from learner.app import run
from learner.batch import Batch, StepResult
from learner.config import LearnerConfig
from learner.model.load import load_model, resolve_device
from learner.trainer import Trainer
from protocol.command import run_command
from protocol.settings import load_settings

PROG = "metered"


class MeteredTrainer(Trainer):
    """A trainer that notes the CPU seconds of its steps. All calls come from one thread, which does all the work."""

    def __init__(self, config: LearnerConfig, *, checkpoint: Path | None = None) -> None:
        # Once for what it imports, which is no model's.
        load_model(config.model, dtype=config.dtype, device=resolve_device(config.device))
        gc.collect()
        self.base_bytes = reset_peak_bytes()
        super().__init__(config, checkpoint=checkpoint)
        self.cpu_s: list[float] = []

    def forward_backward(self, batch: Batch) -> StepResult:
        """As the trainer does."""
        before_s = time.thread_time()
        result = super().forward_backward(batch)
        self.cpu_s.append(time.thread_time() - before_s)
        return result

    def optimizer_step(self) -> int:
        """As the trainer does."""
        before_s = time.thread_time()
        policy_version = super().optimizer_step()
        self.cpu_s[-1] += time.thread_time() - before_s
        return policy_version


def metered_run(figures: Path, argv: Sequence[str]) -> int:
    """Run a training run to its end, then write its figures; return the exit code."""
    trainers: list[MeteredTrainer] = []

    def make_trainer(config: LearnerConfig, *, checkpoint: Path | None) -> Trainer:
        trainers.append(MeteredTrainer(config, checkpoint=checkpoint))
        return trainers[-1]

    code = run(load_settings(LearnerConfig, argv, prog=PROG), make_trainer)
    (trainer,) = trainers
    base = trainer.base_bytes
    held = {
        "parameters": trainer.num_parameters,
        "peak_bytes": None if base is None else _resident_bytes("VmHWM") - base,
        "cpu_s": trainer.cpu_s,
    }
    figures.write_text(json.dumps(held), "utf-8")
    return code


def reset_peak_bytes() -> int | None:
    """Forget the largest resident set so far; return what is resident now, or None where Linux does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident_bytes("VmRSS")


def _resident_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match, "Linux writes it so"
    return int(match[1]) * 1024


if __name__ == "__main__":
    sys.exit(run_command(PROG, lambda: metered_run(Path(sys.argv[1]), sys.argv[2:])))
