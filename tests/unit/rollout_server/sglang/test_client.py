"""The calls as they fail: each failure is an EngineFailure that says what SGLang said."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rollout_server.engines.base import EngineFailure
from rollout_server.engines.sglang import client as client_module
from rollout_server.engines.sglang.answers import PROBE
from rollout_server.engines.sglang.client import CallRefused, Client, Disconnected, Load
from rollout_server.engines.sglang.host import free_port, until_answers
from tests.fake_sglang.driving import ADMIN_KEY, API_KEY, Fake, run, running_fake

pytestmark = pytest.mark.usefixtures("fake_path")


@contextlib.asynccontextmanager
async def connected(
    model: Path, api_key: str = API_KEY, admin_key: str = ADMIN_KEY
) -> AsyncIterator[tuple[Client, Fake]]:
    port = free_port(0)
    with running_fake(model, port):
        up = Client(f"http://127.0.0.1:{port}", api_key=API_KEY, admin_key=ADMIN_KEY)
        await until_answers(up)
        await up.close()
        client = Client(f"http://127.0.0.1:{port}", api_key=api_key, admin_key=admin_key)
        try:
            yield client, Fake(port)
        finally:
            await client.close()


def test_a_call_that_is_refused_says_how(tiny_model_dir: Path) -> None:
    async def case() -> None:
        async with connected(tiny_model_dir) as (client, fake):
            await fake.tell(
                refuse={"/generate": 400}, fail_update="no such shape", garbage=["/server_info", "/v1/loads"]
            )
            with pytest.raises(CallRefused, match=r"/generate says 400: \{\"error\": .*refused") as refused:
                await client.generate(PROBE)
            assert refused.value.status == 400
            with pytest.raises(EngineFailure, match=r"/update_weights_from_disk says 400: .*no such shape"):
                await client.update_weights(str(tiny_model_dir), "1.0", flush_cache=True)
            with pytest.raises(EngineFailure, match="/server_info: an answer that is none: Expected `object`"):
                await client.info()
            with pytest.raises(EngineFailure, match="/v1/loads: an answer that is none"):
                await client.loads()

    run(case())


@pytest.mark.parametrize(
    ("api_key", "admin_key", "generates", "pauses"),
    [("wrong", ADMIN_KEY, False, True), (API_KEY, "wrong", True, False), (API_KEY, API_KEY, True, False)],
)
def test_each_key_opens_its_own_calls(
    tiny_model_dir: Path, api_key: str, admin_key: str, generates: bool, pauses: bool
) -> None:
    async def case() -> None:
        async with connected(tiny_model_dir, api_key, admin_key) as (client, _):
            for works, call in ((generates, client.generate(PROBE)), (pauses, client.pause("retract"))):
                if works:
                    await call
                else:
                    with pytest.raises(CallRefused, match=r"says 401: .*Unauthorized"):
                        await call

    run(case())


def test_a_call_has_a_deadline(tiny_model_dir: Path) -> None:
    async def case() -> None:
        async with connected(tiny_model_dir) as (client, fake):
            await fake.tell(hang=True, hold=["/v1/loads"])
            with pytest.raises(EngineFailure, match=r"/generate did not answer within 0.05 s"):
                await client.generate(PROBE, deadline_s=0.05)
            with pytest.raises(EngineFailure, match=r"/v1/loads did not answer within 0.05 s"):
                await client.loads(deadline_s=0.05)

    run(case())


def test_a_server_that_dies_or_is_not_there_is_a_broken_connection(tiny_model_dir: Path) -> None:
    async def case() -> None:
        async with connected(tiny_model_dir) as (client, fake):
            await fake.tell(hang=True)
            under_way = asyncio.create_task(client.generate(PROBE))
            await fake.until(lambda told: told["calls"].get("/generate") == 1)
            await fake.tell(die=3)
            with pytest.raises(Disconnected, match="/generate: "):
                await under_way
            with pytest.raises(Disconnected, match="/server_info: ClientConnectorError"):
                await client.info()

    run(case())


def test_closing_fails_what_is_under_way_and_what_comes_later(tiny_model_dir: Path) -> None:
    async def case() -> None:
        async with connected(tiny_model_dir) as (client, fake):
            await fake.tell(hang=True)
            under_way = asyncio.create_task(client.generate(PROBE))
            await fake.until(lambda told: told["calls"].get("/generate") == 1)
            await client.close()
            with pytest.raises(Disconnected, match="/generate: "):
                await under_way
            with pytest.raises(Disconnected, match="/generate: RuntimeError: Session is closed"):
                await client.generate(PROBE)

    run(case())


def test_a_connection_is_given_up_before_the_server_drops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn drops idle connections after 5 s; a POST sent into that looks like the death of the server."""
    assert client_module.KEEP_ALIVE_S < 5.0
    monkeypatch.setattr(client_module, "KEEP_ALIVE_S", 0.02)
    dropped = asyncio.Queue[str]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        assert await reader.read() == b""  # until the client hangs up
        dropped.put_nowait("by the client")
        writer.close()

    async def case() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", api_key="", admin_key="")
            await client._call("GET", "/x", dict, None)
            assert await asyncio.wait_for(dropped.get(), 5) == "by the client"
            await client.close()

    run(case())


def test_a_load_counts_tokens_where_it_can() -> None:
    assert Load().tokens_decoded == 0
    assert Load(decode_moments=[]).tokens_decoded == 0
    assert Load(decode_moments=[3.0]).tokens_decoded == 0
    assert Load(decode_moments=[3.0, 12.0, 60.0]).tokens_decoded == 12
