"""What dividing rows among ranks saves: memory of a rank per token of a sequence, two gloo ranks on both sides.

Two completions of one prompt. Without context parallelism each rank forwards one of them whole; with it both forward
half of the tokens of each. Gradients and the head's chunks weigh the same whatever the length: so the figure is how
much higher the peak of a step is for longer completions, per token. That both sides train the same is a test of its own
(tests/system/test_ranks.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.harness import Row
from tests.bench.peers_groups import QWEN3
from tests.bench.two_ranks import lead_or_follow

if TYPE_CHECKING:
    from learner.trainer import Trainer

PROMPT_TOKENS, SHORT_TOKENS, LONG_TOKENS, QUICK_TOKENS = 64, 2048, 8192, 6144


def divided_rows(quick: bool) -> float:
    """MiB for a thousand tokens."""
    return growth(2, quick)


def whole_rows(quick: bool) -> float:
    return growth(1, quick)


def growth(context_parallel_size: int, quick: bool) -> float:
    """How much more memory rank 0 needs for each thousand tokens that completions are longer."""
    longer = QUICK_TOKENS if quick else LONG_TOKENS
    low, high = (peak_of_two_ranks(context_parallel_size, tokens) for tokens in (SHORT_TOKENS, longer))
    return (high - low) / (longer - SHORT_TOKENS) * 1000


def peak_of_two_ranks(context_parallel_size: int, num_tokens: int) -> float:
    """MiB of rank 0 in a step, over what it held before."""
    from tests.models import build_tiny_model
    from tests.spawned_ranks import run_ranks

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        build_tiny_model(directory / "model", architecture="qwen3", **QWEN3 | {"max_position_embeddings": 16_384})
        command = ["tests.bench.context", name, str(context_parallel_size), str(num_tokens)]
        ranks = run_ranks([command] * 2, directory)
        assert all(rank.code == 0 for rank in ranks), ranks[0].output[-2000:]
        peak_mib: float = json.loads((directory / "answer.json").read_text())
        return peak_mib


def peak_of_a_step(trainer: Trainer, num_tokens: int) -> float:
    """Of the first forward and backward: freed memory of one before would hide a part of it."""
    import numpy as np

    from tests.bench.memory import peak_mib, reset_peak
    from tests.factories import make_batch, make_train_group

    prompt = np.random.default_rng(0).integers(2, QWEN3["vocab_size"], PROMPT_TOKENS).tolist()
    group = make_train_group(
        prompt_tokens=prompt, rewards=[0.0, 1.0], lengths=[num_tokens] * 2, vocab_size=QWEN3["vocab_size"]
    )
    held_mib = reset_peak()
    assert trainer.forward_backward(make_batch(groups=[group])).finite
    return peak_mib() - held_mib


def main(directory: Path, context_parallel_size: int, num_tokens: int) -> None:
    """One rank."""
    from learner.config import LearnerConfig

    budget = -(-(PROMPT_TOKENS + num_tokens) // context_parallel_size)
    config = LearnerConfig(
        model=str(directory / "model"), token_budget=budget, context_parallel_size=context_parallel_size
    )
    lead_or_follow(config, directory, partial(peak_of_a_step, num_tokens=num_tokens))


ROWS = [
    Row(
        name="context_memory",
        control="two ranks, whole rows",
        ours=divided_rows,
        baseline=whole_rows,
        ratio="ours/baseline",
        target=0.6,
        sense="lower",
        unit="MiB a thousand tokens",
        rounds=3,
    )
]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
