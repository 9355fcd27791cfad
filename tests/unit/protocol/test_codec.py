from __future__ import annotations

import threading
from typing import Any

import msgspec
import numpy as np
import pytest

from protocol.codec import MAX_FRAME_BYTES, MAX_FRAMES, MAX_HEADER_BYTES, decode, encode
from protocol.errors import MalformedMessage, ProtocolError, VersionMismatch
from protocol.messages import Fault, Hello, Lease, Ping, WeightsChunk
from protocol.versions import PROTOCOL_VERSION, Version
from tests.factories import make_group, make_lease

CHUNK = WeightsChunk(version=Version(1, 2), offset=0, data=np.arange(6, dtype=np.uint8))


def wire(message: Any) -> list[bytes]:
    """Return what a peer receives."""
    return [bytes(frame) for frame in encode(message)]


def header_of(message: Any) -> dict[str, Any]:
    return msgspec.msgpack.decode(encode(message)[0])


def with_header(frames: list[bytes], **changes: Any) -> list[bytes]:
    """Change fields of the header; None takes one away."""
    header = {**msgspec.msgpack.decode(frames[0]), **changes}
    kept = {name: value for name, value in header.items() if value is not ...}
    return [msgspec.msgpack.encode(kept), *frames[1:]]


def refusal(frames: list[Any]) -> str:
    with pytest.raises(MalformedMessage) as caught:
        decode(frames)
    return str(caught.value)


def test_the_header_is_a_named_map_that_describes_each_array():
    header = header_of(make_lease(prompt_tokens=[7, 8, 9]))
    assert (header["type"], header["protocol_version"]) == ("lease", PROTOCOL_VERSION)
    assert header["prompt_tokens"] == ["<i4", 3]
    assert header["sampling"]["stop_token_ids"] == [1]
    assert header_of(make_group())["span_versions"] == ["<i4", 4, 2]


def test_frames_follow_the_fields_and_absent_arrays_have_none():
    group = make_group(step_rewards=np.zeros(15, np.float32))
    header, *frames = encode(group)
    names = [name for name in group.__struct_fields__ if isinstance(getattr(group, name), np.ndarray)]
    assert len(frames) == len(names) == 14
    for name, frame in zip(names, frames, strict=True):
        assert bytes(frame) == getattr(group, name).tobytes(), name
    assert msgspec.msgpack.decode(header)["loss_mask"] is None
    assert len(encode(WeightsChunk(version=Version(1, 2), offset=0))) == 1


def test_encoding_copies_nothing():
    group = make_group()
    frames = encode(group)
    assert np.shares_memory(np.asarray(frames[3]), group.completion_tokens)


def test_an_array_that_is_not_contiguous_is_copied_into_order():
    lease = msgspec.structs.replace(make_lease(), prompt_tokens=np.arange(10, dtype=np.int32)[::2])
    np.testing.assert_array_equal(decode(wire(lease)).prompt_tokens, [0, 2, 4, 6, 8])
    transposed = np.arange(8, dtype=np.int32).reshape(2, 4).T
    group = make_group(span_versions=transposed)
    np.testing.assert_array_equal(decode(wire(group)).span_versions, transposed)
    assert all(frame.c_contiguous for message in (lease, group) for frame in encode(message)[1:])


