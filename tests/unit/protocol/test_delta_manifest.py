"""What a delta manifest may claim, and which deltas lead where."""

from __future__ import annotations

import itertools
import json
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from protocol.errors import MalformedMessage
from protocol.versions import Version
from protocol.weights.delta import encode_tensor
from protocol.weights.delta_manifest import (
    MAX_CHAIN,
    MAX_DELTAS_BYTES,
    DeltaManifest,
    build_delta_manifest,
    find_chain,
    join_deltas,
    read_deltas,
    write_delta,
)
from protocol.weights.layout import Layout
from protocol.weights.manifest import BLOCK_BYTES, Manifest, TensorEntry, TensorSpec, content_digest, digest


def write_deltas(deltas: list[DeltaManifest]) -> bytes:
    return join_deltas(map(write_delta, deltas))


SPECS = (TensorSpec("a", "BF16", (4,)), TensorSpec("b", "BF16", (2,)))
PART = encode_tensor(bytes(8), bytes([0, 0, 1, 0, 0, 0, 2, 0]), 2)


def manifest(policy_version: int) -> Manifest:
    layout = Layout(SPECS)
    entries = tuple(
        TensorEntry(spec, layout.offset(spec.name), spec.nbytes, (f"{policy_version:032x}",)) for spec in layout.specs
    )
    version = Version(1, policy_version)
    return Manifest(version=version, algorithm="xxh3_128", tensors=entries, file_bytes=layout.file_bytes)


def delta(policy_version: int, base: int | None = None) -> DeltaManifest:
    """Of the version before, unless said otherwise."""
    assert PART is not None
    before = manifest(policy_version - 1 if base is None else base)
    return build_delta_manifest(Version(1, policy_version), before, [("a", PART)])


def test_a_delta_says_what_it_is_made_of() -> None:
    assert PART is not None
    made = delta(3)
    assert (made.version, made.base, made.base_digest) == (Version(1, 3), Version(1, 2), content_digest(manifest(2)))
    (part,) = made.parts
    assert (part.name, part.num_changed, part.nbytes) == ("a", 2, len(PART))
    assert (made.num_changed, made.nbytes) == (2, len(PART))
    assert read_deltas(write_deltas([made, delta(4)])) == (made, delta(4))


def test_its_bytes_are_fetched_in_blocks_one_part_after_the_other() -> None:
    assert PART is not None
    large = PART + bytes(BLOCK_BYTES)
    shipment = build_delta_manifest(Version(1, 3), manifest(2), [("a", large), ("b", PART)]).shipment
    assert (shipment.version, shipment.base, shipment.nbytes) == (Version(1, 3), Version(1, 2), len(large) + len(PART))
    assert [(block.offset, block.nbytes) for block in shipment.blocks] == [
        (0, BLOCK_BYTES), (BLOCK_BYTES, len(PART)), (len(large), len(PART)),
    ]  # fmt: skip
    assert shipment.blocks[1].digest == digest("xxh3_128", large[BLOCK_BYTES:])
    assert shipment.blocks[2].what == "delta of tensor b"


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "a base that is newer": ({"base": [1, 4]}, r"version 1\.3 from 1\.4: a base is older"),
    "its own base": ({"base": [1, 3]}, r"version 1\.3 from 1\.3: a base is older"),
    "another algorithm": ({"algorithm": "md5"}, "deltas: "),
    "negative bytes": ({"parts": [{"name": "a", "num_changed": 1, "nbytes": -1, "digests": []}]}, "deltas: "),
    "too few digests": (
        {"parts": [{"name": "a", "num_changed": 1, "nbytes": 9, "digests": []}]},
        "delta of tensor a: 0 digests for 9 bytes, expected 1",
    ),
    "no digest": (
        {"parts": [{"name": "a", "num_changed": 1, "nbytes": 9, "digests": ["x"]}]},
        "delta of tensor a: its digest is not 32 hex digits",
    ),
    "a tensor twice": (
        {"parts": [{"name": "a", "num_changed": 1, "nbytes": 9, "digests": ["0" * 32]}] * 2},
        r"version 1\.3: a tensor twice",
    ),
    "an unknown key": ({"pickle": "gASV"}, "deltas: "),
}


@pytest.mark.parametrize("lie", LIES)
def test_deltas_that_lie_are_refused(lie: str) -> None:
    changed, message = LIES[lie]
    with pytest.raises(MalformedMessage, match=message):
        read_deltas(json.dumps([json.loads(msgspec.json.encode(delta(3))) | changed]).encode())


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"\xff", b"[" * 100_000])
def test_bytes_that_are_no_deltas_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage, match=r"^deltas: "):
        read_deltas(data)


def test_too_much_is_refused_unread() -> None:
    with pytest.raises(MalformedMessage, match="at most"):
        read_deltas(bytes(MAX_DELTAS_BYTES + 1))
    with pytest.raises(MalformedMessage, match=f"{MAX_CHAIN + 1} of them: at most {MAX_CHAIN}"):
        read_deltas(write_deltas([delta(number + 1) for number in range(MAX_CHAIN + 1)]))


@given(
    links=st.sets(st.tuples(st.integers(0, 6), st.integers(1, 7)).filter(lambda link: link[0] < link[1])),
    held=st.integers(0, 7),
    wanted=st.integers(1, 7),
)
def test_a_chain_leads_from_what_is_held_to_what_is_wanted(links: set[tuple[int, int]], held: int, wanted: int) -> None:
    into = {version: base for base, version in sorted(links)}
    deltas = [delta(version, base) for version, base in into.items()]
    chain = find_chain(deltas, content_digest(manifest(held)), Version(1, wanted))
    path = [wanted]
    while path[0] in into and path[0] != held:
        path.insert(0, into[path[0]])
    if path[0] != held or held == wanted:
        assert chain is None
    else:
        assert chain is not None
        steps = [(step.base.policy_version, step.version.policy_version) for step in chain]
        assert steps == list(itertools.pairwise(path))
