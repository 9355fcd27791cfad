"""The schedule by hand, the parameter groups, and state that survives a file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from learner.config import OptimizerOptions
from learner.optimizer import check_library, load_state, make_optimizer, save_state, scheduled_rate
from protocol.errors import ConfigError


def rates(count: int, **options) -> list[float]:
    settings = OptimizerOptions(learning_rate=8.0, **options)
    return [scheduled_rate(settings, done, peak=settings.learning_rate) for done in range(count)]


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
    with pytest.raises(ConfigError, match=r"is of another model or optim: it has exp_avg\.norm"):
        load_state(make_optimizer(less, OptimizerOptions()), less, tmp_path)
    other = {"w": torch.nn.Parameter(torch.zeros(2, 2)), "norm": named["norm"]}
    with pytest.raises(ConfigError, match=r"\.w is not of shape \[2, 2\]"):
        load_state(make_optimizer(other, OptimizerOptions()), other, tmp_path)


# --- bitsandbytes

OPTIMS = ("adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")


def large_parameters() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {"w": torch.nn.Parameter(torch.randn(96, 64)), "norm": torch.nn.Parameter(torch.randn(64))}


def after_updates(optim: str, updates: int = 4):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    named = large_parameters()
    optimizer = make_optimizer(named, OptimizerOptions(optim=optim, learning_rate=0.01, weight_decay=0.1))
    for seed in range(updates):
        give_gradients(named, seed)
        optimizer.step()
    return named, optimizer


@pytest.mark.parametrize(("optim", "tolerance"), [("adamw_8bit", 0.02), ("paged_adamw_32bit", 1e-6)])
def test_other_states_give_nearly_the_same_updates(optim, tolerance):
    before = large_parameters()
    plain, _ = after_updates("adamw")
    other, _ = after_updates(optim)
    for name in before:
        step = (plain[name] - before[name]).norm()
        assert (other[name] - plain[name]).norm() <= tolerance * step


def test_matrices_have_states_of_one_byte():
    named, optimizer = after_updates("adamw_8bit")
    bytes_of = {
        name: sum(x.nbytes for x in optimizer.state[p].values() if torch.is_tensor(x) and x.numel() > 256)
        for name, p in named.items()
    }
    assert bytes_of["w"] == 2 * named["w"].numel()
    assert optimizer.state[named["norm"]]["state1"].dtype == torch.float32


@pytest.mark.parametrize("optim", OPTIMS)
def test_every_state_survives_a_file_bit_by_bit(tmp_path, optim):
    first, optimizer = after_updates(optim)
    save_state(optimizer, first, tmp_path)
    second = large_parameters()
    for name, parameter in second.items():
        parameter.data.copy_(first[name].data)
    resumed = make_optimizer(second, OptimizerOptions(optim=optim, learning_rate=0.01, weight_decay=0.1))
    load_state(resumed, second, tmp_path)
    for seed in (7, 8):
        for named, adam in ((first, optimizer), (second, resumed)):
            give_gradients(named, seed)
            adam.step()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("wrote", "reads"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_the_state_of_another_optimizer_is_refused(tmp_path, wrote, reads):
    named, optimizer = after_updates(wrote)
    save_state(optimizer, named, tmp_path)
    with pytest.raises(ConfigError, match=r"is of another optim: it has no (state|exp|absmax)"):
        load_state(make_optimizer(named, OptimizerOptions(optim=reads)), named, tmp_path)


def test_a_missing_library_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_library("adamw")
    with pytest.raises(
        ConfigError, match=r"optim 'adamw_8bit' needs bitsandbytes, which is not installed: pip install '\.\[opt"
    ):
        check_library("adamw_8bit")


def test_a_device_that_cannot_page_is_named(caplog):
    after_updates("paged_adamw_8bit", updates=0)
    assert "only a CUDA device pages" in caplog.text
