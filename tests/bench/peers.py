"""A whole optimizer step against TRL's trainers on the same groups: completion tokens/s, and peak memory.

Every side trains the same model on the same group (peers_groups.py) in float32 with one torch thread, in a process of
its own: one step of full size to warm up, then one that counts, in CPU seconds (see Meter).
TRL's trainers run at their fastest `per_device_train_batch_size` of 4, 8, 16 and 32, ours at its default token
budget; where memory is compared, ours runs with a token budget of 1024. `shared_*` compares with our own path without
sharing, whose speed is multiplied by the ratio of floating-point operations: a figure of 1 means that all of the
possible saving arrives.

    python -m tests.bench.peers probe      # how Peer.batches was found: each peer at each batch, once
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.bench import peers_own, peers_trl
from tests.bench.harness import ROOT, Figures, Row
from tests.bench.peers_groups import SHAPES, Shape, flop_ratio

MEMORY_BUDGET = 1024
PADDED_BUDGET = 4096
"""Where our path without sharing is fastest."""


@dataclass(frozen=True)
class Peer:
    """One of TRL's trainers, what it is called, and what is claimed against it; dictionaries by (G, prompt tokens)."""

    control: str
    make: Callable[..., Any]
    options: dict[str, bool]
    batches: dict[tuple[int, int], int]
    """Its fastest per_device_train_batch_size, for G 16 and a prompt of 64 by the probe below, on two cores. The others
    are taken over from there, larger where a long prompt or a large group makes repeating the prompt cost more."""
    speed: dict[tuple[int, int], float]
    memory: float


PEERS = {
    "grpo_shipped": Peer(
        control="GRPOTrainer as shipped",
        make=peers_trl.grpo_trainer,
        options={"compact_head": False},
        batches={(16, 64): 4, (16, 512): 4},
        speed={(16, 64): 7.0, (16, 512): 12.0},
        memory=0.25,
    ),
    "grpo_compact": Peer(
        control="GRPOTrainer, completion-only head",
        make=peers_trl.grpo_trainer,
        options={"compact_head": True},
        batches={(16, 64): 8, (16, 512): 4, (64, 64): 8, (64, 512): 4},
        speed={(16, 64): 3.5, (16, 512): 3.5, (64, 64): 3.5, (64, 512): 4.5},
        memory=0.5,
    ),
    "async_shipped": Peer(
        control="AsyncGRPOTrainer, our attention",
        make=peers_trl.async_trainer,
        options={"own_head": False},
        batches={(16, 64): 16, (16, 512): 16, (64, 64): 16, (64, 512): 32},
        speed={(16, 64): 3.0, (16, 512): 3.0, (64, 64): 3.0, (64, 512): 3.0},
        memory=0.2,
    ),
    "async_ours": Peer(
        control="AsyncGRPOTrainer, our attention, head",
        make=peers_trl.async_trainer,
        options={"own_head": True},
        batches={(16, 64): 16, (16, 512): 16, (64, 64): 32, (64, 512): 32},
        speed={(16, 64): 1.15, (16, 512): 1.15, (64, 64): 1.15, (64, 512): 1.15},
        memory=0.7,
    ),
}
"""What is left of the last one's difference is everything around attention and head, and that a head which returns
logprobs must run twice where ours computes the loss itself."""
SHARING_TARGET = 0.9
ROUNDS = 3
"""A round of all sides takes two to six minutes."""


@dataclass(frozen=True)
class OwnStep:
    """Our trainer, with the default token budget or another."""

    shape: Shape
    token_budget: int | None = None

    def __call__(self, quick: bool) -> Figures:
        options = {} if self.token_budget is None else {"token_budget": self.token_budget}
        figures = peers_own.step_figures(self.shape, quick=quick, **options)
        return figures | {"saved_tokens_per_s": figures["tokens_per_s"]}


@dataclass(frozen=True)
class UnsharedStep:
    """Our trainer without sharing; `saved_tokens_per_s` is what it would reach if sharing saved all it can."""

    shape: Shape

    def __call__(self, quick: bool) -> Figures:
        figures = peers_own.step_figures(self.shape, quick=quick, share_prefix=False, token_budget=PADDED_BUDGET)
        return figures | {"saved_tokens_per_s": figures["tokens_per_s"] * flop_ratio(self.shape, quick=quick)}


@dataclass(frozen=True)
class PeerStep:
    """One of TRL's trainers at a per_device_train_batch_size."""

    peer: str
    shape: Shape
    device_batch: int

    def __call__(self, quick: bool) -> Figures:
        peer = PEERS[self.peer]
        return peers_trl.step_figures(
            peer.make, self.shape, quick=quick, device_batch=self.device_batch, **peer.options
        )


def rows_of(shape: Shape) -> list[Row]:
    """All comparisons on one shape; they share their runs."""
    key = (shape.num_generations, shape.prompt_length)
    suffix = f"{key[0]}_{key[1]}"
    own, small = OwnStep(shape), OwnStep(shape, MEMORY_BUDGET)
    rows = [
        Row(
            name=f"shared_{suffix}",
            control="own unshared path x FLOP ratio",
            ours=own,
            baseline=UnsharedStep(shape),
            ratio="ours/baseline",
            target=SHARING_TARGET,
            unit="tokens/CPU s",
            figure="saved_tokens_per_s",
            contest=f"step_{suffix}",
            rounds=ROUNDS,
        )
    ]
    for name, peer in PEERS.items():
        if key not in peer.batches:
            continue
        control = PeerStep(name, shape, peer.batches[key])
        rows += [
            Row(
                name=f"speed_{name}_{suffix}",
                control=peer.control,
                ours=own,
                baseline=control,
                ratio="ours/baseline",
                target=peer.speed[key],
                unit="tokens/CPU s",
                figure="tokens_per_s",
                contest=f"step_{suffix}",
                rounds=ROUNDS,
            ),
            Row(
                name=f"memory_{name}_{suffix}",
                control=peer.control,
                ours=small,
                baseline=control,
                ratio="ours/baseline",
                target=peer.memory,
                sense="lower",
                unit="MiB over base",
                figure="peak_mib",
                contest=f"step_{suffix}",
                rounds=ROUNDS,
            ),
        ]
    return rows


ROWS = [row for shape in SHAPES for row in rows_of(shape)]


def probe(*names: str) -> None:
    """Print each peer's tokens/s at each batch, of the peers named or all."""
    for peer in names or tuple(PEERS):
        for shape in SHAPES:
            key = (shape.num_generations, shape.prompt_length)
            for batch in [batch for batch in (4, 8, 16, 32) if key in PEERS[peer].batches and batch <= key[0]]:
                command = [sys.executable, "-m", "tests.bench.peers", "one", peer, *map(str, key), str(batch)]
                done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
                print(done.stdout.splitlines()[-1], flush=True)


def one(peer: str, num_generations: str, prompt_length: str, batch: str) -> None:
    """Print one figure of the probe."""
    shape = Shape(int(num_generations), int(prompt_length))
    figures = PeerStep(peer, shape, int(batch))(quick=False)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{peer} G {num_generations}, prompt {prompt_length}, batch {batch}: {shown}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    {"probe": probe, "one": one}[sys.argv[1]](*sys.argv[2:])
