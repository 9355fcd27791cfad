"""Whatever the network does to the answers, no wrong byte is ever accepted, and right ones are (I5)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from protocol.codec import encode
from protocol.errors import IntegrityError
from protocol.messages import Pong, WeightsChunk, WeightsRequest
from protocol.versions import Version
from protocol.weights.assembly import MAX_REFETCHES, Assembly, FetchCounters, Outcome
from protocol.weights.layout import MappedWeights, build_manifest
from protocol.weights.manifest import Manifest, TensorSpec
from tests.weights import fill, make_weights, tensors

CHUNK_BYTES = 16
SPECS = (
    TensorSpec("large", "F32", (25,)),
    TensorSpec("medium", "BF16", (17,)),
    TensorSpec("none", "F32", (0,)),
    TensorSpec("small", "F32", (1,)),
    TensorSpec("tiny", "U8", (3,)),
)
Pair = tuple[MappedWeights, MappedWeights, Manifest]
Message = list[bytes]

DEEDS = ["deliver"] * 6 + [
    "lose", "repeat", "corrupt", "truncate", "extend", "misplace", "other version", "garbage", "cut", "pong", "delay",
]  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with tempfile.TemporaryDirectory() as directory:
        source = make_weights(Path(directory) / "source.safetensors", 1, SPECS)
        destination = make_weights(Path(directory) / "destination.safetensors", 2, SPECS)
        yield source, destination, build_manifest(Version(1, 5), source, "xxh3_128")


def answers(source: MappedWeights, request: WeightsRequest) -> list[WeightsChunk]:
    """Answer as a server does."""
    end = request.offset + request.length
    return [
        WeightsChunk(
            version=request.version,
            offset=at,
            data=np.frombuffer(source.bytes(at, min(CHUNK_BYTES, end - at)), np.uint8),
        )
        for at in range(request.offset, end, CHUNK_BYTES)
    ]


def wire(chunk: WeightsChunk) -> Message:
    return [bytes(frame) for frame in encode(chunk)]


def misbehave(deed: str, chunk: WeightsChunk, draw: st.DataObject) -> list[Message]:
    """Return what arrives in place of the chunk."""
    assert chunk.data is not None
    data = chunk.data.copy()
    if deed == "corrupt":
        data[draw.draw(st.integers(0, data.size - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    elif deed == "truncate":
        data = data[: draw.draw(st.integers(0, data.size - 1))]
    elif deed == "extend":
        data = np.append(data, np.uint8(0))
    elif deed == "garbage":
        return [[draw.draw(st.binary(max_size=30))], [], [b""] * 40]
    elif deed == "pong":
        return [[bytes(frame) for frame in encode(Pong(sent_s=1.0))]]
    elif deed == "lose":
        return []
    offset = chunk.offset + (CHUNK_BYTES if deed == "misplace" else 0)
    version = Version(1, 4) if deed == "other version" else chunk.version
    return [wire(WeightsChunk(version=version, offset=offset, data=data))] * (2 if deed == "repeat" else 1)


@settings(deadline=None, max_examples=150)
@given(draw=st.data())
def test_what_is_accepted_is_what_the_manifest_says(pair: Pair, draw: st.DataObject) -> None:
    source, destination, manifest = pair
    fill(destination, seed=2)
    counters = FetchCounters()
    assembly = Assembly(manifest.shipment, destination.writable_bytes(0, manifest.file_bytes), counters, CHUNK_BYTES)
    deeds = draw.draw(st.sampled_from([DEEDS, ["deliver", "corrupt", "cut"]]))
    delayed: list[Message] = []
    corrupted = 0
    try:
        for _ in range(draw.draw(st.integers(0, 25))):
            request = assembly.next_request(draw.draw(st.integers(1, 4)))
            if request is None:
                break
            for chunk in answers(source, request):
                deed = draw.draw(st.sampled_from(deeds))
                corrupted += deed in ("corrupt", "misplace")
                if deed == "cut":
                    assembly.disconnected()
                arrived = misbehave(deed, chunk, draw)
                if deed == "delay":
                    delayed += arrived
                else:
                    for message in arrived:
                        assembly.take_in(message)
        for message in draw.draw(st.permutations(delayed)):
            assembly.take_in(message)
        assembly.disconnected()
        while (request := assembly.next_request(2)) is not None:
            for chunk in answers(source, request):
                assembly.take_in(wire(chunk))
    except IntegrityError:
        assert corrupted > MAX_REFETCHES
        return
    assert assembly.done
    assert np.array_equal(tensors(destination), tensors(source))
    assert build_manifest(Version(1, 5), destination, "xxh3_128") == manifest
    assert counters.bytes == assembly.bytes >= tensors(source).size


def assemble(pair: Pair, deeds: dict[int, str]) -> FetchCounters:
    """Fetch with one deed at each of the given answers, then honestly; return what was counted."""
    source, destination, manifest = pair
    fill(destination, seed=2)
    counters = FetchCounters()
    assembly = Assembly(manifest.shipment, destination.writable_bytes(0, manifest.file_bytes), counters, CHUNK_BYTES)
    number = 0
    while not assembly.done:
        request = assembly.next_request(4)
        if request is None:
            assembly.disconnected()
            continue
        for chunk in answers(source, request):
            assert chunk.data is not None
            data = chunk.data.copy()
            data[0] ^= deeds.get(number) == "corrupt"
            data = data[: -1 if deeds.get(number) == "truncate" else None]
            for _ in range({"lose": 0, "repeat": 2}.get(deeds.get(number, ""), 1)):
                assembly.take_in(wire(WeightsChunk(version=chunk.version, offset=chunk.offset, data=data)))
            number += 1
    assert np.array_equal(tensors(destination), tensors(source))
    return counters


def test_clean_fetch_places_every_byte_once(pair: Pair) -> None:
    counted = asdict(assemble(pair, {}))
    assert counted.pop("bytes") == tensors(pair[0]).size
    assert counted.pop("chunks") == -(-tensors(pair[0]).size // CHUNK_BYTES)
    assert set(counted.values()) == {0}


@pytest.mark.parametrize(
    ("deed", "counter", "extra_chunks"),
    [("repeat", "duplicate", 0), ("truncate", "wrong_size", 0), ("corrupt", "refetched_blocks", 7)],
)
def test_every_deed_is_counted_and_costs_no_more_than_its_tensor(
    pair: Pair, deed: str, counter: str, extra_chunks: int
) -> None:
    counted = asdict(assemble(pair, {1: deed}))
    assert counted[counter] == 1
    assert counted["chunks"] == -(-tensors(pair[0]).size // CHUNK_BYTES) + extra_chunks


def test_lost_answer_costs_only_asking_again(pair: Pair) -> None:
    assert assemble(pair, {1: "lose"}) == assemble(pair, {})


def test_three_refetches_heal_and_a_fourth_failure_is_final(pair: Pair) -> None:
    source, destination, manifest = pair
    counters = FetchCounters()
    assembly = Assembly(manifest.shipment, destination.writable_bytes(0, manifest.file_bytes), counters, CHUNK_BYTES)

    def fetch_corrupting_large(times: int) -> None:
        while (request := assembly.next_request(1)) is not None:
            (chunk,) = answers(source, request)
            assert chunk.data is not None
            data = chunk.data.copy()
            if chunk.offset == manifest.tensors[0].offset and times:
                data[0] ^= 1
                times -= 1
            assembly.take_in(wire(WeightsChunk(version=chunk.version, offset=chunk.offset, data=data)))

    fetch_corrupting_large(times=MAX_REFETCHES)
    assert assembly.done
    assert counters.refetched_blocks == MAX_REFETCHES
    assembly = Assembly(manifest.shipment, destination.writable_bytes(0, manifest.file_bytes), counters, CHUNK_BYTES)
    with pytest.raises(IntegrityError, match=r"^version 1\.5, tensor large: its bytes do not hash .* 3 refetches"):
        fetch_corrupting_large(times=MAX_REFETCHES + 1)
    assert not assembly.done


def test_verified_neighbor_is_not_touched_when_its_chunk_is_fetched_again(pair: Pair) -> None:
    source, destination, manifest = pair
    names = [block.what for block in manifest.shipment.blocks]
    small = next(entry for entry in manifest.tensors if entry.spec.name == "small")
    assert (small.offset - manifest.tensors[0].offset) // CHUNK_BYTES * CHUNK_BYTES < 100  # in a chunk with large's end
    counters, told = FetchCounters(), list[str]()
    assembly = Assembly(
        manifest.shipment, destination.writable_bytes(0, manifest.file_bytes), counters, CHUNK_BYTES,
        lambda block: told.append(names[block]),
    )  # fmt: skip
    request = assembly.next_request(7)
    assert request is not None
    for round_ in range(2):
        for chunk in reversed(answers(source, request)):  # small arrives, and is right, before large turns out wrong
            assert chunk.data is not None
            data = chunk.data.copy()
            if chunk.offset == request.offset:
                data[0] ^= round_ == 0
            elif chunk.offset <= small.offset < chunk.offset + data.size:
                data[small.offset - chunk.offset] ^= round_ == 1  # others may have got it from here meanwhile
            assembly.take_in(wire(WeightsChunk(version=chunk.version, offset=chunk.offset, data=data)))
        if round_ == 0:
            assert counters.refetched_blocks == 1
            assert "tensor small" in told
            rest, again = assembly.next_request(99), assembly.next_request(99)
            assert rest is not None
            assert again is not None
            assert (again.offset, again.length) == (request.offset, request.length)
            for chunk in answers(source, rest):
                assembly.take_in(wire(chunk))
    assert [names[failed] for failed in assembly.failures.elements()] == ["tensor large"]
    assert sorted(told) == sorted(names)
    assert assembly.done
    assert np.array_equal(tensors(destination), tensors(source))


def test_answers_without_bytes_say_what_becomes_of_the_request(pair: Pair) -> None:
    _, destination, manifest = pair
    assembly = Assembly(
        manifest.shipment, destination.writable_bytes(0, manifest.file_bytes), FetchCounters(), CHUNK_BYTES
    )

    def answer(policy_version: int, data: np.ndarray | None) -> Outcome:
        return assembly.take_in(wire(WeightsChunk(version=Version(1, policy_version), offset=0, data=data)))

    nothing = np.zeros(0, np.uint8)
    assert (answer(4, None), answer(4, nothing)) == (Outcome.USELESS, Outcome.USELESS)
    assert (answer(5, None), answer(5, nothing)) == (Outcome.WITHDRAWN, Outcome.NOT_YET)


def test_what_lies_between_the_blocks_of_a_shipment_is_not_written(pair: Pair) -> None:
    """Blocks a and c of a version are asked for, in one chunk with b: b is verified already, and nobody looks again."""
    source, destination, manifest = pair
    whole = manifest.shipment
    *_, a, b, c = whole.blocks
    assert a.offset + a.nbytes == b.offset
    assert c.offset + c.nbytes - a.offset <= 64, "one chunk has all three"
    array = np.frombuffer(destination.writable_bytes(0, manifest.file_bytes), np.uint8)
    before = array[b.offset : b.offset + b.nbytes].copy()
    some = whole._replace(blocks=[a, c])
    assembly = Assembly(some, destination.writable_bytes(0, manifest.file_bytes), FetchCounters(), 64)
    request = assembly.next_request(1)
    assert request is not None
    data = np.frombuffer(source.bytes(request.offset, request.length), np.uint8).copy()
    data[b.offset - request.offset : b.offset - request.offset + b.nbytes] ^= 0xFF
    assembly.take_in(wire(WeightsChunk(version=request.version, offset=request.offset, data=data)))
    assert assembly.done
    assert np.array_equal(array[b.offset : b.offset + b.nbytes], before)
