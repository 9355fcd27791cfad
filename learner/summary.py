"""The end of a run: summary.json and its last words on the terminal.

Made of totals and counts, never of live objects. Null in summary.json is "no value" (no evaluation, no step, ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from learner.durable import write_atomic
from learner.idle import EMPTY_SEATS, LEARNER_WAITS, describe
from learner.stats import EvalPoint, Totals
from learner.token_ledger import TokenEnd, TokenLedger, costs

IDLE_WORTH_SAYING = 0.2
"""A side that idles more than this gets advice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run in one object. Field names are public: scripts read summary.json."""

    task: str
    """The data set."""
    model: str
    steps: int
    """Trained, over all restarts."""
    steps_skipped: int
    reward_first: float
    """Mean over the first min(5, steps / 4) steps (at least one)."""
    reward_last: float
    """Same over the last ones."""
    eval_first: float
    eval_last: float
    staleness_max: int
    """Of any trained group's oldest token; at most max_staleness (I4)."""
    staleness_mean: float
    """Over all tokens trained."""
    max_staleness: int
    groups_trained: int
    groups_filtered: int
    groups_quarantined: int
    groups_unaccounted: int
    """I3: always 0."""
    tokens_trained: int
    weights_published: int
    learner_idle_ratio: float
    """Share of the wall time in which the train loop waited, for a batch or for the previous publish."""
    rollout_idle_ratio: float
    """Share of the servers' wall time in which their engines had nothing to decode."""
    learner_idle: dict[str, float]
    """Why the train loop waited: share of the wall time by cause. Sums to learner_idle_ratio."""
    seats_empty: dict[str, float]
    """Why seats of the engines stood empty: share of their time by cause. Sums to 1 - occupancy."""
    tokens_generated: int
    tokens: dict[str, int]
    """What became of every token: trained, truncated, filtered, ..., under_way (unfinished at the end). Sums to
    tokens_generated."""
    generated_per_trained: float
    """1 where no token is thrown away."""
    learner_s_per_mtok: float
    """Seconds of the learner for each million of trained tokens."""
    server_s_per_mtok: float
    """Same of all servers together."""
    wall_s: float
    """First lease to last step."""
    verdict: str
    """Which side waited for which, and what to do about it."""
    checkpoint: str
    """Directory that `from_pretrained` loads."""
    evals: tuple[EvalPoint, ...]


def summarize(
    totals: Totals,
    *,
    task: str,
    model: str,
    max_staleness: int,
    counts: Mapping[str, int],
    evals: Sequence[EvalPoint],
    weights_published: int,
    tokens: TokenLedger,
    checkpoint: Path,
) -> Summary:
    """Put the totals of `RunStats` and the ledger's counts (filtered, quarantined, unaccounted) together."""
    trained, generated = tokens.ends[TokenEnd.TRAINED], tokens.generated
    cost = costs(trained, generated, learner_s=totals.wall_s, servers_s=totals.servers_s)
    return Summary(
        task=task,
        model=model,
        steps=totals.steps,
        steps_skipped=totals.steps_skipped,
        reward_first=totals.reward_first,
        reward_last=totals.reward_last,
        eval_first=evals[0].reward if evals else math.nan,
        eval_last=evals[-1].reward if evals else math.nan,
        staleness_max=totals.staleness_max,
        staleness_mean=totals.staleness_mean,
        max_staleness=max_staleness,
        groups_trained=totals.groups_trained,
        groups_filtered=counts["filtered"],
        groups_quarantined=counts["quarantined"],
        groups_unaccounted=counts["unaccounted"],
        tokens_trained=totals.tokens_trained,
        weights_published=weights_published,
        learner_idle_ratio=totals.learner_idle_ratio,
        rollout_idle_ratio=totals.rollout_idle_ratio,
        learner_idle={str(cause): _share(seconds, totals.wall_s) for cause, seconds in totals.learner_idle_s.items()},
        seats_empty={
            column.removeprefix("rollout/").removesuffix("_s"): _share(seconds, totals.servers_s)
            for column, seconds in totals.empty_s.items()
        },
        tokens_generated=generated,
        tokens={**{str(end): count for end, count in tokens.ends.items()}, "under_way": tokens.under_way},
        generated_per_trained=cost["cost/generated_per_trained"],
        learner_s_per_mtok=cost["cost/learner_s_per_mtok"],
        server_s_per_mtok=cost["cost/server_s_per_mtok"],
        wall_s=totals.wall_s,
        verdict=idle_verdict(totals, max_staleness),
        checkpoint=str(checkpoint),
        evals=tuple(evals),
    )