@pytest.mark.parametrize("buffer", [bytes, bytearray, lambda frame: memoryview(bytearray(frame))])
def test_decoded_arrays_are_read_only_views_of_the_frames(buffer):
    frames = [bytes(frame) if i == 0 else buffer(frame) for i, frame in enumerate(encode(CHUNK))]
    data = decode(frames).data
    assert np.shares_memory(data, np.frombuffer(frames[1], np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1


def test_arrays_come_back_equal_with_dtype_and_shape():
    group = make_group(
        loss_mask=np.ones(15, np.uint8),
        step_rewards=np.linspace(-1, 1, 15, dtype=np.float32),
        sampling_mask=np.ones((15, 3), np.uint8),
        routed_experts=np.arange(30, dtype=np.uint16).reshape(15, 2),
    )
    assert len(encode(group)) == 18 <= MAX_FRAMES
    decoded = decode(wire(group))
    for name in group.__struct_fields__:
        sent, received = getattr(group, name), getattr(decoded, name)
        if isinstance(sent, np.ndarray):
            assert (received.dtype, received.shape) == (sent.dtype, sent.shape), name
            np.testing.assert_array_equal(received, sent)
        else:
            assert received == sent, name


def test_a_matrix_of_one_column_keeps_its_column():
    assert decode(wire(make_group())).reward_values.shape == (4, 1)


def test_empty_arrays_travel():
    assert decode(wire(msgspec.structs.replace(CHUNK, data=np.zeros(0, np.uint8)))).data.size == 0


def test_a_wrong_dtype_is_the_senders_mistake():
    with pytest.raises(TypeError, match="array of float64, the wire has int32, float32, uint8, uint16"):
        encode(msgspec.structs.replace(CHUNK, data=np.zeros(3)))
    with pytest.raises(TypeError, match="array of >i4"):
        encode(msgspec.structs.replace(make_lease(), prompt_tokens=np.zeros(3, ">i4")))


def test_what_no_peer_would_accept_is_not_encoded():
    with pytest.raises(ValueError, match=rf"Fault: header of \d+ bytes, allowed are {MAX_HEADER_BYTES}"):
        encode(Fault(code="x", reason="y" * MAX_HEADER_BYTES))
    with pytest.raises(ValueError, match=rf"array of {MAX_FRAME_BYTES + 1} bytes, allowed are {MAX_FRAME_BYTES}"):
        encode(msgspec.structs.replace(CHUNK, data=np.empty(MAX_FRAME_BYTES + 1, np.uint8)))


def test_frame_counts_are_checked():
    frames = wire(CHUNK)
    assert refusal([]) == f"0 frames, allowed are 1 to {MAX_FRAMES}"
    assert refusal(frames * MAX_FRAMES) == f"{2 * MAX_FRAMES} frames, allowed are 1 to {MAX_FRAMES}"
    assert refusal(frames[:1]) == "1 frames, fewer than the header has arrays"
    assert refusal([*frames, b""]) == "3 frames, more than the header has arrays"
    assert refusal([*wire(Ping(sent_s=1.0)), b""]) == "2 frames: Ping has no arrays"


def test_sizes_are_checked_before_anything_else():
    too_long = b"\xc0" * (MAX_HEADER_BYTES + 1)
    assert refusal([too_long]) == f"header of {MAX_HEADER_BYTES + 1} bytes, allowed are {MAX_HEADER_BYTES}"
    huge = memoryview(np.empty(MAX_FRAME_BYTES + 1, np.uint8))
    frames = [*with_header(wire(CHUNK)[:1], data=["|u1", MAX_FRAME_BYTES + 1]), huge]
    assert f"up to {MAX_FRAME_BYTES} bytes" in refusal(frames)


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        (["|u1", 7], "data: expected |u1 that fills its frame"),
        (["|u1", 5], "data: expected |u1 that fills its frame"),
        (["|i1", 6], "data: expected |u1 that fills its frame"),
        (["<i4", 6], "data: expected |u1 that fills its frame"),
        (["|u1", 2, 4], "data: its frame does not fill the described array"),
        (["|u1", 6, 0], "data: its frame does not fill the described array"),
        (["|u1", 2**64 - 1, 2**64 - 1], "data: its frame does not fill the described array"),
        (["|u1", -1], "Expected `int` >= 0"),
        (["|u1", -1, -6], "Expected `int` >= 0"),
        (["|u1", 6.0], "Expected `int`, got `float`"),
        (["|u1", True], "Expected `int`, got `bool`"),
        (["|u1", 1, 2, 3], "Expected `array` of at most length 3"),
        (["|u1"], "Expected `array` of at least length 2"),
        ([], "Expected `array` of at least length 2"),
        ("|u1", "Expected `array | null`, got `str`"),
        ({"dtype": "|u1", "length": 6}, "Expected `array | null`, got `object`"),
        ([[["|u1"]], 6], "Expected `str`, got `array`"),
    ],
)
def test_an_array_must_be_what_its_header_says(described, reason):
    assert reason in refusal(with_header(wire(CHUNK), data=described))


