"""Shared-prefix attention, by the cascade and by public operators, against dense attention in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention

from learner.model import attention, flex
from learner.model.attention import Packed, Prefix, shared_prefix_attention
from learner.model.packing import Layout, buckets
from protocol.errors import ConfigError

pytestmark = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile", "ignore:The .grad attribute of a Tensor"
)

H, K, D = 4, 2, 8
PROMPTS = (5, 3, 2)
COMPLETIONS = ((2, 4, 40, 40), (), (1, 1, 7))  # padded, equal and single buckets; a group with nothing to forward
LAYOUT = Layout(
    prompts=buckets(PROMPTS), prompt_lengths=PROMPTS, completions=tuple(buckets(lengths) for lengths in COMPLETIONS)
)
NUM_PROMPT = sum(PROMPTS)
NUM_COMPLETION = sum(map(sum, COMPLETIONS))


@pytest.fixture(params=["cascade", "public", "flex"])
def path(request, monkeypatch):
    """All implementations; the first must exist in the torch that the project pins."""
    assert attention.HAS_CPU_FLASH
    if request.param == "public":
        monkeypatch.setattr(attention, "HAS_CPU_FLASH", False)
    if request.param == "flex":
        monkeypatch.setattr(attention, "attend_with_prefix", flex.flex_with_prefix)
        monkeypatch.setattr(flex_attention, "_validate_device", lambda q, k, v: None)  # its eager backward works
    return request.param


class Layer(torch.nn.Module):
    layer_idx = 0


def visible() -> torch.Tensor:
    """[T, T] who may see whom in the row, token by token."""
    owner = [("prompt", p) for p, n in enumerate(PROMPTS) for _ in range(n)]
    owner += [(p, i) for p, group in enumerate(COMPLETIONS) for i, n in enumerate(group) for _ in range(n)]
    mask = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for query, own in enumerate(owner):
        for key in range(query + 1):
            mask[query, key] = owner[key] == own or owner[key] == ("prompt", own[0])
    return mask


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """[1, H, T, D] with every key head repeated, in float64: [1, T, H, D]."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scaling).masked_fill(~visible(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def inputs(dtype=torch.float32, *, scale=1.0):
    torch.manual_seed(0)
    shapes = [(1, heads, NUM_PROMPT + NUM_COMPLETION, D) for heads in (H, K, K)]
    return [(scale * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


def values_and_gradients(function, tensors):
    out = function(*tensors)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, tensors, torch.randn(out.shape).to(out.dtype))]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_equals_dense_attention(path, scale):
    tensors = inputs(scale=scale)
    ours = values_and_gradients(
        lambda q, k, v: shared_prefix_attention(Layer(), q, k, v, None, packed=Packed(LAYOUT), scaling=0.3)[0], tensors
    )
    expected = values_and_gradients(lambda q, k, v: dense(q, k, v, 0.3), tensors)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(
            got.double(), want.double(), rtol=1e-5, atol=1e-5 * max(1.0, want.abs().max().item())
        )


def test_gradcheck(path):
    tensors = inputs(torch.float64)
    q, k, v = (x.detach()[0].transpose(0, 1) for x in tensors)
    parts = [q[NUM_PROMPT:], k[NUM_PROMPT:], v[NUM_PROMPT:], k[:NUM_PROMPT], v[:NUM_PROMPT]]
    parts = [part.clone().requires_grad_() for part in parts]

    def attend(*tensors):
        return attention.attend_with_prefix(*tensors, LAYOUT, None)

    assert torch.autograd.gradcheck(attend, parts, fast_mode=True)


def test_a_prompt_apart_gives_the_same(path):
    tensors = inputs()
    together = values_and_gradients(
        lambda q, k, v: shared_prefix_attention(Layer(), q, k, v, None, packed=Packed(LAYOUT))[0], tensors
    )

    def apart(q, k, v):
        prefix = Prefix()
        first, second = ([x[:, :, part] for x in (q, k, v)] for part in (slice(NUM_PROMPT), slice(NUM_PROMPT, None)))
        alone = Layout(prompts=LAYOUT.prompts, prompt_lengths=PROMPTS, completions=((), (), ()))
        behind = Layout(prompts=(), prompt_lengths=PROMPTS, completions=LAYOUT.completions)
        prompt, _ = shared_prefix_attention(Layer(), *first, None, packed=Packed(alone, prefix))
        kept = prefix.leaves[0]
        assert all(leaf.is_leaf and leaf.requires_grad for leaf in kept)
        prefix.leaves[0] = prefix.computed[0]  # with the graph, so that one backward pass goes through all
        rest, _ = shared_prefix_attention(Layer(), *second, None, packed=Packed(behind, prefix))
        return torch.cat([prompt, rest], 1)

    for got, want in zip(values_and_gradients(apart, tensors), together, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_comes_back_as_bfloat16_but_is_attended_in_float32(path):
    q, k, v = (x.detach() for x in inputs(torch.bfloat16))
    out, _ = shared_prefix_attention(Layer(), q.float(), k.float(), v, None, packed=Packed(LAYOUT), scaling=0.3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), dense(q, k, v, 0.3), rtol=2**-8, atol=1e-6)


def test_autocast_rounds_the_model_but_not_the_attention(path):
    q, k, v = (x.detach() for x in inputs())
    expected, _ = shared_prefix_attention(Layer(), q, k, v, None, packed=Packed(LAYOUT))
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = shared_prefix_attention(Layer(), q, k, v, None, packed=Packed(LAYOUT))
    assert torch.equal(got, expected)


def test_gradients_of_a_prefix_skip_leaves_that_nobody_used():
    prefix = Prefix()
    keys = torch.ones(2, 1, 1, requires_grad=True)
    prefix.keep(3, keys * 2, keys * 3)
    prefix.leaves[3][0].sum().backward()
    computed, gradients = prefix.gradients()
    torch.autograd.backward(computed, gradients)
    assert keys.grad is not None
    assert keys.grad.flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize("option", ["sliding_window", "softcap", "s_aux", "position_bias"])
def test_what_it_cannot_do_is_refused(option):
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match=option):
        shared_prefix_attention(Layer(), q, k, v, None, packed=Packed(LAYOUT), **{option: 4})


def test_flex_attention_is_for_cuda():
    flex.check_device(torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"'flex_attention' trains on CUDA devices only, and device is 'cpu': use"):
        flex.check_device(torch.device("cpu"))


def test_masks_and_dropout_are_refused():
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match="a mask or dropout"):
        shared_prefix_attention(Layer(), q, k, v, torch.ones(1), packed=Packed(LAYOUT))
    with pytest.raises(NotImplementedError, match="a mask or dropout"):
        shared_prefix_attention(Layer(), q, k, v, None, packed=Packed(LAYOUT), dropout=0.1)
