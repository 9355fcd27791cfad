"""WeightsReceiver and the bulk plane it really uses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from protocol.channel import bulk_server_socket
from protocol.messages import WeightsFailed, WeightsLive, WeightsReady, WeightsStaged, WeightsSwap
from protocol.versions import Version
from protocol.waits import Waits
from protocol.weights.layout import build_manifest
from protocol.weights.serving import WeightsServer
from rollout_server.config import ScriptedOptions
from rollout_server.engines.scripted import ScriptedEngine
from rollout_server.weights import WeightsReceiver
from tests.weights import make_weights

SOON_S = 10.0


@contextlib.asynccontextmanager
async def real_receiver(tmp_path: Path) -> AsyncIterator[tuple[WeightsReceiver, ScriptedEngine]]:
    async with ScriptedEngine(ScriptedOptions(), room=4) as engine:
        receiver = WeightsReceiver(engine, Waits(), learner="ipc:///nowhere", directory=tmp_path / "staging")
        loop = asyncio.create_task(receiver.loop())
        try:
            yield receiver, engine
        finally:
            loop.cancel()
            await asyncio.wait_for(receiver.close(), SOON_S)
        assert list((tmp_path / "staging").glob("weights-*")) == [], "nothing is left behind"


def test_bytes_that_do_not_match_their_manifest_never_go_live(tmp_path: Path, tmp_path_factory: Any) -> None:
    published = make_weights(tmp_path / "published", seed=1)
    manifest = build_manifest(Version(1, 1), published, "xxh3_128")
    other = build_manifest(Version(1, 1), make_weights(tmp_path / "other", seed=2), "xxh3_128")
    address = f"ipc://{tmp_path_factory.mktemp('w')}/w"

    async def main() -> None:
        async with real_receiver(tmp_path) as (receiver, engine):
            with WeightsServer(address) as server:
                server.serve(manifest, published)
                lie = np.frombuffer(other.to_json(), np.uint8)
                receiver.announce(WeightsReady(version=Version(1, 1), manifest=lie, addresses=(address,)))
                failed = await asyncio.wait_for(receiver.reports.get(), SOON_S)
                assert isinstance(failed, WeightsFailed)
                assert "do not hash to the manifest after 3 refetches" in failed.reason
                assert engine.live is None
                second = msgspec.structs.replace(manifest, version=Version(1, 2))
                server.withdraw(Version(1, 1))
                server.serve(second, published)
                truth = np.frombuffer(second.to_json(), np.uint8)
                receiver.announce(WeightsReady(version=Version(1, 2), manifest=truth, addresses=(address,)))
                staged = await asyncio.wait_for(receiver.reports.get(), SOON_S)
                assert isinstance(staged, WeightsStaged)
                receiver.swap(WeightsSwap(version=staged.version))
                live = await asyncio.wait_for(receiver.reports.get(), SOON_S)
                assert isinstance(live, WeightsLive)
                assert engine.live == live.version == Version(1, 2)

    asyncio.run(main())


def test_closing_calls_off_a_fetch_from_somebody_who_does_not_answer(tmp_path: Path, tmp_path_factory: Any) -> None:
    manifest = build_manifest(Version(1, 1), make_weights(tmp_path / "published", seed=1), "xxh3_128")
    address = f"ipc://{tmp_path_factory.mktemp('w')}/w"

    async def main() -> None:
        with bulk_server_socket(address) as silent:
            silent.set(zmq.RCVTIMEO, int(1000 * SOON_S))
            async with real_receiver(tmp_path) as (receiver, _):
                text = np.frombuffer(manifest.to_json(), np.uint8)
                receiver.announce(WeightsReady(version=Version(1, 1), manifest=text, addresses=(address,)))
                await asyncio.to_thread(silent.recv_multipart)  # it has asked
            assert receiver.reports.empty()

    asyncio.run(main())
