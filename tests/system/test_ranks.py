"""Two gloo ranks train what one rank trains; a checkpoint of either goes on on the other; faults end in one error."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learner.config import LearnerConfig
from learner.model.export import unique_tensors
from learner.trainer import Trainer
from tests.models import build_tiny_model
from tests.rank_worker import batch_of, perform
from tests.spawned_ranks import Ended, run_ranks
from tests.system.harness import END_S, RUN_S, START_S, read_events

pytestmark = pytest.mark.system

EQUAL = 1e-5
RECIPE = {"learning_rate": 1e-2, "weight_decay": 0.1, "beta": 0.1, "warmup_steps": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "prompts apart": {"token_budget": 12},
    "whole groups": {"token_budget": 512, "loss_type": "grpo"},
    "padded": {"token_budget": 24, "share_prefix": False},
    "untied": {"token_budget": 12, "model": "untied"},
    "several updates": {"token_budget": 24, "num_iterations": 2, "num_mini_batches": 2, "anchor": "proximal"},
    "all tokens first": {"token_budget": 24, "kl_in": "reward", "importance_sampling_level": "sequence"},
    "following": {"token_budget": 24, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    "checkpointed": {"token_budget": 12, "gradient_checkpointing": True},
    "recompute head": {"token_budget": 12, "loss_head": "recompute"},
    "context": {"token_budget": 256, "context_parallel_size": 2},
    "context, prompts apart": {"token_budget": 12, "context_parallel_size": 2, "gradient_checkpointing": True},
    "context, all tokens first": {
        "token_budget": 12,
        "context_parallel_size": 2,
        "kl_in": "reward",
        "importance_sampling_level": "sequence",
    },
}
"""Each trained on one rank and on two."""
EXACT = ("num_micro_batches", "tokens_forwarded")
"""Metrics that depend on how the step is divided."""


def train(trainer: Trainer, steps: range) -> list[dict[str, float]]:
    rows = []
    for step in steps:
        rows.append(trainer.forward_backward(batch_of(step)).metrics)
        trainer.optimizer_step()
    return rows


def assert_equal_rows(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(rows) == len(expected)
    for row, control in zip(rows, expected, strict=True):
        compared = {key: value for key, value in row.items() if key not in EXACT}
        assert compared == pytest.approx({key: control[key] for key in compared}, rel=EQUAL, abs=EQUAL)


def assert_equal_weights(directory: Path, control: Trainer) -> None:
    expected = unique_tensors(control._model)
    loaded = unique_tensors(AutoModelForCausalLM.from_pretrained(directory))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=EQUAL, atol=EQUAL, msg=name)


class World:
    """What two ranks did in one go, and what one rank did of the same."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.models = {"tied": str(model), "untied": str(build_tiny_model(directory / "m", tie_word_embeddings=False))}
        self.controls: dict[str, Trainer] = {}
        self.rows: dict[str, list[dict[str, float]]] = {}
        runs: list[dict[str, Any]] = []
        for name, shape in SHAPES.items():
            control = self.controls[name] = Trainer(LearnerConfig(**self.options(shape)))
            self.rows[name] = train(control, range(1, 4))
            operations = [["train", 1], ["train", 2], ["train", 3], ["save", str(directory / f"two {name}")]]
            runs.append({"options": self.options(shape), "checkpoint": None, "operations": operations})
        runs[0]["operations"].append(["publish", str(directory / "published.safetensors")])
        control = self.controls["prompts apart"]
        control.save(directory / "one")
        self.rows["resumed"] = train(control, range(4, 6))
        resumed = [["train", 4], ["train", 5], ["save", str(directory / "two resumed")]]
        for checkpoint in ("one", "two prompts apart"):
            options = self.options(SHAPES["prompts apart"])
            runs.append({"options": options, "checkpoint": str(directory / checkpoint), "operations": resumed})
            resumed = resumed[:2]
        self.rows["following on"] = train(self.controls["following"], range(4, 6))
        following = {"options": self.options(SHAPES["following"]), "checkpoint": str(directory / "two following")}
        runs.append({**following, "operations": [["train", 4], ["train", 5]]})
        options = self.options({"token_budget": 12, "autocast": "bfloat16"})
        runs.append({"options": options, "checkpoint": None, "operations": [["train", 1], ["train", 2]]})
        bfloat16 = Trainer(LearnerConfig(**options))
        self.rows["bfloat16"] = train(bfloat16, range(1, 3))
        names = [*SHAPES, "from one rank", "from two ranks", "following on", "bfloat16"]
        self.ranks = run_plan(directory, runs)
        answers = json.loads((directory / "answer.json").read_text()) if self.ranks[0].code == 0 else []
        self.answers = dict(zip(names, answers, strict=False))

    def options(self, shape: dict[str, Any]) -> dict[str, Any]:
        return {**RECIPE, **shape, "model": self.models[shape.get("model", "tied")]}


