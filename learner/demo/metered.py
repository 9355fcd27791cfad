"""A learner process that also says what it held: `python -m learner.demo.metered FILE --config learner.toml`.

It runs what `headway-learner train` runs, and writes to FILE the parameters of every model, and how far the resident
set rose above what it was before the first of them was made (null where there is no /proc).
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.config import LearnerConfig
from protocol.command import run_command
from protocol.settings import load_settings

if TYPE_CHECKING:
    from learner.trainer import Trainer

PROG = "metered"


def metered_run(figures: Path, argv: Sequence[str]) -> int:
    """Run a training run to its end, then write its figures; return the exit code."""
    from learner.app import run
    from learner.model.load import load_model, resolve_device
    from learner.trainer import Trainer

    held: dict[str, Any] = {}

    def make_trainer(config: LearnerConfig, *, checkpoint: Path | None) -> Trainer:
        load_model(config.model, dtype=config.dtype, device=resolve_device(config.device))  # what that imports is no
        gc.collect()  # model's
        held["base_bytes"] = reset_peak_bytes()
        trainer = Trainer(config, checkpoint=checkpoint)
        held["parameters"] = trainer.num_parameters
        return trainer

    code = run(load_settings(LearnerConfig, argv, prog=PROG), make_trainer)
    base = held.pop("base_bytes")
    held["peak_bytes"] = None if base is None else _resident_bytes("VmHWM") - base
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
