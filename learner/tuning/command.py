"""headway-learner simulate: what a run would be like, from declared costs, a length trace or a recorded run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from pydantic import Field, model_validator

from learner.config.section import Section
from learner.tuning.forecast import Forecast
from learner.tuning.recorded import recorded
from learner.tuning.simulator import WARMUP_STEPS, simulate
from learner.tuning.trace import lognormal_trace
from learner.tuning.workload import Costs, Dial, Workload
from protocol.length_trace import LengthTrace, read_length_trace, write_length_trace
from protocol.settings import is_set, load_settings

C = TypeVar("C", bound="Forecasting")

MOST_GROUPS_DRAWN = 1 << 16
"""After so many groups the first come again."""


class Forecasting(Section):
    """What is simulated: a dial, lengths and costs."""

    prompts_per_step: int = Field(8, ge=1)
    """P: groups per training step."""
    num_generations: int = Field(64, ge=2)
    """G: completions sampled per prompt."""
    max_staleness: int = Field(4, ge=0)
    """Hard bound of the staleness, in steps; 0 is synchronous."""
    reorder_window: int | None = Field(None, ge=1)
    """W: how far a finished group may overtake. Default: derived, as in training."""
    weight_sync_steps: int = Field(1, ge=1)
    """Publish every k-th version."""
    servers: int = Field(1, ge=1, le=4096)
    """Rollout servers."""
    room: int = Field(64, ge=1)
    """M: samples that each server decodes at once."""
    decode_token_s: float = Field(0.01, gt=0)
    """t0 of a decode step of b samples, t0 (1 + c b / M): seconds a token of a single sample."""
    occupancy_cost: float = Field(1.0, ge=0)
    """c: 1 makes a step with all seats taken twice as long as that of a single sample."""
    length_median: float = Field(500.0, gt=0)
    """Tokens of a completion."""
    length_p99_over_p50: float = Field(5.0, ge=1)
    """99th percentile of the lengths over their median, lognormal; 1 makes all equal."""
    max_completion_length: int = Field(4096, ge=1)
    """Where lengths are cut."""
    trace: Path | None = None
    """A file of lengths, which takes the place of the three above (`simulate --write-trace` makes one)."""
    prefill_s: float = Field(0.0, ge=0)
    """For which a prompt holds up its server's decoding, once for its group."""
    reward_s: float = Field(0.0, ge=0)
    """From a group's last token to its rewards."""
    heartbeat_s: float = Field(1.0, gt=0)
    """Of the servers."""
    filtered_share: float = Field(0.0, ge=0, lt=1)
    """Of the groups, whose rewards are all equal and which filter_zero_std therefore leaves out."""
    pause_s: float = Field(0.0, ge=0)
    """For which a server stands still when it takes new weights."""
    publish_s: float = Field(0.0, ge=0)
    """From an optimizer step to its weights lying at the servers."""
    train_token_s: float | None = Field(None, ge=0)
    """Training seconds per completion token. Default: what all servers need for one with all seats taken (balanced)."""
    train_step_s: float = Field(0.0, ge=0)
    """Training seconds per step, on top."""
    seed: int = Field(0, ge=0)
    """Of the lengths."""
    steps: int = Field(200, ge=1)
    """Steps to measure."""
    warmup_steps: int = Field(WARMUP_STEPS, ge=1)
    """Steps before them."""
    events: Literal["sample", "group"] = "sample"
    """sample: each completion begins and ends by itself. group: one event a group, for days with many servers; it takes
    sum / longest seats for as long as its longest completion decodes."""
    as_json: bool = False
    """Print one JSON object instead of the table."""

    @model_validator(mode="after")
    def _check(self) -> Forecasting:
        drawn = ("length_median", "length_p99_over_p50", "max_completion_length")
        given = [key for key in drawn if self.trace is not None and is_set(self, key)]
        if given:
            raise ValueError(f"{given[0]} has no effect with trace {self.trace}: leave one of them out")
        if self.train_token_s == 0 and self.train_step_s == 0:
            raise ValueError("train_token_s 0 and train_step_s 0: training takes no time; give one of them")
        _ = self.dial.bounds  # refuses what cannot progress
        return self

    @property
    def dial(self) -> Dial:
        """How far rollouts run ahead."""
        return Dial(
            prompts_per_step=self.prompts_per_step,
            num_generations=self.num_generations,
            max_staleness=self.max_staleness,
            reorder_window=self.reorder_window,
            weight_sync_steps=self.weight_sync_steps,
        )

    @property
    def costs(self) -> Costs:
        """What things cost."""
        balanced = self.decode_token_s * (1 + self.occupancy_cost) / (self.room * self.servers)
        return Costs(
            decode_token_s=self.decode_token_s, occupancy_cost=self.occupancy_cost, prefill_s=self.prefill_s,
            reward_s=self.reward_s, pause_s=self.pause_s, publish_s=self.publish_s, train_step_s=self.train_step_s,
            train_token_s=balanced if self.train_token_s is None else self.train_token_s,
        )  # fmt: skip

    def lengths(self) -> LengthTrace:
        """Read or draw them.

        Raises:
            ConfigError: the trace file is none.
        """
        if self.trace is not None:
            return read_length_trace(self.trace)
        groups = self.prompts_per_step * (self.warmup_steps + self.steps + self.max_staleness + 2)
        return lognormal_trace(
            num_groups=min(groups, MOST_GROUPS_DRAWN), num_generations=self.num_generations,
            median=self.length_median, p99_over_p50=self.length_p99_over_p50,
            max_completion_length=self.max_completion_length, seed=self.seed,
        )  # fmt: skip


