"""The hook inside SGLang, on models whose loaders do what SGLang's do, and what none may do.

The real loaders are mapped in tests/sglang/test_sparse.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rollout_server.inside_sglang import answer_file, changes_file, load

Weights = Iterable[tuple[str, Tensor]]
FILE = {
    "q": torch.randn(6, 4), "k": torch.randn(2, 4), "o": torch.randn(4, 6), "embed": torch.randn(5, 4),
    "experts": torch.randn(2, 3, 4),
}  # fmt: skip


class Model(nn.Module):
    """Rank 1 of 2: fused rows, a shard of columns, padded and repeated rows, experts, a second name for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.full((40,), 7.0)  # parameters that are parts of one buffer
        self.qk = nn.Parameter(flat[:16].view(4, 4))
        self.o = nn.Parameter(flat[16:28].view(4, 3))
        self.embed = nn.Parameter(torch.full((8, 4), 7.0))
        self.head = self.embed
        self.experts = nn.Parameter(torch.full((2, 4, 3), 7.0))

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            if name == "q":
                self.qk.data.narrow(0, 0, 3).copy_(tensor.narrow(0, 3, 3))
            elif name == "k":
                self.qk.data[3:].copy_(tensor.chunk(2)[1])
            elif name == "o":
                self.o.data.copy_(tensor[:, 3:])
            elif name == "embed":
                self.embed[:5].data.copy_(tensor)
                self.embed[5:].data.fill_(0)
            else:
                for expert in range(2):
                    self.experts.data[expert].copy_(tensor[expert].t())


def order(model: nn.Module, directory: Path, what: str) -> dict[str, Any]:
    load(model, [(json.dumps({"do": what, "directory": str(directory)}), torch.FloatTensor())])
    answer: dict[str, Any] = json.loads(answer_file(directory, what, os.getpid()).read_text())
    return answer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "private").mkdir(mode=0o700)
    save_file(FILE, tmp_path / "private" / "model.safetensors")
    return tmp_path / "private"


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_map_is_what_the_loader_does_and_changes_nothing(directory: Path) -> None:
    model = Model()
    before = state(model)
    mapped = order(model, directory, "map")
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())
    assert sorted(mapped["boxes"]) == [
        ["embed", "embed", 0, 0, [20], [1], [1]],
        ["experts", "experts", 0, 0, [4, 3], [1, 4], [3, 1]],
        ["experts", "experts", 12, 12, [4, 3], [1, 4], [3, 1]],
        ["k", "qk", 4, 12, [4], [1], [1]],
        ["o", "o", 3, 0, [4, 3], [6, 1], [3, 1]],
        ["q", "qk", 12, 0, [12], [1], [1]],
    ]
    assert mapped["parameters"] == {
        "embed": [32, "float32"], "experts": [24, "float32"], "o": [12, "float32"], "qk": [16, "float32"],
    }  # fmt: skip
    assert order(model, directory, "compare")["failed"].endswith("does not hold embed where its loader puts it")
    model.load_weights(FILE.items())
    assert order(model, directory, "compare") == {"compared": 6}
    model.experts.data[1, 2, 1] += 1
    assert order(model, directory, "compare")["failed"] == (
        "Unmapped: experts does not hold experts where its loader puts it"
    )


def scaled(model: Model, weights: Weights) -> None:
    model.o.data.copy_(dict(weights)["o"][:, 3:] * 2)


def joined(model: Model, weights: Weights) -> None:
    found = dict(weights)
    model.qk.data.copy_(torch.cat([found["q"][3:], found["k"][1:]]))


def written_anew(model: Model, weights: Weights) -> None:
    model.o = nn.Parameter(dict(weights)["o"][:, 3:])


def repeated(model: Model, weights: Weights) -> None:
    model.embed.data.copy_(dict(weights)["k"][:1])


def derived(model: Model, weights: Weights) -> None:
    model.load_weights_as_it_should(weights)
    model.absorbed = model.o.data @ model.o.data.t()


