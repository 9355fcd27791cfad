"""What a chain of deltas changes, in the file and taken together."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from protocol.versions import Version
from protocol.weights.delta import encode_tensor
from protocol.weights.delta_manifest import build_delta_manifest
from protocol.weights.layout import MappedWeights, build_manifest
from protocol.weights.manifest import BLOCK_BYTES, Manifest, TensorSpec
from protocol.weights.specs import ITEM_BYTES
from rollout_server.deltas import Applied, _union, apply_chain
from tests.weights import make_weights

positions = st.sets(st.integers(0, 50), min_size=1).map(lambda found: np.array(sorted(found), np.int64))


@given(st.lists(positions, min_size=1, max_size=4))
def test_changes_of_a_chain_are_those_of_any_of_its_deltas(chain: list[np.ndarray]) -> None:
    together = _union(chain)
    assert together.dtype == np.int64
    assert together.tolist() == sorted(set().union(*(found.tolist() for found in chain)))


SPECS = (
    TensorSpec("long", "BF16", (5 * BLOCK_BYTES // 4 + 3,)),
    TensorSpec("short", "F32", (100,)),
    TensorSpec("still", "F32", (100,)),
)
"""A tensor of three blocks, the last one short."""


class Chain:
    """A staged base, and two versions that deltas lead to."""

    def __init__(self, directory: Path) -> None:
        self.staged = make_weights(directory / "staged.safetensors", 0, SPECS)
        self.chain, self.blobs, self.changed = [], [], []
        base, manifest = self.staged, build_manifest(Version(1, 0), self.staged, "xxh3_128")
        for number in (1, 2):
            new = MappedWeights.create(directory / f"{number}.safetensors", base.layout)
            new.writable_bytes(0, base.layout.file_bytes)[:] = base.bytes(0, base.layout.file_bytes)
            parts = [(name, self.change(base, new, name, number)) for name in ("long", "short")]
            self.chain.append(build_delta_manifest(Version(1, number), manifest, parts))
            self.blobs.append(memoryview(b"".join(part for _, part in parts)))
            base, manifest = new, build_manifest(Version(1, number), new, "xxh3_128")
        self.newest, self.manifest = base, manifest

    def change(self, base: MappedWeights, new: MappedWeights, name: str, seed: int) -> bytes:
        """Change elements of every block, the outermost ones too, and of all their bytes."""
        width = ITEM_BYTES[base.layout.spec(name).dtype]
        numbers = np.frombuffer(new.view(name), f"u{width}")
        places = np.random.default_rng(seed).choice(numbers.size, numbers.size // 50, replace=False)
        edges = np.arange(0, numbers.size, BLOCK_BYTES // width)
        places = np.union1d(places, np.concatenate((edges, edges[1:] - 1, [numbers.size - 1])))
        numbers[places] ^= np.array(int.from_bytes(b"\3\5\7\11"[:width], "little"), f"u{width}")
        self.changed.append((name, places))
        part = encode_tensor(base.view(name), new.view(name), width)
        assert part is not None
        return part

    def apply(self, manifest: Manifest) -> tuple[Applied, list[int]]:
        told: list[int] = []
        applied = apply_chain(
            self.chain, self.blobs, self.staged, manifest, about_to_write=lambda: None, on_block=told.append
        )
        return applied, sorted(told)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def test_tensors_of_several_blocks_follow_the_chain(chain: Chain) -> None:
    applied, told = chain.apply(chain.manifest)
    assert chain.staged.path.read_bytes() == chain.newest.path.read_bytes()
    assert (applied.wrong, told) == ([], [0, 1, 2, 3, 4])
    for name in ("long", "short"):
        expected = sorted(set().union(*(places.tolist() for changed, places in chain.changed if changed == name)))
        assert applied.changes[name].tolist() == expected
    assert "still" not in applied.changes
    assert applied.apply_s > 0 < applied.verify_s


def test_blocks_that_are_not_the_versions_are_named_and_nobody_is_told_of_them(chain: Chain) -> None:
    chain.staged.view("long")[BLOCK_BYTES + 5] ^= 1
    chain.staged.view("still")[0] ^= 1
    applied, told = chain.apply(chain.manifest)
    assert (applied.wrong, told) == ([1, 3], [0, 2, 4]), "in file order: short, still, long"
