"""The loss against hand-worked golden vectors, a naive float64 reference, autograd and finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from learner.grpo.advantages import group_advantages
from learner.grpo.aggregation import token_weights
from learner.grpo.corrections import importance_ratio, truncated
from learner.grpo.loss import LossTokens, TokenLoss, grpo_loss
from learner.grpo.surrogates import clipped_surrogate

LOG2 = math.log(2)
WIDE = {"epsilon": 0.2, "epsilon_high": 0.28}


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def wide_clip(ratio_T: torch.Tensor, tokens: LossTokens) -> torch.Tensor:
    return clipped_surrogate(ratio_T, tokens.advantages_T, **WIDE)


def clipped_loss(
    policy, behavior, advantages, weights, *, proximal=None, clip_max=None, reference=None, beta=0.0, **more
) -> TokenLoss:
    """The loss with TIS where there is a proximal policy, as the configuration's defaults put it together."""
    completion = torch.zeros(len(policy), dtype=torch.int64)
    weight = None
    if clip_max is not None:
        weight = truncated(
            importance_ratio(proximal, behavior, completion, level="token"), clip_min=None, clip_max=clip_max
        )
    tokens = LossTokens(
        policy_logprobs_T=policy,
        entropy_T=torch.zeros_like(policy),
        anchor_logprobs_T=behavior if proximal is None else proximal,
        behavior_logprobs_T=behavior,
        advantages_T=advantages,
        weights_T=weights,
        completion_T=completion,
        behavior_weight_T=weight,
        reference_logprobs_T=reference,
    )
    return grpo_loss(tokens, wide_clip, beta=beta, **more)


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
    loss = clipped_loss(policy, behavior, f64(1, 1, -1), f64(0.5, 0.25, 0.25), reference=reference, beta=0.1)
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
    loss = clipped_loss(policy, behavior, f64(1, 1, -2), f64(0.25, 0.25, 0.5), proximal=policy.detach(), clip_max=2.0)
    assert loss.ratio_T.tolist() == [1.0, 1.0, 1.0]
    assert loss.behavior_weight_T is not None
    assert loss.behavior_weight_T.tolist() == pytest.approx([1.0, 2.0, 0.25])
    assert loss.loss.item() == pytest.approx(-(0.25 * 1 + 0.25 * 2 + 0.5 * 0.25 * -2))
    loss.loss.backward()
    assert policy.grad.tolist() == pytest.approx([-0.25, -0.5, 0.25])


def test_proximal_without_weights_is_the_plain_policy_gradient():
    policy = f64(-1.0, -2.0).requires_grad_()
    loss = clipped_loss(policy, f64(-3.0, -0.5), f64(1, -1), f64(0.5, 0.5), proximal=policy.detach())
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
    loss = clipped_loss(
        policy, behavior, advantages, weights,
        proximal=policy.detach() if anchor == "proximal" else None,
        clip_max=1.3 if anchor == "proximal" else None, reference=reference if beta else None, beta=beta,
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
        return clipped_loss(
            policy, behavior, advantages, weights, proximal=proximal, clip_max=1.1, reference=reference, beta=0.2
        ).loss

    assert torch.autograd.gradcheck(loss, (torch.full((8,), -0.4, dtype=torch.float64, requires_grad=True),))


def test_parts_of_a_step_add_up_to_the_step():
    torch.manual_seed(5)
    policy, behavior = -torch.rand(2, 9, dtype=torch.float64)
    advantages, weights = torch.randn(2, 9, dtype=torch.float64)
    whole = clipped_loss(policy, behavior, advantages, weights).loss
    parts = [
        clipped_loss(policy[s], behavior[s], advantages[s], weights[s]).loss
        for s in (slice(0, 2), slice(2, 3), slice(3, 9))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_golden_bias_corrected_kl():
    """rho 2 weighs k3(r = 1/2) = ln2 - 1/2; the gradient is rho (k3 + 1 - r) = rho log(pi / ref)."""
    policy = f64(0.5).log().requires_grad_()
    loss = clipped_loss(
        policy, f64(0.25).log(), f64(0.0), f64(1.0), reference=f64(0.25).log(), beta=0.1, use_bias_correction_kl=True
    )
    assert loss.loss.item() == pytest.approx(0.1 * 2 * (LOG2 - 0.5))
    loss.loss.backward()
    assert policy.grad.item() == pytest.approx(0.1 * 2 * LOG2)


def test_bias_corrected_kl_weighs_against_what_sampled_whatever_the_anchor():
    policy = f64(0.5).log().requires_grad_()
    loss = clipped_loss(
        policy, f64(0.25).log(), f64(0.0), f64(1.0), proximal=policy.detach(), reference=f64(0.25).log(), beta=0.1,
        use_bias_correction_kl=True,
    )  # fmt: skip
    assert loss.loss.item() == pytest.approx(0.1 * 2 * (LOG2 - 0.5))


def test_golden_entropy_bonus():
    policy, entropy = f64(-1.0, -1.0), f64(0.5, 1.5).requires_grad_()
    tokens = LossTokens(
        policy_logprobs_T=policy, entropy_T=entropy, anchor_logprobs_T=policy, behavior_logprobs_T=policy,
        advantages_T=f64(1, 1), weights_T=f64(0.9, 0.1), completion_T=torch.tensor([0, 1]),
    )  # fmt: skip
    loss = grpo_loss(tokens, wide_clip, entropy_weight=0.01 / 2)
    assert loss.loss.item() == pytest.approx(-1.0 - 0.01 * 1.0), "the mean entropy, whatever the weights of tokens are"
    loss.loss.backward()
    assert entropy.grad.tolist() == pytest.approx([-0.005, -0.005])


def test_what_is_masked_may_be_infinite():
    """A mask is there for just such tokens; times 0 an overflown ratio would be NaN, in value and gradient."""
    policy = f64(-1.0, -1.0).requires_grad_()
    behavior = f64(-2000.0, -1.0)
    tokens = LossTokens(
        policy_logprobs_T=policy, entropy_T=policy, anchor_logprobs_T=behavior, behavior_logprobs_T=behavior,
        advantages_T=f64(-1, -1), weights_T=f64(0.5, 0.5), completion_T=torch.tensor([0, 0]),
        behavior_weight_T=f64(0, 1),
    )  # fmt: skip
    loss = grpo_loss(tokens, wide_clip)
    assert loss.loss.item() == 0.5
    assert loss.ratio_T.tolist() == [1, 1]
    loss.loss.backward()
    assert policy.grad.tolist() == [0.0, 0.5]
