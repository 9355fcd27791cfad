"""Whatever is sent arrives unchanged, and whatever arrives is a message or a ProtocolError."""

from __future__ import annotations

import contextlib
from typing import Any

import hypothesis.extra.numpy as npst
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import SMALL_BYTES, decode, encode
from protocol.errors import InvalidGroup, MalformedMessage, ProtocolError
from protocol.messages import (
    FinishReason,
    Group,
    Hello,
    Lease,
    Ping,
    Purpose,
    Sampling,
    WeightsChunk,
    WeightsLive,
    WeightsLost,
    WeightsReady,
    WeightsStaged,
    WeightsSwap,
)
from protocol.parts import PartAssembler, merge_groups, split_group
from protocol.validation import validate_group
from protocol.versions import Version
from tests.factories import VOCAB_SIZE, make_completion, make_group
from tests.golden.test_frames import SAMPLES

WIRES = {name: [bytes(frame) for frame in encode(message)] for name, message in SAMPLES.items()}

texts = st.text(max_size=20)
naturals = st.integers(0, 2**63 - 1)
reals = st.floats(allow_nan=False)
versions = st.builds(Version, st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
octets = npst.arrays(np.uint8, st.integers(0, 40)) | st.integers(-9, 9).map(
    lambda offset: np.resize(np.arange(251, dtype=np.uint8), SMALL_BYTES + offset)
)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 999),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 100),
    min_p=st.floats(0, 0.99),
    max_completion_length=st.integers(1, 2**31),
    stop_token_ids=st.lists(st.integers(0, 2**31), max_size=4).map(tuple),
)
plain_messages = st.one_of(
    st.builds(Ping, sent_s=reals, status=st.none()),
    st.builds(WeightsChunk, version=versions, offset=naturals, data=st.none() | octets),
    st.builds(
        Hello,
        session=texts,
        server=texts,
        engine=texts,
        room=naturals,
        vocab_size=naturals,
        model_digest=texts,
        tokenizer_digest=texts,
        canaries=st.booleans(),
        reward_functions=st.lists(texts, max_size=3).map(tuple),
        live=st.none() | versions,
        unacked=st.lists(texts, max_size=5).map(tuple),
    ),
    st.builds(
        Lease,
        group_id=texts,
        ordinal=naturals,
        sequence=naturals,
        attempt=naturals,
        purpose=st.sampled_from(Purpose),
        num_generations=st.integers(1, 2**40),
        sampling=samplings,
        seed=naturals,
        min_version=versions,
        prompt_tokens=npst.arrays(np.int32, st.integers(1, 40)),
        row=octets,
    ),
)


weights_messages = st.one_of(
    st.builds(WeightsStaged, version=versions),
    st.builds(WeightsSwap, version=versions, checksums=st.lists(texts, max_size=3).map(tuple)),
    st.builds(WeightsLost, reason=texts),
    st.builds(
        WeightsLive, version=versions, check_s=reals, checksum=texts, mismatch_kl=st.none() | reals,
        mismatch=st.none() | reals,
    ),
)  # fmt: skip


@st.composite
def announcements(draw: st.DrawFn) -> WeightsReady:
    """Draw announcements with and without canaries, small and large."""
    canaries: dict[str, Any] = {}
    if draw(st.booleans()):
        rows, length = draw(st.integers(1, 40)), draw(st.integers(2, 200))
        canaries["canary_tokens"] = np.arange(rows * length, dtype=np.int32).reshape(rows, length)
        canaries["canary_logprobs"] = -np.arange(rows * (length - 1), dtype=np.float32).reshape(rows, length - 1)
    return WeightsReady(version=draw(versions), manifest=draw(octets), addresses=("ipc:///x",), **canaries)


@st.composite
def groups(draw: st.DrawFn) -> Group:
    """Draw valid groups of all forms: any lengths and spans, with and without optional arrays."""
    num_generations = draw(st.integers(1, 6))
    completions = []
    for index in range(num_generations):
        span_lengths = draw(st.lists(st.integers(1, 5), max_size=3))
        completions.append(
            make_completion(
                sum(span_lengths),
                spans=[(Version(1, 2 + k), length) for k, length in enumerate(span_lengths)],
                finish_reason=FinishReason.STOP if span_lengths else FinishReason.ABORT,
                seed=index,
            )
        )
    tokens = sum(len(completion.completion_tokens) for completion in completions)
    optional: dict[str, Any] = {}
    if draw(st.booleans()):
        optional["loss_mask"] = draw(npst.arrays(np.uint8, tokens, elements=st.integers(0, 1)))
    if draw(st.booleans()):
        optional["routed_experts"] = draw(npst.arrays(np.uint16, (tokens, draw(st.integers(0, 3)))))
    rewards = draw(st.lists(st.none() | st.floats(-1, 1, width=32), min_size=num_generations, max_size=num_generations))
    return make_group(completions=completions, rewards=rewards, ordinal=draw(st.integers(0, 99)), **optional)


