"""The packed step with shared prompts against the naive one: same loss, same gradients, for any groups.

Naive means: one forward pass of the whole model for every completion behind its own copy of the prompt, log_softmax of
all logits, equation 3 completion by completion with Python loops. Nothing of learner/ is used in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention
from transformers import AutoModelForCausalLM

from learner.batch import Batch, TrainGroup
from learner.config import LearnerConfig
from learner.model import attention, flex, packing
from learner.trainer import Trainer
from protocol.messages import FinishReason
from tests.factories import make_batch, make_train_group

EPSILON, EPSILON_HIGH, CLIP_MAX = 0.2, 0.28, 1.5
VOCAB = 40
BUDGETS = (16, 60, 8192)
TOLERANCE = 1e-5


@st.composite
def train_groups(draw: st.DrawFn) -> TrainGroup:
    """Any group: G of 2 to 6, some completions of one token, unscored, truncated or aborted, some tokens masked."""
    g = draw(st.integers(2, 6))
    lengths = draw(st.lists(st.sampled_from([1, 1, 2, 3, 5, 8, 13, 41]), min_size=g, max_size=g))
    seed = draw(st.integers(0, 2**16))
    changes: dict[str, Any] = {}
    if draw(st.booleans()):
        changes["loss_mask"] = np.random.default_rng(seed).integers(0, 2, sum(lengths)).astype(np.uint8)
    return make_train_group(
        ordinal=draw(st.integers(0, 99)),
        prompt_tokens=draw(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=12)),
        rewards=draw(st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0, None]), min_size=g, max_size=g)),
        lengths=lengths,
        finish_reasons=draw(st.lists(st.sampled_from(list(FinishReason)), min_size=g, max_size=g)),
        temperature=draw(st.sampled_from([1.0, 0.6, 1.7])),
        vocab_size=VOCAB,
        seed=seed,
        **changes,
    )


batches = st.lists(train_groups(), min_size=1, max_size=3).map(lambda groups: make_batch(groups=groups))
knobs = st.fixed_dictionaries(
    {
        "loss_type": st.sampled_from(["dapo", "grpo"]),
        "anchor": st.sampled_from(["behavior", "proximal"]),
        "beta": st.sampled_from([0.0, 0.2]),
        "scale_rewards": st.sampled_from(["group", "none"]),
        "mask_truncated_completions": st.booleans(),
        "loss_head": st.sampled_from(["auto", "recompute"]),
    }
)


@pytest.fixture(scope="module")
def make_trainer(tiny_model_dir: Path) -> Callable[..., Trainer]:
    """Trainers of the tiny model, one per configuration, with weights moved away from the reference's."""

    @functools.cache
    def make(**options: Any) -> Trainer:
        config = LearnerConfig(
            model=str(tiny_model_dir),
            epsilon=EPSILON,
            epsilon_high=EPSILON_HIGH,
            **({"importance_sampling_clip_max": CLIP_MAX} if options.get("anchor") == "proximal" else {}),
            **options,
        )
        trainer = Trainer(config)
        # Else a wrong result would hide behind the fall-back to padding that it causes.
        assert trainer._policy.shares_prefix == config.share_prefix
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in trainer._parameters.values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return trainer

    return make


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def naive_step(model: Any, reference: Any, batch: Batch, options: dict[str, Any]) -> torch.Tensor | None:
    """The loss of the batch by the book; None when nothing trains."""
    terms: list[list[list[torch.Tensor]]] = []  # per group, completion, token
    for entry in batch.groups:
        group, kept, start = entry.group, [], 0
        completions = []
        for i, length in enumerate(group.completion_lengths.tolist()):
            completions.append(slice(start, start + length))
            start += length
            masked = options["mask_truncated_completions"] and group.finish_reasons[i] == FinishReason.LENGTH
            if group.scored[i] and group.finish_reasons[i] != FinishReason.ABORT and not masked:
                kept.append(i)
        if len(kept) < 2:
            continue
        rewards = [float(group.rewards[i]) for i in kept]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        scale = std + 1e-4 if options["scale_rewards"] == "group" else 1.0
        terms.append([])
        for i, reward in zip(kept, rewards, strict=True):
            tokens = group.completion_tokens[completions[i]]
            behavior = group.behavior_logprobs[completions[i]]
            mask = np.ones(len(tokens)) if group.loss_mask is None else group.loss_mask[completions[i]]
            policy = naive_logprobs(model, entry, tokens)
            with torch.no_grad():
                pi_ref = naive_logprobs(reference, entry, tokens)
            objective = [
                naive_token(policy[t], float(behavior[t]), pi_ref[t], (reward - mean) / scale, options)
                for t in range(len(tokens))
                if mask[t]
            ]
            terms[-1].append(objective)
    return naive_mean(terms, options["loss_type"])


def naive_logprobs(model: Any, entry: TrainGroup, tokens: np.ndarray) -> torch.Tensor:
    text = torch.from_numpy(np.concatenate([entry.prompt_tokens, tokens]).astype(np.int64))
    logits = (
        model(input_ids=text[None], use_cache=False).logits[0, len(entry.prompt_tokens) - 1 : -1]
        / entry.group.temperature
    )
    return logits.log_softmax(-1).gather(1, text[len(entry.prompt_tokens) :, None])[:, 0]


