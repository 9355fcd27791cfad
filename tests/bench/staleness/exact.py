"""One run at an exact staleness: every token of a step is sampled by the weights of max(0, policy_version - staleness).

The shipped trainer and the shipped decoder in one process, with no clock: version u samples the batch that will be
trained on by version u + staleness, and version 0 all the batches before it, too. That is the worst case that
`max_staleness` allows, in every step; a real run is fresher. Samples depend on weights, prompt and seed alone, so a run
is a function of its setting and its seed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from learner.batch import Batch, TrainGroup
from learner.config import LearnerConfig
from learner.demo import sorting
from learner.demo.recipes import recipes
from learner.leases import RunIdentity, train_lease
from learner.ledger import Entry
from learner.prompts import PromptRow
from learner.trainer import Trainer
from protocol.completions import Completion, group_versions
from protocol.messages import Group, Lease, RewardStatus
from protocol.versions import Version
from protocol.weights.manifest import TensorSpec
from rollout_server.engines.base import EngineFailure, GenerationRequest
from rollout_server.engines.decode import Decoder
from rollout_server.engines.live_weights import DTYPES
from rollout_server.engines.rows import Job
from rollout_server.engines.text import load_decoder
from rollout_server.engines.transformers import load_model
from rollout_server.groups import build_group, reward_call
from rollout_server.rewards.base import Scores
from rollout_server.rewards.builtin import exact_match

ROOM = 256
MAX_LENGTH = 32
INCARNATION = 1
EVAL_SEED = 1 << 20
"""Far from any run's: what is evaluated is sampled with numbers of its own."""
METRICS = ("clip_ratio/region_mean", "policy_kl", "effective_sample_size", "entropy", "grad_norm")
"""Kept of the trainer's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What every run of a comparison shares: the sort demonstration's task and model, and how long it trains."""

    max_steps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    """Over the demonstration's configuration of the learner."""
    num_eval: int = 300
    """Prompts of an evaluation."""
    eval_generations: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run was like. Rewards are between 0 and 1."""

    rewards: list[float]
    """[max_steps] of the groups of each step, so of the version that sampled them."""
    evaluation: float
    """Share of evaluation prompts that the last version sorts, sampled at temperature 1."""
    metrics: dict[str, float]
    """METRICS, means over the steps."""


class Weights:
    """A version in memory: what the trainer writes it into, and what the decoder reads it from."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._bytes = {spec.name: bytearray(spec.nbytes) for spec in specs}
        self.tensors = {
            spec.name: torch.frombuffer(self._bytes[spec.name], dtype=DTYPES[spec.dtype]).view(spec.shape)
            for spec in specs
        }

    def view(self, name: str) -> memoryview:
        """Return the writable bytes of a tensor."""
        return memoryview(self._bytes[name])


class Sampler:
    """The rollout server's work without the server: a lease in, a scored group out, by the weights loaded last."""

    def __init__(self, model: Path, specs: Sequence[TensorSpec]) -> None:
        self._decoder = Decoder(load_model(model, dtype="float32", device="cpu"), room=ROOM, max_length=MAX_LENGTH)
        self._weights = Weights(specs)
        self._text = load_decoder(model)

    def load(self, trainer: Trainer) -> None:
        """Sample by the trainer's weights as they are."""
        trainer.write_weights(self._weights)
        self._decoder.load({**self._weights.tensors}, Version(INCARNATION, trainer.policy_version))

    def groups(self, leases: Sequence[Lease]) -> list[Group]:
        """Sample and score."""
        done: dict[str, list[Completion]] = {}
        for lease in leases:
            self._submit(lease, done)
        while not self._decoder.idle:
            self._decoder.step()
        return [self._score(lease, done[lease.group_id]) for lease in leases]

    def _submit(self, lease: Lease, done: dict[str, list[Completion]]) -> None:
        def reply(result: list[Completion] | EngineFailure) -> None:
            assert not isinstance(result, EngineFailure), result
            done[lease.group_id] = result

        request = GenerationRequest(
            group_id=lease.group_id,
            prompt_tokens=lease.prompt_tokens,
            num_generations=lease.num_generations,
            sampling=lease.sampling,
            seed=lease.seed,
        )
        self._decoder.submit(Job(request=request, reply=reply))

    def _score(self, lease: Lease, completions: Sequence[Completion]) -> Group:
        call = reward_call(lease, completions, self._text)
        arguments = call.arguments(range(len(call)))
        values = exact_match(arguments["completions"], arguments["answer"], arguments["finish_reason"])
        scores = Scores(
            values=np.array(values, np.float32)[:, None],
            statuses=np.full((len(call), 1), RewardStatus.OK, np.uint8),
            seconds=np.zeros((len(call), 1), np.float32),
        )
        return build_group(
            lease, completions, scores, [1.0], reward_names=["exact_match"], generate_s=0.0, reward_s=0.0
        )


