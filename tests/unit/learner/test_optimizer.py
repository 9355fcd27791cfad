"""The schedule by hand, the parameter groups, and state that survives a file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from learner.config import OptimizerOptions
from learner.optimizer import load_state, make_optimizer, save_state, scheduled_rate
from protocol.errors import ConfigError


def rates(count: int, **options) -> list[float]:
    settings = OptimizerOptions(learning_rate=8.0, **options)
    return [scheduled_rate(settings, done) for done in range(count)]


def test_constant():
    assert rates(3) == [8.0] * 3


def test_warm_up_begins_above_zero_and_ends_at_the_peak():
    assert rates(6, warmup_steps=4) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_linear_would_reach_zero_after_the_last_step():
    assert rates(8, warmup_steps=2, max_steps=6, lr_scheduler_type="linear") == [4, 8, 8, 6, 4, 2, 0, 0]


def test_cosine():
    expected = [8.0, 4 + 2 * 2**0.5, 4.0, 4 - 2 * 2**0.5, 0.0, 0.0]
    assert rates(6, max_steps=4, lr_scheduler_type="cosine") == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run():
    assert rates(3, warmup_steps=8, max_steps=3, lr_scheduler_type="linear") == [1.0, 2.0, 3.0]


def parameters() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {"w": torch.nn.Parameter(torch.randn(3, 2)), "norm": torch.nn.Parameter(torch.randn(3))}


def give_gradients(named, seed):
    torch.manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)


def test_only_matrices_decay():
    named = parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = make_optimizer(named, OptimizerOptions(learning_rate=0.1, weight_decay=0.5))
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(named["w"].detach(), before["w"] * (1 - 0.1 * 0.5))
    assert torch.equal(named["norm"].detach(), before["norm"])


def test_one_update_by_hand():
    named = {"w": torch.nn.Parameter(torch.tensor([[1.0]]))}
    options = OptimizerOptions(learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3)
    optimizer = make_optimizer(named, options)
    named["w"].grad = torch.tensor([[0.5]])
    optimizer.step()
    # Both moments are corrected for their start at zero: 0.5 / (sqrt(0.25) + 1e-3)
    assert named["w"].item() == pytest.approx(1 - 0.1 * 0.5 / 0.501)


def test_the_state_survives_a_file_bit_by_bit(tmp_path):
    options = OptimizerOptions(learning_rate=0.1, weight_decay=0.1)
    first, second = parameters(), parameters()
    optimizer = make_optimizer(first, options)
    give_gradients(first, 1)
    optimizer.step()
    save_state(optimizer, first, tmp_path)
    for name, parameter in second.items():
        parameter.data.copy_(first[name].data)
    resumed = make_optimizer(second, options)
    load_state(resumed, second, tmp_path)
    for named, adam in ((first, optimizer), (second, resumed)):
        give_gradients(named, 2)
        adam.step()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_state_before_the_first_update_is_empty(tmp_path):
    named = parameters()
    save_state(make_optimizer(named, OptimizerOptions()), named, tmp_path)
    assert load_file(tmp_path / "optimizer.safetensors") == {}
    optimizer = make_optimizer(named, OptimizerOptions())
    load_state(optimizer, named, tmp_path)
    assert not optimizer.state


def test_the_state_of_another_model_is_refused(tmp_path):
    named = parameters()
    optimizer = make_optimizer(named, OptimizerOptions())
    give_gradients(named, 1)
    optimizer.step()
    save_state(optimizer, named, tmp_path)
    less = {"w": named["w"]}
    with pytest.raises(ConfigError, match=r"is of another model: it has exp_avg\.norm"):
        load_state(make_optimizer(less, OptimizerOptions()), less, tmp_path)
    other = {"w": torch.nn.Parameter(torch.zeros(2, 2)), "norm": named["norm"]}
    with pytest.raises(ConfigError, match=r"w is not of shape \[2, 2\]"):
        load_state(make_optimizer(other, OptimizerOptions()), other, tmp_path)