def idle_verdict(totals: Totals, max_staleness: int) -> str:
    """Say which side waited for which and why, and what would help.

    One idle side means that the other is too slow. Two idle sides mean that they wait in turn: the bound keeps them
    from overlapping, and only more staleness (or steadier lengths) helps.
    """
    learner_idle, rollout_idle = totals.learner_idle_ratio, totals.rollout_idle_ratio
    if math.isnan(learner_idle):
        return "no step has trained"
    learner, rollout = (f"{100 * ratio:.0f} %" for ratio in (learner_idle, rollout_idle))
    why_learner = f"learner: {describe(totals.learner_idle_s, LEARNER_WAITS, totals.wall_s)}"
    why_rollout = f"seats empty: {describe(totals.empty_s, EMPTY_SEATS, totals.servers_s)}"
    match learner_idle > IDLE_WORTH_SAYING, rollout_idle > IDLE_WORTH_SAYING:
        case True, True:
            return (
                f"the learner waited {learner} and the rollout servers {rollout} of the time, in turn: raise"
                f" max_staleness (now {max_staleness}) to let them overlap ({why_learner}; {why_rollout})"
            )
        case True, False:
            return f"the learner waited {learner} of the time; {why_learner} (max_staleness is {max_staleness})"
        case False, True:
            return f"the rollout servers idled {rollout} of the time; {why_rollout}"
    return f"both sides were busy: the learner waited {learner} of the time" + (
        "" if math.isnan(rollout_idle) else f", the rollout servers {rollout}"
    )


def token_line(summary: Summary) -> str:
    """Say what became of the tokens, and what a trained one costs."""
    others = {end: count for end, count in summary.tokens.items() if count and end != "trained"}
    lost = ", ".join(f"{count:,} {end.replace('_', ' ')}" for end, count in others.items())
    return (
        f"tokens: {summary.tokens_generated:,} generated, {summary.tokens['trained']:,} trained"
        f"{f' ({lost})' if lost else ''}; a million trained took {summary.learner_s_per_mtok:,.0f} s of the learner,"
        f" {summary.server_s_per_mtok:,.0f} s of servers"
    )


def _share(seconds: float, whole_s: float) -> float:
    return seconds / whole_s if whole_s else math.nan


def write_summary(path: Path, summary: Summary) -> None:
    """Write summary.json whole or not at all.

    Raises:
        OSError: the disk refused.
    """
    write_atomic(path, msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")


def summary_lines(summary: Summary) -> list[str]:
    """Return the last words of a run, plain text."""
    evaluation = (
        f"eval {summary.eval_first:.3f} ({summary.evals[0].label}) -> {summary.eval_last:.3f}"
        f" ({summary.evals[-1].label}), "
        if summary.evals
        else ""
    )
    return [
        f"{summary.steps} steps in {summary.wall_s:.0f} s: {evaluation}"
        f"reward {summary.reward_first:.3f} -> {summary.reward_last:.3f}",
        f"{summary.groups_trained:,} groups trained, {summary.groups_filtered:,} filtered,"
        f" {summary.groups_quarantined:,} quarantined, {summary.groups_unaccounted:,} unaccounted;"
        f" {summary.tokens_trained:,} tokens; skipped steps: {summary.steps_skipped:,}",
        f"staleness {summary.staleness_mean:.2f} mean, {summary.staleness_max} max"
        f" (bound {summary.max_staleness}); {summary.weights_published:,} versions published",
        token_line(summary),
        summary.verdict,
        f"model: {summary.checkpoint}",
    ]


def print_summary(summary: Summary) -> None:
    """Print the last words of a run."""
    print("\n".join(summary_lines(summary)), flush=True)