def validate(group: Group, num_generations: int) -> None:
    validate_group(
        group,
        num_generations=num_generations,
        max_completion_length=15,
        vocab_size=VOCAB_SIZE,
        reward_functions=("exact_match",),
    )


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    for name in left.__struct_fields__:
        one, other = getattr(left, name), getattr(right, name)
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other, err_msg=name, strict=True)
        else:
            assert one == other, name


@given(st.one_of(plain_messages, weights_messages, announcements(), groups()))
def test_messages_survive_the_wire(message):
    received = decode([bytes(frame) for frame in encode(message)])
    assert_same(received, message)
    for name in received.__struct_fields__:
        value = getattr(received, name)
        assert not isinstance(value, np.ndarray) or not value.flags.writeable


@given(groups(), st.integers(1, 300), st.randoms(use_true_random=False))
def test_groups_survive_being_sent_in_parts(group, max_bytes, random):
    parts = [decode([bytes(frame) for frame in encode(part)]) for part in split_group(group, max_bytes)]
    arriving = parts + random.sample(parts, random.randint(0, len(parts)))
    random.shuffle(arriving)
    assembler = PartAssembler()
    whole = next(merged for merged in map(assembler.add, arriving) if merged is not None)
    assert_same(whole, group)
    assert_same(merge_groups(parts), group)
    validate(whole, group.num_generations)


def only_protocol_errors(frames: list[bytes]) -> None:
    with contextlib.suppress(ProtocolError):
        message = decode(frames)
        assert_stable(message)
        if isinstance(message, Group):
            with contextlib.suppress(InvalidGroup):
                validate(message, 2)
            PartAssembler().add(message)


def assert_stable(message: Any) -> None:
    """What was accepted can be sent on, and is accepted again."""
    frames = [bytes(frame) for frame in encode(message)]
    assert [bytes(frame) for frame in encode(decode(frames))] == frames


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=200), max_size=6))
def test_random_frames_raise_nothing_else(frames):
    only_protocol_errors(frames)


@settings(max_examples=600)
@given(
    st.sampled_from(sorted(WIRES)),
    st.lists(
        st.tuples(st.sampled_from(["set", "insert", "delete", "truncate"]), st.integers(0, 2**16), st.integers(0, 255)),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_damaged_frames_raise_nothing_else(name, damages, data):
    frames = list(WIRES[name])
    for kind, position, value in damages:
        which = data.draw(st.integers(0, len(frames) - 1))
        damaged = bytearray(frames[which])
        place = position % (len(damaged) + 1)
        if kind == "set" and place < len(damaged):
            damaged[place] = value
        elif kind == "insert":
            damaged.insert(place, value)
        elif kind == "delete":
            del damaged[place : place + 1 + value % 8]
        elif kind == "truncate":
            del damaged[place:]
        frames[which] = bytes(damaged)
    only_protocol_errors(frames)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=600)
@given(st.sampled_from(sorted(WIRES)), st.data())
def test_headers_with_any_value_anywhere_raise_nothing_else(name, data):
    header, *frames = WIRES[name]
    fields = msgspec.msgpack.decode(header)
    for field in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3)):
        fields[field] = data.draw(values)
    if data.draw(st.booleans()):
        fields[data.draw(texts)] = data.draw(values)
    only_protocol_errors([msgspec.msgpack.encode(fields), *frames])


@given(st.sampled_from(sorted(WIRES)), st.permutations(range(6)), st.integers(0, 6))
def test_frames_missing_doubled_or_in_another_order_raise_nothing_else(name, order, count):
    header, *frames = WIRES[name]
    only_protocol_errors([header, *[frames[k % len(frames)] for k in order[:count] if frames]])


@given(
    st.sampled_from(sorted(name for name, frames in WIRES.items() if len(frames) > 1)),
    st.data(),
    st.binary(min_size=1, max_size=20),
)
def test_frames_of_other_sizes_than_the_header_describes_are_never_accepted(name, data, extra):
    """No byte too many or too few passes, be it among the padding, and no frame."""
    header, *frames = WIRES[name]
    which = data.draw(st.integers(0, len(frames) - 1))
    place = data.draw(st.integers(0, len(frames[which])))
    match data.draw(st.sampled_from(["lengthen", "shorten", "split", "drop", "add"])):
        case "lengthen":
            frames[which] = frames[which][:place] + extra + frames[which][place:]
        case "shorten":
            frames[which] = frames[which][: min(place, len(frames[which]) - 1)]
        case "split":
            frames[which : which + 1] = [frames[which][:place], frames[which][place:]]
        case "drop":
            del frames[which]
        case "add":
            frames.insert(which, extra)
    with pytest.raises(MalformedMessage, match=r"frames of \[.*\] bytes after a header that describes"):
        decode([header, *frames])
