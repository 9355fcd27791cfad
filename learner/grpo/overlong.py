"""Soft overlong punishment: completions that come near their limit lose reward by degrees, not all at once.

Tensor functions only. Shapes: N completions that train.
"""

from __future__ import annotations

from torch import Tensor


def soft_overlong_punishment(lengths_N: Tensor, *, max_completion_length: int, soft_punish_cache: int) -> Tensor:
    """Compute what is added to the reward of a completion of a length |o|.

        0                                     |o| <= L_max - L_cache
        ((L_max - L_cache) - |o|) / L_cache   up to L_max, where it reaches -1

    DAPO (arXiv 2503.14476), eq. 13. There a completion beyond L_max gets -1; none is longer here.

    Args:
        lengths_N: [N] tokens.
        max_completion_length: L_max, tokens.
        soft_punish_cache: L_cache, tokens.

    Returns:
        [N] float64, in [-1, 0].
    """
    beyond_N = lengths_N.double() - (max_completion_length - soft_punish_cache)
    return -(beyond_N / soft_punish_cache).clamp(0.0, 1.0)