def test_a_frame_of_odd_size_is_refused():
    frames = wire(make_lease())
    assert "prompt_tokens: its frame does not fill" in refusal([frames[0], frames[1] + b"x", *frames[2:]])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sent_s": "now"}, "Expected `float`, got `str` at `$.sent_s`"),
        ({"sent_s": ...}, "Object missing required field `sent_s`"),
        ({"type": "pickle"}, "not a message at `$.type`"),
        ({"type": ...}, "Object missing required field `type`"),
        ({"secret": "payload"}, "not a message"),
        ({"status": {"secret": 1}}, "not a message at `$.status`"),
        ({"status": [1]}, "Expected `object | null`, got `array`"),
    ],
)
def test_headers_must_fit_their_type(changes, reason):
    text = refusal(with_header(wire(Ping(sent_s=1.0)), **changes))
    assert reason in text
    assert "secret" not in text
    assert "payload" not in text


def test_the_messages_own_checks_hold_on_arrival():
    lease = wire(make_lease())
    assert refusal(with_header([lease[0], b"", lease[2]], prompt_tokens=["<i4", 0])).startswith(
        "prompt_tokens has shape (0,): expected [P]"
    )
    sampling = header_of(make_lease())["sampling"]
    assert "top_p 7.0: allowed is 0 < top_p <= 1" in refusal(with_header(lease, sampling={**sampling, "top_p": 7.0}))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\x91" * 60_000,
        b"\x81\xa1a" * 20_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\xa4type\xa2\xff\xfe",
        b"\x82\xa4type\xa4ping\xa6sent_s\xd6\xff\x00\x00\x00\x00",
        "päyload".encode(),
    ],
)
def test_garbage_is_refused_whatever_it_is(header):
    with pytest.raises(ProtocolError) as caught:
        decode([header])
    assert "payload" not in str(caught.value)


def test_another_version_is_named_even_when_nothing_else_can_be_read():
    expected = f"message of protocol version 9, this process speaks {PROTOCOL_VERSION}"
    with pytest.raises(VersionMismatch, match=expected):
        decode(with_header(wire(Ping(sent_s=1.0)), protocol_version=9))
    with pytest.raises(VersionMismatch, match=expected):
        decode([msgspec.msgpack.encode({"type": "hallo", "protocol_version": 9, "new": [[1], {"a": 2}]})])
    assert refusal([msgspec.msgpack.encode({"protocol_version": "9"})]) == "Object missing required field `type`"


def test_optional_fields_may_be_left_out_by_another_implementation():
    assert decode(with_header(wire(Ping(sent_s=2.0)), protocol_version=..., status=...)) is not None
    hello = Hello(
        session="s", server="a", engine="e", room=1, vocab_size=2, model_digest="", tokenizer_digest="",
        reward_functions=("f",), live=Version(3, 4),
    )  # fmt: skip
    decoded = decode(with_header(wire(hello), unacked=..., in_flight=...))
    assert (decoded.live, decoded.unacked) == (Version(3, 4), ())


def test_threads_do_not_mix_their_frames():
    leases: list[Lease] = [make_lease(ordinal=k, prompt_tokens=[k] * 50) for k in range(4)]
    right = []

    def round_trips(lease: Lease) -> None:
        back = [decode(wire(lease)).prompt_tokens for _ in range(300)]
        right.append(all(np.array_equal(tokens, lease.prompt_tokens) for tokens in back))

    threads = [threading.Thread(target=round_trips, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4


def test_no_reference_to_a_message_is_kept():
    frame = bytearray(encode(CHUNK)[1])
    message = decode([encode(CHUNK)[0], frame])
    with pytest.raises(BufferError):
        frame.append(0)  # the decoded array holds it
    del message
    frame.append(0)
