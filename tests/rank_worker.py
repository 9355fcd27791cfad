"""One of several learner ranks, driven by a plan instead of servers: `python -m tests.rank_worker PLAN.json`.

Rank 0 does what the plan says and writes what it saw to `answer`; the others follow. A plan is a list of runs, one
after another in the same processes; each has the trainer's options, a checkpoint or null, and operations:
["train", step], ["train pair", step], ["save", directory], ["publish", file]. `raise_at` is the step at which followers
fail, or null.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.batch import Batch, StepResult
from learner.config import LearnerConfig
from learner.grpo.loss import LossTokens
from learner.model import attention
from learner.ranks.commands import Stop, to_bytes
from learner.ranks.follower import follow
from learner.ranks.place import place_of
from learner.ranks.trainer import LeadingTrainer, RankTrainer
from learner.ranks.world import World
from learner.trainer import Trainer
from protocol.command import run_command
from protocol.weights.layout import Layout, MappedWeights
from tests.factories import make_batch, make_train_group


def batch_of(step: int) -> Batch:
    """Three groups of unequal cost, one with a prompt longer than the others; the same for everybody."""
    prompts = ([5, 6, 7], [8] * 9, [4, 9])
    lengths = ([3, 6, 1, 4], [8, 2, 2, 5], [1, 1, 7, 2])
    return make_batch(
        step=step,
        groups=[
            make_train_group(ordinal=p, lengths=lengths[p], seed=10 * step + p, prompt_tokens=prompts[p])
            for p in range(3)
        ],
    )


def own_loss(tokens: LossTokens) -> Tensor:
    """A user's, who counts on there being tokens."""
    return -tokens.advantages_T * tokens.policy_logprobs_T / (1 + 0 * tokens.completion_T.max())


def pair_of(step: int) -> Batch:
    """Two completions, one of them nearly all of the work: of three ranks one has nothing to do."""
    return make_batch(step=step, groups=[make_train_group(lengths=[30, 1], rewards=[1.0, 0.0], seed=step)])


def perform(trainer: Trainer, operations: list[list[Any]]) -> list[dict[str, float]]:
    rows = []
    for name, argument in operations:
        if name.startswith("train"):
            batch = pair_of(argument) if name == "train pair" else batch_of(argument)
            result = trainer.forward_backward(batch)
            assert result.finite, result.reason
            rows.append(result.metrics)
            trainer.optimizer_step()
        elif name == "save":
            trainer.save(Path(argument))
        else:
            with MappedWeights.create(Path(argument), Layout(trainer.specs())) as mapped:
                trainer.write_weights(mapped)
    return rows


def fail_at(step: int) -> None:
    """Plant a fault in a follower."""
    honest = RankTrainer.forward_backward

    def forward_backward(self: RankTrainer, batch: Batch) -> StepResult:
        if batch.step == step:
            raise MemoryError("no more memory for this test")
        return honest(self, batch)

    RankTrainer.forward_backward = forward_backward  # type: ignore[method-assign]


def main(plan_file: str) -> int:
    plan = json.loads(Path(plan_file).read_text())
    place = place_of(os.environ)
    assert place is not None
    world = World.join(place, torch.device("cpu"), 30.0)
    world.open()
    if not place.leads and plan["raise_at"] is not None:
        fail_at(plan["raise_at"])
    answers = []
    for run in plan["runs"]:
        config = LearnerConfig(**run["options"])
        attention.HAS_CPU_FLASH = not run.get("no_flash")
        if not place.leads:
            follow(config, world)
            continue
        checkpoint = Path(run["checkpoint"]) if run["checkpoint"] else None
        trainer = LeadingTrainer(config, world, logs_dir=Path(plan["answer"]).parent, checkpoint=checkpoint)
        answers.append(perform(trainer, run["operations"]))
        with world.watched("the end"):
            world.broadcast(to_bytes(Stop()))
        Path(plan["answer"]).write_text(json.dumps(answers))
    world.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_command("rank", lambda: main(sys.argv[1])))
