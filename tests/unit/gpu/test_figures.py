"""The report of the GPU tests, and where they refuse to run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rollout_server.engines.choice import Machine
from tests.gpu import rig
from tests.gpu.figures import Figures
from tests.models import VOCAB_SIZE, build_tiny_model


def test_the_table_and_the_line() -> None:
    figures = Figures()
    figures.record("pause", 0.123456, "s")
    figures.record_median("through the engine", [3.0, 1000.5, 2000.0], "tokens/s", worst=3.0)
    assert figures.table().splitlines() == [
        "pause               0.1235 s",
        "through the engine    1000 tokens/s  median of 3, worst 3",
    ]
    line = figures.line(date="2026-11-25", hardware={"device": "some GPU", "sglang": "0.5.23"})
    assert "\n" not in line
    assert json.loads(line) == {
        "date": "2026-11-25", "device": "some GPU", "sglang": "0.5.23",
        "figures": {"pause": {"value": 0.123456, "unit": "s", "note": ""},
                    "through the engine": {"value": 1000.5, "unit": "tokens/s", "note": "median of 3, worst 3"}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("device", "machine", "reason"),
    [
        ("cuda", (True, False, "0.5.23"), None),
        ("cpu", (False, True, "0.5.23"), None),
        ("cuda", (False, True, "0.5.23"), "no CUDA device"),
        ("cuda", (True, False, None), "sglang is not installed"),
        ("cpu", (True, False, "0.5.23"), "SGLang's CPU engine is off"),
        ("tpu", (True, True, "0.5.23"), "HEADWAY_GPU_DEVICE=tpu: allowed are cuda and cpu"),
    ],
)
def test_where_they_are_skipped(
    device: str, machine: tuple[bool, bool, str | None], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, cpu, version = machine
    here = Machine(has_cuda=cuda, allows_cpu_sglang=cpu, sglang_version=version)
    monkeypatch.setattr(rig, "read_machine", lambda: here)
    found = rig.missing(device)
    assert found is None if reason is None else (found or "").startswith(reason)


def test_versions_of_the_weights(tmp_path: Path) -> None:
    from protocol.versions import Version

    model = build_tiny_model(tmp_path / "model")
    made = rig.Rig(device="cpu", model=model, directory=tmp_path, vocab_size=VOCAB_SIZE)
    own, other, again = (
        made.weights(Version(1, i), content=content) for i, content in enumerate(["own", "other", "own"])
    )
    assert own.path.read_bytes() == again.path.read_bytes() != other.path.read_bytes()
    assert own.digest == again.digest != other.digest
    from safetensors.numpy import load_file

    mine, theirs = load_file(own.path), load_file(other.path)
    assert mine.keys() == theirs.keys()
    assert all(np.any(mine[name] != theirs[name]) for name in mine)


def test_prompts_follow_from_their_names() -> None:
    assert rig.draw_prompt("a", 44).tolist() == rig.draw_prompt("a", 44).tolist() != rig.draw_prompt("b", 44).tolist()
    assert 5 <= rig.draw_prompt("a", 44).min() <= rig.draw_prompt("a", 44).max() < 44
