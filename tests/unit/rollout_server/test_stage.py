"""Where a version lies on its way to the engine: the right bytes, by whichever path, or none (I5)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.deltas import DeltaChain, Published
from learner.links import Links
from protocol.errors import Superseded, WeightsError
from protocol.messages import WeightsPath
from protocol.versions import Version
from protocol.weights import delta_loops
from protocol.weights.delta import encode_tensor
from protocol.weights.delta_manifest import build_delta_manifest, read_deltas
from protocol.weights.fetching import WeightsFetcher
from protocol.weights.layout import MappedWeights, build_manifest
from protocol.weights.manifest import content_digest
from protocol.weights.serving import WeightsServer
from rollout_server.relay import Relay
from rollout_server.stage import STALL_S, Delivery, Stage, Wanted
from rollout_server.strikes import STRIKES
from tests.weights import SMALL_SPECS, fill, make_weights


class Trip:
    """A learner's end that publishes, with a delta each time, and a stage that brings."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = WeightsServer(f"ipc://{directory}/bulk")
        self.chain = DeltaChain(self.server, Links(local=False), "always")
        self.stage = Stage(directory / "staging", WeightsFetcher())
        self.dice = np.random.default_rng(0)
        self.newest = self.publish(0, None)

    def publish(self, number: int, base: Published | None) -> Published:
        mapped = make_weights(self.directory / f"{number}.safetensors", 0)
        if base is None:
            fill(mapped, 1)
        else:
            for spec in SMALL_SPECS:
                mapped.view(spec.name)[:] = base.mapped.view(spec.name)
            numbers = np.frombuffer(mapped.view("model.embed_tokens.weight"), np.uint32)
            numbers[self.dice.choice(numbers.size, 400, replace=False)] ^= 1
        return Published(build_manifest(Version(1, number), mapped, "xxh3_128"), mapped)

    def step(self) -> Published:
        """Publish the next version and its delta; serve them."""
        base = self.newest
        self.newest = self.publish(base.manifest.version.policy_version + 1, base)
        self.chain.extend(base, self.newest)
        self.server.serve(self.newest.manifest, self.newest.mapped)
        return base

    def wanted(self) -> Wanted:
        offered = self.chain.offers(self.newest.manifest.version)
        deltas = () if offered is None else read_deltas(offered)
        return Wanted(self.newest.manifest, (self.server.address,), None, deltas)

    def bring(self, wanted: Wanted | None = None) -> Delivery:
        """Bring the newest version, and check every byte of it."""
        delivery = self.stage.bring(wanted or self.wanted(), threading.Event())
        assert delivery.file.read_bytes() == self.newest.mapped.path.read_bytes()
        assert delivery.digest == content_digest(self.newest.manifest)
        return delivery

    def damage(self, name: str) -> None:
        """Flip a bit of the staged file behind the stage's back."""
        (file,) = (self.directory / "staging").glob("*.safetensors")
        with MappedWeights.open(file, writable=True) as mapped:
            mapped.view(name)[0] ^= 1


@pytest.fixture
def trip(tmp_path: Path) -> Iterator[Trip]:
    made = Trip(tmp_path)
    made.server.serve(made.newest.manifest, made.newest.mapped)
    yield made
    made.server.close()
    made.stage.discard()


def test_the_first_version_comes_whole_and_the_next_by_what_differs(trip: Trip) -> None:
    first = trip.bring()
    assert (first.path, first.changes) == (WeightsPath.DENSE, None)
    base = trip.step()
    second = trip.bring()
    assert second.path is WeightsPath.DELTA
    assert second.bytes < first.bytes / 100
    assert second.file == first.file
    assert second.base == content_digest(base.manifest)
    assert second.changes is not None
    ((name, positions),) = second.changes.items()
    old, new = (np.frombuffer(published.mapped.view(name), np.uint32) for published in (base, trip.newest))
    assert np.array_equal(positions, np.flatnonzero(old != new))


