"""TRL's learners on a given group: GRPOTrainer and AsyncGRPOTrainer, alone, without an engine and without a GPU.

Both run as they are but for what a CPU lacks or a comparison needs:

    GRPOTrainer        its rollout function returns our group
        compact_head   the head on completion tokens only, as TRL does where there is Triton
    AsyncGRPOTrainer   its rollout worker hands out our group; weights are sent nowhere; MFU is not computed
        attention      our cascade in the place of its FlashAttention-3 kernel, which no CPU has
        own_head       our head in the place of its fused one, on completion tokens only: what is then left of the
                       difference is packing and everything around it
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import queue
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bench.harness import Skip
from tests.bench.meter import Meter
from tests.bench.peers_groups import Shape, make_step, write_model

NEEDS = ("trl", "accelerate", "datasets")
VERSION = "1.16.0"
"""Of trl: what is replaced below are private names of this one."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
NUM_STEPS = 2
"""One of full size to warm up, one that counts."""


def check_installed() -> None:
    """Skip the row, in one sentence, where TRL is not."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"{', '.join(missing)} not installed: pip install -c constraints.txt -e '.[peers]'")
    if (version := importlib.metadata.version("trl")) != VERSION:
        raise Skip(f"trl {version} is installed, and {VERSION} wanted: pip install -c constraints.txt -e '.[peers]'")
    os.environ |= ENVIRONMENT


def step_figures(make: Callable[..., Any], shape: Shape, *, quick: bool, **options: Any) -> dict[str, float]:
    """Figures (see Meter) of the last optimizer step of a trainer that `make` makes."""
    check_installed()
    import transformers

    class Laps(transformers.TrainerCallback):
        """From the end of one step to the end of the next: all that the trainer does, but for generation."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.meter = Meter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.meter.lap()

    laps = Laps()
    with tempfile.TemporaryDirectory() as directory:
        trainer = make(Path(directory), shape, quick=quick, **options)
        trainer.add_callback(laps)
        trainer.train()
    assert laps.meter.num_laps == NUM_STEPS
    return laps.meter.figures(sum(shape.lengths(quick=quick)))


def grpo_trainer(
    directory: Path, shape: Shape, *, device_batch: int, compact_head: bool, quick: bool = False, **options: Any
) -> Any:
    """Make a GRPOTrainer whose every step is the group of `shape`."""
    import trl.trainer.utils
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    group = make_step(shape, quick=quick).groups[0]
    completions = list(_completions(group))
    num_generations = len(completions)
    device_batch = min(device_batch, num_generations)
    if compact_head:
        trl.trainer.utils._use_triton = lambda device: True  # that module asks only which tokens to score
    rewards = group.group.rewards.tolist()
    return GRPOTrainer(
        model=str(write_model(directory / "model", shape)),
        reward_funcs=lambda completions, **_: rewards,
        args=GRPOConfig(
            num_generations=num_generations,
            max_completion_length=max(shape.lengths(quick=quick)),
            beta=0.0,
            loss_type="dapo",
            model_init_kwargs={"dtype": "float32"},
            **_arguments(directory, device_batch, num_generations, options),
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * num_generations}),
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": [group.prompt_tokens.tolist()] * num_generations,
            "completion_ids": [tokens.tolist() for tokens, _ in completions],
            "logprobs": [logprobs.tolist() for _, logprobs in completions],
        },
    )


def async_trainer(
    directory: Path, shape: Shape, *, device_batch: int, own_head: bool, quick: bool = False, **options: Any
) -> Any:
    """Make an AsyncGRPOTrainer whose every step is the group of `shape`."""
    import trl.trainer.utils
    from datasets import Dataset
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing

    packing.tree_attention = cascade_attention
    async_grpo_trainer.get_peak_flops_per_device = lambda *_: None
    if own_head:
        trl.trainer.utils._use_triton = lambda device: True
        trl.trainer.utils._ChunkedLogProbFunction = OwnHead
    num_generations = len(shape.lengths(quick=quick))
    device_batch = min(device_batch, num_generations)
    return AsyncGRPOTrainer(
        model=str(write_model(directory / "model", shape)),
        args=AsyncGRPOConfig(
            num_generations=num_generations,
            token_budget=0,  # a fixed number of samples per micro-batch, so that a step is exactly one group
            max_staleness=NUM_STEPS,
            dtype="float32",
            **_arguments(directory, device_batch, num_generations, options),
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * num_generations}),
        rollout_worker=RolloutWorker(shape, quick=quick),
        weight_transfer=NoTransfer(),
    )


