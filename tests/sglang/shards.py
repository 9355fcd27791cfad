"""Run with SGLang's interpreter: its own sharded layers, as ranks of two, mapped, loaded and changed.

An SGLang of two ranks was not got to sample on two shared CPUs; what sharding does to a map is decided by these layers
alone. Prints, for each rank, the map and whether few changes gave what a load of everything gives.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from sglang.srt.layers import linear

from rollout_server.engines.sglang.client import ServerInfo
from rollout_server.engines.sglang.sparse import LOADER, Mapped, SparseLoads
from rollout_server.inside_sglang import answer_file, load
from tests.changes import change_some

HIDDEN, HEAD, HEADS, KV_HEADS, MIDDLE = 32, 8, 4, 2, 64


class Layer(torch.nn.Module):
    """Attention and MLP weights of one layer, as SGLang's models have and load them."""

    def __init__(self, rank: int, kv_heads: int) -> None:
        super().__init__()
        linear._resolve_linear_group = lambda group: SimpleNamespace(rank_in_group=rank, world_size=2)
        self.qkv_proj = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, kv_heads, bias=True)
        self.o_proj = linear.RowParallelLinear(HEADS * HEAD, HIDDEN, bias=False)
        self.gate_up_proj = linear.MergedColumnParallelLinear(HIDDEN, [MIDDLE, MIDDLE], bias=False)
        self.down_proj = linear.RowParallelLinear(MIDDLE, HIDDEN, bias=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        stacked = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v"),
                   "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}  # fmt: skip
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            part, _, kind = name.partition(".")
            to, shard = stacked.get(part, (part, None))
            parameter = parameters[f"{to}.{kind}"]
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))


def make_file(kv_heads: int) -> dict[str, torch.Tensor]:
    rows = {"q_proj": HEADS * HEAD, "k_proj": kv_heads * HEAD, "v_proj": kv_heads * HEAD}
    shapes = rows | {"gate_proj": MIDDLE, "up_proj": MIDDLE}
    file = {f"{name}.weight": torch.randn(size, HIDDEN) for name, size in shapes.items()}
    file |= {f"{name}.bias": torch.randn(size) for name, size in rows.items()}
    return file | {"o_proj.weight": torch.randn(HIDDEN, HEADS * HEAD), "down_proj.weight": torch.randn(HIDDEN, MIDDLE)}


def order(layer: Layer, directory: Path, what: str) -> Any:
    load(layer, [(json.dumps({"do": what, "directory": str(directory)}), torch.FloatTensor())])
    return json.loads(answer_file(directory, what, os.getpid()).read_text())


def try_rank(directory: Path, rank: int, kv_heads: int) -> dict[str, Any]:
    """Load a version, set what another one changes, and compare with a load of that one."""
    file = make_file(kv_heads)
    new, changes = change_some(file, share=0.1)
    save_file(file, directory / "model.safetensors")
    save_file(new, directory / "new.tensors")
    layer, whole = Layer(rank, kv_heads), Layer(rank, kv_heads)
    mapped = order(layer, directory, "map")
    layer.load_weights(file.items())
    compared = order(layer, directory, "compare")
    info = ServerInfo(version="", model_path="", dtype="", device="", custom_weight_loader=[LOADER])
    sparse = SparseLoads(None, info)  # type: ignore[arg-type]
    sparse._mapped = {os.getpid(): msgspec.convert(mapped, Mapped)}
    sparse.stage(directory / "new.tensors", changes, directory)
    applied = order(layer, directory, "apply")
    whole.load_weights(new.items())
    pairs = list(zip(layer.parameters(), whole.parameters(), strict=True))
    return {
        "rank": rank, "kv_heads": kv_heads, "boxes": mapped["boxes"], "compared": compared, "applied": applied,
        "all": sum(map(len, changes.values())), "equal": all(torch.equal(few, full) for few, full in pairs),
    }  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps([try_rank(Path(directory), rank, kv_heads) for kv_heads in (2, 1) for rank in (0, 1)]))


if __name__ == "__main__":
    main()
