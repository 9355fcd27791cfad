"""Names, published bytes, saved directories."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.model import export
from learner.model.export import describe, save_pretrained, specs_of, unique_tensors, write_tensors, write_weights
from protocol import parallel
from protocol.errors import WeightsError
from protocol.versions import Version
from protocol.weights.layout import Layout, MappedWeights, build_manifest, make_manifest
from tests.models import build_tiny_model


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path):
    directory = build_tiny_model(tmp_path / "model", tie_word_embeddings=request.param)
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def test_every_tensor_once_under_its_first_name(model):
    names = list(unique_tensors(model))
    assert ("lm_head.weight" in names) == (not model.config.tie_word_embeddings)
    assert "model.embed_tokens.weight" in names
    assert not any("rotary" in name for name in names)  # buffers that are not persistent
    assert sum(t.numel() for t in unique_tensors(model).values()) == model.num_parameters()


def test_equal_but_separate_tensors_are_not_taken_for_tied(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.copy_(model.model.layers[0].mlp.up_proj.weight)
    assert "model.layers.1.mlp.up_proj.weight" in unique_tensors(model)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_published_version_is_the_state_dict(model, dtype, torch_dtype, tmp_path):
    with MappedWeights.create(tmp_path / "version.safetensors", Layout(specs_of(model, dtype))) as mapped:
        write_weights(model, dtype, mapped)
        published = load_file(tmp_path / "version.safetensors")
    expected = unique_tensors(model)
    assert published.keys() == expected.keys()
    for name, tensor in published.items():
        assert tensor.dtype == torch_dtype
        assert torch.equal(tensor, expected[name].to(torch_dtype)), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(model, bad, tmp_path):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = bad
    with MappedWeights.create(tmp_path / "version.safetensors", Layout(specs_of(model, "float32"))) as mapped:
        with pytest.raises(WeightsError, match=r"^tensor model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
            write_weights(model, "float32", mapped)


LARGE = 1_300_000
"""More elements than a block, and than several pieces; no multiple of either."""


@pytest.mark.parametrize("algorithm", ["xxh3_128", "blake3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_digests_taken_piece_by_piece_are_those_of_the_file(dtype, algorithm, tmp_path):
    tensors = {
        "large": torch.randn(LARGE * 2), "block": torch.randn(1 << 20), "two": torch.randn(1 << 21),
        "turned": torch.randn(700, 900).T, "small": torch.randn(3), "scalar": torch.tensor(2.0),
    }  # fmt: skip
    with MappedWeights.create(tmp_path / "version.safetensors", Layout(describe(tensors, dtype))) as mapped:
        digests = write_tensors(tensors, dtype, mapped, algorithm)
        version = Version(1, 2)
        manifest = make_manifest(version, mapped.layout, algorithm, digests)
        assert manifest == build_manifest(version, mapped, algorithm)
        published = load_file(tmp_path / "version.safetensors")
    assert all(torch.equal(published[name], tensor.to(published[name].dtype)) for name, tensor in tensors.items())


@pytest.mark.parametrize("at", [0, LARGE // 2, LARGE - 1])
def test_one_number_of_a_large_tensor_is_enough_to_refuse_it(at, tmp_path):
    tensors = {"w": torch.ones(LARGE)}
    with MappedWeights.create(tmp_path / "version.safetensors", Layout(describe(tensors, "bfloat16"))) as mapped:
        write_tensors(tensors, "bfloat16", mapped)
        tensors["w"][at] = float("-inf")
        with pytest.raises(WeightsError, match=r"^tensor w is not finite"):
            write_tensors(tensors, "bfloat16", mapped)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -math.nan, 3.4e38, -3.4e38])
@pytest.mark.parametrize("published", ["float32", "bfloat16"])
def test_what_would_not_be_finite_once_published_is_refused_and_nothing_else(published, bad, tmp_path):
    most = torch.finfo(torch.bfloat16).max
    tensors = {"w": torch.tensor([most, -most, 0.0, -0.0, 1e-40, -1.0])}
    with MappedWeights.create(tmp_path / "version.safetensors", Layout(describe(tensors, published))) as mapped:
        write_tensors(tensors, published, mapped)
        tensors["w"][4] = bad
        if math.isfinite(bad) and published == "float32":
            write_tensors(tensors, published, mapped)
            return
        with pytest.raises(WeightsError, match=rf"^tensor w is not finite as {published}"):
            write_tensors(tensors, published, mapped)


@pytest.mark.parametrize("torch_threads", [1, 8])
def test_threads_are_not_multiplied_by_those_of_torch(torch_threads, tmp_path, monkeypatch):
    writers = set()
    write = export._write
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    monkeypatch.setattr(parallel, "_num_cores", lambda: 2)
    monkeypatch.setattr(parallel, "BYTES_A_THREAD", 1)
    together = threading.Barrier(2 if torch_threads == 1 else 1)

    def seen(*arguments):
        writers.add(threading.get_ident())
        together.wait(10.0)
        return write(*arguments)

    monkeypatch.setattr(export, "_write", seen)
    tensors = {name: torch.ones(8) for name in "ab"}
    with MappedWeights.create(tmp_path / "version.safetensors", Layout(describe(tensors, "float32"))) as mapped:
        write_tensors(tensors, "float32", mapped)
    assert len(writers) == together.parties


def test_finite_numbers_whose_sum_is_not_are_published(tmp_path):
    tensors = {"w": torch.full((LARGE,), 3e38), "v": torch.tensor([3e38, 3e38, -3e38] * 100)}
    with MappedWeights.create(tmp_path / "version.safetensors", Layout(describe(tensors, "float32"))) as mapped:
        write_tensors(tensors, "float32", mapped)
        assert torch.equal(load_file(tmp_path / "version.safetensors")["w"], tensors["w"])


def test_a_saved_directory_loads_plainly(model, tmp_path, tiny_model_dir):
    save_pretrained(model, AutoTokenizer.from_pretrained(tiny_model_dir), tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is type(model)
    assert all(torch.equal(t, unique_tensors(model)[name]) for name, t in unique_tensors(again).items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_model_dir).get_vocab()