def run_plan(
    directory: Path, runs: list[dict[str, Any]], *, num_ranks: int = 2, raise_at: int | None = None
) -> list[Ended]:
    plan = directory / "plan.json"
    plan.write_text(json.dumps({"answer": str(directory / "answer.json"), "raise_at": raise_at, "runs": runs}))
    return run_ranks([["tests.rank_worker", str(plan)]] * num_ranks, directory)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model_dir) -> World:
    world = World(tmp_path_factory.mktemp("ranks"), tiny_model_dir)
    assert [rank.code for rank in world.ranks] == [0, 0], "\n".join(rank.output for rank in world.ranks)
    return world


@pytest.mark.parametrize("name", SHAPES)
def test_two_ranks_train_what_one_rank_trains(world, name):
    assert_equal_rows(world.answers[name], world.rows[name])
    if name not in ("prompts apart", "following"):  # those controls have gone on
        assert_equal_weights(world.directory / f"two {name}", world.controls[name])


def test_both_ranks_have_work(world):
    for row, control in zip(world.answers["prompts apart"], world.rows["prompts apart"], strict=True):
        assert row["tokens_forwarded"] >= control["tokens_forwarded"]
        assert row["num_micro_batches"] > 1


def test_a_published_version_is_what_one_rank_would_publish(world):
    published = load_file(world.directory / "published.safetensors")
    saved = load_file(world.directory / "two prompts apart" / "model.safetensors")
    assert published.keys() == saved.keys()
    assert all(torch.equal(published[name], saved[name]) for name in saved)


@pytest.mark.parametrize("source", ["from one rank", "from two ranks"])
def test_two_ranks_go_on_from_either_checkpoint(world, source):
    assert_equal_rows(world.answers[source], world.rows["resumed"])


def test_one_rank_goes_on_from_the_checkpoint_of_two(world):
    options = world.options(SHAPES["prompts apart"])
    trainer = Trainer(LearnerConfig(**options), checkpoint=world.directory / "two prompts apart")
    assert trainer.policy_version == 3
    assert_equal_rows(train(trainer, range(4, 6)), world.rows["resumed"])
    assert_equal_weights(world.directory / "two resumed", trainer)


def test_a_reference_that_follows_goes_on_where_it_was(world):
    assert_equal_rows(world.answers["following on"], world.rows["following on"])
    options = world.options(SHAPES["following"])
    alone = Trainer(LearnerConfig(**options), checkpoint=world.directory / "two following")
    assert_equal_rows(train(alone, range(4, 6)), world.rows["following on"])


