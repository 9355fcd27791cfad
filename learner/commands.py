"""The train command: the learner's configuration plus what only a command line has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from learner.config import LearnerConfig
from learner.ranks.place import check_ranks, place_of
from protocol.errors import ConfigError
from protocol.settings import load_settings


class TrainCommand(LearnerConfig):
    """Train a language model with GRPO on groups that rollout servers stream in."""

    dry_run: bool = False
    """Show the resolved configuration, what follows from it, the memory it needs, what this machine lacks for it and
    what was not checked; start nothing. Under torchrun, no rank waits for another."""

    @property
    def config(self) -> LearnerConfig:
        """The configuration without the command's own flags."""
        given = self.model_dump(include=self.model_fields_set - {"dry_run"})
        return LearnerConfig.model_validate(given)


def train(argv: Sequence[str], *, prog: str) -> int:
    """Run a training run to its end; return the exit code.

    Raises:
        ConfigError: The configuration is wrong or incomplete.
    """
    place = place_of(os.environ)
    try:
        command = load_settings(TrainCommand, argv, prog=prog)
        config = command.config
        check_complete(config)
    except ConfigError as error:
        if place is None or place.leads:
            raise
        from learner.ranks.launch import report_error

        report_error(place, error)
        return 0
    if command.dry_run:
        from learner.dry_run import dry_run

        if place is None or place.leads:
            dry_run(config, place)
        return 0
    if place is not None:
        from learner.ranks.launch import train_on_ranks

        return train_on_ranks(config, place)
    from learner.app import run

    check_ranks(config, place)
    return run(config)


def check_complete(config: LearnerConfig) -> None:
    """Refuse a configuration without a model or without data, with paths that lead nowhere, or too small a budget.

    Raises:
        ConfigError: Names the key and what to write.
    """
    if not config.model:
        raise ConfigError("model is empty: name the directory of a Hugging Face causal model, --model DIR")
    if not config.dataset:
        raise ConfigError("dataset is empty: name a .jsonl file or a task, --dataset reasoning_gym:chain_sum")
    if config.model.startswith((".", "/", "~")) and not Path(config.model).expanduser().is_dir():
        raise ConfigError(f"model {config.model!r}: no such directory; give one with config.json, or a hub name")
    for key, data in (("dataset", config.dataset), ("eval_dataset", config.eval_dataset)):
        if data and ":" not in data and not Path(data).expanduser().is_file():
            raise ConfigError(f"{key} {data!r}: no such file; give a .jsonl file or reasoning_gym:<task>")
    longest = config.max_prompt_length + config.max_completion_length
    size = config.context_parallel_size
    if config.token_budget < -(-longest // size):
        divided = f", divided among {size} ranks (context_parallel_size)" if size > 1 else ""
        raise ConfigError(
            f"token_budget {config.token_budget} is smaller than one sequence, and would bound no memory: it must be at"
            f" least {-(-longest // size)} (max_prompt_length {config.max_prompt_length} + max_completion_length"
            f" {config.max_completion_length}{divided}), or one of these smaller"
        )
