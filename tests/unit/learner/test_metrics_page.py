"""learner/metrics.md lists what metrics.jsonl holds: every column, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from learner.batch import StepResult
from learner.idle import LearnerWaits, NotLeased
from learner.recorder import StepTimer
from learner.weights_desk import Findings
from protocol.messages import WeightsLive
from protocol.versions import Version
from tests.factories import make_batch, make_group, make_train_group
from tests.unit.learner.test_recorder import office

TEXT = (Path(__file__).parents[3] / "learner" / "metrics.md").read_text("utf-8")
SOURCES = [
    path.read_text("utf-8")
    for name in ("objective.py", "critic.py", "trainer.py", "grpo/diagnostics.py", "arrivals.py")
    for path in [Path(__file__).parents[3] / "learner" / name]
]
"""Of columns that only some objectives have, or that are counted only when something goes wrong."""


NO_COLUMNS = {
    "grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "policy", "token_truncate", "token_mask", "sequence_truncate",
    "sequence_mask", "geometric_truncate", "geometric_mask", "k1", "k2", "k3", "critic", "reference",
}  # fmt: skip
"""Keys of other dictionaries in SOURCES."""


def documented() -> set[str]:
    """Column names in the tables' first cells; causes written out."""
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    causes = {"learner/idle_CAUSE_s": LearnerWaits, "rollout/lease_CAUSE_s": NotLeased}
    for pattern, kind in causes.items():
        names.remove(pattern)
        names |= {pattern.replace("CAUSE", cause) for cause in kind}
    return {name.replace("NAME", "exact_match") for name in names}


def test_every_column_is_documented_and_every_documented_column_is_written(tmp_path: Path) -> None:
    with office(tmp_path) as o:
        server = o.desk.join("north", room=100)
        live = WeightsLive(version=Version(1, 0), mismatch_kl=0.1, mismatch=0.1)
        o.desk.coordinator.weights.handle(server, live)
        o.desk.coordinator.weights.findings = Findings(Version(1, 0), 0.1, 0.1, 0.1, 0.1)
        o.desk.coordinator.weights.live_s = 0.1
        judged = make_train_group(group=make_group(rewards=[1.0, 0.0], step_rewards=[1.0] * 7))
        result = StepResult(finite=True, loss_tokens=4, metrics={"loss": 0.5})
        o.recorder.step(make_batch(step=1, groups=[judged]), result, StepTimer(o.desk.clock), learning_rate=1e-4)
        o.recorder.write_rows()
        (row,) = o.rows()
    assert set(row) <= documented(), f"not in learner/metrics.md: {sorted(set(row) - documented())}"
    others = sorted(documented() - set(row))
    unknown = [name for name in others if not any(f'"{name.removeprefix("groups/")}"' in text for text in SOURCES)]
    assert not unknown, f"nothing writes {unknown}"


def test_what_objectives_add_is_documented() -> None:
    written = {name for text in SOURCES[:4] for name in re.findall(r'"((?:\w+/)?\w+)": ', text)}
    written |= {name for text in SOURCES[:4] for name in re.findall(r'metrics\["([\w/]+)"\] =', text)}
    metrics = {name for name in written if not name.endswith(("_T", "_PG", "_N"))} - NO_COLUMNS
    assert len(metrics) > 8
    assert metrics <= documented(), sorted(metrics - documented())