def test_a_checkpoint_of_two_ranks_has_no_pickle_and_both_halves(world):
    files = [path for path in (world.directory / "two untied").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    shards = sorted(path for path in files if path.parent.name == "optimizer")
    assert len(shards) == 2
    sizes = [sum(tensor.numel() for tensor in load_file(shard).values()) for shard in shards]
    assert max(sizes) < 1.1 * min(sizes)


def test_mixed_precision_stays_near_autocast(world):
    for row, control in zip(world.answers["bfloat16"], world.rows["bfloat16"], strict=True):
        assert row["loss"] == pytest.approx(control["loss"], abs=0.05)
        assert row["grad_norm"] == pytest.approx(control["grad_norm"], rel=0.1)


def test_four_ranks_divide_the_step_and_its_rows(tiny_model_dir, tmp_path):
    """Two contexts of two ranks; one of four, which is more than there are key heads; a step that is one long row."""
    recipe = {**RECIPE, "model": str(tiny_model_dir)}
    one_context = recipe | {"token_budget": 64, "context_parallel_size": 4}
    options: list[dict[str, Any]] = [
        recipe | {"token_budget": 6, "context_parallel_size": 2},
        one_context,
        one_context,
        one_context | {"autocast": "bfloat16"},
        one_context | {"token_budget": 2, "loss_function": "tests.rank_worker:own_loss"},
    ]
    operations = [["train", 1], ["train", 2], ["train pair", 3]]
    runs: list[dict[str, Any]] = [{"options": each, "checkpoint": None, "operations": operations} for each in options]
    runs[2]["no_flash"] = True
    ranks = run_plan(tmp_path, runs, num_ranks=4)
    assert [rank.code for rank in ranks] == [0] * 4, "\n".join(rank.output for rank in ranks)
    assert "FutureWarning" not in ranks[0].output
    divided, whole, masked, bfloat16, own = json.loads((tmp_path / "answer.json").read_text())
    control = perform(Trainer(LearnerConfig(**options[0] | {"context_parallel_size": 1})), operations)
    for rows in (divided, whole, masked):
        assert_equal_rows(rows, control)
    assert_equal_rows(own, perform(Trainer(LearnerConfig(**options[4] | {"context_parallel_size": 1})), operations))
    assert [row["num_micro_batches"] for row in whole] == [4.0] * 3, "each rank ran a part of the one row"
    assert whole[2]["tokens_forwarded"] == 4 * -(-control[2]["tokens_forwarded"] // 4), "the parts are equal"
    for row, expected in zip(bfloat16, control, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=0.05)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)


# --- faults


def test_a_rank_without_work_joins_in_and_one_that_fails_says_why_through_rank_0(tiny_model_dir, tmp_path):
    """Two runs of the same three ranks."""
    options = {**RECIPE, "model": str(tiny_model_dir), "token_budget": 12}
    pairs = [["train pair", 1], ["train pair", 2]]
    runs = [
        {"options": options, "checkpoint": None, "operations": pairs},
        {"options": options, "checkpoint": None, "operations": [["train", 1], ["train", 5]]},
    ]
    leader, *followers = run_plan(tmp_path, runs, num_ranks=3, raise_at=5)
    (rows,) = json.loads((tmp_path / "answer.json").read_text())
    assert [row["num_micro_batches"] for row in rows] == [2.0, 2.0], "of three ranks, two had work"
    assert_equal_rows(rows, perform(Trainer(LearnerConfig(**options)), pairs))
    assert all("no more memory for this test" in follower.output for follower in followers), "the fault happened"
    assert leader.code == 1
    (error,) = leader.errors
    assert "rank 1 ended: MemoryError: no more memory for this test; during forward_backward: " in error


def test_ranks_that_disagree_are_refused_before_anything_loads(tiny_model_dir, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    common = ["learner", "train", "--model", str(tiny_model_dir), "--dataset", str(data)]
    common += ["--output-dir", str(tmp_path / "runs"), "--collective-timeout-s", "30", "--learning-rate"]
    leader, follower = run_ranks([[*common, "1e-6"], [*common, "1e-5"]], tmp_path)
    assert (leader.code, follower.code) == (2, 0)
    (error,) = leader.errors
    assert "ranks disagree on learning_rate: 1e-06 on rank 0, 1e-05 on rank 1" in error
    assert follower.errors == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(240)
def test_a_run_under_torchrun_ends_with_one_error_and_goes_on_on_one_rank(lab):
    server = lab.server()
    learner = lab.learner(ranks=2, max_steps=500, save_steps=2)
    lab.wait_step(3, alive=[learner, server])
    (begun,) = read_events(lab.run.path / "logs" / "rank-1.log", "following")
    os.kill(int(begun["pid"]), signal.SIGKILL)
    assert learner.wait_exit(END_S) == 1
    errors = [line for line in learner.text().splitlines() if "headway-learner: error:" in line]
    assert len(errors) == 1, learner.tail()
    assert "rank 1 ended or hangs, without a word" in errors[0]
    saved = max(lab.run.checkpoints())
    assert (lab.run.path / "checkpoints" / saved / "optimizer").is_dir()
    steps = int(saved.rpartition("-")[2]) + 3
    alone = lab.learner(max_steps=steps)
    assert alone.wait_exit(START_S + RUN_S) == 0, alone.tail()
    assert f"resuming from step {steps - 3}" in alone.text()
    assert lab.run.summary()["steps"] == steps
