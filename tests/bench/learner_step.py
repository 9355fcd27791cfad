"""What forwarding each prompt once saves: a whole learner step, shared prefix against padded copies.

The control is the shipped padded path, which is no straw man: sequences sorted by length and padded on the right (so
no mask is needed and torch's flash attention runs), the head on completion tokens only. Its time is divided by the
ratio of floating-point operations (linear layers, head, exact attention; padding not counted) of the same groups, so
a figure of 1 means that all of the saving arrives. `python -m tests.bench.learner_step` prints the parts, and the
steps of the two demos.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.harness import Row

if TYPE_CHECKING:
    from learner.batch import Batch
    from learner.trainer import Trainer

G = 16
QWEN3: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32_768, "initializer_range": 0.02,
}  # fmt: skip


def shared_64(quick: bool) -> float:
    return step_seconds(prompt_length=64, share_prefix=True, quick=quick)


def padded_64(quick: bool) -> float:
    return step_seconds(prompt_length=64, share_prefix=False, quick=quick) / flop_ratio(64, quick)


def shared_256(quick: bool) -> float:
    return step_seconds(prompt_length=256, share_prefix=True, quick=quick)


def padded_256(quick: bool) -> float:
    return step_seconds(prompt_length=256, share_prefix=False, quick=quick) / flop_ratio(256, quick)


def completion_lengths(quick: bool) -> list[list[int]]:
    """Per group, lognormal around 64 tokens (sigma 0.7), 16 to 256."""
    import numpy as np

    random = np.random.default_rng(0)
    return [
        np.clip(random.lognormal(np.log(64), 0.7, G), 16, 256).astype(int).tolist() for _ in range(1 if quick else 2)
    ]


def flop_ratio(prompt_length: int, quick: bool) -> float:
    """Operations of the padded path (without its padding) over those of the shared one.

    A token costs 2 per weight of every linear layer, and 4 x heads x head size per token it attends to; backward
    passes cost twice their forward pass everywhere, so the factor 3 cancels.
    """
    c = QWEN3
    head_width = c["head_dim"] * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    layer = 2 * c["hidden_size"] * (head_width + 3 * c["intermediate_size"])
    attend = 4 * c["num_attention_heads"] * c["head_dim"]
    predict = 2 * c["hidden_size"] * c["vocab_size"]

    def sequence(first: int, last: int) -> float:
        """Layers' cost of the tokens at positions first to last - 1."""
        return c["num_hidden_layers"] * (
            (last - first) * layer + attend * (last * (last + 1) - first * (first + 1)) / 2
        )

    lengths = completion_lengths(quick)
    head = sum(map(sum, lengths)) * predict
    own = sum(sequence(prompt_length, prompt_length + n - 1) for group in lengths for n in group)
    prompt = sequence(0, prompt_length)
    return (head + own + prompt * G * len(lengths)) / (head + own + prompt * len(lengths))


def step_seconds(*, prompt_length: int, share_prefix: bool, quick: bool) -> float:
    """CPU seconds of a step, after one of full size to warm up."""
    lengths = completion_lengths(quick)
    batch = make_groups(lengths, prompt_length, QWEN3["vocab_size"])
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(Path(directory), "qwen3", QWEN3, share_prefix=share_prefix)
    timed_step(trainer, batch)
    return min(timed_step(trainer, batch) for _ in range(2))


def timed_step(trainer: Trainer, batch: Batch) -> float:
    started_s = time.process_time()
    assert trainer.forward_backward(batch).finite
    trainer.optimizer_step()
    return time.process_time() - started_s


def make_groups(lengths: list[list[int]], prompt_length: int, vocab_size: int) -> Batch:
    import numpy as np

    from tests.factories import make_batch, make_train_group

    random = np.random.default_rng(1)
    return make_batch(
        groups=[
            make_train_group(
                ordinal=p,
                prompt_tokens=random.integers(2, vocab_size, prompt_length).tolist(),
                rewards=[float(i % 2) for i in range(len(group))],
                lengths=group,
                vocab_size=vocab_size,
            )
            for p, group in enumerate(lengths)
        ]
    )


def make_trainer(
    directory: Path, architecture: Any, shape: dict[str, Any], *, share_prefix: bool, autocast: Any = "none"
) -> Trainer:
    from learner.config import LearnerConfig
    from learner.trainer import Trainer
    from tests.models import build_tiny_model

    build_tiny_model(directory, architecture=architecture, **shape)
    return Trainer(
        LearnerConfig(
            model=str(directory),
            share_prefix=share_prefix,
            autocast=autocast,
            learning_rate=1e-6,
            token_budget=4096,  # where the padded path is fastest; the shared one hardly cares
        )
    )


ROWS = [
    Row(
        name=f"shared_prefix_{prompt_length}",
        control="own padded path / FLOP ratio",
        ours=ours,
        baseline=baseline,
        ratio="baseline/ours",
        target=0.8,
        sense="higher",
        unit="CPU s a step",
    )
    for prompt_length, ours, baseline in ((64, shared_64, padded_64), (256, shared_256, padded_256))
]

DEMOS: dict[str, dict[str, Any]] = {
    "sort, 100k parameters, P=16": {
        "architecture": "qwen3", "autocast": "none", "prompt_length": 10, "lengths": [[9] * G] * 16,
        "shape": {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16},
    },
    "SmolLM2-135M shape, bf16 autocast, P=8": {
        "architecture": "llama", "autocast": "bfloat16", "prompt_length": 31, "lengths": [[3, 4, 5, 5] * 4] * 8,
        "shape": {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49_152, "initializer_range": 0.04,
        },
    },
}  # fmt: skip


def main() -> None:
    for row in ROWS:
        length = int(row.name.rpartition("_")[2])
        ours, padded, ideal = (
            row.ours(False),
            row.baseline(False) * flop_ratio(length, False),
            flop_ratio(length, False),
        )
        print(f"{row.name}: {ours:.2f} against {padded:.2f} CPU s, {padded / ours:.2f}x of {ideal:.2f}x possible")
    for name, demo in DEMOS.items():
        with tempfile.TemporaryDirectory() as directory:
            trainer = make_trainer(
                Path(directory), demo["architecture"], demo["shape"], share_prefix=True, autocast=demo["autocast"]
            )
        batch = make_groups(demo["lengths"], demo["prompt_length"], trainer.vocab_size)
        timed_step(trainer, batch)
        print(f"{name}: {min(timed_step(trainer, batch) for _ in range(3)):.3f} CPU s a step")


if __name__ == "__main__":
    sys.exit(main())
