"""What of the trainer is no tensor: how far it is, its random state, a coefficient that moves, what bits hang on."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch

from learner.config import LearnerConfig
from learner.journal_records import Numerics
from protocol.errors import ConfigError

STATE_FILE = "trainer.json"


def save_progress(directory: Path, config: LearnerConfig, *, policy_version: int, beta: float) -> None:
    """Write policy_version, torch's random state and, where it adapts, the KL coefficient."""
    state: dict[str, Any] = {
        "policy_version": policy_version,
        "torch_rng_state": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if config.kl_target is not None:
        state |= {"beta": beta, "initial_beta": config.beta}
    (directory / STATE_FILE).write_text(json.dumps(state))


def load_progress(checkpoint: Path, config: LearnerConfig) -> tuple[int, float]:
    """Set torch's random state; return policy_version and the KL coefficient (config's, where that has changed).

    Raises:
        ConfigError: the file is missing or damaged.
    """
    beta = config.beta
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
        policy_version = int(state["policy_version"])
        if config.kl_target is not None and state.get("initial_beta") == config.beta:
            beta = float(state["beta"])
        random_state = bytearray(base64.b64decode(state["torch_rng_state"], validate=True))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"checkpoint {checkpoint} has no usable {STATE_FILE}: {error}") from error
    torch.set_rng_state(torch.frombuffer(random_state, dtype=torch.uint8))
    return policy_version, beta


def numerics(device: torch.device) -> Numerics:
    """Say what a replay must have in common with this process, to give the same bits."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return Numerics(device=device.type, num_threads=torch.get_num_threads(), ranks=ranks, torch=str(torch.__version__))
