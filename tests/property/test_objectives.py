"""Every objective that the configuration lets through equals the naive padded one, in value and gradient."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from learner.batch import TrainGroup
from learner.config import LearnerConfig
from learner.grpo.loss import TokenLoss
from learner.model.packing import collect, mini_batches, pack_padded, pack_shared
from learner.objective import Objective, StepTensors
from protocol.messages import FinishReason
from protocol.versions import Version
from tests.factories import make_train_group
from tests.naive_objective import NaiveStep

MAX_LENGTH = 8
POLICY_VERSION = 5
TOLERANCE = 1e-6
"""Relative: weights and behavior logprobs are float32, everything else here is float64."""


@st.composite
def train_groups(draw: st.DrawFn) -> TrainGroup:
    """Any group: empty and one-token completions, equal rewards, unscored, truncated, aborted, masked, old weights."""
    g = draw(st.sampled_from([2, 2, 3, 4, 7, 64]))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    lengths = random.choice([0, 1, 1, 2, 3, MAX_LENGTH], g).tolist()
    changes: dict[str, Any] = {}
    if draw(st.booleans()):
        changes["loss_mask"] = random.integers(0, 2, sum(lengths)).astype(np.uint8)
    equal, whole = draw(st.booleans()), draw(st.booleans())
    rewards = [1.0] * g if equal else random.choice([0.0, 1.0, 0.5, -2.0], g).tolist()
    rewards = [None if not whole and random.random() < 0.2 else r for r in rewards]
    if draw(st.booleans()):
        changes["step_rewards"] = step_rewards(lengths, rewards, random)
    reasons = list(FinishReason)
    return make_train_group(
        ordinal=draw(st.integers(0, 99)),
        rewards=rewards,
        spans=[[(Version(1, POLICY_VERSION - int(random.integers(0, 4))), n)] if n else [] for n in lengths],
        finish_reasons=[reasons[i] for i in random.integers(0, len(reasons), g)] if not whole else None,
        seed=int(random.integers(0, 2**16)),
        **changes,
    )


def step_rewards(lengths: list[int], rewards: list[float | None], random: np.random.Generator) -> np.ndarray:
    """Steps anywhere: none in what is unscored, one at least in what is scored and has a token."""
    steps = [np.full(length, np.nan, np.float32) for length in lengths]
    for of, reward in zip(steps, rewards, strict=True):
        if reward is not None and of.size:
            ends = np.union1d(np.flatnonzero(random.random(of.size) < 0.4), random.integers(of.size))
            of[ends] = random.choice([reward, 0.0, 0.25], ends.size)
    return np.concatenate(steps)


CHOICES: dict[str, list[Any]] = {
    "loss_type": ["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo"],
    "importance_sampling_level": ["token", "sequence"],
    "epsilon_high": [None, 0.28, 5.0],
    "delta": [None, None, 1.4],
    "advantage_estimator": ["grpo", "grpo", "rloo", "reinforce_plus_plus_baseline", "process"],
    "scale_rewards": [None, None, "batch", "none"],
    "anchor": ["behavior", "proximal"],
    "proximal_logprobs": ["recompute", "recompute", "loglinear"],
    "importance_sampling_mode": [
        None, "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate",
        "geometric_mask", "second_moment",
    ],
    "importance_sampling_clip_max": [1.2, 2.0],
    "importance_sampling_clip_min": [None, 0.8],
    "beta": [0.0, 0.2],
    "kl_in": ["loss", "loss", "reward"],
    "kl_estimator": [None, "k1", "k2", "k3"],
    "use_bias_correction_kl": [False, True],
    "entropy_coef": [0.0, 0.01],
    "num_iterations": [1, 2],
    "num_mini_batches": [1, 2],
    "mask_truncated_completions": [False, True],
    "soft_punish_cache": [0, 4],
}  # fmt: skip


FOCI: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo, several updates": {"loss_type": "bnpo", "num_iterations": 2, "num_mini_batches": 2},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"importance_sampling_level": "sequence"},
    "loglinear": {"anchor": "proximal", "num_iterations": 2, "proximal_logprobs": "loglinear"},
    "sequence_mask": {"importance_sampling_mode": "sequence_mask"},
    "geometric_truncate": {"anchor": "proximal", "importance_sampling_mode": "geometric_truncate"},
    "kl in loss": {"beta": 0.2},
    "kl in reward": {"beta": 0.2, "kl_in": "reward"},
    "process": {"advantage_estimator": "process"},
}
"""Where a configuration begins: words that would seldom come together by chance."""


@st.composite
def configurations(draw: st.DrawFn, focus: str) -> tuple[dict[str, Any], LearnerConfig]:
    """As many more words as go together; what the configuration refuses, no reference needs to define."""
    options: dict[str, Any] = {"max_completion_length": MAX_LENGTH, **FOCI[focus]}
    config = LearnerConfig(**options)
    for key in draw(st.permutations([key for key in CHOICES if key not in options])):
        more = options | {key: draw(st.sampled_from(CHOICES[key]))}
        with contextlib.suppress(ValidationError):
            config, options = LearnerConfig(**more), more
    return options, config


def double(tensors: StepTensors) -> StepTensors:
    """In float64, so that only what is float32 by nature is."""
    changes = {f.name: getattr(tensors, f.name) for f in dataclasses.fields(tensors)}
    return dataclasses.replace(
        tensors, **{k: v.double() for k, v in changes.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    )


class Scene:
    """A step, and logprobs that three models might have, flat and by completion."""

    def __init__(self, groups: list[TrainGroup], config: LearnerConfig, seed: int) -> None:
        self.groups, self.config = groups, config
        self.step = collect(groups, mask_truncated_completions=config.mask_truncated_completions)
        self.objective = Objective(config, torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        self.values: dict[str, list[torch.Tensor]] = {}
        for name in ("policy", "start", "reference", "entropy"):
            self.values[name] = [
                torch.from_numpy(entry.group.behavior_logprobs).double()
                + 0.3 * torch.randn(entry.group.behavior_logprobs.size, generator=generator, dtype=torch.float64)
                for entry in groups
            ]
        for name in ("policy", "entropy"):
            for value in self.values[name]:
                value.requires_grad_()

    def flat(self, name: str) -> torch.Tensor:
        """[T] in the step's order."""
        kept = []
        for p, (entry, value) in enumerate(zip(self.groups, self.values[name], strict=True)):
            group = entry.group
            trains = np.repeat(self.step.trains_PG[p, : group.num_generations], group.completion_lengths)
            mask = np.ones(trains.size, np.bool_) if group.loss_mask is None else group.loss_mask.astype(np.bool_)
            kept.append(value[torch.from_numpy(trains & mask)])
        return torch.cat(kept)

    def naive(self, options: dict[str, Any]) -> NaiveStep:
        by_completion = {
            name: [
                value.split(entry.group.completion_lengths.tolist())
                for entry, value in zip(self.groups, of, strict=True)
            ]
            for name, of in self.values.items()
        }
        return NaiveStep([entry.group for entry in self.groups], options, POLICY_VERSION, **by_completion)

    def updates(self) -> list[tuple[StepTensors, slice]]:
        """As the trainer makes them."""
        parts = mini_batches(self.step, self.config.num_mini_batches)
        tensors = self.objective.prepare(
            self.step,
            parts,
            policy_version=POLICY_VERSION,
            proximal_logprobs_T=self.flat("start") if self.config.needs_proximal else None,
            reference_logprobs_T=self.flat("reference") if self.config.beta else None,
        )
        ends = np.cumsum([part.completion_T.size for part in parts]).tolist()
        updates = list(zip(tensors, map(slice, [0, *ends], ends), strict=False)) * self.config.num_iterations
        return [
            (dataclasses.replace(double(of), progress=done / len(updates)), where)
            for done, (of, where) in enumerate(updates)
        ]

    def pieces(self, tensors: StepTensors, seed: int) -> list[torch.Tensor]:
        """Some tokens at a time: any where the objective allows it, else whole completions."""
        random = np.random.default_rng(seed)
        unit = np.arange(tensors.weights_T.numel()) if self.config.token_level else tensors.completion_T.numpy()
        label = random.integers(0, 3, unit.max() + 1)[unit]
        return [torch.from_numpy(np.flatnonzero(label == piece)) for piece in np.unique(label)]

    def loss(self, tensors: StepTensors, where: slice, index: torch.Tensor) -> TokenLoss:
        policy, entropy = self.flat("policy")[where], self.flat("entropy")[where]
        return self.objective.loss(policy[index], entropy[index], index, tensors)

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        leaves = [*self.values["policy"], *self.values["entropy"]]
        return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


