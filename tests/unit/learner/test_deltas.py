"""The chain of deltas: made where they pay, exact, and never a gap in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import learner.deltas as deltas_module
from learner.deltas import DeltaChain, DeltaWeights, Published
from learner.links import SHARED, Links
from protocol.errors import ConfigError
from protocol.messages import WeightsLive, WeightsPath
from protocol.versions import Version
from protocol.weights import delta_loops
from protocol.weights.delta import apply_tensor, decode_tensor
from protocol.weights.delta_manifest import MAX_CHAIN, read_deltas
from protocol.weights.layout import build_manifest
from protocol.weights.manifest import TensorSpec
from tests.weights import fill, make_weights

SPECS = (TensorSpec("head", "BF16", (300, 1024)), TensorSpec("norm", "F32", (1024,)), TensorSpec("none", "F32", (0,)))


class Versions:
    """Versions that follow each other, by a share of changed elements, and the chain that they make."""

    def __init__(self, directory: Path, mode: DeltaWeights = "auto", *, link_bytes_per_s: float = 1e6) -> None:
        self.links = Links(local=False)
        self.links.joined("a")
        for _ in range(40):
            live = WeightsLive(
                version=Version(1, 0), path=WeightsPath.DENSE, bytes=int(link_bytes_per_s), transfer_s=1.0
            )
            self.links.live("a", live)
        self.served: dict[tuple[Version, Version], bytes] = {}
        self.chain = DeltaChain(self, self.links, mode)
        self.directory = directory
        self.dice = np.random.default_rng(0)
        self.newest = self.publish(0, None, 1.0)

    def serve_delta(self, version: Version, base: Version, delta: bytes) -> None:
        self.served[version, base] = delta

    def withdraw_delta(self, version: Version, base: Version) -> None:
        del self.served[version, base]

    def publish(self, number: int, base: Published | None, share: float) -> Published:
        mapped = make_weights(self.directory / f"{number}.safetensors", 0, SPECS)
        if base is None:
            fill(mapped, 1)
        else:
            begin = len(mapped.layout.header)
            nbytes = mapped.layout.file_bytes - begin
            mapped.writable_bytes(begin, nbytes)[:] = base.mapped.bytes(begin, nbytes)
            for name, width in (("head", np.uint16), ("norm", np.uint32)):
                numbers = np.frombuffer(mapped.view(name), width)
                where = self.dice.choice(numbers.size, int(numbers.size * share), replace=False)
                numbers[where] ^= self.dice.integers(1, np.iinfo(width).max, where.size, width)  # nothing to compress
        return Published(build_manifest(Version(1, number), mapped, "xxh3_128"), mapped)

    def step(self, share: float) -> bool:
        """Publish the next version; whether there is a delta to it to be had."""
        base = self.newest
        self.newest = self.publish(base.manifest.version.policy_version + 1, base, share)
        self.chain.extend(base, self.newest)
        return self.chain.offers(self.newest.manifest.version) is not None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4])
def test_a_delta_turns_the_version_before_into_the_new_one(tmp_path: Path, share: float) -> None:
    versions = Versions(tmp_path, "always")
    base = versions.newest
    assert versions.step(share)
    offered = versions.chain.offers(Version(1, 1))
    assert offered is not None
    (delta,) = read_deltas(offered)
    blob, offset = versions.served[delta.version, delta.base], 0
    for part in delta.parts:
        spec = base.mapped.layout.spec(part.name)
        width = {"BF16": 2, "F32": 4}[spec.dtype]
        octets = blob[offset : offset + part.nbytes]
        apply_tensor(
            decode_tensor(octets, num_elements=spec.nbytes // width, item_bytes=width), base.mapped.view(part.name)
        )
        offset += part.nbytes
    assert offset == len(blob) == delta.nbytes
    assert base.mapped.path.read_bytes() == versions.newest.mapped.path.read_bytes()
    assert versions.chain.density == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(
    ("link_bytes_per_s", "share", "pays"),
    [(1e6, 0.01, True), (1e6, 0.999, False), (1e12, 0.01, False)],
    ids=["few changes on a slow link", "all changes", "a link like memory"],
)
def test_it_is_made_where_it_is_sooner_there(tmp_path: Path, link_bytes_per_s: float, share: float, pays: bool) -> None:
    versions = Versions(tmp_path, link_bytes_per_s=link_bytes_per_s)
    assert versions.step(share) is pays
    assert bool(versions.served) is pays
    assert (versions.chain.offers(Version(1, 1)) is not None) is pays


def test_where_memory_is_shared_nobody_even_looks(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    versions.links.left("a")
    assert versions.links.slowest == SHARED
    assert not versions.step(0.01)
    assert versions.chain.density is None


def test_never_is_never(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "never")
    assert not versions.step(0.01)
    assert versions.chain.density is None


def test_the_chain_grows_and_a_version_without_a_delta_ends_it(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    for number in (1, 2, 3):
        assert versions.step(0.01)
        offered = versions.chain.offers(Version(1, number))
        assert offered is not None
        assert [delta.base.policy_version for delta in read_deltas(offered)] == list(range(number))
    assert not versions.step(0.999)
    assert versions.served == {}
    assert versions.chain.offers(Version(1, 4)) is None
    assert versions.step(0.01)
    offered = versions.chain.offers(Version(1, 5))
    assert offered is not None
    assert [delta.base.policy_version for delta in read_deltas(offered)] == [4]


def test_an_older_version_is_not_offered_what_came_after_it(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    for _ in range(3):
        versions.step(0.01)
    offered = versions.chain.offers(Version(1, 2))
    assert offered is not None
    assert [delta.version.policy_version for delta in read_deltas(offered)] == [1, 2]


def test_the_chain_forgets_its_oldest_when_all_of_it_is_no_less_than_the_file(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "always")
    for _ in range(4):
        versions.step(0.3)
    assert 1 <= len(versions.served) < 4
    total = sum(len(delta) for delta in versions.served.values())
    assert total <= versions.newest.manifest.file_bytes / 2 or len(versions.served) == 1
    offered = versions.chain.offers(Version(1, 4))
    assert offered is not None
    assert {(delta.version, delta.base) for delta in read_deltas(offered)} == set(versions.served)


def test_the_chain_is_no_longer_than_a_receiver_looks_at(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "always")
    for _ in range(MAX_CHAIN + 2):
        versions.step(0.0)
    assert len(versions.served) == MAX_CHAIN


def test_the_announcement_of_the_chain_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = Versions(tmp_path, "always")
    versions.step(0.0001)
    first = versions.chain.offers(Version(1, 1))
    assert first is not None
    monkeypatch.setattr(deltas_module, "MAX_OFFER_BYTES", 3 * len(first))
    for number in range(2, 9):
        versions.step(0.0001)
        offered = versions.chain.offers(Version(1, number))
        assert offered is not None
        assert len(offered) <= 3 * len(first) + len(b"[,,]")
    assert 1 < len(versions.served) <= 3


@pytest.fixture
def no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(loop: object, item_bytes: int) -> None:
        raise ImportError("Numba needs NumPy 1.0 or less")

    monkeypatch.setattr(delta_loops, "_compiled", compiled)


@pytest.mark.parametrize(("mode", "keep"), [("always", False), ("never", True)])
def test_who_asks_for_deltas_where_none_can_be_made_is_told_at_the_start(
    no_numba: None, mode: DeltaWeights, keep: bool
) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot be imported \(Numba needs NumPy 1.0 or less\): install it, or leave"
    ):
        DeltaChain(None, Links(local=False), mode, keep=keep)  # type: ignore[arg-type]


def test_who_did_not_ask_does_without(no_numba: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    versions = Versions(tmp_path)
    for _ in range(2):
        assert not versions.step(0.001)
    assert versions.served == {}
    assert caplog.text.count("event=weights_only_whole") == 1
