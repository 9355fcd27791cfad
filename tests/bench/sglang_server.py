"""Tokens a second through the rollout server, against driving the same SGLang directly.

Both sides start the same SGLang on a CPU and keep ROOM samples under way in it, with the same prompts, lengths and
logprobs wanted. Ours is a real server process, attached to it: leases come in over ZeroMQ, groups are scored by a
reward worker and come back, and one of a learner's tasks is played here: leasing, acknowledging, counting tokens. The
control posts to /generate from a plain loop and counts. Everything beside SGLang takes CPU time from it: on two cores
this is the hardest place for the ratio. The model is large enough to be decoded at the pace of a small real one.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from tests.bench.harness import Row, Skip

ROOM, GENERATIONS = 16, 8
PROMPT_TOKENS, COMPLETION_TOKENS = 48, 128
WARM_S, MEASURE_S, QUICK_MEASURE_S = 4.0, 15.0, 6.0
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 32, "num_attention_heads": 8}
START_S = 60.0


def through_server(quick: bool) -> float:
    return with_sglang(serve, quick)


def direct(quick: bool) -> float:
    return with_sglang(post, quick)


def with_sglang(side: Callable[..., Coroutine[Any, Any, float]], quick: bool) -> float:
    from tests.models import build_tiny_model
    from tests.sglang_cpu.launch import PYTHON, RunningSGLang

    if not PYTHON.exists():
        raise Skip("the environment that has SGLang is not built: make sglang")
    with tempfile.TemporaryDirectory(prefix="hw-") as folder:
        sglang = RunningSGLang.start(build_tiny_model(Path(folder) / "model", **SHAPE), room=ROOM)
        try:
            return asyncio.run(side(sglang, Path(folder), QUICK_MEASURE_S if quick else MEASURE_S))
        finally:
            sglang.stop()


def prompt(number: int) -> list[int]:
    """Another prompt for every group, as data would have it."""
    return [2 + (number * 31 + i * 7) % 40 for i in range(PROMPT_TOKENS)]


class Counter:
    """Tokens that came within the measured time."""

    def __init__(self) -> None:
        self.tokens = 0
        self.begun_s = 0.0

    def begin(self) -> None:
        self.tokens, self.begun_s = 0, time.perf_counter()

    def rate(self) -> float:
        return self.tokens / (time.perf_counter() - self.begun_s)


async def post(sglang: Any, folder: Path, measure_s: float) -> float:
    """Keep ROOM requests under way; a group's samples are asked for together."""
    import aiohttp

    counter, numbers = Counter(), itertools.count()
    samples = (prompt(number // GENERATIONS) for number in numbers)
    headers = {"Authorization": f"Bearer {sglang.api_key}"}
    parameters = {"max_new_tokens": COMPLETION_TOKENS, "temperature": 1.0, "ignore_eos": True}

    async def keep_one(session: aiohttp.ClientSession) -> None:
        while True:
            body = {"input_ids": next(samples), "sampling_params": parameters, "return_logprob": True}
            async with session.post("/generate", json=body) as response:
                answer = await response.json()
            assert len(answer["meta_info"]["output_token_logprobs"]) == COMPLETION_TOKENS
            counter.tokens += len(answer["output_ids"])

    async with aiohttp.ClientSession(sglang.url, headers=headers) as session:
        tasks = [asyncio.create_task(keep_one(session)) for _ in range(ROOM)]
        await asyncio.sleep(WARM_S)
        counter.begin()
        await asyncio.sleep(measure_s)
        rate = counter.rate()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return rate


async def serve(sglang: Any, folder: Path, measure_s: float) -> float:
    """Play the learner to a server process that is attached to SGLang."""
    from protocol.channel import listen
    from protocol.weights.layout import MappedWeights, build_manifest
    from protocol.weights.serving import WeightsServer
    from tests.factories import INITIAL

    address = f"ipc://{folder}/learner"
    weights = MappedWeights.open(sglang.model / "model.safetensors")
    manifest = build_manifest(INITIAL, weights, "xxh3_128")
    with WeightsServer(f"{address}-weights") as bulk:
        bulk.serve(manifest, weights)
        async with listen(address) as channel:
            server = start_server(sglang, address, folder)
            try:
                async with asyncio.timeout(START_S + measure_s):
                    return await lease(channel, manifest, bulk.address, measure_s)
            finally:
                server.terminate()
                server.wait(30)


def start_server(sglang: Any, address: str, folder: Path) -> subprocess.Popen[bytes]:
    flags = {
        "learner": address, "engine": "sglang", "engine-url": sglang.url, "engine-api-key": sglang.api_key,
        "engine-admin-key": sglang.admin_key, "model": sglang.model, "room": ROOM, "max-model-length": 512,
        "reward-funcs": "exact_match", "reward-workers": 1, "staging-dir": folder / "staging", "drain-s": 0,
    }  # fmt: skip
    command = [sys.executable, "-m", "rollout_server"]
    command += [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return subprocess.Popen(command, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})


async def lease(channel: Any, manifest: Any, bulk_address: str, measure_s: float) -> float:
    """Welcome the server, give it the weights, keep it leased as a learner does, count what comes."""
    import numpy as np

    from protocol import messages
    from protocol.parts import PartAssembler
    from tests.factories import make_lease, make_sampling

    counter, numbers, parts = Counter(), itertools.count(), PartAssembler()
    run_id, begin_s, ends_s = secrets.token_hex(8), float("inf"), float("inf")

    def give(peer: bytes) -> None:
        number = next(numbers)
        sampling = make_sampling(max_completion_length=COMPLETION_TOKENS, stop_token_ids=())
        channel.send(
            peer,
            make_lease(
                ordinal=number, num_generations=GENERATIONS, prompt_tokens=prompt(number), sampling=sampling,
                run_id=run_id,
            ),
        )  # fmt: skip

    while True:
        peer, message = await channel.recv()
        now_s = time.perf_counter()
        if now_s >= ends_s:
            return counter.rate()
        if now_s >= begin_s:
            counter.begin()
            begin_s, ends_s = float("inf"), now_s + measure_s
        match message:
            case messages.Hello():
                channel.send(
                    peer, messages.Welcome(session=message.session, run_id=run_id, incarnation=1, liveness_s=60.0)
                )
                ready = np.frombuffer(manifest.to_json(), np.uint8)
                channel.send(
                    peer, messages.WeightsReady(version=manifest.version, manifest=ready, addresses=(bulk_address,))
                )
            case messages.WeightsStaged():
                channel.send(peer, messages.WeightsSwap(version=message.version))
            case messages.WeightsLive():
                begin_s = now_s + WARM_S
                for _ in range(2 * ROOM // GENERATIONS):
                    give(peer)
            case messages.Group() if (group := message if message.num_parts == 1 else parts.add(message)) is not None:
                assert group.completion_lengths.tolist() == [COMPLETION_TOKENS] * GENERATIONS
                channel.send(
                    peer, messages.Ack(group_id=group.group_id, attempt=group.attempt, status=messages.AckStatus.OK)
                )
                counter.tokens += group.completion_tokens.size
                give(peer)


ROWS = [
    Row(
        name="sglang_server",
        control="SGLang driven directly",
        ours=through_server,
        baseline=direct,
        ratio="ours/baseline",
        target=0.9,
        sense="higher",
        unit="tokens/s",
    ),
]
