from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from protocol.errors import MalformedMessage
from protocol.versions import Version
from protocol.weights.layout import Layout
from protocol.weights.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    TensorEntry,
    TensorSpec,
    block_digests,
    content_digest,
    digest,
    new_hasher,
    schema_digest,
)

SPECS = (TensorSpec("b", "F32", (2,)), TensorSpec("a", "F32", (2, 3)), TensorSpec("n", "BF16", (0,)))
EMPTY_XXH3 = "99aa06d3014798d86001c324468d497f"


def make_manifest() -> Manifest:
    layout = Layout(SPECS)
    return Manifest(
        version=Version(1, 7),
        algorithm="xxh3_128",
        tensors=tuple(
            TensorEntry(
                spec, layout.offset(spec.name), spec.nbytes, block_digests("xxh3_128", memoryview(bytes(spec.nbytes)))
            )
            for spec in layout.specs
        ),
        file_bytes=layout.file_bytes,
    )


def test_manifest_survives_its_json() -> None:
    manifest = make_manifest()
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(memoryview(manifest.to_json())) == manifest


def test_decoded_version_is_ordered_like_any_version() -> None:
    assert Manifest.from_json(make_manifest().to_json()).version < Version(1, 8)


def test_json_is_what_the_readme_shows() -> None:
    first = json.loads(make_manifest().to_json())
    assert set(first) == {"version", "algorithm", "tensors", "file_bytes"}
    assert first["version"] == [1, 7]
    assert first["tensors"][0]["spec"] == {"name": "a", "dtype": "F32", "shape": [2, 3]}


def change(path: str, value: object) -> Any:
    """Return a change of one value of the manifest's JSON; `path` is like tensors.0.offset."""

    def apply(manifest: Any) -> None:
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in parents:
            manifest = manifest[key]
        if value is None:
            del manifest[last]
        else:
            manifest[last] = value

    return apply


def swap_tensors(manifest: Any) -> None:
    manifest["tensors"][0], manifest["tensors"][1] = manifest["tensors"][1], manifest["tensors"][0]


def repeat_tensor(manifest: Any) -> None:
    manifest["tensors"].append(manifest["tensors"][0])


LIES = {
    "negative version": (change("version", [1, -1]), "both numbers must be 0 to"),
    "version beyond int32": (change("version", [2**31, 0]), "both numbers must be 0 to"),
    "version of one number": (change("version", [1]), "manifest: "),
    "unknown algorithm": (change("algorithm", "md5"), "manifest: "),
    "algorithm of other digests": (change("algorithm", "blake3"), "tensor a: its digest is not 64 hex digits"),
    "file_bytes too small": (change("file_bytes", 1), "file_bytes 1, but its tensors make"),
    "file_bytes astronomic": (change("file_bytes", 2**60), "manifest: "),
    "offset of another tensor": (change("tensors.0.offset", 0), r"tensor a: bytes \[0, \+24\], but the layout"),
    "negative offset": (change("tensors.0.offset", -8), "manifest: "),
    "nbytes too large": (change("tensors.0.nbytes", 25), r"\+25\], but the layout"),
    "nbytes as text": (change("tensors.0.nbytes", "24"), "manifest: "),
    "nbytes as truth": (change("tensors.0.nbytes", True), "manifest: "),
    "nbytes as float": (change("tensors.0.nbytes", 24.5), "manifest: "),
    "shape too large": (change("tensors.0.spec.shape", [2**40, 2**40]), "bytes of tensors: at most"),
    "shape changed": (change("tensors.0.spec.shape", [2, 4]), "file_bytes"),
    "negative dimension": (change("tensors.0.spec.shape", [-2, -3]), "manifest: "),
    "too many dimensions": (change("tensors.0.spec.shape", [1] * 9), "manifest: "),
    "dtype of no number": (change("tensors.0.spec.dtype", "F31"), "manifest: "),
    "empty name": (change("tensors.0.spec.name", ""), "matching regex"),
    "control characters in a name": (change("tensors.0.spec.name", "a\x1b[2J"), "matching regex"),
    "name with a line break": (change("tensors.0.spec.name", "a\n"), "matching regex"),
    "reserved name": (change("tensors.0.spec.name", "__metadata__"), "given twice or reserved"),
    "digest too short": (change("tensors.0.digests", ["ab"]), "tensor a: its digest is not 32 hex digits"),
    "digest in upper case": (change("tensors.0.digests", ["A" * 32]), "tensor a: its digest is not 32 hex digits"),
    "digest of bytes that are not there": (
        change("tensors.2.digests", ["0" * 32]),
        "tensor n: 1 digests for 0 bytes, expected 0",
    ),
    "missing field": (change("file_bytes", None), "manifest: "),
    "unknown field": (change("pickle", "gASV"), "manifest: "),
    "tensors out of order": (swap_tensors, "tensor b stands where the file has a"),
    "tensor twice": (repeat_tensor, "given twice or reserved"),
}


