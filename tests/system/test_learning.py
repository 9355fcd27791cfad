"""The thing itself: two public commands, and a small language model that learns to sort letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from learner.demo import sorting
from learner.demo.pair import free_port_pair
from learner.demo.recipes import recipes
from learner.demo.run import DemoOptions, write_run
from tests.system.harness import END_S, Lab, Run

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
STEPS = 110
LEARNING_S = 240.0
SUMMARY_FIELDS = (
    "task", "model", "steps", "reward_first", "reward_last", "eval_first", "eval_last", "staleness_max",
    "staleness_mean", "max_staleness", "groups_trained", "groups_filtered", "groups_quarantined", "groups_unaccounted",
    "tokens_trained", "weights_published", "learner_idle_ratio", "rollout_idle_ratio", "wall_s", "checkpoint",
)  # fmt: skip


@pytest.fixture(scope="module")
def sorting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's model after its supervised warm-up."""
    directory = tmp_path_factory.mktemp("sort") / "model"
    sorting.prepare(directory)
    return directory


@pytest.fixture(scope="module")
def learned(module_lab: Lab, sorting_model: Path) -> Run:
    """The demonstration's own configuration files, given to the public commands; fewer steps."""
    run = Run(module_lab.directory / "runs" / "sort")
    options = DemoOptions(task="sort", max_steps=STEPS, max_staleness=4)
    write_run(recipes()["sort"], options, run_dir=run.path, model=sorting_model, port=free_port_pair())
    logs = run.path / "logs"
    server = module_lab.start("server", ["rollout_server"], run.path / "server.toml", logs / "server.log")
    learner = module_lab.start("learner", ["learner", "train"], run.path / "learner.toml", logs / "learner.log")
    assert learner.wait_exit(LEARNING_S) == 0, learner.tail() + server.tail()
    assert server.wait_exit(END_S) == 0
    return run


def test_sampled_accuracy_rises(learned: Run) -> None:
    summary = learned.summary()
    assert summary["steps"] == STEPS
    assert 0.2 < summary["eval_first"] < 0.4
    assert summary["eval_last"] >= summary["eval_first"] + 0.15
    assert summary["reward_last"] > summary["reward_first"]
    first, last = summary["evals"][0], summary["evals"][-1]
    assert (first["oldest"], first["newest"]) == (0, 0), "pinned to the initial weights"
    assert (last["oldest"], last["newest"]) == (STEPS, STEPS), "pinned to the last weights"


def test_staleness_is_real_and_bounded(learned: Run) -> None:
    rows = learned.rows()
    assert [row["step"] for row in rows if not row["skipped"]] == list(range(1, STEPS + 1))
    assert max(row["staleness/max"] for row in rows) == learned.summary()["staleness_max"]
    assert 1 <= learned.summary()["staleness_max"] <= 4
    assert learned.summary()["staleness_mean"] > 0.2, "rollouts ran ahead of the learner"
    assert all(len(row["staleness/hist"]) <= 5 for row in rows)
    assert all(row["slots_in_use"] <= row["slots_total"] for row in rows), "I1"


def test_the_summary_says_everything(learned: Run) -> None:
    summary = learned.summary()
    assert set(SUMMARY_FIELDS) <= set(summary)
    assert summary["groups_unaccounted"] == 0
    assert summary["groups_quarantined"] == 0
    assert summary["groups_trained"] == 16 * STEPS
    assert summary["weights_published"] == STEPS + 1
    assert 0 <= summary["learner_idle_ratio"] <= 1
    assert 0 <= summary["rollout_idle_ratio"] <= 1
    assert summary["wall_s"] > 0
    assert all(row["groups_unaccounted"] == 0 for row in learned.rows())


def test_the_checkpoint_is_a_plain_hugging_face_model(learned: Run, sorting_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = learned.summary()["checkpoint"]
    after = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = AutoModelForCausalLM.from_pretrained(sorting_model)
    pairs = zip(after.parameters(), before.parameters(), strict=True)
    assert all(not torch.equal(trained, initial) for trained, initial in pairs)
    words = [AutoTokenizer.from_pretrained(where).get_vocab() for where in (checkpoint, sorting_model)]
    assert words[0] == words[1]


def test_the_run_directory_holds_what_is_promised(learned: Run) -> None:
    promised = (
        "config.json",
        "metrics.jsonl",
        "samples",
        "checkpoints",
        "journal",
        "logs",
        "summary.json",
        "reward.png",
    )
    assert {path.name for path in learned.path.iterdir()} >= set(promised)
    config: dict[str, Any] = json.loads((learned.path / "config.json").read_text("utf-8"))
    assert config["max_staleness"] == 4
    sample = json.loads((learned.path / "samples" / "step_000001.jsonl").read_text("utf-8").splitlines()[0])
    assert sample["prompt"].endswith(">")
    assert (learned.path / "reward.png").read_bytes().startswith(b"\x89PNG")
