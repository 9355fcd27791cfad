from __future__ import annotations

import re
import threading
from typing import Any

import msgspec
import numpy as np
import pytest

from protocol.codec import MAX_FRAME_BYTES, MAX_FRAMES, MAX_HEADER_BYTES, SMALL_BYTES, decode, encode
from protocol.errors import MalformedMessage, ProtocolError, VersionMismatch
from protocol.messages import Fault, Group, Hello, Lease, Ping, WeightsChunk, WeightsReady
from protocol.versions import PROTOCOL_VERSION, Version
from tests.factories import make_group, make_lease

CHUNK = WeightsChunk(version=Version(1, 2), offset=0, data=np.arange(6, dtype=np.uint8))
LARGE_CHUNK = msgspec.structs.replace(CHUNK, data=np.arange(SMALL_BYTES // 2, dtype=np.uint16).view(np.uint8))


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


def test_small_arrays_share_the_last_frame_in_order_and_aligned():
    group = make_group(rewards=[0.0, 1.0, 0.0], step_rewards=np.zeros(15, np.float32))
    header, shared = encode(group)
    arrays = [value for value in map(group.__getattribute__, group.__struct_fields__) if isinstance(value, np.ndarray)]
    assert len(arrays) == 14
    expected = b""
    for array in arrays:
        expected = expected.ljust(-(-len(expected) // 8) * 8, b"\0") + array.tobytes()
    assert any(array.nbytes % 8 for array in arrays)
    assert bytes(shared) == expected
    assert msgspec.msgpack.decode(header)["loss_mask"] is None
    assert len(encode(WeightsChunk(version=Version(1, 2), offset=0))) == 1


@pytest.mark.parametrize("num_bytes", [0, 1, SMALL_BYTES - 1, SMALL_BYTES, SMALL_BYTES + 1])
def test_an_array_of_the_threshold_has_a_frame_of_its_own(num_bytes):
    row = np.full(num_bytes, 7, np.uint8)
    lease = msgspec.structs.replace(make_lease(prompt_tokens=[1, 2, 3]), row=row)
    tokens = lease.prompt_tokens.tobytes()
    frames = wire(lease)[1:]
    shared = tokens if num_bytes >= SMALL_BYTES else tokens + bytes(4) + row.tobytes()
    assert frames == ([row.tobytes(), shared] if num_bytes >= SMALL_BYTES else [shared])
    np.testing.assert_array_equal(decode(wire(lease)).row, row, strict=True)


def test_large_arrays_keep_their_order_before_the_shared_frame():
    num_tokens = SMALL_BYTES // 4
    group = make_group(rewards=[0.0], lengths=[num_tokens], loss_mask=np.ones(num_tokens, np.uint8))
    _, tokens, logprobs, shared = wire(group)
    assert tokens == group.completion_tokens.tobytes()
    assert logprobs == group.behavior_logprobs.tobytes()
    assert shared.endswith(group.loss_mask.tobytes())


def test_encoding_copies_no_large_array():
    frames = encode(LARGE_CHUNK)
    assert np.shares_memory(np.asarray(frames[1]), LARGE_CHUNK.data)


def test_an_array_that_is_not_contiguous_is_copied_into_order():
    lease = msgspec.structs.replace(make_lease(), prompt_tokens=np.arange(10, dtype=np.int32)[::2])
    np.testing.assert_array_equal(decode(wire(lease)).prompt_tokens, [0, 2, 4, 6, 8])
    transposed = np.arange(8, dtype=np.int32).reshape(2, 4).T
    group = make_group(span_versions=transposed)
    np.testing.assert_array_equal(decode(wire(group)).span_versions, transposed)
    every_second = np.arange(2 * SMALL_BYTES, dtype=np.uint16).view(np.uint8)[::2]
    chunk = msgspec.structs.replace(CHUNK, data=every_second)
    np.testing.assert_array_equal(decode(wire(chunk)).data, every_second)
    assert memoryview(encode(chunk)[1]).c_contiguous


@pytest.mark.parametrize("chunk", [CHUNK, LARGE_CHUNK])
@pytest.mark.parametrize("buffer", [bytes, bytearray, lambda frame: memoryview(bytearray(frame))])
def test_decoded_arrays_are_read_only_views_of_the_frames(buffer, chunk):
    frames = [bytes(frame) if i == 0 else buffer(frame) for i, frame in enumerate(encode(chunk))]
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
    assert len(encode(group)) == 2
    decoded = decode(wire(group))
    for name in group.__struct_fields__:
        sent, received = getattr(group, name), getattr(decoded, name)
        if isinstance(sent, np.ndarray):
            assert (received.dtype, received.shape) == (sent.dtype, sent.shape), name
            np.testing.assert_array_equal(received, sent)
        else:
            assert received == sent, name


def test_a_group_with_all_its_arrays_large_needs_every_frame():
    group = make_group()
    arrays = [name for name, kind in Group.__annotations__.items() if "Int" in kind or "Float" in kind]
    dtypes = {name: value.dtype for name in arrays if (value := getattr(group, name)) is not None}
    large = {name: np.zeros((SMALL_BYTES, 1), dtypes.get(name, np.uint8)) for name in arrays}
    large["step_rewards"] = large["step_rewards"].astype(np.float32)
    large["routed_experts"] = large["routed_experts"].astype(np.uint16)
    frames = wire(msgspec.structs.replace(group, **large))
    assert len(frames) == 18 == MAX_FRAMES
    assert decode(frames).routed_experts.shape == (SMALL_BYTES, 1)


def test_a_matrix_of_one_column_keeps_its_column():
    assert decode(wire(make_group())).reward_values.shape == (4, 1)


def test_empty_arrays_travel_and_are_not_none():
    empty = msgspec.structs.replace(CHUNK, data=np.zeros(0, np.uint8))
    assert wire(empty)[1:] == [b""]
    assert decode(wire(empty)).data.shape == (0,)
    group = make_group(routed_experts=np.zeros((15, 0), np.uint16))
    assert decode(wire(group)).routed_experts.shape == (15, 0)


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
    assert refusal(frames[:1]) == "frames of [] bytes after a header that describes [6]"
    assert refusal([*frames, b""]) == "frames of [6, 0] bytes after a header that describes [6]"
    assert refusal([*wire(Ping(sent_s=1.0)), b""]) == "2 frames: Ping has no arrays"
    no_array = wire(msgspec.structs.replace(CHUNK, data=None))
    assert refusal([*no_array, b""]) == "frames of [0] bytes after a header that describes []"


def test_an_array_in_the_wrong_kind_of_frame_is_refused():
    """There is one form for each message: small arrays share a frame, large ones do not."""
    lease = make_lease(prompt_tokens=[1, 2])
    header, shared = wire(lease)
    tokens, row = shared[:8], shared[8:]
    assert decode([header, shared]).row.tobytes() == row
    assert "bytes after a header that describes" in refusal([header, tokens, row])
    large = msgspec.structs.replace(lease, row=LARGE_CHUNK.data)
    header, row, shared = wire(large)
    for frames in ([row, shared], [shared, row], [shared + row], [row + shared]):
        if frames != [row, shared]:
            assert "bytes after a header that describes" in refusal([header, *frames])


@pytest.mark.parametrize("change", [lambda f: f[:-1], lambda f: f + b"\0", lambda f: f + bytes(8), lambda f: b""])
def test_the_shared_frame_has_exactly_the_arrays_and_the_padding_between(change):
    header, shared = wire(make_lease(prompt_tokens=[1, 2, 3]))
    assert f"describes [{len(shared)}]" in refusal([header, change(shared)])
    unpadded = shared[:12] + shared[16:]
    assert f"frames of [{len(shared) - 4}] bytes" in refusal([header, unpadded])


def test_sizes_are_checked_before_anything_else():
    too_long = b"\xc0" * (MAX_HEADER_BYTES + 1)
    assert refusal([too_long]) == f"header of {MAX_HEADER_BYTES + 1} bytes, allowed are {MAX_HEADER_BYTES}"
    lease = with_header(wire(make_lease()), prompt_tokens=["<i4", MAX_FRAME_BYTES // 4 + 1])
    assert refusal(lease) == f"prompt_tokens: expected <i4, at most {MAX_FRAME_BYTES} bytes"


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        (["|u1", 7], "frames of [6] bytes after a header that describes [7]"),
        (["|u1", 5], "frames of [6] bytes after a header that describes [5]"),
        (["|i1", 6], "data: expected |u1"),
        (["<i4", 6], "data: expected |u1"),
        (["|u1", 2, 4], "frames of [6] bytes after a header that describes [8]"),
        (["|u1", 6, 0], "frames of [6] bytes after a header that describes [0]"),
        (["|u1", 1 << 26, 1 << 26], "data: expected |u1, at most 67108864 bytes"),
        (["|u1", SMALL_BYTES], "frames of [6] bytes after a header that describes [16384]"),
        (["|u1", 2**64 - 1, 2**64 - 1], "Expected `int` <= 67108864"),
        (["|u1", 0, 2**64 - 1], "Expected `int` <= 67108864"),
        (["|u1", (1 << 26) + 1, 0], "Expected `int` <= 67108864"),
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
    lease = wire(make_lease(prompt_tokens=[1, 2]))
    assert refusal(with_header([lease[0], lease[1][8:]], prompt_tokens=["<i4", 0])).startswith(
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


@pytest.mark.parametrize(
    ("tokens", "logprobs", "shapes"),
    [
        ((2, 3), None, r"canary_tokens \(2, 3\), canary_logprobs None"),
        (None, (2, 2), r"canary_tokens None, canary_logprobs \(2, 2\)"),
        ((2, 3), (2, 3), r"canary_tokens \(2, 3\), canary_logprobs \(2, 3\)"),
        ((6,), (5,), r"canary_tokens \(6,\), canary_logprobs \(5,\)"),
    ],
)
def test_canaries_without_a_logprob_for_every_token_but_the_first_are_refused(tokens, logprobs, shapes):
    with pytest.raises(ValueError, match=f"{shapes}: expected"):
        WeightsReady(
            version=Version(1, 7),
            manifest=np.zeros(1, np.uint8),
            addresses=(),
            canary_tokens=None if tokens is None else np.zeros(tokens, np.int32),
            canary_logprobs=None if logprobs is None else np.zeros(logprobs, np.float32),
        )


@pytest.mark.parametrize(("tokens", "logprobs"), [((0, 3), (0, 2)), ((2, 1), (2, 0)), ((0, 1), (0, 0))])
def test_canaries_that_predict_nothing_are_refused(tokens, logprobs):
    """An engine would compare the mean of no numbers."""
    with pytest.raises(ValueError, match=re.escape(f"canary_tokens {tokens}: expected [N, L] with N >= 1 and L >= 2")):
        WeightsReady(
            version=Version(1, 7), manifest=np.zeros(1, np.uint8), addresses=(),
            canary_tokens=np.zeros(tokens, np.int32), canary_logprobs=np.zeros(logprobs, np.float32),
        )  # fmt: skip


def test_canaries_that_do_not_fit_are_no_message():
    good = WeightsReady(
        version=Version(1, 7), manifest=np.zeros(1, np.uint8), addresses=(), canary_tokens=np.zeros((2, 3), np.int32),
        canary_logprobs=np.zeros((2, 2), np.float32),
    )  # fmt: skip
    frames = [bytes(frame) for frame in encode(good)]
    header = msgspec.msgpack.decode(frames[0])
    header["canary_logprobs"] = ["<f4", 1, 4]
    with pytest.raises(MalformedMessage, match=r"canary_logprobs \(1, 4\): expected \[N, L\] and \[N, L - 1\]"):
        decode([msgspec.msgpack.encode(header), *frames[1:]])