class Rows:
    """Leases of the sort task's rows, in their order, again from the first after the last."""

    def __init__(self, rows: Sequence[sorting.Row], trainer: Trainer, config: LearnerConfig) -> None:
        self._rows, self._encode, self._config = rows, trainer.tokenizer.encode, config
        self._identity = RunIdentity(
            run_id=f"staleness-{config.seed}",
            incarnation=INCARNATION,
            vocab_size=trainer.vocab_size,
            model_digest=trainer.model_digest,
            tokenizer_digest=trainer.tokenizer_digest,
            stop_token_ids=tuple(trainer.eos_token_ids),
        )

    def lease(self, ordinal: int) -> Lease:
        """Ask for a group."""
        row = self._rows[ordinal % len(self._rows)]
        prompt = PromptRow(
            ordinal=ordinal,
            prompt_tokens=np.array(self._encode(row["prompt"]), np.int32),
            prompt=row["prompt"],
            columns={"answer": row["answer"]},
        )
        entry = Entry(ordinal=ordinal, sequence=ordinal)
        return train_lease(self._config, self._identity, prompt, entry, min_version=Version(INCARNATION, 0))


def make_config(task: Task, *, model: Path, seed: int, options: Mapping[str, Any]) -> LearnerConfig:
    """Return the learner's configuration of a run: the demonstration's, then the task's, then the setting's words.

    No group is filtered: what is refilled would be one more thing that differs between settings.
    """
    recipe = recipes()["sort"].learner
    fixed = {"model": str(model), "dataset": "sort", "seed": seed, "device": "cpu", "filter_zero_std": False}
    values = {**recipe, **fixed, "max_steps": task.max_steps, **task.options, **options}
    del values["eval_temperature"]  # read with an eval_dataset only; what is evaluated here is in _evaluate
    return LearnerConfig(**values)


def run(task: Task, *, model: Path, staleness: int, seed: int, options: Mapping[str, Any]) -> Outcome:
    """Train once.

    Args:
        task: what is learned, and how long.
        model: directory of the warmed-up model.
        staleness: of every token of every step, as far as there are versions so old.
        seed: of prompts and samples.
        options: words of the learner's configuration.
    """
    config = make_config(task, model=model, seed=seed, options=options)
    trainer = Trainer(config)
    sampler = Sampler(model, trainer.specs())
    train, held_out = sorting.split_prompts(num_train=20_000, num_eval=task.num_eval, seed=seed)
    rows = Rows(list(sorting.rows(train)), trainer, config)
    ahead: deque[Batch] = deque()
    """Sampled, not yet trained: the next step first."""
    rewards, metrics = [], []
    for version in range(task.max_steps):
        sampler.load(trainer)
        while len(ahead) <= staleness and version + len(ahead) < task.max_steps:
            ahead.append(_sample_batch(sampler, rows, step=version + len(ahead) + 1, config=config))
        batch = ahead.popleft()
        sampled_by = {each for one in batch.groups for each in group_versions(one.group)}
        assert sampled_by == {Version(INCARNATION, max(0, version - staleness))}, f"step {batch.step}: {sampled_by}"
        rewards.append(fmean(float(one.group.rewards.mean()) for one in batch.groups))
        result = trainer.forward_backward(batch)
        if not result.finite:
            raise ArithmeticError(f"step {batch.step}: {result.reason}")
        trainer.optimizer_step()
        metrics.append(trainer.step_metrics)
    sampler.load(trainer)
    return Outcome(
        rewards=rewards,
        evaluation=_evaluate(sampler, list(sorting.rows(held_out)), trainer, task, config),
        metrics={key: fmean(of[key] for of in metrics) for key in METRICS},
    )


def _sample_batch(sampler: Sampler, rows: Rows, *, step: int, config: LearnerConfig) -> Batch:
    """Sample the batch of a step by the weights that are loaded."""
    first = (step - 1) * config.prompts_per_step
    leases = [rows.lease(ordinal) for ordinal in range(first, first + config.prompts_per_step)]
    groups = [
        TrainGroup(
            ordinal=lease.ordinal, sequence=lease.sequence, prompt_tokens=lease.prompt_tokens, prompt="", group=group
        )
        for lease, group in zip(leases, sampler.groups(leases), strict=True)
    ]
    return Batch(step=step, groups=tuple(groups))


def _evaluate(
    sampler: Sampler, held_out: Sequence[sorting.Row], trainer: Trainer, task: Task, config: LearnerConfig
) -> float:
    """Let the weights that are loaded sort the evaluation prompts."""
    changes = {"num_generations": task.eval_generations, "seed": EVAL_SEED}
    rows = Rows(held_out, trainer, config.model_copy(update=changes))
    groups = sampler.groups([rows.lease(ordinal) for ordinal in range(len(held_out))])
    return fmean(float(group.rewards.mean()) for group in groups)
