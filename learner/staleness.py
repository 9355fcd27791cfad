"""The staleness bound: from what the user allows to how far rollouts may run ahead. Pure arithmetic.

Symbols: P prompts_per_step; S how many steps rollouts run ahead; W reorder window; k weight_sync_steps;
m = max_staleness. A group leased at live version v has sequence number i <= (v + S + 1) P - 1, because at most
(S + 1) P slots exist between lease and live weights. While it is untaken only sequence numbers below i + W may be
taken, so at most i + W - 1 groups go before it; its step s has (s - 1) P <= i + W - 1, and therefore

    staleness = (s - 1) - v  <=  S + ceil((W - 1) / P)  =  m.

*How far ahead* (S) and *how old at most* (m) are two things; the user states m (and may state W), S is derived.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The numbers the ledger enforces."""

    prompts_per_step: int
    """P"""
    max_staleness: int
    """m"""
    reorder_window: int
    """W: a finished group may be taken when its sequence number is below lowest untaken + W."""
    steps_ahead: int
    """S"""
    weight_sync_steps: int = 1
    """k: every k-th version is published."""

    @property
    def slots_total(self) -> int:
        """Groups that may exist between lease and live weights (I1)."""
        return (self.steps_ahead + 1) * self.prompts_per_step

    @property
    def lowest_depth(self) -> int:
        """Fewest steps ahead that do not deadlock: the slots of k - 1 trained steps wait for the k-th to be live."""
        return self.weight_sync_steps - 1

    @property
    def window_steps(self) -> int:
        """What the reorder window adds to the staleness: ceil((W - 1) / P)."""
        return -(-(self.reorder_window - 1) // self.prompts_per_step)


def derive_bounds(
    *,
    max_staleness: int,
    prompts_per_step: int,
    reorder_window: int | None = None,
    weight_sync_steps: int = 1,
) -> Bounds:
    """Derive S from what the user allows; with no window given, choose W as well.

    Up to max_staleness 3 the window is closed (W = 1, S = m). From 4 on W = P + 1 and S = m - 1: the same bound, one
    step less of running ahead, and a straggler no longer holds up the groups of the step behind it.

    Raises:
        ConfigError: no S satisfies the pair, or the pair cannot progress, or it buys nothing.
    """
    m, p, k = max_staleness, prompts_per_step, weight_sync_steps
    if reorder_window is None:
        reorder_window = 1 if m < 4 or m - 1 < k else p + 1
    bounds = Bounds(
        prompts_per_step=p,
        max_staleness=m,
        reorder_window=reorder_window,
        steps_ahead=m - -(-(reorder_window - 1) // p),
        weight_sync_steps=k,
    )
    if bounds.steps_ahead < 0:
        raise ConfigError(
            f"reorder_window {reorder_window} alone allows a staleness of {bounds.window_steps}, above max_staleness"
            f" {m}: with prompts_per_step {p} the window may be at most {m * p + 1}"
        )
    if bounds.steps_ahead < bounds.lowest_depth:
        raise ConfigError(
            f"weight_sync_steps {k} with S = {bounds.steps_ahead} steps ahead would deadlock: rollouts need"
            f" S >= {k - 1}; raise max_staleness to at least {k - 1 + bounds.window_steps} or publish more often"
        )
    if reorder_window > 1 and bounds.steps_ahead < k:
        raise ConfigError(
            f"reorder_window {reorder_window} buys nothing with weight_sync_steps {k} and S = {bounds.steps_ahead}:"
            f" use reorder_window 1 or max_staleness >= {k + bounds.window_steps}"
        )
    return bounds
