"""From logits to tokens, given one uniform number per row. Pure tensor functions.

The numbers come from `counters.uniforms`, so a token depends only on the weights, the prompt and the sample's seed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol.messages import Float32, Sampling
from rollout_server.engines.counters import Int64


@dataclass(slots=True)
class SamplingRows:
    """Sampling parameters of every row, [room] each. Off means: no effect, not a special value to test for."""

    temperature: Float32
    """1 for greedy rows: their logprobs are those of temperature 1."""
    greedy: npt.NDArray[np.bool_]
    truncates: npt.NDArray[np.bool_]
    top_k: Int64
    """The largest int64 when off."""
    top_p: Float32
    """inf when off."""
    min_p: Float32

    @classmethod
    def empty(cls, room: int) -> SamplingRows:
        """Room for so many rows."""
        return cls(
            temperature=np.ones(room, np.float32),
            greedy=np.zeros(room, np.bool_),
            truncates=np.zeros(room, np.bool_),
            top_k=np.zeros(room, np.int64),
            top_p=np.zeros(room, np.float32),
            min_p=np.zeros(room, np.float32),
        )

    def put(self, rows: slice, sampling: Sampling) -> None:
        """Set the parameters of `rows`."""
        self.greedy[rows] = sampling.temperature == 0
        self.temperature[rows] = sampling.temperature or 1.0
        self.truncates[rows] = sampling.truncates
        self.top_k[rows] = sampling.top_k or np.iinfo(np.int64).max
        self.top_p[rows] = sampling.top_p if sampling.top_p < 1 else np.inf
        self.min_p[rows] = sampling.min_p

    def head(self, count: int) -> SamplingRows:
        """Views of the first `count` rows."""
        return SamplingRows(*(getattr(self, field.name)[:count] for field in fields(self)))

    def move(self, sources: Int64, targets: Int64) -> None:
        """Copy rows `sources` over rows `targets`."""
        for field in fields(self):
            array = getattr(self, field.name)
            array[targets] = array[sources]


def sample(logits: Tensor, uniform: Float32, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverse CDF.

    Args:
        logits: [n, V] of any float dtype.
        uniform: [n] in [0, 1), with at most 24 bits (`counters.uniforms`).
        rows: parameters of the n rows.

    Returns:
        tokens [n] int64, and their logprobs [n] float32: log softmax(logits / T) of the whole softmax, also where
        top_k, top_p or min_p truncate it.
    """
    device = logits.device
    scores = logits.float()
    if (rows.temperature != 1).any():
        scores = scores / torch.from_numpy(rows.temperature).to(device)[:, None]
    logprobs = torch.log_softmax(scores, dim=-1)
    probabilities = logprobs.exp()
    if rows.truncates.any():
        probabilities = truncate(
            probabilities,
            top_k=torch.from_numpy(rows.top_k).to(device),
            top_p=torch.from_numpy(rows.top_p).to(device),
            min_p=torch.from_numpy(rows.min_p).to(device),
        )
    cdf = probabilities.cumsum(dim=-1)
    # The first token whose CDF exceeds u * total: u * total < total also after rounding, since u <= 1 - 2^-24.
    tokens = torch.searchsorted(cdf, torch.from_numpy(uniform).to(device)[:, None] * cdf[:, -1:], right=True)
    # Only NaN logits (weights gone bad) get past the end; their NaN logprob then says so to the learner (I6).
    tokens = tokens.clamp_(max=scores.shape[-1] - 1)
    if rows.greedy.any():
        tokens = torch.where(torch.from_numpy(rows.greedy).to(device)[:, None], scores.argmax(-1, keepdim=True), tokens)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1)


def truncate(probabilities: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero what top-k, then top-p (Holtzman et al., arXiv 1904.09751), then min-p (arXiv 2407.01082) exclude.

    Args:
        probabilities: [n, V].
        top_k: [n] keep so many of the largest.
        top_p: [n] then keep the smallest set of the largest whose share of what is left reaches this.
        min_p: [n] then keep those of at least so large a part of the largest.

    Returns:
        [n, V], not normalized again.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    ordered = ordered.masked_fill(rank >= top_k[:, None], 0)
    mass_before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill(mass_before >= top_p[:, None] * ordered.sum(dim=-1, keepdim=True), 0)
    ordered = ordered.masked_fill(ordered < min_p[:, None] * ordered[:, :1], 0)
    return torch.zeros_like(ordered).scatter_(-1, order, ordered)
