"""Adapters through the public commands: trained, published alone, sampled by the embedded engine, resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.models import build_tiny_model
from tests.system.harness import END_S, RUN_S, START_S, Lab, reward

pytestmark = pytest.mark.system
ADAPTER = {"use_peft": True, "lora_r": 4, "learning_rate": 0.05, "max_staleness": 0, "max_completion_length": 12}
SERVER = {"engine": "transformers", "device": "cpu", "dtype": "float32", "max_model_length": 64,
          "reward_funcs": [reward("parity")]}  # fmt: skip


def test_what_is_sampled_is_what_trains_also_after_a_kill(lab: Lab) -> None:
    """max_staleness 0: a batch is of the very version that trains with it, so that every ratio must be 1."""
    config = {**ADAPTER, "max_steps": 6, "save_steps": 2, "filter_zero_std": False, "beta": 0.05}
    server = lab.server(model=str(lab.model), **SERVER)
    killed = lab.learner(**config)
    lab.wait_step(3, alive=[killed, server])
    killed.kill()
    learner = lab.learner(**config)
    assert learner.wait_exit(START_S + RUN_S) == 0, learner.tail() + server.tail()
    assert server.wait_exit(END_S) == 0

    rows = [row for row in lab.run.rows() if not row["skipped"]]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert max(abs(row["ratio/mean"] - 1) for row in rows) < 1e-4
    assert max(row["policy_kl"] for row in rows) < 1e-6
    assert rows[0]["kl"] < 1e-6 < rows[-1]["kl"], "the policy leaves its base model"
    sent = [int(event["bytes"]) for event in lab.run.events("published")]
    whole = (lab.model / "model.safetensors").stat().st_size
    assert max(sent) < whole / 2, "the adapter alone"
    checkpoint = lab.run.path / "checkpoints" / lab.run.checkpoints()[-1]
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0.01 for name, tensor in adapter.items() if ".lora_B." in name)
    assert not (checkpoint / "model.safetensors").exists()


def test_a_server_with_other_weights_of_the_same_shape_ends(lab: Lab, tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "other", seed=9)
    server = lab.server(model=str(other), **SERVER)
    learner = lab.learner(**ADAPTER)
    assert server.wait_exit(START_S + RUN_S) == 2
    assert "is of a base model with other weights" in server.text()
    assert "give both the same --model" in server.text()
    assert learner.exit_code is None, "it waits for a server that fits"


def test_an_adapter_and_all_weights_at_once_are_refused_at_once(lab: Lab) -> None:
    learner = lab.learner(use_peft=True, publish="full")
    assert learner.wait_exit(END_S) == 2
    assert "publish full with use_peft" in learner.text()
    assert "publish adapter (or auto), or train all weights" in learner.text()