def naive_token(
    policy: torch.Tensor, behavior: float, pi_ref: torch.Tensor, advantage: float, options: dict[str, Any]
) -> torch.Tensor:
    weight = 1.0
    ratio = torch.exp(policy - behavior)
    if options["anchor"] == "proximal":
        weight = min(ratio.item(), CLIP_MAX)
        ratio = torch.exp(policy - policy.detach())
    inside = ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH)
    k3 = torch.exp(pi_ref - policy) - (pi_ref - policy) - 1
    return weight * torch.min(ratio * advantage, inside * advantage) - options["beta"] * k3


def naive_mean(terms: list[list[list[torch.Tensor]]], loss_type: str) -> torch.Tensor | None:
    tokens = [token for group in terms for completion in group for token in completion]
    if not tokens:
        return None
    if loss_type == "dapo":
        return -torch.stack(tokens).mean()
    groups = [
        torch.stack([torch.stack(completion).mean() for completion in group if completion]).mean()
        for group in terms
        if any(group)
    ]
    return -torch.stack(groups).mean()


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check(trainer: Trainer, reference: Any, batch: Batch, options: dict[str, Any]) -> None:
    result = trainer.forward_backward(batch)
    got = gradients(trainer._model) if result.finite else None
    trainer._drop_gradients()
    own = trainer._model.config._attn_implementation
    trainer._model.set_attn_implementation("eager")
    loss = naive_step(trainer._model, reference, batch, options)
    if loss is None:
        assert not result.finite
        assert result.reason == "no completion of the batch trains"
    else:
        loss.backward()
        expected = gradients(trainer._model)
        assert result.metrics["loss"] == pytest.approx(loss.item(), rel=TOLERANCE, abs=TOLERANCE)
        assert got is not None
        assert (got - expected).norm() <= TOLERANCE * max(1.0, expected.norm().item())
    trainer._drop_gradients()
    trainer._model.set_attn_implementation(own)


HARD = make_batch(
    groups=[
        make_train_group(ordinal=0, rewards=(1.0, 0.0), lengths=(1, 1), prompt_tokens=[4]),
        make_train_group(ordinal=1, rewards=(None, None, 1.0), lengths=(5, 3, 9)),
        make_train_group(ordinal=2, rewards=(1.0, 0.0, 1.0), lengths=(1, 40, 33), prompt_tokens=list(range(2, 20))),
    ]
)
PLAIN = {
    "loss_type": "grpo",
    "anchor": "behavior",
    "beta": 0.2,
    "scale_rewards": "group",
    "mask_truncated_completions": False,
}

FEW = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FEW
@given(batch=batches, options=knobs, token_budget=st.sampled_from(BUDGETS))
@example(batch=HARD, options=PLAIN, token_budget=16)
@example(batch=HARD, options=PLAIN, token_budget=8192)
def test_shared_equals_naive(make_trainer, reference, batch, options, token_budget):
    check(make_trainer(token_budget=token_budget, **options), reference, batch, options)


@FEW
@given(batch=batches, options=knobs, token_budget=st.sampled_from(BUDGETS))
@example(batch=HARD, options=PLAIN, token_budget=60)
def test_padded_equals_naive(make_trainer, reference, batch, options, token_budget):
    check(make_trainer(token_budget=token_budget, share_prefix=False, **options), reference, batch, options)


@pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile", "ignore:The .grad attribute of a Tensor"
)
@settings(FEW, max_examples=2)  # every new length is compiled
@given(batch=batches, token_budget=st.sampled_from(BUDGETS), gradient_checkpointing=st.booleans())
@example(batch=HARD, token_budget=16, gradient_checkpointing=True)
def test_shared_by_flex_attention_equals_naive(make_trainer, reference, batch, token_budget, gradient_checkpointing):
    options = {**PLAIN, "attn_implementation": "flex_attention", "gradient_checkpointing": gradient_checkpointing}
    with pytest.MonkeyPatch.context() as patch:
        # On CPU torch has its backward pass, but does not let it be used.
        patch.setattr(flex, "check_device", lambda device: None)
        patch.setattr(flex_attention, "_validate_device", lambda q, k, v: None)
        check(make_trainer(token_budget=token_budget, **options), reference, batch, PLAIN)


@settings(FEW, max_examples=8)
@given(batch=batches, token_budget=st.sampled_from(BUDGETS))
@example(batch=HARD, token_budget=16)
def test_shared_by_public_operators_equals_naive(make_trainer, reference, batch, token_budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "HAS_CPU_FLASH", False)
        check(make_trainer(token_budget=token_budget, **PLAIN), reference, batch, PLAIN)


@FEW
@given(batch=batches, token_budget=st.integers(1, 200))
def test_rows_hold_every_trained_token_once_within_the_budget(batch, token_budget):
    step = packing.collect(batch.groups, mask_truncated_completions=False)
    for pack in (packing.pack_shared, packing.pack_padded):
        micro_batches = pack(step, token_budget)
        rows = [rows for micro_batch in micro_batches for rows in micro_batch.rows]
        indices = np.concatenate([r.index_T for r in rows]) if rows else np.zeros(0)
        assert sorted(indices.tolist()) == list(range(step.targets_T.size))
        longest = max((len(p) for p in step.prompts), default=0) + max(step.lengths_N, default=0)
        assert all(r.tokens_BL.size <= max(token_budget, longest) for r in rows)
        assert [r.tokens_BL.tolist() for m in pack(step, token_budget) for r in m.rows] == [
            r.tokens_BL.tolist() for r in rows
        ]