class SimulateCommand(Forecasting):
    """Predict step time, idle shares and staleness: the shipped scheduler under a virtual clock, deterministic."""

    write_trace: Path | None = None
    """Write the lengths that were drawn to a file, and simulate nothing."""
    compare: bool = False
    """Simulate the synchronous run (max_staleness 0), too, and show the speed over it."""

    @model_validator(mode="after")
    def _check_trace(self) -> SimulateCommand:
        if self.write_trace is not None and self.trace is not None:
            raise ValueError("write_trace writes lengths that were drawn: leave trace out")
        return self


def simulate_command(argv: Sequence[str], *, prog: str) -> int:
    """Run the command and return its exit code: 1 when the bound or the books were broken.

    Args:
        argv: an optional RUN_DIR, then flags, which take the place of what the run was like.
        prog: for --help.

    Raises:
        ConfigError: A wrong flag, a dial that cannot progress, a run directory with too little in it.
    """
    command, workload = read_command(SimulateCommand, argv, prog=prog)
    if command.write_trace is not None:
        write_length_trace(command.write_trace, workload.trace)
        num_groups, num_generations = workload.trace.lengths.shape
        print(f"{command.write_trace}: {num_groups} groups of {num_generations} lengths")
        return 0
    forecast = simulate(workload, command.dial, steps=command.steps, warmup_steps=command.warmup_steps)
    synchronous = None
    if command.compare:
        still = replace(command.dial, max_staleness=0, reorder_window=None, weight_sync_steps=1)
        synchronous = simulate(workload, still, steps=command.steps, warmup_steps=command.warmup_steps)
    if command.as_json:
        speed = {} if synchronous is None else {"speed_over_synchronous": synchronous.step_s / forecast.step_s}
        print(msgspec.json.encode(forecast.as_dict() | speed).decode())
    else:
        print(table(forecast, synchronous))
    return int(bool(forecast.violations or forecast.unaccounted))


def read_command(kind: type[C], argv: Sequence[str], *, prog: str) -> tuple[C, Workload]:
    """Read a command, and what it simulates.

    Args:
        kind: of the command.
        argv: an optional RUN_DIR, then flags, which take the place of what the run was like.
        prog: for --help.

    Raises:
        ConfigError: A wrong flag, a dial that cannot progress, a run directory with too little in it.
    """
    logging.getLogger("learner").setLevel(logging.ERROR)  # its notices are of the simulated run
    run_dir, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    command = load_settings(kind, flags, prog=f"{prog} [RUN_DIR]")
    recording = recorded(Path(run_dir)) if run_dir else None
    given = {key: getattr(command, key) for key in command.model_fields_set}
    if recording is not None:
        command = kind.model_validate(recording.words | given)
    lengths = command.lengths() if recording is None or command.trace is not None else recording.lengths
    if recording is not None and recording.notice and "occupancy_cost" not in given:
        print(recording.notice, file=sys.stderr)
    return command, Workload(
        trace=lengths, costs=command.costs, servers=command.servers, room=command.room,
        group_events=command.events == "group", filtered_share=command.filtered_share,
        heartbeat_s=command.heartbeat_s,
    )  # fmt: skip


def table(forecast: Forecast, synchronous: Forecast | None = None) -> str:
    """Show a forecast to people."""
    hist = [count / max(1, sum(forecast.staleness_hist)) for count in forecast.staleness_hist]
    rows = [
        ("step", f"{forecast.step_s:.3g} s", f"roofline {forecast.roofline_s:.3g} s, {forecast.roofline:.1%} of it")
    ]
    if synchronous is not None:
        speed = synchronous.step_s / forecast.step_s
        rows.append(("over synchronous", f"{speed:.2f}x", f"a step of {synchronous.step_s:.3g} s"))
    rows += [
        ("trained", f"{forecast.trained_tokens_s:,.0f} tokens/s", ""),
        ("learner idle", f"{forecast.learner_idle:.1%}", "waited for a batch or a publish"),
        ("rollout idle", f"{forecast.rollout_idle:.1%}", "of the seats; paused for weights"
         f" {forecast.rollout_paused:.1%} of the time"),
        ("staleness", f"{forecast.staleness_mean:.2f}", f"mean over tokens; groups {forecast.staleness_group_mean:.2f},"
         f" at most {forecast.staleness_max}; tokens at 0, 1, ...: {' '.join(f'{share:.0%}' for share in hist)}"),
        ("violations", f"{forecast.violations}", f"of the bound; {forecast.unaccounted} groups unaccounted for"),
        ("length ratio", f"{forecast.length_ratio:.3f}", "mean length of what trained over what was leased"),
        ("server share", "{:.2f}-{:.2f}".format(*forecast.server_share), "groups of a server over an even share"),
    ]  # fmt: skip
    return "\n".join(f"{name:<17} {value:>16}  {text}".rstrip() for name, value, text in rows)
