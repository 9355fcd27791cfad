"""How things are named and seeded on both sides: by what they are, so that nothing has to be remembered or sent."""

from __future__ import annotations

import hashlib

import msgspec

from protocol.messages import Purpose


def group_id(run_id: str, ordinal: int, purpose: Purpose = Purpose.TRAIN) -> str:
    """Name a group by what it is, never by its text: 32 hex digits of BLAKE2b(run, purpose, ordinal)."""
    return hashlib.blake2b(f"{run_id}/{purpose}/{ordinal}".encode(), digest_size=16).hexdigest()


def group_seed(run_seed: int, ordinal: int) -> int:
    """Seed of a group, 63 bits: a retry draws the same numbers, and no sampling RNG state is ever kept."""
    digest = hashlib.blake2b(f"{run_seed}/{ordinal}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a group, 63 bits."""
    return group_seed(seed, index)


def tokenizer_digest(vocabulary: dict[str, int]) -> str:
    """Digest of a tokenizer's vocabulary: equal token ids mean equal tokens on both sides."""
    items = sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))
    return hashlib.blake2b(msgspec.json.encode(items), digest_size=16).hexdigest()


def session_name(process: str, number: int) -> str:
    """Name a connection by the process that made it and by how many it has made: 3f2a90c1-2."""
    return f"{process}-{number}"


def process_of(session: str) -> str:
    """The process that made a connection.

    Example:
        >>> process_of("3f2a90c1-2")
        '3f2a90c1'
    """
    return session.rpartition("-")[0]


def is_overtaken(session: str, newer: str) -> bool:
    """Whether a session is an earlier one of the process whose session is `newer`.

    Example:
        >>> is_overtaken("3f2a90c1-2", "3f2a90c1-10"), is_overtaken("77d0e5b2-2", "3f2a90c1-10")
        (True, False)
    """
    process, _, number = session.rpartition("-")
    newer_process, _, newer_number = newer.rpartition("-")
    if process != newer_process or not (number.isdecimal() and newer_number.isdecimal()):
        return False
    return (len(number), number) < (len(newer_number), newer_number)  # as numbers; who knows how long they are
