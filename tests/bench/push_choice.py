"""Whether a delta or all bytes goes over a link: the automatic choice against the better of the two, everywhere.

What a push of 32 MiB of bf16 takes is added up from stages that are really done and timed: dense is transfer and
hash; delta is encode, transfer, decode, apply and hash. Through memory that both ends map nothing is transferred of
a dense push. Otherwise the bytes go through a loopback TCP connection in chunks, and a link of 10, 1 or 0.1 Gbit/s
lets no chunk go before its bucket has the tokens: its clock is arithmetic, so that nothing sleeps, and stages count
CPU seconds, so that other load on the machine does not decide. The ends of a connection work at once: the slower
one counts.

Each round decides first, from what earlier rounds taught, estimate of the changed share included; the choice's
seconds are those of the decision and of the way it chose, as timed in that same round. So what is judged is the
choice, not the noise between two runs. Four rounds at each share are for learning
alone: the pushes of a run are alike.
"""

from __future__ import annotations

import math
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.bench.harness import Row

NUM_ELEMENTS = 16 << 20
DENSE_BYTES = 2 * NUM_ELEMENTS
CHUNK_BYTES = 256 << 10
GBIT = 1e9 / 8
SHARED_MEMORY = "shm"
LINKS = {SHARED_MEMORY: math.inf, "tcp": math.inf, "10 Gbit/s": 10 * GBIT, "1 Gbit/s": GBIT, "0.1 Gbit/s": GBIT / 10}
"""Tokens per second, in bytes."""
SHARES = (0.001, 0.01, 0.03, 0.1, 0.3, 0.5)
LEARNING_ROUNDS, ROUNDS = 4, 7


def cpu_s(work: Callable[[], Any]) -> tuple[float, Any]:
    started_s = time.thread_time()
    result = work()
    return time.thread_time() - started_s, result


@dataclass
class Wire:
    """Both ends of a TCP connection, worked in turns."""

    sender: socket.socket
    receiver: socket.socket

    def carry(self, source: memoryview, target: memoryview) -> list[tuple[int, float]]:
        """Copy chunk by chunk; return the bytes of each and the CPU seconds of its slower end."""
        chunks = []
        for begin in range(0, len(source), CHUNK_BYTES):
            left_out, left_in = source[begin : begin + CHUNK_BYTES], target[begin : begin + CHUNK_BYTES]
            size, send_s, receive_s = len(left_out), 0.0, 0.0
            left_in = left_in[:size]
            while left_in:
                started_s = time.thread_time()
                if left_out:
                    left_out = left_out[self.sender.send(left_out, socket.MSG_DONTWAIT) :]
                sent_s = time.thread_time()
                left_in = left_in[self.receiver.recv_into(left_in) :]
                send_s, receive_s = send_s + sent_s - started_s, receive_s + time.thread_time() - sent_s
            chunks.append((size, max(send_s, receive_s)))
        return chunks


@contextmanager
def loopback() -> Iterator[Wire]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * CHUNK_BYTES)
        sender.connect(listener.getsockname())
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        receiver, _ = listener.accept()
        with receiver:
            yield Wire(sender, receiver)


def throttled_s(chunks: list[tuple[int, float]], bytes_per_s: float) -> float:
    """Return when the last chunk is through: each takes its tokens, or its work where that takes longer."""
    return sum(max(size / bytes_per_s, work_s) for size, work_s in chunks)


@dataclass
class Stages:
    """One version pushed both ways, stage by stage."""

    encode_s: float
    apply_s: float
    hash_s: float
    num_changed: int
    delta_bytes: int
    chunks: dict[str, list[tuple[int, float]]]
    """Of each way."""

    def transfer_s(self, way: str, link: str) -> float:
        """Return the seconds on a link; a part is written into shared memory, a dense version lies there."""
        if link == SHARED_MEMORY:
            return 0.0
        return throttled_s(self.chunks[way], LINKS[link])

    def push_s(self, way: str, link: str) -> float:
        work_s = self.encode_s + self.apply_s if way == "delta" else 0.0
        return work_s + self.transfer_s(way, link) + self.hash_s


