"""A version read out of the learner's own file: verified, claimed while it is loaded, else fetched."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from protocol.errors import Superseded
from protocol.kinds import WeightsPath
from protocol.versions import Version
from protocol.weights.fetching import FetchReport
from protocol.weights.layout import Layout, MappedWeights
from protocol.weights.manifest import Manifest, Shipment
from protocol.weights.shared import SharedBuffer
from rollout_server.engines.base import EngineFailure
from rollout_server.engines.live_weights import copy_weights, read_weights
from rollout_server.stage import Stage, Wanted
from tests.weights import SMALL_SPECS, data_bytes, fill, manifest_of, tensors


class Fetcher:
    """Brings the bytes of `source`, and counts how often."""

    def __init__(self) -> None:
        self.source: MappedWeights | None = None
        self.fetched = 0

    def fetch(self, shipment: Shipment, addresses: Any, destination: memoryview, **_: Any) -> FetchReport:
        assert self.source is not None
        self.fetched += 1
        destination[:] = self.source.bytes(0, shipment.nbytes)
        return FetchReport(0.5, 0.25, shipment.nbytes, 0)


class Host:
    """A learner's buffer and a server's stage in one directory."""

    def __init__(self, directory: Path) -> None:
        self.fetcher = Fetcher()
        self.stage = Stage(directory, self.fetcher)  # type: ignore[arg-type]
        self.buffer = SharedBuffer.create(directory, Layout(SMALL_SPECS))
        self.fetcher.source = self.buffer.mapped

    def publish(self, policy_version: int) -> Wanted:
        assert self.buffer.begin()
        fill(self.buffer.mapped, seed=policy_version)
        manifest = manifest_of(self.buffer.mapped, policy_version)
        self.buffer.finish(manifest.version)
        return Wanted(manifest, ("ipc:///x",), None, shared=self.buffer.name)

    def bring(self, wanted: Wanted) -> Any:
        return self.stage.bring(wanted, threading.Event())


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path / "staging")
    yield host
    host.stage.close()
    host.buffer.remove()
    assert list((tmp_path / "staging").iterdir()) == []


def holds(file: MappedWeights | None, manifest: Manifest) -> bool:
    assert file is not None
    return manifest_of(file, manifest.version.policy_version) == manifest


def test_a_version_beside_the_server_is_neither_fetched_nor_copied(host: Host) -> None:
    for version in (1, 2, 3):
        wanted = host.publish(version)
        delivery = host.bring(wanted)
        assert (delivery.path, delivery.bytes, delivery.transfer_s) == (WeightsPath.SHARED, 0, 0.0)
        assert delivery.verify_s > 0
        assert delivery.file == host.buffer.mapped.path
        assert holds(delivery.mapped, wanted.manifest)
        assert not host.buffer.begin(), "the engine has not loaded it yet"
        host.stage.loaded()
    assert host.fetcher.fetched == host.stage._shared.refused == 0
    assert list(host.buffer.mapped.path.parent.iterdir()) == [host.buffer.mapped.path], "no file of its own"


def test_i5_a_wrong_byte_is_found_wherever_it_is_and_the_version_fetched(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    begin = len(host.buffer.mapped.layout.header)
    size = data_bytes(host.buffer.mapped)
    for number, at in enumerate((begin, begin + size // 2, begin + size - 1), 1):
        wanted = host.publish(number)
        whole = bytes(host.buffer.mapped.bytes(0, begin + size))
        host.buffer.mapped.writable_bytes(at, 1)[0] ^= 1
        host.fetcher.source = MappedWeights(Path(), host.buffer.mapped.layout, memoryview(whole))
        delivery = host.bring(wanted)
        assert (delivery.path, delivery.bytes) == (WeightsPath.DENSE, begin + size)
        assert host.stage._shared.refused == host.fetcher.fetched == number
        assert holds(delivery.mapped, wanted.manifest)
        assert host.buffer.begin(), "what is wrong is not claimed"
        host.buffer.finish(wanted.version)
    *errors, last = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 3, "each time"
    assert "its bytes do not hash to the manifest" in errors[0]
    assert "weights_path_quarantined" in last
    honest = host.publish(4)
    assert (host.bring(honest).path, host.stage._shared.refused) == (WeightsPath.DENSE, 3)


def test_a_learner_on_another_host_is_noted_once(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for version in (1, 2, 3):
        wanted = host.publish(version)
        elsewhere = Wanted(wanted.manifest, wanted.addresses, None, shared="weights-1-0123abcd-1.1.safetensors")
        assert host.bring(elsewhere).path is WeightsPath.DENSE
    notices = [record.getMessage() for record in caplog.records if "weights_not_shared" in record.getMessage()]
    assert len(notices) == 1
    assert "it is not here" in notices[0]
    assert host.stage._shared.refused == 3


def test_a_version_without_a_name_is_fetched_without_a_word(host: Host) -> None:
    wanted = host.publish(1)
    assert host.bring(Wanted(wanted.manifest, wanted.addresses, None)).path is WeightsPath.DENSE
    assert host.stage._shared.refused == 0


def test_a_version_that_nobody_loads_is_given_back(host: Host) -> None:
    host.bring(host.publish(1))
    host.stage.release()
    wanted = host.publish(2)
    host.bring(wanted)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Superseded, match=r"the reading of version 1\.2 was called off"):
        host.stage.bring(wanted, stop)
    assert host.buffer.begin()
    host.buffer.finish(Version(1, 2))


def test_an_engine_that_lost_the_version_gets_it_again_from_wherever_it_is(host: Host) -> None:
    wanted = host.publish(1)
    host.bring(wanted)
    host.stage.loaded()
    assert host.bring(wanted).path is WeightsPath.SHARED
    host.stage.loaded()
    whole = bytes(host.buffer.mapped.bytes(0, wanted.manifest.file_bytes))
    host.publish(2)
    host.fetcher.source = MappedWeights(Path(), host.buffer.mapped.layout, memoryview(whole))
    delivery = host.bring(wanted)
    assert delivery.path is WeightsPath.DENSE
    assert holds(delivery.mapped, wanted.manifest)
    assert host.bring(wanted).path is WeightsPath.NONE


def test_a_file_that_a_given_up_load_may_still_read_stays_claimed(host: Host) -> None:
    wanted = host.publish(1)
    host.bring(wanted)
    host.stage.discard()
    host.stage.release()
    assert not host.buffer.begin()
    delivery = host.bring(wanted)
    assert delivery.path is WeightsPath.DENSE
    assert not host.buffer.begin()
    host.stage.loaded()
    assert host.bring(host.publish(2)).path is WeightsPath.SHARED


def test_an_engine_reads_the_mapping_as_it_reads_the_file(tmp_path: Path) -> None:
    model = {
        "a": torch.randn(5, 3), "b": torch.randn(7).bfloat16(), "c": torch.arange(4), "s": torch.tensor(2.0),
        "h": torch.randn(6).half(), "d": torch.randn(2).double(), "f": torch.tensor([True, False]),
    }  # fmt: skip
    save_file(model, tmp_path / "model.safetensors")
    with MappedWeights.open(tmp_path / "model.safetensors") as mapped:
        read = read_weights(tmp_path / "nowhere", model, mapped)
    assert read.keys() == model.keys(), "and views outlive the mapping's owner"
    assert all(torch.equal(read[name], tensor) for name, tensor in model.items())
    live = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    copy_weights(read, live)
    assert all(torch.equal(live[name], tensor) for name, tensor in model.items())
    with pytest.raises(EngineFailure, match="do not fit the model: b is not in the model"):
        read_weights(tmp_path / "nowhere", {name: model[name] for name in model if name != "b"}, mapped_again(tmp_path))


def mapped_again(directory: Path) -> MappedWeights:
    return MappedWeights.open(directory / "model.safetensors")


def test_the_bytes_of_the_mapping_are_those_the_learner_wrote(host: Host) -> None:
    wanted = host.publish(1)
    delivery = host.bring(wanted)
    assert (tensors(delivery.mapped) == tensors(host.buffer.mapped)).all()
