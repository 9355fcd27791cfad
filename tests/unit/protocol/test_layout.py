from __future__ import annotations

import errno
import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from protocol.errors import WeightsError
from protocol.versions import Version
from protocol.weights.layout import Layout, MappedWeights, build_manifest
from protocol.weights.manifest import TensorSpec, digest
from protocol.weights.specs import ITEM_BYTES
from tests.weights import SMALL_SPECS, fill, make_weights

SPECS = (
    TensorSpec("norm", "F16", (3,)),
    TensorSpec("weight", "F32", (2, 3)),
    TensorSpec("flag", "BOOL", (1,)),
    TensorSpec("scale", "F32", ()),
    TensorSpec("empty", "F32", (0, 5)),
    TensorSpec("ids", "I64", (2,)),
)


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[MappedWeights]:
    with make_weights(tmp_path / "weights.safetensors", seed=0, specs=SPECS) as weights:
        weights.view("flag")[:] = b"\x01"
        yield weights


def test_the_file_is_what_the_safetensors_library_reads(weights: MappedWeights) -> None:
    loaded = load_file(weights.path)
    assert {name: (array.shape, array.dtype.name) for name, array in loaded.items()} == {
        "norm": ((3,), "float16"), "weight": ((2, 3), "float32"), "flag": ((1,), "bool"),
        "scale": ((), "float32"), "empty": ((0, 5), "float32"), "ids": ((2,), "int64"),
    }  # fmt: skip
    for name, array in loaded.items():
        assert array.tobytes() == bytes(weights.view(name))
    with safe_open(weights.path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_bfloat16_too(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "weights.safetensors", seed=3)
    with safe_open(weights.path, "numpy") as file:
        assert set(file.keys()) == {spec.name for spec in SMALL_SPECS}
        assert file.get_slice("model.layers.0.mlp.weight").get_dtype() == "BF16"


def test_layout_does_not_depend_on_the_order_of_its_specs() -> None:
    assert Layout(reversed(SPECS)) == Layout(SPECS)
    assert hash(Layout(reversed(SPECS))) == hash(Layout(SPECS))
    assert Layout(SPECS) != Layout(SPECS[:-1])


def test_every_tensor_is_aligned_to_its_items() -> None:
    layout = Layout(SPECS)
    assert len(layout.header) % 8 == 0
    assert all(layout.offset(spec.name) % ITEM_BYTES[spec.dtype] == 0 for spec in layout.specs)
    assert layout.file_bytes == len(layout.header) + sum(spec.nbytes for spec in SPECS)


def test_layout_of_nothing_is_a_file_too(tmp_path: Path) -> None:
    MappedWeights.create(tmp_path / "none.safetensors", Layout([])).close()
    assert load_file(tmp_path / "none.safetensors") == {}


def test_name_given_twice_or_reserved_is_refused() -> None:
    for name in ("weight", "__metadata__"):
        with pytest.raises(ValueError, match=f"tensor {name}: the name is given twice or reserved"):
            Layout([*SPECS, TensorSpec(name, "F32", (1,))])


def test_new_file_is_private_complete_and_zero(tmp_path: Path) -> None:
    layout = Layout(SPECS)
    with MappedWeights.create(tmp_path / "new.safetensors", layout) as weights:
        found = weights.path.stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert found.st_size == layout.file_bytes
        assert found.st_blocks * 512 >= layout.file_bytes
        assert not any(weights.bytes(len(layout.header), layout.file_bytes - len(layout.header)))


def test_what_is_written_is_what_others_map(weights: MappedWeights) -> None:
    np.frombuffer(weights.view("weight"), np.float32)[:] = np.arange(6, dtype=np.float32)
    with MappedWeights.open(weights.path) as reader:
        assert reader.layout == weights.layout
        assert np.frombuffer(reader.view("weight"), np.float32).tolist() == [0, 1, 2, 3, 4, 5]
        fill(weights, seed=9)  # a later version, same mapping
        assert bytes(reader.view("weight")) == bytes(weights.view("weight"))
        assert load_file(weights.path)["weight"].tobytes() == bytes(weights.view("weight"))


def test_only_a_writable_mapping_can_be_written(weights: MappedWeights) -> None:
    with MappedWeights.open(weights.path) as reader, pytest.raises(TypeError, match="read-only"):
        reader.view("norm")[:] = bytes(6)
    with MappedWeights.open(weights.path, writable=True) as writer:
        writer.view("norm")[:] = b"abcdef"
    assert bytes(weights.view("norm")) == b"abcdef"
    assert weights.bytes(0, 8).readonly


def test_bytes_for_serving_cover_the_whole_file(weights: MappedWeights) -> None:
    assert bytes(weights.bytes(0, weights.layout.file_bytes)) == weights.path.read_bytes()


def test_views_outlive_the_mapping_and_it_gives_no_new_ones(weights: MappedWeights) -> None:
    view, expected = weights.view("ids"), bytes(weights.view("ids"))
    weights.close()
    weights.close()
    assert bytes(view) == expected
    with pytest.raises(ValueError, match="released memoryview"):
        weights.view("ids")


def test_pages_and_descriptors_go_with_the_last_view(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "weights.safetensors", seed=0)
    view = weights.view("model.norm.weight")
    weights.remove()
    assert not weights.path.exists()
    maps = Path("/proc/self/maps")
    assert str(weights.path) in maps.read_text()
    view.release()
    assert str(weights.path) not in maps.read_text()


def test_unknown_tensor_is_a_key_error(weights: MappedWeights) -> None:
    with pytest.raises(KeyError, match="bias"):
        weights.view("bias")


def test_manifest_names_every_tensor_with_its_place_and_digest(weights: MappedWeights) -> None:
    manifest = build_manifest(Version(2, 5), weights, "blake3")
    assert manifest.layout == weights.layout
    data = weights.path.read_bytes()
    for entry in manifest.tensors:
        tensor = data[entry.offset : entry.offset + entry.nbytes]
        assert entry.digests == ((digest("blake3", tensor),) if tensor else ())


def test_manifest_changes_with_one_bit(weights: MappedWeights) -> None:
    before = build_manifest(Version(2, 5), weights, "xxh3_128")
    weights.view("scale")[0] ^= 1
    after = build_manifest(Version(2, 5), weights, "xxh3_128")
    changed = [a.spec.name for a, b in zip(after.tensors, before.tensors, strict=True) if a.digests != b.digests]
    assert changed == ["scale"]


def test_file_of_the_library_opens(tmp_path: Path) -> None:
    arrays = {"b": np.arange(3, dtype=np.float16), "a": np.ones((2, 2), np.float32), "c": np.zeros(5, np.uint8)}
    save_file(arrays, tmp_path / "theirs.safetensors", metadata={"format": "np"})
    with MappedWeights.open(tmp_path / "theirs.safetensors") as weights:
        assert {spec.name: spec.shape for spec in weights.layout.specs} == {"a": (2, 2), "b": (3,), "c": (5,)}
        assert all(bytes(weights.view(name)) == array.tobytes() for name, array in arrays.items())


# What can go wrong when a file is made.


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let the kernel refuse larger files, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_failed_allocation_leaves_nothing_behind(tmp_path: Path) -> None:
    descriptors = os.listdir("/proc/self/fd")
    with largest_file(1 << 20), pytest.raises(WeightsError, match=r"cannot allocate the weights file .*File too large"):
        make_weights(tmp_path / "weights.safetensors", seed=0)
    assert list(tmp_path.iterdir()) == []
    assert os.listdir("/proc/self/fd") == descriptors


def test_full_disk_says_what_is_needed_and_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    layout = Layout(SMALL_SPECS)
    with pytest.raises(WeightsError, match=rf"no room for {layout.file_bytes} bytes .* has \d+ free: make room"):
        MappedWeights.create(tmp_path / "weights.safetensors", layout)
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_never_overwritten(weights: MappedWeights) -> None:
    before = weights.path.read_bytes()
    with pytest.raises(WeightsError, match=r"cannot create the weights file .*File exists"):
        MappedWeights.create(weights.path, weights.layout)
    assert weights.path.read_bytes() == before


def test_missing_directory_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot create the weights file .*No such file or directory"):
        MappedWeights.create(tmp_path / "absent" / "weights.safetensors", Layout(SPECS))


# Files that somebody else wrote.


def container(header: bytes | dict[str, Any], data: bytes = bytes(24), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in entry().items() if name != key}


def test_the_files_below_are_bad_for_one_reason_each(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(container({"__metadata__": {"format": "pt"}, "w": entry()}))
    with MappedWeights.open(path) as weights:
        assert weights.layout.specs == (TensorSpec("w", "F32", (2, 3)),)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "header of 0|0 bytes"),
    "seven bytes": (bytes(7), "7 bytes with a header"),
    "header beyond the file": (container({"w": entry()}, length=1000), "with a header of 1000"),
    "header beyond any file": (container({"w": entry()}, length=2**64 - 1), "with a header of 18446744073709551615"),
    "header over the cap": ((1 << 25).to_bytes(8, "little") + b"{" + bytes(1 << 25), "header of 33554432: at most"),
    "header of no bytes": (container(b""), "does not start with {"),
    "header that is a list": (container(b"[]"), "does not start with {"),
    "header that starts with a space": (container(b' {"w":1}'), "does not start with {"),
    "header cut off": (container(b'{"w":'), "Expecting value"),
    "header that is no UTF-8": (container(b'{"\xff":1}'), "codec can't decode"),
    "header in UTF-16": (container('{"w":1}'.encode("utf-16-le")), "does not start|Expecting"),
    "header that nests": (container(b'{"w":' + b"[" * 200_000), "nested too deeply"),
    "bytes after the JSON": (container(b'{"w":1} 2'), "Extra data"),
    "name twice": (container(b'{"w":%s,"w":%s}' % ((json.dumps(entry()).encode(),) * 2)), "a key twice"),
    "key twice in an entry": (container(b'{"w":{"dtype":"F32","dtype":"F64"}}'), "a key twice"),
    "metadata that is no text": (container({"__metadata__": {"a": 1}, "w": entry()}), "Expected `str`"),
    "name with control characters": (container({"w\x1b[2J": entry()}), "matching regex"),
    "unknown dtype": (container({"w": entry("C64")}), "Invalid enum value"),
    "dtype that is a number": (container({"w": entry(32)}), "Expected `str`"),
    "no dtype": (container({"w": without("dtype")}), "missing required field `dtype`"),
    "no shape": (container({"w": without("shape")}), "missing required field `shape`"),
    "no offsets": (container({"w": without("data_offsets")}), "missing required field `data_offsets`"),
    "unknown field": (container({"w": entry(code="os.system")}), "unknown field `code`"),
    "negative dimension": (container({"w": entry(shape=(-2, -3))}), "Expected `int` >= 0"),
    "dimension that is a float": (container({"w": entry(shape=(2.5, 3))}), "Expected `int`, got `float`"),
    "dimension that is NaN": (
        container(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}}'),
        "Expected `int`",
    ),
    "number of 5000 digits": (container(b'{"w":' + b"9" * 5000 + b"}"), "[Ee]xceeds the limit"),
    "product that overflows 64 bits": (container({"w": entry(shape=(2**40, 2**40))}), "bytes of tensors: at most"),
    "offsets too small": (container({"w": entry(offsets=(0, 20))}), "but its shape and place need"),
    "offsets backwards": (container({"w": entry(offsets=(24, 0))}), "but its shape and place need"),
    "offsets of three numbers": (container({"w": entry(offsets=(0, 12, 24))}), "Expected `array` of length 2"),
    "hole before the first tensor": (container({"w": entry(offsets=(8, 32))}, bytes(32)), "shape and place need"),
    "tensors that overlap": (container({"v": entry(), "w": entry()}), "tensor w: data_offsets"),
    "hole between tensors": (container({"v": entry(), "w": entry(offsets=(32, 56))}, bytes(56)), "tensor w: data_off"),
    "data cut off": (container({"w": entry()}, bytes(23)), "header describes"),
    "bytes after the data": (container({"w": entry()}, bytes(25)), "header describes"),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_bad_file_is_refused_before_it_is_mapped(bad: str, tmp_path: Path) -> None:
    data, message = BAD_FILES[bad]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(
        WeightsError, match=f"bad.safetensors is not a safetensors file that can be loaded: .*({message})"
    ):
        MappedWeights.open(path)
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_directory_and_missing_file_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="it is not a regular file"):
        MappedWeights.open(tmp_path)
    with pytest.raises(WeightsError, match=r"cannot open the weights file .*No such file"):
        MappedWeights.open(tmp_path / "absent.safetensors")
