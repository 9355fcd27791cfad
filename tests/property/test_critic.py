"""The critic on packed rows with shared prompts against a padded one written out: same values, same gradients.

Naive means: the whole model forwarded for every completion behind its own copy of the prompt, its last hidden states
times the value head, the clipped squared error token by token.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from learner.batch import Batch, TrainGroup
from learner.config import LearnerConfig
from learner.model.packing import collect
from learner.trainer import Trainer
from tests.factories import make_batch, make_train_group

CLIP = 0.3
TOLERANCE = 1e-5


@st.composite
def train_groups(draw: st.DrawFn) -> TrainGroup:
    """Any group, a single completion and completions of one token too; some unscored, some tokens masked."""
    g = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.sampled_from([1, 1, 2, 3, 8, 21]), min_size=g, max_size=g))
    seed = draw(st.integers(0, 2**16))
    changes: dict[str, Any] = {}
    if draw(st.booleans()):
        changes["loss_mask"] = np.random.default_rng(seed).integers(0, 2, sum(lengths)).astype(np.uint8)
    return make_train_group(
        ordinal=draw(st.integers(0, 99)),
        prompt_tokens=draw(st.lists(st.integers(2, 39), min_size=1, max_size=9)),
        rewards=draw(st.lists(st.sampled_from([0.0, 1.0, 1.0, None]), min_size=g, max_size=g)),
        lengths=lengths,
        seed=seed,
        vocab_size=40,
        **changes,
    )


batches = st.lists(train_groups(), min_size=1, max_size=3).map(lambda groups: make_batch(groups=groups))


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "padded"])
def trainer(request: pytest.FixtureRequest, tiny_model_dir: Path) -> Trainer:
    config = LearnerConfig(
        model=str(tiny_model_dir), advantage_estimator="gae", filter_zero_std=False, cliprange_value=CLIP,
        share_prefix=request.param, token_budget=24,
    )  # fmt: skip
    trainer = Trainer(config)
    assert trainer._critic._policy.shares_prefix == request.param
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer._critic._parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trainer


def naive_values(model: Any, batch: Batch) -> torch.Tensor:
    """[T], of every token that trains, in order."""
    head, values = model.get_output_embeddings(), []
    for entry in batch.groups:
        group, start = entry.group, 0
        mask = torch.ones(group.completion_tokens.size) if group.loss_mask is None else torch.tensor(group.loss_mask)
        for i, length in enumerate(group.completion_lengths.tolist()):
            part = slice(start, start + length)
            start += length
            if not group.scored[i]:
                continue
            tokens = [*entry.prompt_tokens.tolist(), *group.completion_tokens[part].tolist()]
            hidden = model.base_model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
            of_tokens = (hidden @ head.weight[0] + head.bias[0])[len(entry.prompt_tokens) - 1 : -1]
            values.append(of_tokens[mask[part] > 0])
    return torch.cat(values) if values else torch.zeros(0)


def naive_gradients(model: Any, batch: Batch, old: torch.Tensor, returns: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    values = naive_values(model, batch)
    loss = 0.0 * values.sum()  # all of it may be clipped
    for v, o, r in zip(values, old.to(values.dtype), returns.to(values.dtype), strict=True):
        near = min(max(v, o - CLIP), o + CLIP)
        loss = loss + max((v - r) ** 2, (near - r) ** 2) / 2 / values.numel()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(batch=batches)
def test_packed_equals_naive(trainer: Trainer, batch: Batch) -> None:
    critic = trainer._critic
    result = trainer.forward_backward(batch)
    plain = copy.deepcopy(critic._model)
    plain.set_attn_implementation("sdpa")
    exact = copy.deepcopy(plain).double()
    expected = naive_values(exact, batch).detach()
    assert result.finite == (expected.numel() > 0)
    if not result.finite:
        return
    (update,) = trainer._plan(collect(batch.groups, mask_truncated_completions=False, min_scored=1))
    old = update.tensors.values_T
    close(old, expected, naive_values(plain, batch).detach())

    # Away from where the step began, so that some values are clipped and some are not (and none is on the edge).
    shifted = CLIP * torch.linspace(-1.87, 2.03, old.numel())
    update.tensors.values_T.add_(shifted)
    returns = update.tensors.returns_T
    critic.drop_gradients()
    critic.forward_backward(update.micro_batches, update.tensors)
    exact_gradients = naive_gradients(exact, batch, update.tensors.values_T, returns)
    plain_gradients = naive_gradients(plain, batch, update.tensors.values_T, returns)
    for name, gradient in exact_gradients.items():
        close(critic._parameters[name].grad, gradient, plain_gradients[name])
    trainer._drop_gradients()


def close(found: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """Within 1e-5 of the largest, or three times what naive float32 is off."""
    scale = exact.abs().max().clamp(min=1e-3)
    allowed = max(TOLERANCE * scale.item(), 3 * (plain.double() - exact).abs().max().item())
    assert (found.double() - exact).abs().max().item() <= allowed
