"""The fake's --custom-weight-loader: orders as rollout_server/inside_sglang obeys them, on the bytes of a file.

The fake has one process and puts each tensor of the file where it is in the file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}
TORCH = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
Header = dict[str, dict[str, Any]]


class Unpickler(pickle.Unpickler):
    """Lets through what SGLang's own does, as far as it is needed."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) == ("torch", "FloatTensor"), f"Blocked unsafe global ({module}.{name})"
        return list


def read_order(payload: str) -> dict[str, Any]:
    ((text, tensor),) = Unpickler(io.BytesIO(base64.b64decode(payload, validate=True))).load()
    assert tensor == []
    return json.loads(text)


def obey(order: dict[str, Any], held: bytearray) -> dict[str, Any]:
    """Do it; the answer."""
    directory = Path(order["directory"])
    if order["do"] == "map":
        header, _ = parse((directory / "model.safetensors").read_bytes())
        sizes = {name: math.prod(entry["shape"]) for name, entry in header.items()}
        return {
            "boxes": [[name, name, 0, 0, [size], [1], [1]] for name, size in sizes.items()],
            "parameters": {name: [size, TORCH[header[name]["dtype"]]] for name, size in sizes.items()},
        }
    if order["do"] == "compare":
        equal = held == (directory / "model.safetensors").read_bytes()
        return {} if equal else {"failed": "Unmapped: it does not hold them"}
    few = (directory / f"changes-{os.getpid()}.few").read_bytes()
    places, begin = parse(bytes(held))
    for name, positions, values in changes_in(few):
        item = ITEM_BYTES[places[name]["dtype"]]
        first = begin + places[name]["data_offsets"][0]
        for number, position in enumerate(positions):
            to = first + position * item
            held[to : to + item] = values[number * item : (number + 1) * item]
    return {}


def changes_in(few: bytes) -> list[tuple[str, list[int], bytes]]:
    """(parameter, positions, bytes of the values) of a file of changes."""
    header, begin = parse(few)
    found = []
    for key, entry in header.items():
        if key.startswith("positions "):
            name = key.removeprefix("positions ")
            positions = memoryview(cut(few, begin, entry)).cast("q").tolist()
            found.append((name, positions, cut(few, begin, header[f"values {name}"])))
    return found


def cut(content: bytes, begin: int, entry: dict[str, Any]) -> bytes:
    first, end = entry["data_offsets"]
    return content[begin + first : begin + end]


def parse(content: bytes) -> tuple[Header, int]:
    """(header of a safetensors file, where its tensors begin)"""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, 8 + length


def digest(held: bytearray) -> str:
    return hashlib.sha256(held).hexdigest()
