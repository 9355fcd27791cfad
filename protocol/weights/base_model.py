"""Whether two directories hold the same model: what an adapter is trained on must be what it is served on.

An adapter's own digests say nothing of the weights under it, and another base model of the same shape (an instruct
model for its pretrained one) gives logprobs that look like many others. Both sides hash the files they have loaded. The
learner also hashes a reference model, which must stay what it was when a run is continued.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from protocol.errors import WeightsError
from protocol.weights.adapters import ADAPTER_WEIGHTS
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import digest
from protocol.weights.specs import Dtype, Shape

OTHER_FILES = (ADAPTER_WEIGHTS, "optimizer.safetensors")
"""Safetensors files in a model's directory that are not its weights."""


def base_digest(directory: Path) -> str:
    """Digest a model's safetensors files: 32 hex digits of BLAKE2b over the sorted JSON of each tensor's fields.

    Names, dtypes, shapes and the xxh3_128 of the bytes count; how they are spread over files does not. Reads all of it,
    a second or so per GB: not for the event loop.

    Raises:
        WeightsError: there are none, or one cannot be read.
    """
    files = sorted(file for file in directory.glob("*.safetensors") if file.name not in OTHER_FILES)
    if not files:
        raise WeightsError(f"model {directory} has no *.safetensors file: adapters need a base model in that format")
    content = sorted(entry for file in files for entry in _entries(file))
    return hashlib.blake2b(msgspec.json.encode(content), digest_size=16).hexdigest()


def _entries(file: Path) -> list[tuple[str, Dtype, Shape, str]]:
    with MappedWeights.open(file) as mapped:
        return [
            (spec.name, spec.dtype, spec.shape, digest("xxh3_128", mapped.view(spec.name)))
            for spec in mapped.layout.specs
        ]
