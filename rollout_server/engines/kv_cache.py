"""Keys and values of the rows being decoded, each at its own length, in the form a Hugging Face model writes to.

Rows [0, n) are in use and the model runs on exactly those: a row that ends is filled by the last one (`move`). Buffers
grow with the longest row in use, so a large `max_length` costs nothing until someone needs it. This file knows
nothing of requests, sampling or versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

GROWTH = 64
"""Buffers grow to multiples of so many tokens, and at least by half of what they hold."""


@dataclass(frozen=True, slots=True)
class PromptCache:
    """One prefilled prompt, kept until every sample of its group has a row."""

    keys: list[Tensor]
    """Per layer [H, P, D]."""
    values: list[Tensor]
    logits: Tensor
    """[V] after the last prompt token: what the first token of every sample is drawn from."""

    @property
    def length(self) -> int:
        """Tokens of the prompt, P."""
        return self.keys[0].shape[1]


class RowCache(Cache):  # type: ignore[misc]  # transformers ships no types
    """KV buffers [room, H, capacity, D] per layer, written at one position per row.

    Shapes come from the first prompt, so layers may differ in heads and head sizes. The decode step is
    `begin_step(lengths)`, then the model's forward, which calls `update` once per layer.
    """

    def __init__(self, *, room: int, max_length: int) -> None:
        super().__init__(layers=[])
        self._room, self._max_length = room, max_length
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows = torch.empty(0, dtype=torch.int64)
        self._positions = self._rows
        self._visible = 0

    @property
    def capacity(self) -> int:
        """Tokens per row that the buffers hold now."""
        return self._keys[0].shape[2] if self._keys else 0

    def admit(self, prompt: PromptCache, first: int, count: int) -> None:
        """Copy a prompt into rows [first, first + count)."""
        if not self._keys:
            self._keys = [self._empty_like(keys) for keys in prompt.keys]
            self._values = [self._empty_like(values) for values in prompt.values]
        self._reserve(prompt.length)
        for buffers, prompts in ((self._keys, prompt.keys), (self._values, prompt.values)):
            for buffer, tensor in zip(buffers, prompts, strict=True):
                buffer[first : first + count, :, : prompt.length] = tensor

    def begin_step(self, positions: Tensor, visible: int) -> Tensor:
        """Say where the coming forward writes, and return its attention mask.

        Args:
            positions: [n] int64 on the device: the position of the new token of each row.
            visible: 1 + the largest of them; the model sees the buffers cut to that length.

        Returns:
            [n, 1, 1, visible] to be added to the attention scores: 0 up to the row's position, -inf after it.
        """
        self._reserve(visible)
        self._positions, self._visible = positions, visible
        if len(self._rows) != len(positions):
            self._rows = torch.arange(len(positions), device=positions.device)
        hidden = torch.arange(visible, device=positions.device) > positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._keys[0].dtype, device=positions.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None, None, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one new token per row ([n, H, 1, D]) and return what the rows attend to ([n, H, visible, D])."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._rows, :, self._positions] = key_states[:, :, 0]
        values[self._rows, :, self._positions] = value_states[:, :, 0]
        rows = len(self._rows)
        return keys[:rows, :, : self._visible], values[:rows, :, : self._visible]

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy rows `sources` over rows `targets` (both [k] int64), of which `length` tokens matter."""
        for buffer in (*self._keys, *self._values):
            buffer[targets, :, :length] = buffer[sources, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the one being written, for models that ask; the longest row's."""
        return max(self._visible - 1, 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(length, offset) of what `update` returns."""
        return self._visible, 0

    def _reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens; what is in the buffers stays."""
        capacity = self.capacity
        if length <= capacity:
            return
        wanted = max(length, capacity + capacity // 2)
        wanted = min(-(-wanted // GROWTH) * GROWTH, self._max_length)
        for buffers in (self._keys, self._values):
            for layer, old in enumerate(buffers):
                buffers[layer] = old.new_zeros((*old.shape[:2], wanted, old.shape[3]))
                buffers[layer][:, :, :capacity] = old

    def _empty_like(self, prompt: Tensor) -> Tensor:
        return prompt.new_zeros((self._room, prompt.shape[0], 0, prompt.shape[2]))