def caught(model: Model, weights: Weights) -> None:
    found = dict(weights)
    try:
        scaled(model, found.items())
    except Exception:  # noqa: BLE001 - what some loaders do
        model.load_weights_as_it_should(found.items())


@pytest.mark.parametrize(
    ("loader", "why"),
    [
        (scaled, r"its loader does aten.mul.Tensor with o"),
        (joined, r"its loader does aten.cat.default with q"),
        (written_anew, r"its loader exchanges parameters for others"),
        (repeated, r"its loader repeats k over embed"),
        (derived, r"its loader does aten.mm.default with o"),
        (caught, r"its loader does aten.mul.Tensor with o"),
    ],
)
def test_what_is_more_than_a_copy_is_not_mapped(
    directory: Path, loader: Callable[[Model, Weights], None], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    monkeypatch.setattr(Model, "load_weights_as_it_should", Model.load_weights, raising=False)
    monkeypatch.setattr(Model, "load_weights", loader)
    before = model.qk.clone()
    assert order(model, directory, "map") == {"failed": f"Unmapped: {why}"}
    assert torch.equal(model.qk, before)


def test_weights_that_are_packed_after_a_load_are_not_mapped(directory: Path) -> None:
    class Packs:
        def process_weights_after_loading(self, layer: nn.Module) -> None:
            layer.weight.data = layer.weight.data.flip(0)

    model = Model()
    model.layer = nn.Linear(2, 2)
    model.layer.quant_method = Packs()
    before = model.layer.weight.clone()
    assert "aten.flip.default with layer.weight" in order(model, directory, "map")["failed"]
    assert torch.equal(model.layer.weight, before)


def write_changes(directory: Path, sizes: dict[str, Any], **tensors: Tensor) -> None:
    named = {f"{name.replace('_', ' ', 1)}": tensor for name, tensor in tensors.items()}
    save_file(named, changes_file(directory, os.getpid()), {"sizes": json.dumps(sizes)})


def test_elements_are_set(directory: Path) -> None:
    model = Model()
    write_changes(
        directory, {"o": [12, "float32"], "qk": [16, "float32"]},
        positions_o=torch.tensor([0, 11]), values_o=torch.tensor([1.0, 2.0]),
        positions_qk=torch.tensor([5]), values_qk=torch.tensor([3.0]),
    )  # fmt: skip
    assert order(model, directory, "apply") == {"elements": 3}
    assert (model.o[0, 0], model.o[3, 2], model.qk[1, 1]) == (1, 2, 3)
    assert sum((parameter == 7).sum() for parameter in model.parameters()) == 12 + 16 + 32 + 24 - 3


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"o": [12, "float32"], "gone": [1, "float32"]}, "KeyError: 'gone'"),
        ({"o": [13, "float32"]}, "Unmapped: o is not what it was: 13 elements of float32"),
        ({"o": [12, "bfloat16"]}, "Unmapped: o is not what it was: 12 elements of bfloat16"),
    ],
)
def test_what_is_not_as_it_was_is_refused_whole(directory: Path, sizes: dict[str, Any], told: str) -> None:
    model = Model()
    before = state(model)
    write_changes(directory, sizes, positions_o=torch.tensor([0]), values_o=torch.tensor([1.0]))
    assert order(model, directory, "apply") == {"failed": told}
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())


def test_a_directory_of_others_is_not_worked_in(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory.chmod(0o755)
    assert order(Model(), directory, "map")["failed"].startswith(f"PermissionError: {directory} is not a private")
    load(Model(), [(json.dumps({"do": "map", "directory": str(directory / "none")}), torch.FloatTensor())])
    assert "map-" in capsys.readouterr().out, "it cannot be answered, and the log says so"


def test_the_hook_brings_nothing_else_of_ours_into_sglang(directory: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from rollout_server.inside_sglang import load; from rollout_server.inside_sglang import orders;"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] in ('rollout_server', 'protocol')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(
        ["rollout_server", "rollout_server.inside_sglang", "rollout_server.inside_sglang.orders"]
    )
