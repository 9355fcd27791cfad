"""The loss against hand-worked golden vectors, a naive float64 reference, autograd and finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from learner.grpo.advantages import group_advantages
from learner.grpo.loss import clipped_surrogate, grpo_loss, token_weights

LOG2 = math.log(2)
WIDE = {"epsilon": 0.2, "epsilon_high": 0.28}


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- weights


def test_grpo_weights_by_hand():
    # group 0: completions of 1 and 3 tokens; group 1: one of 2 tokens. 1/2 (groups) x 1/2 or 1/1 x 1/|o|
    completion = torch.tensor([0, 1, 1, 1, 2, 2])
    weights = token_weights("grpo", completion, torch.tensor([0, 0, 1]))
    assert weights.tolist() == pytest.approx([1 / 4, 1 / 12, 1 / 12, 1 / 12, 1 / 4, 1 / 4])


def test_dapo_weights_are_equal():
    assert token_weights("dapo", torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1])).tolist() == [0.25] * 4


def test_completions_and_groups_without_a_trained_token_are_in_no_denominator():
    # completion 1 has no token (loss_mask all 0), and group 1 only completion 2, which has none either
    weights = token_weights("grpo", torch.tensor([0, 0, 3]), torch.tensor([0, 0, 1, 2]))
    assert weights.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_weights_of_a_step_sum_to_one(loss_type):
    completion = torch.repeat_interleave(torch.arange(6), torch.tensor([3, 1, 7, 2, 2, 9]))
    weights = token_weights(loss_type, completion, torch.tensor([0, 0, 1, 3, 3, 3]))
    assert weights.sum().item() == pytest.approx(1.0, rel=1e-6)


# --- clipped surrogate


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.5, 2.0, 2.56, 0.0),  # clipped above: 1.28 x 2
        (0.5, 2.0, 1.0, 2.0),  # moved the wrong way: pulls back at full strength
        (0.5, -2.0, -1.6, 0.0),  # clipped below: 0.8 x -2
        (1.5, -2.0, -3.0, -2.0),  # moved the wrong way
        (1.25, 2.0, 2.5, 2.0),  # inside the wider upper range
    ],
)
def test_surrogate_by_hand(ratio, advantage, expected, slope):
    rho = f64(ratio).requires_grad_()
    objective = clipped_surrogate(rho, f64(advantage), **WIDE)
    objective.backward()
    assert objective.item() == pytest.approx(expected)
    assert rho.grad.item() == slope


# --- the whole


def test_golden_behavior_anchor_with_kl():
    """Two completions, worked by hand.

    token      0        1        2
    rho        1        2        1/2
    A          1        1        -1
    surrogate  1        1.28     -0.8     (clipped above; clipped below)
    r=ref/pi   1        1/2      2
    k3         0        ln2-1/2  1-ln2
    w          1/2      1/4      1/4
    """
    policy = f64(0.5, 0.5, 0.25).log().requires_grad_()
    behavior = f64(0.5, 0.25, 0.5).log()
    reference = f64(0.5, 0.25, 0.5).log()
    loss = grpo_loss(
        policy, behavior, f64(1, 1, -1), f64(0.5, 0.25, 0.25), **WIDE, reference_logprobs_T=reference, beta=0.1
    )
    expected = -(0.5 * 1 + 0.25 * (1.28 - 0.1 * (LOG2 - 0.5)) + 0.25 * (-0.8 - 0.1 * (1 - LOG2)))
    assert loss.loss.item() == pytest.approx(expected, rel=1e-14)
    assert loss.ratio_T.tolist() == pytest.approx([1, 2, 0.5])
    assert loss.kl_T is not None
    assert loss.kl_T.tolist() == pytest.approx([0, LOG2 - 0.5, 1 - LOG2])
    loss.loss.backward()
    # d/dlogpi: -w (rho A) where not clipped; + w beta (1 - r) from the KL
    assert policy.grad.tolist() == pytest.approx([-0.5, 0.25 * 0.1 * 0.5, 0.25 * 0.1 * -1.0])


def test_golden_proximal_anchor():
    """With one update the ratio is 1 and the gradient is -w min(pi/behavior, 2) A."""
    policy = f64(0.5, 0.9, 0.1).log().requires_grad_()
    behavior = f64(0.5, 0.1, 0.4).log()
    loss = grpo_loss(
        policy, behavior, f64(1, 1, -2), f64(0.25, 0.25, 0.5), **WIDE,
        proximal_logprobs_T=policy.detach(), importance_sampling_clip_max=2.0,
    )  # fmt: skip
    assert loss.ratio_T.tolist() == [1.0, 1.0, 1.0]
    assert loss.behavior_weight_T is not None
    assert loss.behavior_weight_T.tolist() == pytest.approx([1.0, 2.0, 0.25])
    assert loss.loss.item() == pytest.approx(-(0.25 * 1 + 0.25 * 2 + 0.5 * 0.25 * -2))
    loss.loss.backward()
    assert policy.grad.tolist() == pytest.approx([-0.25, -0.5, 0.25])


def test_proximal_without_weights_is_the_plain_policy_gradient():
    policy = f64(-1.0, -2.0).requires_grad_()
    loss = grpo_loss(policy, f64(-3.0, -0.5), f64(1, -1), f64(0.5, 0.5), **WIDE, proximal_logprobs_T=policy.detach())
    loss.loss.backward()
    assert loss.behavior_weight_T is None
    assert policy.grad.tolist() == [-0.5, 0.5]


def naive_loss(policy, behavior, rewards_by_group, lengths_by_group, *, loss_type, beta, reference, anchor, clip_max):
    """Equation 3 with Python loops, completion by completion."""
    total_tokens = sum(sum(lengths) for lengths in lengths_by_group)
    position, loss = 0, f64(0.0)
    for rewards, lengths in zip(rewards_by_group, lengths_by_group, strict=True):
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        for reward, length in zip(rewards, lengths, strict=True):
            advantage = (reward - mean) / (std + 1e-4)
            for t in range(position, position + length):
                weight = 1.0
                rho = torch.exp(policy[t] - behavior[t])
                if anchor == "proximal":
                    rho = torch.exp(policy[t] - policy[t].detach())
                    weight = min(math.exp(policy[t].item() - behavior[t].item()), clip_max)
                inside = torch.clamp(rho, 0.8, 1.28)
                term = weight * torch.min(rho * advantage, inside * advantage)
                r = torch.exp(reference[t] - policy[t])
                term = term - beta * (r - torch.log(r) - 1)
                share = 1 / total_tokens if loss_type == "dapo" else 1 / (len(rewards_by_group) * len(rewards) * length)
                loss = loss - share * term
            position += length
    return loss


@pytest.mark.parametrize(
    ("loss_type", "anchor", "beta"), list(itertools.product(["grpo", "dapo"], ["behavior", "proximal"], [0.0, 0.3]))
)
def test_equals_the_naive_reference_in_value_and_gradient(loss_type, anchor, beta):
    torch.manual_seed(3)
    rewards, lengths = [[1.0, 0.0, 0.25], [0.0, 2.0]], [[3, 1, 6], [2, 5]]
    total = sum(map(sum, lengths))
    behavior, reference = -torch.rand(2, total, dtype=torch.float64) * 2
    policy = (behavior + 0.4 * torch.randn(total, dtype=torch.float64)).requires_grad_()
    naive = naive_loss(
        policy,
        behavior,
        rewards,
        lengths,
        loss_type=loss_type,
        beta=beta,
        reference=reference,
        anchor=anchor,
        clip_max=1.3,
    )
    (expected,) = torch.autograd.grad(naive, policy)

    rewards_PG = torch.tensor([[*rewards[0]], [*rewards[1], 0.0]], dtype=torch.float64)
    scored_PG = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    completion = torch.repeat_interleave(torch.arange(5), torch.tensor([*lengths[0], *lengths[1]]))
    advantages = group_advantages(rewards_PG, scored_PG)[scored_PG][completion]
    weights = token_weights(loss_type, completion, torch.tensor([0, 0, 0, 1, 1])).double()
    loss = grpo_loss(
        policy, behavior, advantages, weights, **WIDE,
        proximal_logprobs_T=policy.detach() if anchor == "proximal" else None,
        importance_sampling_clip_max=1.3, reference_logprobs_T=reference if beta else None, beta=beta,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.loss, policy)
    torch.testing.assert_close(loss.loss, naive.squeeze(), rtol=1e-6, atol=1e-9)  # weights are made in float32
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_gradcheck_with_all_parts():
    torch.manual_seed(4)
    behavior, reference, proximal = -torch.rand(3, 8, dtype=torch.float64)
    advantages = torch.randn(8, dtype=torch.float64)
    weights = torch.full((8,), 0.125, dtype=torch.float64)

    def loss(policy):
        return grpo_loss(
            policy, behavior, advantages, weights, **WIDE, proximal_logprobs_T=proximal,
            importance_sampling_clip_max=1.1, reference_logprobs_T=reference, beta=0.2,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (torch.full((8,), -0.4, dtype=torch.float64, requires_grad=True),))


def test_parts_of_a_step_add_up_to_the_step():
    torch.manual_seed(5)
    policy, behavior = -torch.rand(2, 9, dtype=torch.float64)
    advantages, weights = torch.randn(2, 9, dtype=torch.float64)
    whole = grpo_loss(policy, behavior, advantages, weights, **WIDE).loss
    parts = [
        grpo_loss(policy[s], behavior[s], advantages[s], weights[s], **WIDE).loss
        for s in (slice(0, 2), slice(2, 3), slice(3, 9))
    ]
    torch.testing.assert_close(sum(parts), whole)
