"""The frames of every message, kept for ever: what one release sends, another must read.

One file per message under frames_v<PROTOCOL_VERSION>/, one frame per line, in hexadecimal. They change only together
with PROTOCOL_VERSION; then `python -m tests.golden.test_frames` writes those of the new version beside the old ones.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from protocol.codec import SMALL_BYTES, decode, encode
from protocol.errors import VersionMismatch
from protocol.messages import (
    Ack,
    AckStatus,
    AnyMessage,
    Cancel,
    Drain,
    Fault,
    FinishReason,
    Goodbye,
    Group,
    Hello,
    Lease,
    Ping,
    Pong,
    Purpose,
    Refused,
    Return,
    RewardStatus,
    Sampling,
    ServerStatus,
    WeightsChunk,
    WeightsFailed,
    WeightsLive,
    WeightsLost,
    WeightsPath,
    WeightsReady,
    WeightsRequest,
    WeightsStaged,
    WeightsSwap,
    Welcome,
)
from protocol.versions import PROTOCOL_VERSION, Version

HERE = Path(__file__).parent
ID = "0123456789abcdef0123456789abcdef"
V7 = Version(2, 7)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def octets(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


GROUP = {
    "group_id": ID,
    "ordinal": 41,
    "sequence": 40,
    "attempt": 2,
    "purpose": Purpose.TRAIN,
    "num_generations": 2,
    "temperature": 0.5,
    "reward_names": ("exact_match", "format"),
    "part": 0,
    "num_parts": 1,
    "generate_s": 1.5,
    "reward_s": 0.25,
    "notes": ("format: timeout",),
    "completion_index": ints(0, 1),
    "completion_lengths": ints(3, 1),
    "completion_tokens": ints(5, 9, 2, 7),
    "behavior_logprobs": floats(-0.5, -1.5, -0.25, -2.0),
    "finish_reasons": octets(FinishReason.STOP, FinishReason.LENGTH),
    "span_counts": ints(2, 1),
    "span_lengths": ints(2, 1, 1),
    "span_versions": ints(2, 6, 2, 7, 2, 7).reshape(3, 2),
    "rewards": floats(1.0, 0.0),
    "scored": octets(1, 0),
    "reward_values": floats(1.0, 0.0, 0.0, 0.0).reshape(2, 2),
    "reward_statuses": octets(RewardStatus.OK, RewardStatus.UNSCORED, RewardStatus.TIMEOUT, RewardStatus.ERROR).reshape(
        2, 2
    ),
    "reward_seconds": floats(0.125, 0.0, 10.0, 0.5).reshape(2, 2),
}

SAMPLES: dict[str, AnyMessage] = {
    "hello": Hello(
        session="8a1f", server="host-1", engine="scripted", room=64, vocab_size=1000, model_digest="ab" * 16,
        tokenizer_digest="cd" * 16, canaries=True, full_weights=False, max_lora_rank=16,
        reward_functions=("exact_match", "format"), run_id="run", incarnation=2, live=V7, unacked=(ID,),
        in_flight=("f" * 32,), relay_address="tcp://*:5558",
    ),
    "hello_first": Hello(
        session="8a1f", server="host-1", engine="scripted", room=64, vocab_size=1000, model_digest="",
        tokenizer_digest="", reward_functions=(),
    ),
    "welcome": Welcome(session="8a1f", run_id="run", incarnation=2, keep=(ID,), heartbeat_s=1.0, liveness_s=5.0),
    "refused": Refused(code="protocol_version", reason="learner speaks 2"),
    "lease": Lease(
        group_id=ID, ordinal=41, sequence=40, attempt=2, purpose=Purpose.EVAL, num_generations=2,
        sampling=Sampling(
            temperature=0.5, top_p=0.9, top_k=20, min_p=0.1, max_completion_length=8, stop_token_ids=(2, 3)
        ),
        seed=2**63 - 1, min_version=V7, prompt_tokens=ints(4, 5, 6),
        row=np.frombuffer(b'{"prompt":"2+3=","columns":{"answer":"5"}}', np.uint8),
    ),
    "lease_large_row": Lease(
        group_id=ID, ordinal=41, sequence=40, attempt=2, purpose=Purpose.TRAIN, num_generations=2,
        sampling=Sampling(max_completion_length=8, stop_token_ids=(2,)), seed=1, min_version=V7,
        prompt_tokens=ints(4, 5, 6), row=np.full(SMALL_BYTES, ord(" "), np.uint8),
    ),
    "group": Group(**GROUP),
    "group_all_arrays": Group(
        **GROUP,
        loss_mask=octets(1, 1, 1, 0),
        step_rewards=floats(np.nan, 0.5, np.nan, -1.0),
        sampling_mask=octets(1, 0, 1, 1, 0, 1, 1, 1).reshape(4, 2),
        routed_experts=np.array([[1, 2], [3, 4], [5, 6], [7, 65535]], np.uint16),
    ),
    "group_step_rewards": Group(**GROUP, step_rewards=floats(float("nan"), 0.5, 0.0, float("nan"))),
    "ack": Ack(group_id=ID, attempt=2, status=AckStatus.STALE, reason="sampled by orphaned weights 1.8"),
    "return": Return(group_id=ID, attempt=2, reason="drain", fault=False),
    "cancel": Cancel(group_id=ID, attempt=2, reason="deadline"),
    "weights_ready": WeightsReady(
        version=V7, manifest=np.frombuffer(b'{"version":[2,7]}', np.uint8), addresses=("tcp://*:5556",)
    ),
    "weights_ready_canaries": WeightsReady(
        version=V7, manifest=np.frombuffer(b'{"version":[2,7]}', np.uint8), addresses=("tcp://*:5556",),
        canary_tokens=ints(4, 5, 6, 7, 8, 9).reshape(2, 3),
        canary_logprobs=floats(-0.5, -1.5, -0.25, -2.0).reshape(2, 2),
    ),
    "weights_ready_paths": WeightsReady(
        version=V7, manifest=np.frombuffer(b'{"version":[2,7]}', np.uint8),
        addresses=("tcp://10.0.0.8:5558", "tcp://*:5556"), address_keys=("k" * 40, ""),
        shared="weights-17-0123abcd.safetensors", deltas=np.frombuffer(b"[]", np.uint8),
    ),
    "weights_request": WeightsRequest(version=V7, offset=262144, length=262144),
    "weights_request_delta": WeightsRequest(version=V7, offset=0, length=262144, base=Version(2, 6)),
    "weights_chunk": WeightsChunk(version=V7, offset=262144, data=octets(0, 1, 254, 255)),
    "weights_chunk_none": WeightsChunk(version=V7, offset=262144),
    "weights_chunk_delta": WeightsChunk(version=V7, offset=0, base=Version(2, 6), data=octets(0, 1, 254, 255)),
    "weights_staged": WeightsStaged(version=V7),
    "weights_swap": WeightsSwap(version=V7, checksums=("sglang-tp2:0123abcd",)),
    "weights_swap_first": WeightsSwap(version=V7),
    "weights_live": WeightsLive(
        version=V7, path=WeightsPath.DELTA, bytes=4096, transfer_s=0.5, verify_s=0.25, pause_s=0.125, check_s=1.5,
        checksum="sglang-tp2:0123abcd", mismatch_kl=0.0009765625, mismatch=0.03125,
    ),
    "weights_live_unchecked": WeightsLive(version=V7, transfer_s=0.5, verify_s=0.25, pause_s=0.125),
    "weights_lost": WeightsLost(reason="the engine died with exit code -9"),
    "weights_failed": WeightsFailed(version=V7, reason="digest"),
    "ping": Ping(
        sent_s=12.5,
        status=ServerStatus(
            samples_running=1, samples_waiting=2, groups_in_flight=3, groups_unacked=4, groups_finished=5,
            tokens_generated=6, tokens_held=3, prompt_tokens=10, cached_prompt_tokens=9, kv_usage=0.75,
            engine_restarts=1,
            wall_s=7.0, busy_s=6.5, paused_s=0.5, occupancy_s=5.5, idle_lease_s=0.5, idle_engine_s=0.25,
            idle_rewards_s=0.125, idle_weights_s=0.625, reward_timeouts=7, reward_errors=8, malformed=9,
            loop_lag_ms=1.25, waiting_for="lease",
        ),
    ),
    "ping_bare": Ping(sent_s=12.5),
    "pong": Pong(sent_s=12.5),
    "drain": Drain(reason="SIGTERM"),
    "goodbye": Goodbye(reason="done"),
    "fault": Fault(code="engine", reason="out of memory"),
}  # fmt: skip


def frames_of(directory: Path, name: str) -> list[bytes]:
    return [bytes.fromhex(line) for line in (directory / f"{name}.hex").read_text().splitlines()]


def current() -> Path:
    return HERE / f"frames_v{PROTOCOL_VERSION}"


def test_every_message_has_golden_frames():
    assert {type(message) for message in SAMPLES.values()} == set(get_args(AnyMessage))
    assert {path.stem for path in current().glob("*.hex")} == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_golden_frames_decode_to_their_message_and_encode_to_the_same_bytes(name):
    frames = frames_of(current(), name)
    message = decode(frames)
    expected = SAMPLES[name]
    assert type(message) is type(expected)
    for field in message.__struct_fields__:
        received, sent = getattr(message, field), getattr(expected, field)
        if isinstance(sent, np.ndarray):
            np.testing.assert_array_equal(received, sent, err_msg=field, strict=True)
        else:
            assert received == sent, field
            assert type(received) is type(sent), field
    assert [bytes(frame) for frame in encode(message)] == frames


def test_frames_of_other_versions_are_named_as_such():
    older = {1: 23, 2: 29, 3: 29, 4: 33}
    """How many frames each version has left: they stay for ever."""
    refused = Counter[int]()
    for directory in HERE.glob("frames_v*"):
        version = int(directory.name.removeprefix("frames_v"))
        if version != PROTOCOL_VERSION:
            for path in directory.glob("*.hex"):
                with pytest.raises(VersionMismatch, match=f"version {version}, this process speaks {PROTOCOL_VERSION}"):
                    decode(frames_of(directory, path.stem))
                refused[version] += 1
    assert refused == older


def write_missing() -> None:
    """Write the frames that the current version does not have yet; existing ones are never touched."""
    current().mkdir(exist_ok=True)
    for name, message in SAMPLES.items():
        path = current() / f"{name}.hex"
        if not path.exists():
            path.write_text("".join(f"{bytes(frame).hex()}\n" for frame in encode(message)))
            print("wrote", path.relative_to(HERE))


if __name__ == "__main__":
    write_missing()
