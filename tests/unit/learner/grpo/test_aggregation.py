"""What share of the loss each token has, and sums over completions, by hand and by their defining properties."""

from __future__ import annotations

import pytest
import torch

from learner.grpo.aggregation import completion_means, completion_sums, token_weights


def test_grpo_weights_by_hand():
    # group 0: completions of 1 and 3 tokens; group 1: one of 2 tokens. 1/2 (groups) x 1/2 or 1/1 x 1/|o|
    completion = torch.tensor([0, 1, 1, 1, 2, 2])
    weights = token_weights("grpo", completion, torch.tensor([0, 0, 1]))
    assert weights.tolist() == pytest.approx([1 / 4, 1 / 12, 1 / 12, 1 / 12, 1 / 4, 1 / 4])


def test_dapo_weights_are_equal():
    assert token_weights("dapo", torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1])).tolist() == [0.25] * 4


def test_of_several_mini_batches_dapo_divides_by_the_steps_tokens_and_bnpo_by_its_own():
    # a step of 12 tokens in two mini-batches, of which this is one with 4
    completion, group = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1])
    assert token_weights("dapo", completion, group, tokens_per_update=6.0).tolist() == pytest.approx([1 / 6] * 4)
    assert token_weights("bnpo", completion, group, tokens_per_update=6.0).tolist() == [0.25] * 4


def test_dr_grpo_divides_by_a_constant():
    # two completions have tokens, the limit is 8: 1 / (2 x 8), whatever the lengths are
    weights = token_weights("dr_grpo", torch.tensor([0, 2, 2]), torch.tensor([0, 0, 0]), max_completion_length=8)
    assert weights.tolist() == [1 / 16] * 3


def test_completions_and_groups_without_a_trained_token_are_in_no_denominator():
    # completion 1 has no token (loss_mask all 0), and group 1 only completion 2, which has none either
    weights = token_weights("grpo", torch.tensor([0, 0, 3]), torch.tensor([0, 0, 1, 2]))
    assert weights.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2])


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "bnpo"])
def test_the_weights_of_an_update_sum_to_one(aggregation):
    completion = torch.repeat_interleave(torch.arange(6), torch.tensor([3, 1, 7, 2, 2, 9]))
    weights = token_weights(aggregation, completion, torch.tensor([0, 0, 1, 3, 3, 3]))
    assert weights.sum().item() == pytest.approx(1.0, rel=1e-6)


def test_every_token_gets_its_completions_sum_and_mean():
    values, completion = torch.tensor([1.0, 2.0, 10.0, 4.0, 6.0]), torch.tensor([7, 7, 3, 9, 9])
    assert completion_sums(values, completion).tolist() == [3, 3, 10, 10, 10]
    assert completion_means(values, completion).tolist() == [1.5, 1.5, 10, 5, 5]


def test_sums_have_gradients():
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    completion = torch.tensor([0, 0, 1, 2, 2, 2])
    assert torch.autograd.gradcheck(lambda v: completion_means(v, completion).exp(), values)