MANY = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
steps = st.lists(train_groups(), min_size=1, max_size=3)


@MANY
@given(groups=steps, data=st.data(), seed=st.integers(0, 2**16))
@pytest.mark.parametrize("focus", FOCI)
def test_packed_pieces_equal_the_naive_padded_whole(focus, groups, data, seed):
    options, config = data.draw(configurations(focus))
    scene = Scene(groups, config, seed)
    assume(scene.step.completion_T.size)
    naive = scene.naive(options).losses()
    updates = scene.updates()
    assert len(updates) == len(naive)
    for (tensors, where), expected in zip(updates, naive, strict=True):
        pieces = [scene.loss(tensors, where, index).loss for index in scene.pieces(tensors, seed)]
        loss = torch.stack(pieces).sum()
        assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE, abs=TOLERANCE)
        for got, want in zip(scene.gradients(loss), scene.gradients(expected), strict=True):
            torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("option", [(key, value) for key, values in CHOICES.items() for value in values], ids=str)
def test_every_word_is_reached(option):
    """A word that every drawn configuration refused would be compared with nothing."""
    key, value = option
    needs: dict[str, dict[str, Any]] = {
        "delta": {}, "kl_in": {"beta": 0.2}, "kl_estimator": {"beta": 0.2}, "use_bias_correction_kl": {"beta": 0.2},
        "proximal_logprobs": {"anchor": "proximal", "num_iterations": 2},
        "importance_sampling_mode": {"anchor": "proximal"},
        "importance_sampling_clip_max": {"anchor": "proximal"}, "importance_sampling_clip_min": {"anchor": "proximal"},
    }  # fmt: skip
    extra = {"cispo": {"epsilon_high": 5.0}, "k1": {"use_bias_correction_kl": True}}.get(value, {})
    LearnerConfig(**{**needs.get(key, {}), **extra, key: value})


@MANY
@given(groups=steps, token_budget=st.integers(1, 60), num_mini_batches=st.integers(1, 4))
def test_no_row_holds_half_a_completion(groups, token_budget, num_mini_batches):
    """What makes sequence-level losses exact whatever the micro-batches are."""
    step = collect(groups, mask_truncated_completions=False)
    assume(step.completion_T.size)
    parts = mini_batches(step, num_mini_batches)
    assert sum(len(part.prompts) for part in parts) == len(step.prompts)
    for name in ("tokens_C", "trained_C", "targets_T", "behavior_logprobs_T", "policy_version_T", "lengths_N"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(step, name))
    for part in parts:
        assert part.completion_T.size
        for pack in (pack_shared, pack_padded):
            rows = [rows for micro_batch in pack(part, token_budget) for rows in micro_batch.rows]
            where = [set(part.completion_T[r.index_T].tolist()) for r in rows]
            assert sum(map(len, where)) == len(set().union(*where)) == len(set(part.completion_T.tolist()))
