"""What is simulated: what things cost (Costs), who does them (Workload), and how far they may run ahead (Dial)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from learner.staleness import Bounds, derive_bounds
from protocol.length_trace import LengthTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds that things take. A decode step of b samples on a server with M seats takes t(b) = t0 (1 + c b / M)."""

    decode_token_s: float
    """t0: a decode step of a single sample, that is, seconds a token."""
    occupancy_cost: float
    """c: how much longer a step is with all seats taken."""
    train_token_s: float
    """Of training, for every completion token of the batch."""
    train_step_s: float = 0.0
    """Of training, for every step."""
    prefill_s: float = 0.0
    """For which a prompt holds up its server's decoding, once for all its completions."""
    reward_s: float = 0.0
    """From a group's last token to its rewards; takes no seat."""
    pause_s: float = 0.0
    """For which a server stands still when it takes new weights."""
    publish_s: float = 0.0
    """From an optimizer step to its weights lying at the servers."""
    length_factor: float = 1.0
    """On the trace's lengths, of groups leased from now on."""

    def full_seat_token_s(self, room: int) -> float:
        """Seconds that a server with all seats taken needs for a token: t(M) / M."""
        return self.decode_token_s * (1.0 + self.occupancy_cost) / room


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Who does what, and what it costs."""

    trace: LengthTrace
    costs: Costs
    servers: int = 1
    room: int = 64
    """M: seats of each server, that is, samples it decodes at once."""
    group_events: bool = False
    """Model a group as one event instead of one for each sample: it takes sum / longest seats for as long as its
    longest sample decodes. Seat-seconds and the straggler are exact then; that samples begin one by one is not."""
    heartbeat_s: float = 1.0
    """A server that has something new to say waits no longer."""
    filtered_share: float = 0.0
    """Of the groups, whose rewards are all equal: they are filtered, and others leased in their place."""
    costs_at: Callable[[int], Costs] | None = None
    """Costs while a policy_version is the newest, for regimes that change in mid-run; None: `costs` all along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """The learner's words of the same names."""

    prompts_per_step: int
    num_generations: int
    max_staleness: int
    reorder_window: int | None = None
    weight_sync_steps: int = 1

    @property
    def bounds(self) -> Bounds:
        """What follows.

        Raises:
            ConfigError: it cannot progress, or a part of it buys nothing.
        """
        return derive_bounds(
            max_staleness=self.max_staleness,
            prompts_per_step=self.prompts_per_step,
            reorder_window=self.reorder_window,
            weight_sync_steps=self.weight_sync_steps,
        )