def test_a_stage_that_missed_versions_follows_the_chain(trip: Trip) -> None:
    trip.bring()
    base = trip.newest
    for _ in range(4):
        trip.step()
    delivery = trip.bring()
    assert delivery.path is WeightsPath.DELTA
    assert delivery.changes is not None
    name = "model.embed_tokens.weight"
    old, new = (np.frombuffer(published.mapped.view(name), np.uint32) for published in (base, trip.newest))
    assert set(np.flatnonzero(old != new)) <= set(delivery.changes[name].tolist())


def test_what_is_here_is_not_fetched_again(trip: Trip) -> None:
    trip.bring()
    assert trip.bring().path is WeightsPath.NONE


def test_a_version_of_the_same_name_from_another_run_is_no_base(trip: Trip) -> None:
    trip.bring()
    fill(trip.newest.mapped, seed=99)  # another run's first version, of other bytes
    trip.newest = Published(build_manifest(Version(1, 0), trip.newest.mapped, "xxh3_128"), trip.newest.mapped)
    trip.step()
    assert trip.bring().path is WeightsPath.DENSE


def test_a_base_that_was_damaged_here_costs_the_blocks_it_damaged(trip: Trip, caplog: pytest.LogCaptureFixture) -> None:
    trip.bring()
    trip.damage("model.norm.weight")
    trip.step()
    delivery = trip.bring()
    assert (delivery.path, delivery.refetched_blocks, delivery.changes, delivery.base) == (
        WeightsPath.DELTA,
        1,
        None,
        "",
    )
    assert "1 blocks of the result are wrong" in caplog.text


def test_damaged_blocks_far_from_each_other_are_fetched_and_what_lies_between_is_left_alone(trip: Trip) -> None:
    trip.bring()
    for name in ("model.embed_tokens.weight", "model.layers.0.norm.weight"):
        trip.damage(name)
    trip.step()
    begun_s = time.monotonic()
    delivery = trip.bring()
    assert (delivery.path, delivery.refetched_blocks) == (WeightsPath.DELTA, 2)
    assert time.monotonic() < begun_s + STALL_S, "no answer was taken for a foreign one"


def lying(trip: Trip) -> Wanted:
    """The newest version, with a delta whose digests are right and whose content is not."""
    part = encode_tensor(bytes(12), b"\x01" * 12, 4)
    assert part is not None
    honest = trip.wanted()
    version, base = honest.version, honest.deltas[-1]
    before = Published(honest.manifest, trip.newest.mapped)
    lie = build_delta_manifest(version, before.manifest, [("model.layers.0.scale", part)])
    lie = type(lie)(
        version=version, base=base.base, base_digest=base.base_digest, algorithm=lie.algorithm, parts=lie.parts
    )
    trip.server.serve_delta(version, base.base, part)
    return Wanted(honest.manifest, honest.addresses, None, (lie,))


def test_a_part_that_is_none_of_its_tensor_leaves_the_file_to_the_whole_version(
    trip: Trip, caplog: pytest.LogCaptureFixture
) -> None:
    trip.bring()
    trip.step()
    assert trip.bring(lying(trip)).path is WeightsPath.DENSE
    assert "delta part of 3 changed elements: 1 to 1" in caplog.text


def test_three_lies_in_a_row_and_no_delta_is_taken_any_more(trip: Trip, caplog: pytest.LogCaptureFixture) -> None:
    trip.bring()
    for _ in range(STRIKES):
        trip.step()
        assert trip.bring(lying(trip)).path is WeightsPath.DENSE
    told = [record.levelno for record in caplog.records if "event=weights_path_quarantined" in record.getMessage()]
    assert told == [logging.ERROR]
    trip.step()
    assert trip.bring().path is WeightsPath.DENSE, "an honest one neither"