def push(base: Any, new: Any, weights: Any, inbox: Any, wire: Wire) -> Stages:
    """Do every stage of both ways once; `weights` holds `base` before and after."""
    import numpy as np
    import xxhash

    from protocol.weights.delta import apply_tensor, decode_tensor, encode_tensor

    encode_s, part = cpu_s(lambda: encode_tensor(base, new, 2))
    chunks = {"delta": wire.carry(memoryview(part), inbox)}

    def decode_and_apply() -> Any:
        found = decode_tensor(inbox[: len(part)], num_elements=NUM_ELEMENTS, item_bytes=2)
        apply_tensor(found, weights)
        return found

    apply_s, found = cpu_s(decode_and_apply)
    hash_s, digest = cpu_s(lambda: xxhash.xxh3_128_digest(weights))
    assert digest == xxhash.xxh3_128_digest(new)
    apply_tensor(found, weights)
    chunks["dense"] = wire.carry(memoryview(new).cast("B"), inbox)
    assert np.array_equal(np.frombuffer(inbox, np.uint16, NUM_ELEMENTS), new)
    return Stages(encode_s, apply_s, hash_s, found.indices.size, len(part), chunks)


@dataclass
class Learner:
    """What decides, and what it has learned."""

    costs: Any
    speeds: dict[str, Any]

    def decide(self, base: Any, new: Any, link: str) -> str:
        from protocol.weights.delta import changed_fraction, choose

        about: dict[str, Any] = {
            "dense_bytes": DENSE_BYTES, "num_elements": NUM_ELEMENTS, "link": self.speeds[link], "costs": self.costs,
        }  # fmt: skip
        if choose(num_changed=0, **about) == "dense":
            return "dense"
        return choose(num_changed=changed_fraction(base, new, 2) * NUM_ELEMENTS, **about)

    def learn(self, stages: Stages) -> None:
        self.costs = (
            self.costs.after_hashing(num_bytes=DENSE_BYTES, s=stages.hash_s)
            .after_applying(num_changed=stages.num_changed, s=stages.apply_s)
            .after_encoding(
                dense_bytes=DENSE_BYTES, num_elements=NUM_ELEMENTS, num_changed=stages.num_changed,
                delta_bytes=stages.delta_bytes, s=stages.encode_s,
            )
        )  # fmt: skip
        for link, speed in self.speeds.items():
            self.speeds[link] = speed.after_transfer(DENSE_BYTES, stages.transfer_s("dense", link))


def worst_choice(quick: bool) -> float:
    """Return the worst cell's seconds of the choice over those of the better way; say all cells on stderr."""
    import numpy as np

    from protocol.weights.delta import Costs, LinkSpeed

    rng = np.random.default_rng(0)
    normal = rng.standard_normal(NUM_ELEMENTS, np.float32) * np.float32(0.02)
    base = (normal.view(np.uint32) >> 16).astype(np.uint16)
    weights, inbox = base.copy(), memoryview(bytearray(DENSE_BYTES))
    speeds = {link: LinkSpeed(math.inf if link == SHARED_MEMORY else 1e9) for link in LINKS}
    learner, worst = Learner(Costs(), speeds), 1.0
    with loopback() as wire:
        for share in SHARES:
            new = base.copy()
            moved = rng.random(NUM_ELEMENTS, np.float32) < share
            new[moved] += rng.choice(np.array([1, 0xFFFF], np.uint16), int(moved.sum()))
            seen: dict[str, list[tuple[float, float, float]]] = {link: [] for link in LINKS}
            for number in range(LEARNING_ROUNDS + (3 if quick else ROUNDS)):
                decisions = {link: cpu_s(partial(learner.decide, base, new, link)) for link in LINKS}
                stages = push(base, new, weights, inbox, wire)
                learner.learn(stages)
                for link, (decision_s, way) in decisions.items() if number >= LEARNING_ROUNDS else ():
                    ways = {name: stages.push_s(name, link) for name in ("delta", "dense")}
                    seen[link].append((ways["delta"], ways["dense"], decision_s + ways[way]))
            for link, rounds in seen.items():
                delta_s, dense_s, choice_s = (statistics.median(times) for times in zip(*rounds, strict=True))
                ratio = choice_s / min(delta_s, dense_s)
                worst = max(worst, ratio)
                print(
                    f"{share:6.1%} {link:>10}: delta {delta_s * 1e3:8.1f} ms, dense {dense_s * 1e3:8.1f} ms,"
                    f" choice {ratio:.3f}", file=sys.stderr,
                )  # fmt: skip
    return worst


def ideal(quick: bool) -> float:
    """Return the ratio of one who always knows."""
    return 1.0


ROWS = [
    Row(
        name="push_choice", control="the better of delta and dense", ours=worst_choice, baseline=ideal,
        ratio="ours/baseline", target=1.05, sense="lower", unit="worst of 30 cells", rounds=3,
    )
]  # fmt: skip
