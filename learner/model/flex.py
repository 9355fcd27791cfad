"""Attention of completions to their prompt and to themselves as one call of FlexAttention, for CUDA devices.

The same function as attention.attend_with_prefix. There every bucket is a call of its own; here the row is one, and a
block mask (arXiv 2412.05496) says which blocks of it are empty. It is compiled, for any lengths. No GPU has run it yet:
the tests run it uncompiled on CPU, where torch refuses its backward pass unless told otherwise.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from learner.model.packing import Layout
from protocol.errors import ConfigError


def check_device(device: torch.device) -> None:
    """Refuse devices that FlexAttention cannot train on.

    Raises:
        ConfigError: it is no CUDA device.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"attn_implementation 'flex_attention' trains on CUDA devices only, and device is {device.type!r}:"
            " use attn_implementation = 'auto'"
        )


def flex_with_prefix(
    q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor, layout: Layout, scaling: float | None
) -> Tensor:
    """Attend from completion tokens to their prompt and to themselves: [T - S, H, D].

    Args:
        q: [T - S, H, D].
        k: [T - S, K, D].
        v: [T - S, K, D].
        k_prompt: [S, K, D].
        v_prompt: [S, K, D].
        layout: of the row.
        scaling: of the scores.
    """
    keys, values = torch.cat([k_prompt, k]), torch.cat([v_prompt, v])
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, keys, values))
    attend: Any = _compiled() if q.is_cuda else flex_attention
    mask, grouped = _block_mask(layout, q.device), q.shape[1] != k.shape[1]
    out: Tensor = attend(queries, keys, values, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return out[0].transpose(0, 1)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)  # else every new length compiles
    return compiled


@functools.lru_cache(maxsize=2)
def _block_mask(layout: Layout, device: torch.device) -> BlockMask:
    """Make the mask of a row once for all its layers (and for checkpointed layers that run again)."""
    num_prompt = sum(layout.prompt_lengths)
    lengths = [bucket.lengths for bucket in itertools.chain.from_iterable(layout.completions)]
    completion_lengths = list(itertools.chain.from_iterable(lengths))
    completion_C = _owners(completion_lengths, device)
    group_C, group_S = _owners(layout.group_lengths, device), _owners(layout.prompt_lengths, device)
    group_of_key = torch.cat([group_S, group_C])
    completion_of_key = torch.cat([group_S.new_full((num_prompt,), -1), completion_C])

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prompt = (key < num_prompt) & (group_C[query] == group_of_key[key])
        return in_prompt | ((completion_C[query] == completion_of_key[key]) & (key - num_prompt <= query))

    return create_block_mask(visible, None, None, len(completion_C), len(group_of_key), device=device)


def _owners(lengths: list[int] | tuple[int, ...], device: torch.device) -> Tensor:
    """Number the tokens of consecutive sequences by the sequence they belong to."""
    return torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)