def test_an_honest_delta_in_between_makes_good(trip: Trip) -> None:
    trip.bring()
    for _ in range(STRIKES - 1):
        trip.step()
        trip.bring(lying(trip))
    trip.step()
    assert trip.bring().path is WeightsPath.DELTA
    trip.step()
    assert trip.bring(lying(trip)).path is WeightsPath.DENSE
    trip.step()
    assert trip.bring().path is WeightsPath.DELTA


def test_where_nothing_compiles_every_version_comes_whole(
    trip: Trip, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = delta_loops._compiled

    def without_numba(loop: Callable[..., Any], item_bytes: int) -> Callable[..., Any]:
        if loop in (delta_loops._apply, delta_loops._unpack):  # the learner's end is in this process, too
            raise ImportError("Numba needs NumPy 1.0 or less")
        return compiled(loop, item_bytes)

    trip.bring()
    monkeypatch.setattr(delta_loops, "_compiled", without_numba)
    for _ in range(2):
        trip.step()
        assert trip.wanted().deltas
        assert trip.bring().path is WeightsPath.DENSE
    assert caplog.text.count("event=weights_only_whole") == 1
    assert "numba cannot be imported: Numba needs NumPy 1.0 or less" in caplog.text


def test_deltas_that_are_no_longer_served_are_no_loss(trip: Trip) -> None:
    trip.bring()
    trip.step()
    wanted = trip.wanted()
    trip.server.withdraw_delta(wanted.version, wanted.deltas[0].base)
    assert trip.bring(wanted).path is WeightsPath.DENSE


def test_a_delta_is_not_taken_where_everything_is_sooner_here(trip: Trip) -> None:
    trip.bring()
    for _ in range(30):
        trip.stage._link = trip.stage._link.after_transfer(10**12, 0.001)
    trip.step()
    assert trip.bring().path is WeightsPath.DENSE


def test_a_delta_that_was_called_off_leaves_the_file_as_it_was(trip: Trip) -> None:
    trip.bring()
    trip.step()
    stop = threading.Event()
    stop.set()
    with pytest.raises(Superseded):
        trip.stage.bring(trip.wanted(), stop)
    assert trip.bring().path is WeightsPath.DELTA, "its base is still whole"


def test_a_repair_that_fails_leaves_nothing_that_is_taken_for_whole(trip: Trip) -> None:
    trip.bring()
    trip.damage("model.norm.weight")
    trip.step()
    wanted = trip.wanted()
    trip.server.withdraw(wanted.version)
    with pytest.raises(WeightsError, match="no longer served"):
        trip.stage.bring(wanted, threading.Event())
    trip.step()
    assert trip.bring().path is WeightsPath.DENSE


def test_a_delta_is_passed_on_as_it_came_and_what_it_made_of_the_file_too(trip: Trip, tmp_path: Path) -> None:
    with Relay(f"ipc://{tmp_path}/relay") as relay:
        first = Stage(tmp_path / "first", WeightsFetcher(), relay)
        second = Stage(tmp_path / "second", WeightsFetcher())
        late = Stage(tmp_path / "late", WeightsFetcher())
        for stage in (first, second):
            stage.bring(trip.wanted(), threading.Event())
        trip.step()
        direct = trip.wanted()
        through = Wanted(direct.manifest, (relay.address,), None, direct.deltas)
        sent = trip.server.counters.bytes
        for stage, wanted, path in ((first, direct, WeightsPath.DELTA), (second, through, WeightsPath.DELTA)):
            delivery = stage.bring(wanted, threading.Event())
            assert delivery.path is path
            assert delivery.file.read_bytes() == trip.newest.mapped.path.read_bytes()
        delivery = late.bring(through, threading.Event())
        assert delivery.path is WeightsPath.DENSE, "it has no base, and the first one has the whole file"
        assert delivery.file.read_bytes() == trip.newest.mapped.path.read_bytes()
        assert trip.server.counters.bytes - sent == direct.deltas[-1].nbytes, "once, to the first one"
        for stage in (first, second, late):
            stage.close()
