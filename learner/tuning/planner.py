"""Which dial, and which split: forecasts of what is in question, the knee among them, and which side to grow. Pure.

A candidate is a set of words that take the place of the workload's own. The knee is the least stale of those that train
nearly as much as the best one: what lies beyond it buys staleness and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from learner.tuning.forecast import Forecast
from learner.tuning.simulator import simulate
from learner.tuning.workload import Dial, Workload
from protocol.errors import ConfigError

DIAL_WORDS = ("max_staleness", "reorder_window", "weight_sync_steps", "num_generations", "prompts_per_step")
SPLIT = "split"
"""trainers:servers; training is taken to be so many times as fast."""
NEARLY = 0.95
"""Of the best candidate's trained tokens/s: what the knee must reach."""
EVEN = 0.05
"""Sides whose seconds a step differ by less are balanced."""
MOST_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting in question, and its forecast."""

    words: tuple[tuple[str, str], ...]
    """(word, value) of all that vary."""
    dial: Dial
    trainers: int
    servers: int
    forecast: Forecast

    @property
    def name(self) -> str:
        """For people."""
        return ", ".join(f"{word} {value}" for word, value in self.words)


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found."""

    candidates: tuple[Candidate, ...]
    refused: tuple[str, ...]
    """Settings that cannot progress or buy nothing, each with its reason."""
    best: Candidate
    """With the most trained tokens/s."""
    knee: Candidate
    """The least stale within NEARLY of it; of equally stale ones the fastest."""
    advice: str
    """Which side to grow, at the knee, and by how much."""


def read_vary(texts: Sequence[str]) -> dict[str, list[str]]:
    """Read `NAME=VALUE,VALUE...`, each once.

    Raises:
        ConfigError: an unknown name, no value, a value that is none, or too many settings in all.
    """
    vary: dict[str, list[str]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in (*DIAL_WORDS, SPLIT):
            raise ConfigError(f"vary {text!r}: {name!r} cannot vary; allowed are {', '.join((*DIAL_WORDS, SPLIT))}")
        vary[name] = [value.strip() for value in values.split(",")]
        for value in vary[name]:
            numbers = value.split(":") if name == SPLIT else [value]
            if len(numbers) != (2 if name == SPLIT else 1) or not all(number.isdecimal() for number in numbers):
                example = "1:1,1:2 (trainers:servers)" if name == SPLIT else "1,2,4"
                raise ConfigError(f"vary {text!r}: {value!r} is no value of {name}; write {name}={example}")
            if name == SPLIT and "0" in numbers:
                raise ConfigError(f"vary {text!r}: {value!r}: at least one trainer and one server")
    count = 1
    for values_of_one in vary.values():
        count *= len(values_of_one)
    if count > MOST_CANDIDATES:
        raise ConfigError(f"vary: {count} settings in all, and {MOST_CANDIDATES} are the most: name fewer values")
    return vary


def plan(workload: Workload, dial: Dial, vary: dict[str, list[str]], *, steps: int, warmup_steps: int) -> Plan:
    """Simulate every combination of the values in question.

    Args:
        workload: as measured or declared, with one trainer.
        dial: the words that do not vary.
        vary: values by word.
        steps: to measure of each.
        warmup_steps: before them.

    Raises:
        ConfigError: none of the combinations can progress; names the first one's reason.
    """
    candidates, refused = [], []
    for values in itertools.product(*vary.values()):
        words = tuple(zip(vary, values, strict=True))
        turned = replace(dial, **{word: int(value) for word, value in words if word != SPLIT})
        trainers, servers = map(int, dict(words).get(SPLIT, f"1:{workload.servers}").split(":"))
        costs = workload.costs
        faster = replace(
            costs, train_token_s=costs.train_token_s / trainers, train_step_s=costs.train_step_s / trainers
        )
        try:
            _ = turned.bounds
        except ConfigError as error:
            refused.append(f"{', '.join(f'{word} {value}' for word, value in words)}: {error}")
            continue
        forecast = simulate(
            replace(workload, costs=faster, servers=servers), turned, steps=steps, warmup_steps=warmup_steps
        )
        candidates.append(Candidate(words, turned, trainers, servers, forecast))
    if not candidates:
        raise ConfigError(f"no setting in question can progress: {refused[0]}")
    best = max(candidates, key=lambda one: one.forecast.trained_tokens_s)
    enough = [one for one in candidates if one.forecast.trained_tokens_s >= NEARLY * best.forecast.trained_tokens_s]
    knee = min(enough, key=lambda one: (one.forecast.staleness_mean, -one.forecast.trained_tokens_s))
    return Plan(tuple(candidates), tuple(refused), best, knee, advise(knee))


def advise(candidate: Candidate) -> str:
    """Say which side is the slower one, and how much more of it would make both equally fast."""
    forecast = candidate.forecast
    training_s, generation_s = forecast.training_s, forecast.generation_s
    if abs(training_s - generation_s) <= EVEN * max(training_s, generation_s):
        return (
            f"both sides are equally fast ({training_s:.3g} s a step of training, {generation_s:.3g} s of generation)"
        )
    if generation_s > training_s:
        more = candidate.servers * (generation_s / training_s - 1)
        return (
            f"rollouts are the slower side ({generation_s:.3g} s a step at full seats, training {training_s:.3g} s):"
            f" {more:.1f} more servers like the {candidate.servers} here would balance them"
        )
    more = candidate.trainers * (training_s / generation_s - 1)
    return (
        f"training is the slower side ({training_s:.3g} s a step, generation {generation_s:.3g} s at full seats):"
        f" {more:.1f} more trainers like the {candidate.trainers} here would balance them, or fewer servers"
    )
