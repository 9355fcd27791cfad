"""The chunked head against log_softmax of whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from learner.model import logprobs
from learner.model.logprobs import token_logprobs

T, H, V = 23, 6, 37


@pytest.fixture(autouse=True, params=["one chunk", "many chunks", "tiny tiles"])
def sizes(request, monkeypatch):
    """The result must not depend on where the cuts are."""
    if request.param != "one chunk":
        monkeypatch.setattr(logprobs, "CHUNK_BYTES", 1)
        monkeypatch.setattr(logprobs, "MIN_CHUNK_TOKENS", 5)
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", 1 << 17 if request.param != "tiny tiles" else 2 * V)


def inputs(dtype=torch.float64, *, bias=True, scale=1.0):
    torch.manual_seed(0)
    hidden = (scale * torch.randn(T, H, dtype=dtype)).requires_grad_()
    weight = torch.randn(V, H, dtype=dtype).requires_grad_()
    offset = torch.randn(V, dtype=dtype).requires_grad_() if bias else None
    return hidden, weight, offset, torch.randint(0, V, (T,)), torch.rand(T, dtype=dtype) + 0.5


def naive(hidden, weight, bias, targets, temperature):
    logits = hidden @ weight.T + (0.0 if bias is None else bias)
    logprobs = (logits / temperature[:, None]).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(bias):
    arguments = inputs(bias=bias)
    leaves = [x for x in arguments[:3] if x is not None]
    got, entropy = token_logprobs(*arguments)
    expected, expected_entropy = naive(*arguments)
    slope = torch.randn(T, dtype=torch.float64)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    for ours, want in zip(
        torch.autograd.grad(got, leaves, slope), torch.autograd.grad(expected, leaves, slope), strict=True
    ):
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 32_768, 151_936])
def test_rows_of_logits_begin_in_different_sets_of_the_cache(width, dtype):
    rows = logprobs._spread_rows(torch.empty(0, dtype=dtype), 3, width)
    lines, rest = divmod(rows.stride(0) * rows.element_size(), 64)
    assert (rows.shape, rows.dtype) == ((3, width), dtype)
    assert (rest, lines % 2) == (0, 1)
    assert 0 <= rows.stride(0) - width < 2 * 64 / rows.element_size(), "no more than it takes"


def test_a_frozen_head_costs_no_product_and_changes_no_other_gradient(monkeypatch):
    hidden, weight, bias, targets, temperature = inputs(bias=False)
    (expected, _) = torch.autograd.grad(
        token_logprobs(hidden, weight, bias, targets, temperature)[0].sum(), [hidden, weight]
    )
    weight.requires_grad_(False)
    with FlopCounterMode(display=False) as counted:
        logprobs_T, _ = token_logprobs(hidden, weight, bias, targets, temperature)
        (got,) = torch.autograd.grad(logprobs_T.sum(), [hidden])
    torch.testing.assert_close(got, expected)
    assert counted.get_total_flops() == 3 * 2 * T * H * V


def test_gradcheck():
    hidden, weight, bias, targets, temperature = inputs()
    assert torch.autograd.gradcheck(
        lambda *leaves: token_logprobs(*leaves, targets, temperature)[0], (hidden, weight, bias), fast_mode=True
    )


@pytest.mark.parametrize("together", [True, False])
def test_the_entropy_has_a_gradient_of_its_own(together):
    arguments = inputs()
    losses = []
    for logprobs_T, entropy_T in (token_logprobs(*arguments), naive(*arguments)):
        weights = torch.linspace(-1, 1, T, dtype=torch.float64)
        losses.append((weights * entropy_T).sum() + together * (weights.flip(0) * logprobs_T).sum())
    ours, expected = (torch.autograd.grad(loss, arguments[:3]) for loss in losses)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_impossible_tokens_do_no_harm():
    hidden, weight, bias, _, temperature = inputs(torch.float32)
    with torch.no_grad():
        bias[::2] = -torch.inf
    targets = torch.arange(T) % (V // 2) * 2 + 1
    logprobs_T, entropy_T = token_logprobs(hidden, weight, bias, targets, temperature)
    kept = (hidden, weight[1::2], bias[1::2], targets // 2, temperature)
    for got, want in zip((logprobs_T, entropy_T), naive(*kept), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (logprobs_T.sum() + entropy_T.sum()).backward()
    assert all(torch.isfinite(x.grad).all() for x in (hidden, weight, bias))
    assert not weight.grad[::2].any()


def test_an_impossible_target_shows():
    hidden, weight, bias, targets, temperature = inputs(torch.float32)
    with torch.no_grad():
        bias[targets[0]] = -torch.inf
    assert token_logprobs(hidden, weight, bias, targets, temperature)[0][0] == -torch.inf


def test_the_head_runs_in_float32_on_request():
    hidden, weight, bias, targets, temperature = inputs(torch.float32)
    expected = naive(hidden, weight, bias, targets, temperature)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = token_logprobs(hidden, weight, bias, targets, temperature)
        got, _ = token_logprobs(hidden, weight, bias, targets, temperature, fp32=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (rounded - expected).abs().max() > 1e-3
    leaves = (hidden, weight, bias)
    for ours, want in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-4)


def test_a_bfloat16_model_gets_gradients_summed_in_float32_from_a_float32_head():
    hidden, weight, _, targets, temperature = (
        x if x is None else x.detach() for x in inputs(torch.float32, bias=False)
    )
    hidden, weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    token_logprobs(hidden, weight, None, targets, temperature, fp32=True)[0].sum().backward()
    naive(*exact, None, targets, temperature.double())[0].sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    for got, want in zip((hidden.grad, weight.grad), (x.grad for x in exact), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)  # one rounding, at the end


def test_huge_logits_stay_finite():
    hidden, weight, _, targets, temperature = inputs(torch.float32, bias=False, scale=1e4)
    got, entropy = token_logprobs(hidden, weight, None, targets, temperature)
    assert torch.isfinite(got).all()
    assert torch.isfinite(entropy).all()
    torch.testing.assert_close(got, naive(hidden, weight, None, targets, temperature)[0], rtol=1e-5, atol=1e-2)


def test_bfloat16_logits_are_normalized_in_float32():
    hidden, weight, _, targets, temperature = inputs(torch.float32, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        got, entropy = token_logprobs(hidden, weight, None, targets, temperature)
    assert got.dtype == entropy.dtype == torch.float32
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float() / temperature[:, None]
    torch.testing.assert_close(got, logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert weight.grad.dtype == torch.float32
    expected = torch.autograd.grad(naive(hidden, weight, None, targets, temperature)[0].sum(), weight)[0]
    assert (weight.grad - expected).norm() < 0.01 * expected.norm()


def test_no_tokens():
    hidden, weight, bias, targets, temperature = inputs()
    got, entropy = token_logprobs(hidden[:0], weight, bias, targets[:0], temperature[:0])
    assert got.shape == entropy.shape == (0,)
