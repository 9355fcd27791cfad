"""What a run says, and what it is held to, when it begins or goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from learner.checkpoint import Checkpoint
from learner.config import LearnerConfig

if TYPE_CHECKING:
    from learner.trainer import Trainer


def critic_notice(config: LearnerConfig, checkpoint: Path | None) -> str:
    """What is said where a critic begins in the middle of a run; else empty."""
    if not config.has_critic:
        return ""
    from learner.critic import beginning

    return beginning(checkpoint)


def frozen_fingerprint(config: LearnerConfig, trainer: Trainer, checkpoint: Path | None) -> dict[str, str]:
    """Digest what the run needs of config.model beside a checkpoint: an adapter's base, or the reference."""
    from learner.reference import reference_digest

    digest = trainer.adapter.base_digest if trainer.adapter else reference_digest(config, checkpoint)
    return {"model": digest} if digest else {}


def opening_line(config: LearnerConfig, checkpoint: Checkpoint | None) -> str:
    """What the run says first."""
    where = f"resuming from step {checkpoint.policy_version}" if checkpoint else "starting"
    bounds = config.granted_bounds
    lowered = " (lowered: buffer_bytes holds no more)" if bounds.steps_ahead < config.bounds.steps_ahead else ""
    order = "late groups dropped" if config.staleness_policy == "drop" else f"window {bounds.reorder_window}"
    return (
        f"{config.run_dir}: {where}; max_staleness {bounds.max_staleness}, rollouts at most {bounds.steps_ahead} steps"
        f" ahead{lowered}, {order}, {bounds.slots_total} slots"
    )
