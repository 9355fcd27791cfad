"""What a second rank gains: the same global batch on two gloo ranks and on one, wall seconds of a whole step.

Both sides run the shipped trainer on a core per rank (one torch thread each): groups in, optimizer step done, new
weights gathered. The step is divided by cost; what keeps the ratio below 2 is the optimizer's and the collectives'
share, the head's and embedding's gradients above all, and a busy second core. That both sides train the same is a
test of its own (tests/system/test_ranks.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.harness import Row
from tests.bench.peers_groups import QWEN3

if TYPE_CHECKING:
    from learner.batch import Batch
    from learner.config import LearnerConfig
    from learner.trainer import Trainer

G = 16
PROMPT_TOKENS = 64


def one_rank(quick: bool) -> float:
    """Wall seconds of a step in a process of its own, as each of the two ranks has."""
    with tempfile.TemporaryDirectory() as directory:
        return step_seconds(Path(directory), 1, quick=quick)


def two_ranks(quick: bool) -> float:
    with tempfile.TemporaryDirectory() as directory:
        return step_seconds(Path(directory), 2, quick=quick)


def step_seconds(directory: Path, num_ranks: int, *, quick: bool) -> float:
    from tests.models import build_tiny_model
    from tests.spawned_ranks import run_ranks

    build_tiny_model(directory / "model", architecture="qwen3", **QWEN3)
    ranks = run_ranks([["tests.bench.two_ranks", str(directory), str(int(quick))]] * num_ranks, directory)
    assert all(rank.code == 0 for rank in ranks), ranks[0].output[-2000:]
    seconds: float = json.loads((directory / "answer.json").read_text())
    return seconds


def completion_lengths(quick: bool) -> list[list[int]]:
    """Per group, lognormal around 64 tokens (sigma 0.7), 16 to 256."""
    import numpy as np

    random = np.random.default_rng(0)
    return [
        np.clip(random.lognormal(np.log(64), 0.7, G), 16, 256).astype(int).tolist() for _ in range(2 if quick else 5)
    ]


def make_groups(quick: bool) -> Batch:
    import numpy as np

    from tests.factories import make_batch, make_train_group

    random = np.random.default_rng(1)
    return make_batch(
        groups=[
            make_train_group(
                ordinal=p,
                prompt_tokens=random.integers(2, QWEN3["vocab_size"], PROMPT_TOKENS).tolist(),
                rewards=[float(i % 2) for i in range(G)],
                lengths=lengths,
                vocab_size=QWEN3["vocab_size"],
            )
            for p, lengths in enumerate(completion_lengths(quick))
        ]
    )


def timed_steps(trainer: Trainer, quick: bool) -> float:
    """The faster of two steps, after one of full size to warm up."""
    batch = make_groups(quick)
    seconds = []
    for _ in range(3):
        started_s = time.perf_counter()
        assert trainer.forward_backward(batch).finite
        trainer.optimizer_step()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds[1:])


def main(directory: Path, quick: bool) -> None:
    """One rank."""
    import os

    from learner.config import LearnerConfig
    from learner.model.host_memory import keep_freed_memory
    from learner.ranks.place import place_of
    from learner.trainer import Trainer

    keep_freed_memory()  # as learner/compute.py and learner/ranks/follower.py do
    config = LearnerConfig(model=str(directory / "model"), learning_rate=1e-6, token_budget=2048)
    place = place_of(os.environ)
    if place is None:
        (directory / "answer.json").write_text(json.dumps(timed_steps(Trainer(config), quick)))
    else:
        lead_or_follow(config, directory, lambda trainer: timed_steps(trainer, quick))


def lead_or_follow(config: LearnerConfig, directory: Path, measure: Callable[[Trainer], float]) -> None:
    """Be one of the ranks; rank 0 writes what `measure` says of its trainer."""
    import os

    import torch

    from learner.ranks.commands import Stop, to_bytes
    from learner.ranks.follower import follow
    from learner.ranks.place import place_of
    from learner.ranks.trainer import LeadingTrainer
    from learner.ranks.world import World

    place = place_of(os.environ)
    assert place is not None
    world = World.join(place, torch.device("cpu"), 60.0)
    world.open()
    if place.leads:
        trainer = LeadingTrainer(config, world, logs_dir=directory)
        (directory / "answer.json").write_text(json.dumps(measure(trainer)))
        world.broadcast(to_bytes(Stop()))
    else:
        follow(config, world)
    world.close()


ROWS = [
    Row(
        name="two_ranks",
        control="one rank, same global batch",
        ours=two_ranks,
        baseline=one_rank,
        ratio="baseline/ours",
        target=1.6,
        sense="higher",
        unit="s a step",
    )
]


if __name__ == "__main__":
    main(Path(sys.argv[1]), bool(int(sys.argv[2])))
