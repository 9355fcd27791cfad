"""The head that computes the loss, against plain autograd over whole logits and against the head that runs twice."""

from __future__ import annotations

import pytest
import torch

from learner.model import logprobs
from learner.model.fused_head import fused_token_loss
from learner.model.logprobs import token_logprobs

T, H, V = 23, 6, 37


@pytest.fixture(autouse=True, params=["one chunk", "many chunks", "tiny tiles"])
def sizes(request, monkeypatch):
    """The result must not depend on where the cuts are."""
    if request.param != "one chunk":
        monkeypatch.setattr(logprobs, "CHUNK_BYTES", 1)
        monkeypatch.setattr(logprobs, "MIN_CHUNK_TOKENS", 5)
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", 1 << 17 if request.param != "tiny tiles" else 2 * V)


def inputs(dtype=torch.float64, *, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(T, H, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, dtype=dtype).requires_grad_()
    offset = torch.randn(V, dtype=dtype).requires_grad_() if bias else None
    return hidden, weight, offset, torch.randint(0, V, (T,)), torch.rand(T, dtype=dtype) + 0.5


def clipped_loss(logprobs_T, rows=slice(None)):
    """A sum over tokens with a kink, whose terms differ from token to token."""
    index = torch.arange(T)[rows]
    ratio = torch.exp(logprobs_T + 3.0)
    advantages = torch.cos(index.to(logprobs_T.dtype))
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()


def naive(hidden, weight, bias, targets, temperature):
    logits = hidden @ weight.T + (0.0 if bias is None else bias)
    logprobs_TV = (logits / temperature[:, None]).log_softmax(-1)
    return logprobs_TV.gather(1, targets[:, None])[:, 0], -(logprobs_TV.exp() * logprobs_TV).sum(-1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_values_and_gradients(bias, scale):
    arguments = inputs(bias=bias)
    leaves = [x for x in arguments[:3] if x is not None]
    loss, logprobs_T, entropy_T = fused_token_loss(*arguments, clipped_loss)
    expected = naive(*arguments)
    torch.testing.assert_close((logprobs_T, entropy_T), tuple(x.detach() for x in expected))
    torch.testing.assert_close(loss.detach(), clipped_loss(expected[0]).detach())
    ours = torch.autograd.grad(scale * loss, leaves)
    for got, want in zip(ours, torch.autograd.grad(scale * clipped_loss(expected[0]), leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_the_same_bits_as_the_head_that_runs_twice():
    arguments = inputs(torch.float32)
    loss, logprobs_T, entropy_T = fused_token_loss(*arguments, clipped_loss)
    twice, entropy_twice = token_logprobs(*arguments)
    assert torch.equal(logprobs_T, twice)
    assert torch.equal(entropy_T, entropy_twice)
    ours = torch.autograd.grad(loss, arguments[:3])
    again = torch.autograd.grad(clipped_loss(twice), arguments[:3])
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("head", ["fused", "recompute"])
def test_tokens_without_a_gradient_are_left_out_of_the_products(head, monkeypatch):
    tokens = []
    add = logprobs.HeadGradients.add
    monkeypatch.setattr(
        logprobs.HeadGradients,
        "add",
        lambda self, kept, d_logits: (tokens.extend(kept.tolist()), add(self, kept, d_logits)),
    )
    hidden, weight, bias, targets, temperature = inputs()
    slopes = torch.where(torch.arange(T) % 3 == 1, torch.linspace(-1.0, 1.0, T, dtype=torch.float64), 0.0)

    def loss(logprobs_T, rows=slice(None)):
        return (slopes[rows] * logprobs_T).sum()

    if head == "fused":
        value, _, _ = fused_token_loss(hidden, weight, bias, targets, temperature, loss)
    else:
        value = loss(token_logprobs(hidden, weight, bias, targets, temperature)[0])
    ours = torch.autograd.grad(value, (hidden, weight, bias))
    assert sorted(tokens) == slopes.nonzero()[:, 0].tolist()
    expected = torch.autograd.grad(loss(naive(hidden, weight, bias, targets, temperature)[0]), (hidden, weight, bias))
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_step_in_which_no_token_has_a_gradient():
    hidden, weight, bias, targets, temperature = inputs()
    loss, _, _ = fused_token_loss(hidden, weight, bias, targets, temperature, lambda part, rows: 0.0 * part.sum())
    assert all((gradient == 0.0).all() for gradient in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_the_weights_gradient_is_added_to_in_place():
    hidden, weight, bias, targets, temperature = inputs()
    for times in (1, 2, 3):
        loss, _, _ = fused_token_loss(hidden, weight, bias, targets, temperature, clipped_loss, accumulates=True)
        expected = torch.autograd.grad(clipped_loss(naive(hidden, weight, bias, targets, temperature)[0]), weight)[0]
        if times > 1:
            torch.testing.assert_close(weight.grad, times * expected)
        loss.backward()
        torch.testing.assert_close(weight.grad, times * expected)


def test_what_was_added_in_place_takes_no_factor():
    loss, _, _ = fused_token_loss(*inputs(), clipped_loss, accumulates=True)
    with pytest.raises(AssertionError, match="is where it belongs already"):
        (2.0 * loss).backward()


def test_every_token_is_asked_for_once_and_in_order():
    seen = []

    def token_loss(logprobs_T, rows):
        seen.extend(range(T)[rows])
        return logprobs_T.sum()

    fused_token_loss(*inputs(), token_loss)
    assert seen == list(range(T))


def test_logprobs_and_entropies_carry_no_graph():
    loss, logprobs_T, entropy_T = fused_token_loss(*inputs(), clipped_loss)
    assert loss.requires_grad
    assert not logprobs_T.requires_grad
    assert not entropy_T.requires_grad


@pytest.mark.parametrize("fp32", [True, False])
def test_autocast(fp32):
    hidden, weight, bias, targets, temperature = inputs(torch.float32)
    exact = clipped_loss(naive(hidden, weight, bias, targets, temperature)[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss, logprobs_T, _ = fused_token_loss(hidden, weight, bias, targets, temperature, clipped_loss, fp32=fp32)
    assert logprobs_T.dtype == torch.float32
    expected = torch.autograd.grad(exact, (hidden, weight, bias))
    for got, want in zip(torch.autograd.grad(loss, (hidden, weight, bias)), expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= (1e-5 if fp32 else 0.02) * want.norm()


def test_a_loss_that_is_not_a_number_reaches_the_caller():
    loss, _, _ = fused_token_loss(*inputs(), lambda logprobs_T, rows: (logprobs_T * torch.nan).sum())
    assert torch.isnan(loss)


def test_no_tokens():
    hidden, weight, bias, targets, temperature = inputs()
    loss, logprobs_T, entropy_T = fused_token_loss(hidden[:0], weight, bias, targets[:0], temperature[:0], clipped_loss)
    assert logprobs_T.shape == entropy_T.shape == (0,)
    loss.backward()
    assert loss == 0.0
    assert weight.grad is None
