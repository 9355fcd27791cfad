"""What the fake's weights are and say. Pure; the tests import it, too."""

from __future__ import annotations

import hashlib
from pathlib import Path

INITIAL = "default"
"""SGLang's own label of the weights it starts with."""


def content_of(directory: Path) -> str:
    """Digest of the only weights file of a directory, as the fake holds it."""
    (file,) = directory.glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def adapted(content: str, adapter: str) -> str:
    """Digest of what weights `content` are with an adapter."""
    return hashlib.sha256(f"{content} {adapter}".encode()).hexdigest()


def checksum_of(content: str) -> str:
    return hashlib.sha256(b"as held" + content.encode()).hexdigest()


def draw(content: str, rid: str, position: int, vocab_size: int) -> int:
    return _hash(content, rid, position) % vocab_size


def logprob(content: str, prefix: str, token: int) -> float:
    """Of `token` under weights `content`, after a prompt that was computed under weights `prefix`."""
    return -0.1 - 4.0 * (_hash(content, prefix, token) % 4096) / 4096


def _hash(*parts: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
