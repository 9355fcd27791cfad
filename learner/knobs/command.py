"""headway-learner knob RUN_DIR [NAME VALUE]: show the live knobs of a running learner, or turn one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from learner.config.section import Section
from learner.journal_records import KnobRecord
from learner.knobs.socket import Answer, Request, ask
from learner.run_lock import LOCK_FILE
from protocol.errors import ConfigError
from protocol.settings import load_settings

ANSWER_S = 120.0
"""A step that is being applied is waited for."""


class KnobCommand(Section):
    """Show the live knobs of a running learner, what each may be set to and what was changed; or turn one.

    NAME is depth, concurrency or learning_rate. The change takes effect between two steps, and is recorded in the
    journal and in metrics.jsonl.
    """

    reason: str = ""
    """Why, for the record."""


def knob(argv: Sequence[str], *, prog: str) -> int:
    """Run the command and return its exit code.

    Raises:
        ConfigError: no running learner there, no such knob, or a value outside its range.
    """
    usage = f"{prog} RUN_DIR [NAME VALUE]"
    named = 0 if not argv or argv[0].startswith("-") else 1
    if named and len(argv) > 1 and not argv[1].startswith("--"):
        named = 3
    run_dir, name, value = [*argv[:named], "", "", ""][:3]
    options = load_settings(KnobCommand, argv[named:], prog=usage)
    if not run_dir:
        raise ConfigError(f"no run directory: {usage}, the directory under output_dir that has config.json in it")
    answer = _ask(Path(run_dir), Request(name=name, value=_number(name, value), reason=options.reason))
    if answer.refused:
        raise ConfigError(answer.refused)
    print(_told(answer.changed, answer) if answer.changed else _listed(answer))
    return 0


def _number(name: str, value: str) -> float:
    if not name:
        return 0.0
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(value)):
            return number
    raise ConfigError(f"{name} {value!r}: the value of a knob is a number")


def _ask(run_dir: Path, request: Request) -> Answer:
    if not (run_dir / "config.json").is_file():
        raise ConfigError(f"{run_dir} is no run directory: name the one under output_dir that has config.json in it")
    try:
        return ask(run_dir, request, timeout_s=ANSWER_S)
    except (FileNotFoundError, ConnectionError, msgspec.DecodeError):
        last = (run_dir / LOCK_FILE).read_text().strip() if (run_dir / LOCK_FILE).exists() else ""
        raise ConfigError(
            f"no learner is training in {run_dir} on this host{f' (the last one was {last})' if last else ''}: knobs"
            " turn while a run goes on; before it goes on, its configuration is the place"
        ) from None
    except TimeoutError:
        raise ConfigError(
            f"the learner of {run_dir} has not answered for {ANSWER_S:g} s: a step is being applied, or it hangs. What"
            f" was asked for may still happen; look again without NAME VALUE"
        ) from None
    except PermissionError:
        raise ConfigError(f"the learner of {run_dir} is another user's: only that one may turn its knobs") from None


def _told(record: KnobRecord, answer: Answer) -> str:
    text = f"{record.name}: {record.old:g} -> {record.value:g}, from step {record.step + 1} on"
    if record.name == "depth" and answer.slots_in_use > answer.slots_allowed:
        text += (
            f"; {answer.slots_in_use} slots are in use, nothing new begins until fewer than {answer.slots_allowed} are"
        )
    return text


def _listed(answer: Answer) -> str:
    lines = [f"step {answer.step}; {answer.slots_in_use} of {answer.slots_allowed} slots in use", ""]
    for shown in answer.knobs:
        configured = "" if shown.value == shown.configured else f"  (configured: {shown.configured:g})"
        lines.append(f"{shown.name:<15}{shown.value:<12g}allowed: {shown.allowed}{configured}")
    lines += ["", "changes:" if answer.history else "no changes so far"]
    for record in answer.history:
        reason = f"  {record.reason}" if record.reason else ""
        change = f"{record.name} {record.old:g} -> {record.value:g}"
        lines.append(f"  #{record.number}  step {record.step}  {change}  {record.who}{reason}")
    return "\n".join(lines)
