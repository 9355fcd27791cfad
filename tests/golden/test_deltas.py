"""Parts of deltas, kept for ever: what one release encodes, another must decode.

One JSON file per part under deltas_v<DELTA_FORMAT>/: the tensor's `item_bytes` and `num_elements`, the part in
hexadecimal, and the `indices` and `xor` values that it means. They change only together with DELTA_FORMAT; then
`python -m tests.golden.test_deltas` writes those of the new format beside the old ones. Only decoding is compared:
another zstd may compress the same streams into other bytes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from protocol.weights.delta import DELTA_FORMAT, decode_tensor, encode_tensor

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("deltas_v*/*.json"))


def sample(dtype: str, num_elements: int, indices: list[int], xor: list[int]) -> dict[str, object]:
    """Return the content of a file, encoded by today's code."""
    new = np.zeros(num_elements, dtype)
    new[indices] = xor
    part = encode_tensor(np.zeros_like(new), new, new.itemsize)
    assert part is not None
    return {
        "item_bytes": new.itemsize,
        "num_elements": num_elements,
        "indices": indices,
        "xor": xor,
        "part": part.hex(),
    }


def samples() -> dict[str, dict[str, object]]:
    steady = list(range(3, 5000, 13))
    ulps = [(1, 3, 1, 7, 1, 15, 1, 3)[k % 8] for k in range(len(steady))]
    return {
        "bf16_bytes": sample("<u2", 100, [0, 7, 8, 99], [1, 3, 0x8000, 0x0180]),
        "bf16_bytes_continued": sample("<u2", 2000, [*range(20), 274, 530, 1041], [1, 3, 7] * 7 + [1, 1]),
        "bf16_pairs": sample("<u2", 300_000, [5, 1_000, 70_000, 299_999], [1, 1, 7, 1]),
        "bf16_bitmap": sample("<u2", 13, [0, 1, 3, 8, 12], [1, 3, 1, 0xFFFF, 1]),
        "bf16_zstd": sample("<u2", 5000, steady, ulps),
        "fp32_zstd": sample("<u4", 5000, steady, [0x00010203 * value for value in ulps]),
        "fp8": sample("u1", 64, [1, 9], [1, 128]),
        "f64": sample("<u8", 64, [63], [0x8000000000000001]),
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_today_reads_what_was_once_encoded(file):
    golden = json.loads(file.read_text())
    part = bytes.fromhex(golden["part"])
    found = decode_tensor(part, num_elements=golden["num_elements"], item_bytes=golden["item_bytes"])
    assert found.indices.tolist() == golden["indices"]
    assert found.xor.tolist() == golden["xor"]


def test_every_form_of_todays_format_is_kept():
    assert {file.stem for file in FILES if file.parent.name == f"deltas_v{DELTA_FORMAT}"} == set(samples())


def test_the_worked_example_of_the_readme_is_a_golden_part():
    text = (HERE.parents[1] / "protocol" / "README.md").read_text()
    lines = text.partition("## Delta parts")[2].partition("whole:\n\n")[2].partition("\n\n")[0].splitlines()
    octets = "".join(re.split(r" {4,}", line.strip())[0] for line in lines)
    golden = json.loads((HERE / f"deltas_v{DELTA_FORMAT}" / "bf16_bytes.json").read_text())
    assert octets.replace(" ", "") == golden["part"]


if __name__ == "__main__":
    folder = HERE / f"deltas_v{DELTA_FORMAT}"
    folder.mkdir(exist_ok=True)
    for name, content in samples().items():
        (folder / f"{name}.json").write_text(json.dumps(content) + "\n")