@pytest.mark.parametrize("lie", LIES)
def test_manifest_that_lies_is_refused(lie: str) -> None:
    mutate, message = LIES[lie]
    honest = json.loads(make_manifest().to_json())
    mutate(honest)
    with pytest.raises(MalformedMessage, match=message):
        Manifest.from_json(json.dumps(honest).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"version":' * 5000])
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage, match=r"^manifest: "):
        Manifest.from_json(data)


def test_oversized_manifest_is_refused_unread() -> None:
    with pytest.raises(MalformedMessage, match=f"at most {MAX_MANIFEST_BYTES}"):
        Manifest.from_json(b" " * (MAX_MANIFEST_BYTES + 1))


def test_digests_are_those_of_their_algorithms() -> None:
    assert digest("blake3", b"").startswith("af1349b9f5f9a1a6a0404dea36dcc949")
    assert digest("xxh3_128", b"") == EMPTY_XXH3
    assert digest("xxh3_128", memoryview(b"ab")[:0]) == EMPTY_XXH3


def test_hashing_in_pieces_gives_the_same_digest() -> None:
    hasher = new_hasher("blake3")
    hasher.update(b"half ")
    hasher.update(memoryview(b"and half"))
    assert hasher.hexdigest() == digest("blake3", b"half and half")


def test_schema_digest_ignores_order_and_dtype_only() -> None:
    reference = schema_digest(SPECS)
    assert schema_digest(reversed(SPECS)) == reference
    assert schema_digest([TensorSpec(spec.name, "BF16", spec.shape) for spec in SPECS]) == reference
    assert schema_digest([*SPECS[:2], TensorSpec("n", "BF16", (1,))]) != reference
    assert schema_digest([*SPECS[:2], TensorSpec("m", "BF16", (0,))]) != reference
    assert schema_digest(SPECS[:2]) != reference


def test_the_weights_packages_load_no_torch() -> None:
    code = "import sys, protocol.weights.fetching; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_content_digest_is_of_the_tensors_and_of_nothing_else() -> None:
    manifest = make_manifest()
    content = content_digest(manifest)
    assert len(content) == 32
    assert content_digest(msgspec.structs.replace(manifest, version=Version(9, 9))) == content
    assert content_digest(msgspec.structs.replace(manifest, tensors=manifest.tensors[::-1])) == content
    assert content_digest(Manifest.from_json(manifest.to_json())) == content


@pytest.mark.parametrize(
    "changed",
    [
        {"spec": TensorSpec("c", "F32", (2, 3))},
        {"spec": TensorSpec("a", "I32", (2, 3))},
        {"spec": TensorSpec("a", "F32", (3, 2))},
        {"digests": (digest("xxh3_128", b"other"),)},
    ],
)
def test_another_tensor_is_another_content(changed: dict[str, Any]) -> None:
    manifest = make_manifest()
    first, *others = manifest.tensors
    assert first.spec.name == "a"
    tensors = (msgspec.structs.replace(first, **changed), *others)
    assert content_digest(msgspec.structs.replace(manifest, tensors=tensors)) != content_digest(manifest)


def test_digests_of_different_algorithms_never_make_the_same_content() -> None:
    manifest = make_manifest()
    assert content_digest(msgspec.structs.replace(manifest, algorithm="blake3")) != content_digest(manifest)
