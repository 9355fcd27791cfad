"""The codec against what one would write first: msgspec with numbers in lists, and one msgspec blob.

All sides encode and decode the same groups of 64 completions x 1024 tokens and count CPU seconds a group. The groups
take turns and the encoded messages of the last few stay alive, as in a send queue: a single hot buffer, reused for
ever, would make copies look free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import msgspec
import numpy as np

from protocol.codec import decode, encode
from protocol.messages import Group
from tests.bench.harness import Row, cpu_clock
from tests.factories import make_group

NUM_GENERATIONS, LENGTH = 64, 1024
VOCAB_SIZE = 151_936
NUM_GROUPS = 16
IN_FLIGHT = 8
CPU_S, QUICK_CPU_S = 2.0, 0.4
"""How long a side is measured, in CPU seconds."""


def make_groups() -> list[Group]:
    """Return distinct groups: 0.5 MiB of tokens and logprobs each."""
    return [
        make_group(
            ordinal=k,
            rewards=[0.0, 1.0] * (NUM_GENERATIONS // 2),
            lengths=[LENGTH] * NUM_GENERATIONS,
            vocab_size=VOCAB_SIZE,
        )
        for k in range(NUM_GROUPS)
    ]


def cpu_per_item(items: list[Any], there_and_back: Callable[[Any], Any], *, quick: bool) -> float:
    """Return CPU seconds for one item, the best of many short stretches; keeps the last few results alive."""
    alive: deque[Any] = deque(maxlen=IN_FLIGHT)
    turns = cycle(items)
    for item in items:
        alive.append(there_and_back(item))
    best, spent, stretch = float("inf"), 0.0, 1
    while spent < (QUICK_CPU_S if quick else CPU_S):
        started = cpu_clock()
        for item in islice(turns, stretch):
            alive.append(there_and_back(item))
        used = cpu_clock() - started
        spent += used
        if used < 0.01:
            stretch *= 2
        else:
            best = min(best, used / stretch)
    return best


def arrays_of(message: Any) -> Iterator[np.ndarray]:
    """Yield the array fields that are set."""
    values = (getattr(message, name) for name in message.__struct_fields__)
    return (value for value in values if isinstance(value, np.ndarray))


def ours(quick: bool) -> float:
    groups = make_groups()
    frames = [bytes(frame) for frame in encode(groups[0])]  # what a socket delivers
    decoded = decode(frames)
    received_bytes = [np.frombuffer(frame, np.uint8) for frame in frames[1:]]
    for sent, received in zip(arrays_of(groups[0]), arrays_of(decoded), strict=True):
        assert np.array_equal(sent, received)
        assert not received.flags.writeable
        assert any(np.shares_memory(received, frame) for frame in received_bytes), "decoded arrays must be views"
    return cpu_per_item(groups, lambda group: decode(encode(group)), quick=quick)


def lists(quick: bool) -> float:
    """One message with the numbers in typed lists; like the other sides, from arrays to arrays."""
    groups = make_groups()
    names = Group.__struct_fields__
    dtypes = [v.dtype if isinstance(v, np.ndarray) else None for v in msgspec.structs.astuple(groups[0])]
    fields = [(name, _list_type(getattr(groups[0], name))) for name in names]
    lists_type = msgspec.defstruct("Lists", fields)
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(lists_type)

    def there_and_back(group: Group) -> list[Any]:
        values = [v.tolist() if isinstance(v, np.ndarray) else v for v in msgspec.structs.astuple(group)]
        decoded = decoder.decode(encoder.encode(lists_type(*values)))
        return [
            value if dtype is None else np.array(value, dtype)
            for value, dtype in zip(msgspec.structs.astuple(decoded), dtypes, strict=True)
        ]

    back = dict(zip(names, there_and_back(groups[0]), strict=True))
    assert np.array_equal(back["behavior_logprobs"], groups[0].behavior_logprobs)
    return cpu_per_item(groups, there_and_back, quick=quick)


def _list_type(value: Any) -> Any:
    """Return what a typed list of this field is declared as."""
    if not isinstance(value, np.ndarray):
        return Any if value is None else type(value)
    number = float if value.dtype == np.float32 else int
    return list[number] if value.ndim == 1 else list[list[number]]


class Bin(msgspec.Struct):
    """An array inside a blob."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def blob(quick: bool) -> float:
    """One message with every array as a bin field; decoding makes views of it. As good as one blob gets."""
    groups = make_groups()
    fields = [
        (name, Bin if isinstance(getattr(groups[0], name), np.ndarray) else Any) for name in Group.__struct_fields__
    ]
    blob_type = msgspec.defstruct("Blob", fields)
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(blob_type)

    def there_and_back(group: Group) -> tuple[bytes, list[Any]]:
        values = (getattr(group, name) for name, _ in fields)
        encoded = encoder.encode(
            blob_type(*[Bin(v.dtype.str, v.shape, v.data) if isinstance(v, np.ndarray) else v for v in values])
        )
        decoded = decoder.decode(encoded)
        values = (getattr(decoded, name) for name, _ in fields)
        return encoded, [np.frombuffer(v.data, v.dtype).reshape(v.shape) if isinstance(v, Bin) else v for v in values]

    assert np.array_equal(there_and_back(groups[0])[1][-5], groups[0].reward_seconds)
    return cpu_per_item(groups, there_and_back, quick=quick)


ROWS = [
    Row(
        name="codec_vs_lists",
        control="msgspec, numbers in lists",
        ours=ours,
        baseline=lists,
        ratio="baseline/ours",
        target=300,
        unit="CPU s a group",
    ),
    Row(
        name="codec_vs_blob",
        control="msgspec, one blob of bin fields",
        ours=ours,
        baseline=blob,
        ratio="baseline/ours",
        target=3,
        unit="CPU s a group",
    ),
]
