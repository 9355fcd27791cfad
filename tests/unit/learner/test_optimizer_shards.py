"""Optimizer shards read by one rank, from files as several write them: rows of a moment in each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from learner.config import LearnerConfig
from learner.optimizer import make_optimizer
from learner.optimizer_shards import has_shards, load_shards, save_shards
from protocol.errors import ConfigError


def write_shards(checkpoint: Path, rows: list[int], columns: int = 3) -> torch.Tensor:
    """Moments of `w` in one file per rank of so many rows each; returns all of them."""
    whole = torch.arange(sum(rows) * columns, dtype=torch.float32).reshape(sum(rows), columns)
    (checkpoint / "optimizer").mkdir()
    offset = 0
    for number, part in enumerate(whole.split(rows), start=1):
        tensors = {"exp_avg.w": part.clone(), "exp_avg_sq.w": part.square()}
        places = {name: {"saved_offsets": [offset, 0]} for name in tensors}
        if number == 1:
            tensors["step.w"], places["step.w"] = torch.tensor([7.0]), {"saved_offsets": [0]}
        metadata = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0"}
        save_file(tensors, checkpoint / "optimizer" / f"shard-{number:05d}.safetensors", metadata=metadata)
        offset += len(part)
    return whole


def make(rows: int, name: str = "w") -> tuple[torch.optim.AdamW, dict[str, torch.nn.Parameter]]:
    parameters = {name: torch.nn.Parameter(torch.zeros(rows, 3))}
    return make_optimizer(parameters, LearnerConfig()), parameters


@pytest.mark.parametrize("rows", [[5], [3, 2], [2, 2, 1]])
def test_the_rows_of_all_ranks_are_put_together(tmp_path, rows):
    assert not has_shards(tmp_path)
    whole = write_shards(tmp_path, rows)
    assert has_shards(tmp_path)
    optimizer, parameters = make(5)
    load_shards(optimizer, parameters, tmp_path)
    state = optimizer.state[parameters["w"]]
    assert torch.equal(state["exp_avg"], whole)
    assert torch.equal(state["exp_avg_sq"], whole.square())
    assert state["step"].shape == ()
    assert state["step"] == 7


def test_shards_of_another_shape_are_refused(tmp_path):
    write_shards(tmp_path, [3, 2])
    with pytest.raises(ConfigError, match=r"exp_avg of w is of shape \[5, 3\], the parameter of \[4, 3\]"):
        load_shards(*make(4), tmp_path)


def test_shards_of_another_model_are_refused(tmp_path):
    write_shards(tmp_path, [3, 2])
    with pytest.raises(ConfigError, match=r"optimizer is of another model: it has exp_avg\.w"):
        load_shards(*make(5, "v"), tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_write_that_fails_is_an_error_like_any_other(tmp_path):
    """DCP's own is a BaseException, which goes past everything that deals with full disks."""
    optimizer, parameters = make(5)
    parameters["w"].grad = torch.ones(5, 3)
    optimizer.step()
    (tmp_path / "optimizer").write_text("in the way")
    with pytest.raises(OSError, match=r"optimizer: .*File exists"):
        save_shards(optimizer, parameters, tmp_path)
