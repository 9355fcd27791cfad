"""protocol/README.md is the specification of the wire: it may not drift from the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from protocol import codec, validation
from protocol.messages import AnyMessage, Float32, Int32, Sampling, ServerStatus, UInt8, UInt16
from protocol.versions import PROTOCOL_VERSION
from tests.factories import make_lease

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "protocol" / "README.md").read_text()
ARRAYS: dict[Any, str] = {Int32: "i4", Float32: "f4", UInt8: "u1", UInt16: "u2"}
TYPES = [*get_args(AnyMessage), Sampling, ServerStatus]


def section(name: str) -> str:
    found = re.search(rf"^### {name} \(.*?(?=^### |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found, f"no section on {name}"
    return found.group()


def rows(name: str) -> list[tuple[str, str]]:
    return re.findall(r"^\| `(\w+)` \| (.*?) \|", section(name), re.MULTILINE)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_every_field_is_described_in_its_place(kind):
    fields = [field for field in msgspec.structs.fields(kind) if field.name != "protocol_version"]
    described = rows(kind.__name__)
    assert [name for name, _ in described] == [field.name for field in fields]
    for field, (name, written) in zip(fields, described, strict=True):
        assert (" = " in written) == (not field.required), name
        dtypes = [ARRAYS[kind] for kind in (field.type, *get_args(field.type)) if kind in ARRAYS]
        assert written.startswith(f"{dtypes[0]}[") if dtypes else "4[" not in written and "u1[" not in written, name


def test_no_section_describes_what_is_not_there():
    headings = re.findall(r"^### (\w+) \(", TEXT, re.MULTILINE)
    assert sorted(headings) == sorted(kind.__name__ for kind in TYPES)


def test_the_worked_example_is_a_golden_frame():
    example = TEXT.partition("frame 0")[2].partition("\n\n")[0]
    header, _, array = example.partition("frame 1")
    octets = [re.split(r"\"|map", line)[0] for line in header.splitlines() if line.strip()]
    golden = (ROOT / f"tests/golden/frames_v{PROTOCOL_VERSION}/weights_chunk.hex").read_text().splitlines()
    assert bytes.fromhex("".join(octets)).hex() == golden[0]
    assert bytes.fromhex(array.strip()).hex() == golden[1]


def test_the_worked_shared_frame_is_what_the_codec_sends():
    tokens, _, row = re.search(r"`prompt_tokens` \[([\d, ]+)\] and `row` (`)(.*?)`", TEXT).groups()
    shared = TEXT.partition("A `Lease` with")[2].partition("frame 1")[2].partition("\n\n")[0]
    lease = make_lease(prompt_tokens=[int(token) for token in tokens.split(",")])
    lease = msgspec.structs.replace(lease, row=np.frombuffer(row.encode(), np.uint8))
    assert codec.encode(lease)[1] == bytes.fromhex(shared)


def test_the_limits_are_those_of_the_code():
    assert f"# The wire, version {PROTOCOL_VERSION}" in TEXT
    assert f"at most {codec.MAX_HEADER_BYTES >> 10} KiB" in TEXT
    assert f"at most {codec.MAX_FRAME_BYTES >> 20} MiB. At most {codec.MAX_FRAMES} frames in all" in TEXT
    assert f"of {codec.SMALL_BYTES >> 10} KiB ({codec.SMALL_BYTES} bytes) or more" in TEXT
    assert f"the next multiple of {codec.ALIGNMENT} bytes" in TEXT
    assert f"length, rows and columns are at most {codec.MAX_FRAME_BYTES} each" in TEXT
    assert f"{validation.MAX_NOTES} notes of {validation.MAX_NOTE_CHARACTERS} characters" in TEXT
    assert f"({validation.LOGPROB_TOLERANCE:.0e}".replace("e-03", "e-3") in TEXT