class RolloutWorker:
    """Has all samples of the run in its queue from the start: the trainer never waits."""

    def __init__(self, shape: Shape, *, quick: bool) -> None:
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        for step in range(NUM_STEPS + 1):  # its loader reads one ahead
            for sample in rollout_samples(shape, group_id=step, quick=quick):
                self.rollout_buffer.put(sample)

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update_model_version(self, model_version: int) -> None: ...
    def check_health(self, stale_after_s: float) -> None:
        raise AssertionError("the trainer waits for a sample that is not coming")


class NoTransfer:
    """Weights are sent nowhere."""

    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def send_weights(self, iterator: Iterator[Any]) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...


def rollout_samples(shape: Shape, *, group_id: int, quick: bool) -> Iterator[Any]:
    """Yield the group of `shape` as TRL's rollout samples, shortest first (its buckets are then ours)."""
    import numpy as np
    import torch
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

    from learner.grpo.advantages import group_advantages

    group = make_step(shape, quick=quick).groups[0]
    rewards_1G = torch.from_numpy(group.group.rewards)[None]
    advantages_G = group_advantages(rewards_1G, torch.ones_like(rewards_1G))[0].tolist()
    prompt = group.prompt_tokens
    for advantage, (tokens, logprobs) in zip(advantages_G, _completions(group), strict=True):
        yield RolloutSample(
            prompt=[],
            completion=[],
            input_ids=np.concatenate([prompt, tokens]).astype(np.int64),
            completion_mask=np.repeat([0, 1], [prompt.size, tokens.size]),
            old_log_probs=np.concatenate([np.zeros(prompt.size, np.float32), logprobs]),
            advantage=advantage,
            model_version=0,
            group_id=group_id,
            metrics={},
        )


def cascade_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    tree_cu_seqlens_q: Any,
    scaling: float | None = None,
    **_: Any,
) -> Any:
    """Attend as TRL's tree row says, by our layout: a root (the prompt but for its last token), then its branches."""
    from learner.model.attention import Packed, shared_prefix_attention

    layout = tree_layout(tuple(tree_cu_seqlens_q.diff().tolist()))
    return shared_prefix_attention(module, query, key, value, attention_mask, packed=Packed(layout), scaling=scaling)


@functools.lru_cache
def tree_layout(segments: tuple[int, ...]) -> Any:
    """Layout of a root segment and its branches."""
    from learner.model.packing import Layout, buckets

    root, *branches = segments
    return Layout(prompts=buckets([root]), prompt_lengths=(root,), completions=(buckets(branches),))


class OwnHead:
    """token_logprobs in the shape of TRL's ChunkedLogProbFunction."""

    @staticmethod
    def apply(hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, *_: Any) -> tuple[Any, ...]:
        import torch

        from learner.model.logprobs import token_logprobs

        temperature_T = torch.full(targets.shape, temperature, dtype=torch.float32)
        logprobs, entropies = token_logprobs(hidden, weight, bias, targets, temperature_T)
        return logprobs, entropies, None, None, None


def _completions(group: Any) -> Iterator[tuple[Any, Any]]:
    """Yield tokens and behavior logprobs of each completion."""
    import numpy as np

    cuts = group.group.completion_lengths.cumsum()[:-1]
    yield from zip(
        np.split(group.group.completion_tokens, cuts), np.split(group.group.behavior_logprobs, cuts), strict=True
    )


def _arguments(directory: Path, device_batch: int, num_generations: int, options: dict[str, Any]) -> dict[str, Any]:
    """What both trainers are told: one group a step, float32, nothing but training."""
    return {
        "output_dir": str(directory / "out"),
        "per_device_train_batch_size": device_batch,
        "gradient_accumulation_steps": num_generations // device_batch,
        "max_steps": NUM_STEPS,
        "learning_rate": 1e-6,
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
