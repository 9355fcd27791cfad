"""What `train --dry-run` prints: the resolved configuration, what follows from it, the memory it needs, what is here.

Imports no torch and reads no weights, so it also answers where neither fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from learner.config import LearnerConfig
from learner.model.memory import ITEM_BYTES, memory_estimate
from learner.preflight import check_start, found, unchecked
from learner.ranks.place import Place
from protocol.errors import ConfigError


def dry_run(config: LearnerConfig, place: Place | None) -> None:
    """Print the text of a dry run, then refuse what a start would be refused for, as far as it can be known.

    Raises:
        ConfigError: A start would be refused.
    """
    print(describe(config, place), flush=True)
    check_start(config, place)


def describe(config: LearnerConfig, place: Place | None = None) -> str:
    """Return the text of a dry run.

    Raises:
        ConfigError: The model's directory is missing, or holds no model that can be measured; the run directory holds a
            run that began differently.
    """
    sections = {
        "configuration": [config.model_dump_json(indent=2)],
        "asynchrony": list(_asynchrony(config)),
        "memory of the learner, estimated": list(_memory(config)),
        "here": [_line(*words) for words in found(config)],
    }
    text = "\n\n".join("\n".join([f"{title}:", *lines]) for title, lines in sections.items())
    return f"{text}\n\n{unchecked(config, place)}"


def _asynchrony(config: LearnerConfig) -> Iterator[str]:
    wanted, bounds = config.bounds, config.granted_bounds
    yield _line("max_staleness", str(bounds.max_staleness), "hard bound, in steps, of a group's oldest token")
    yield _line("S", str(bounds.steps_ahead), "steps that rollouts may run ahead")
    if bounds.steps_ahead < wanted.steps_ahead:
        yield _line("", "", f"lowered from {wanted.steps_ahead}: buffer_bytes holds no more worst-case groups")
    yield _line("W", str(bounds.reorder_window), "reorder window, in groups")
    yield _line("bound", str(bounds.steps_ahead + bounds.window_steps), "staleness that S and W allow")
    yield _line("slots_total", str(bounds.slots_total), "groups between lease and live weights")
    reserved = bounds.slots_total * config.group_bytes
    yield _line("reserved", _bytes(reserved), f"{_bytes(config.group_bytes)} a group, of buffer_bytes")
    samples = config.prompts_per_step * config.num_generations
    yield _line("samples", str(samples), "a step: prompts_per_step x num_generations")


def _memory(config: LearnerConfig) -> Iterator[str]:
    model = Path(config.model).expanduser()
    if not model.is_dir():
        if model.is_absolute() or config.model.startswith("."):
            raise ConfigError(f"model {config.model!r}: no such directory")
        yield _line("parameters", "unknown", f"{config.model} is no directory here; a hub name is resolved later")
        return
    estimate = memory_estimate(config)
    parameters, total = estimate.pop("parameters"), estimate.pop("total_bytes")
    published = (estimate["adapter_bytes"] // 4 if config.use_peft else parameters) * ITEM_BYTES[config.published_dtype]
    yield _line("parameters", f"{parameters:,}", str(model))
    for name, size in estimate.items():
        if size:
            yield _line(name.removesuffix("_bytes"), _bytes(size))
    yield _line("publishing", _bytes(published), "the version that servers fetch")
    yield _line("total", _bytes(total + published))


def _line(name: str, value: str, reason: str = "") -> str:
    return f"  {name:<14} {value:>14}  {reason}".rstrip()


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e10 else f"{count / 1e9:,.1f} GB"
