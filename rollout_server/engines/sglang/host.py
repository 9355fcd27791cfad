"""Who runs SGLang: we do, as a child, or the user does and gives its address. Both are used alike."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any, Protocol

from protocol.errors import ConfigError
from rollout_server.config import ServerConfig
from rollout_server.engines.base import EngineFailure
from rollout_server.engines.sglang.answers import PROBE
from rollout_server.engines.sglang.child import Child
from rollout_server.engines.sglang.client import CallRefused, Client, Disconnected, ServerInfo
from rollout_server.engines.sglang.command import build_command, build_options, child_environment, keys_yaml
from rollout_server.engines.sglang.schema import ModelSchema, differs

RETRY_S = 0.2
"""Between two looks at whether SGLang answers yet."""
SPARE_TOKENS = 8
"""SGLang ends a sample a little before its context does."""
UNAUTHORIZED = (401, 403)


class StartFailed(EngineFailure):
    """SGLang did not come up. The text ends with the last lines it printed, where there are any."""


class Host(Protocol):
    """Runs SGLang, one life after another."""

    async def start(self) -> Client:
        """Bring SGLang up, with whatever weights; return the way to talk to it.

        Raises:
            StartFailed: it did not come up in time, or cannot.
            ConfigError: what the user asks for cannot work.
        """

    def died(self) -> asyncio.Future[str]:
        """What ended SGLang, once something has."""

    async def stop(self) -> None:
        """End what `start` started."""

    async def close(self) -> None:
        """Stop, and remove what is left on disk."""


class ChildHost:
    """SGLang as our child process.

    Args:
        config: the server's.
        schema: the model's limits.
        device: cuda or cpu.
        dtype: of the served weights.
        has_amx: whether this CPU has what SGLang's own CPU kernels need.
    """

    def __init__(self, config: ServerConfig, schema: ModelSchema, *, device: str, dtype: str, has_amx: bool) -> None:
        self._config = config
        self._device, self._dtype, self._has_amx = device, dtype, has_amx
        self._context_length = config.max_model_length + SPARE_TOKENS
        if schema.max_positions is not None:
            self._context_length = min(self._context_length, schema.max_positions)
        self._child: Child | None = None
        self._directory = Path(tempfile.mkdtemp(prefix="headway-sglang-"))
        """0700, and its name short: sockets are made in it, in a folder for each life."""
        self._scratch = self._directory / "life"
        self._keys_file = self._scratch / "keys.yaml"
        self._log_file = config.engine_log or self._directory / "sglang.log"
        self._failed = False

    async def start(self) -> Client:
        """See Host."""
        client = None
        try:
            client = await self._launch()
            assert self._child is not None
            async with asyncio.timeout(self._config.engine_start_s):
                await until_answers(client, self._child.died)
                await until_generates(client, self._child.died)
            self._child.watch_workers()
            self._keys_file.unlink(missing_ok=True)
            return client
        except TimeoutError as error:
            what = f"was not up within engine_start_s = {self._config.engine_start_s:g} s"
            raise await self._failure(client, what) from error
        except (StartFailed, OSError) as error:
            what = str(error) if isinstance(error, StartFailed) else f"cannot be started: {error}"
            raise await self._failure(client, what) from error
        except BaseException:
            await self._end(client)
            raise

    async def _launch(self) -> Client:
        """Start the child; it does not answer yet."""
        keys = secrets.token_hex(24), secrets.token_hex(24)
        port = free_port(self._config.sglang.get("port", 0))
        self._scratch.mkdir(mode=0o700, exist_ok=True)
        self._keys_file.touch(mode=0o600)
        self._keys_file.write_text(keys_yaml(*keys), "utf-8")
        options = build_options(
            model=Path(self._config.model), port=port, keys_file=self._keys_file, device=self._device,
            dtype=self._dtype, room=self._config.room, context_length=self._context_length, has_amx=self._has_amx,
            max_lora_rank=self._config.max_lora_rank, lora_target_modules=self._config.lora_target_modules,
            chosen=self._config.sglang,
        )  # fmt: skip
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        environment = child_environment(os.environ, directory=self._scratch, options=options)
        self._child = await Child.start(build_command(options, parent=os.getpid()), environment, self._log_file)
        return Client(f"http://127.0.0.1:{port}", api_key=keys[0], admin_key=keys[1])

    def died(self) -> asyncio.Future[str]:
        """See Host."""
        assert self._child is not None
        return self._child.died

    async def stop(self) -> None:
        """See Host. Who is stopped before the end has failed."""
        self._failed = self._failed or self._child is not None
        await self._kill()

    async def close(self) -> None:
        """Stop; the log of an engine that failed is kept."""
        await self._kill()
        if not (self._failed and self._log_file.parent == self._directory):
            await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def _failure(self, client: Client | None, what: str) -> StartFailed:
        """Put an end to a start that failed and say what it printed."""
        if self._child is not None:
            self._failed = True
            what += f". The end of its log, {self._log_file}:\n{self._child.tail()}"
        await self._end(client)
        return StartFailed(f"SGLang {what}")

    async def _end(self, client: Client | None) -> None:
        if client is not None:
            await client.close()
        await self._kill()

    async def _kill(self) -> None:
        if self._child is not None:
            await self._child.kill()
            self._child = None  # only now: a stop that is called off is made good by `close`
        await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)


class UrlHost:
    """SGLang that somebody else runs.

    Args:
        config: with engine_url and its keys.
        schema: our model, which it must serve.
        max_length: tokens of prompt and completion that it must take.
    """

    def __init__(self, config: ServerConfig, schema: ModelSchema, *, max_length: int) -> None:
        self._config, self._schema, self._max_length = config, schema, max_length

    async def start(self) -> Client:
        """Wait until it answers, then see that it serves our model, that our keys fit and nobody gets in without."""
        config = self._config
        client = Client(config.engine_url, api_key=config.engine_api_key, admin_key=config.engine_admin_key)
        try:
            async with asyncio.timeout(config.engine_start_s):
                await until_answers(client)
                await self._check_model(client)
                await self._check_keys(client)
                await client.resume()  # whoever used it before may have gone in the middle of a swap
                await until_generates(client)
        except StartFailed as failure:
            await client.close()
            if isinstance(failure.__cause__, CallRefused) and failure.__cause__.status in UNAUTHORIZED:
                raise ConfigError(
                    f"engine_url = {config.engine_url} refuses engine_api_key: it must be its --api-key"
                ) from failure
            raise StartFailed(f"SGLang at engine_url = {config.engine_url} {failure}") from failure
        except TimeoutError as error:
            await client.close()
            raise StartFailed(
                f"no SGLang answered at engine_url = {config.engine_url} within engine_start_s ="
                f" {config.engine_start_s:g} s"
            ) from error
        except BaseException:
            await client.close()
            raise
        return client

    def died(self) -> asyncio.Future[str]:
        """Nobody tells: a connection that breaks does, or a probe that is not answered."""
        return asyncio.get_running_loop().create_future()

    async def stop(self) -> None:
        """It is not ours to stop."""

    async def close(self) -> None:
        """Nothing of it is on disk."""

    async def _check_model(self, client: Client) -> None:
        """See that it serves our model, and all of our length."""
        info, model = await client.info(), await client.model_info()
        wrong = await asyncio.to_thread(differs, self._schema, Path(info.model_path), model.model_type)
        if not wrong and info.context_length is not None and info.context_length < self._max_length:
            wrong = (
                f"it takes {info.context_length} tokens (its --context-length), and {self._max_length} are to fit"
                " (max_model_length)"
            )
        wrong = wrong or lora_differs(info, self._config)
        if wrong:
            raise ConfigError(
                f"engine_url = {self._config.engine_url}: {wrong}: start SGLang with the model and the length that are"
                " given here, or give what it has"
            )

    async def _check_keys(self, client: Client) -> None:
        url = self._config.engine_url
        try:
            await client.abort_all(keyless=True)
            open_to_all = True
        except CallRefused as refused:
            open_to_all = refused.status not in UNAUTHORIZED
        if open_to_all:
            raise ConfigError(
                f"engine_url = {url}: it takes new weights from anybody: start SGLang with --admin-api-key KEY and"
                " give the same as --engine-admin-key"
            )
        try:
            await client.abort_all()  # of a server that was here before
        except CallRefused as refused:
            if refused.status in UNAUTHORIZED:
                raise ConfigError(
                    f"engine_url = {url} refuses engine_admin_key: it must be its --admin-api-key"
                ) from None


def lora_differs(info: ServerInfo, config: ServerConfig) -> str:
    """Say why an SGLang does not serve what `max_lora_rank` asks for; empty when it does."""
    wanted = config.max_lora_rank
    if wanted and not info.enable_lora:
        modules = " ".join(config.lora_target_modules)
        return (
            f"it takes no adapters, and max_lora_rank is {wanted} here: it needs --enable-lora --max-lora-rank"
            f" {wanted} --lora-target-modules {modules}"
        )
    if wanted > (info.max_lora_rank or 0):
        return (
            f"it takes adapters of rank {info.max_lora_rank} (its --max-lora-rank), and max_lora_rank is {wanted} here"
        )
    if info.enable_lora and not wanted:
        return "it serves adapters (its --enable-lora), and max_lora_rank is 0 here: all weights would not fit in"
    return ""


async def until_answers(client: Client, died: asyncio.Future[str] | None = None) -> None:
    """Wait until SGLang takes calls.

    Raises:
        StartFailed: it ended, or cannot take them.
    """
    while True:
        if died is not None and died.done():
            raise StartFailed(f"ended while starting ({died.result()})")
        try:
            await client.info()
            return
        except Disconnected:
            await asyncio.sleep(RETRY_S)  # nobody tells when a port opens
        except EngineFailure as failure:
            raise StartFailed(f"did not come up: {failure}") from failure


async def until_generates(client: Client, died: asyncio.Future[str] | None = None) -> None:
    """Wait until SGLang has sampled a token.

    Raises:
        StartFailed: it ended, or cannot.
    """
    token = asyncio.ensure_future(client.generate(PROBE))
    try:
        ends: list[asyncio.Future[Any]] = [token] if died is None else [token, died]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not token.done():
            assert died is not None
            raise StartFailed(f"ended while starting ({died.result()})")
        token.result()
    except StartFailed:
        raise
    except EngineFailure as failure:
        raise StartFailed(f"did not come up: {failure}") from failure
    finally:
        token.cancel()
        await asyncio.gather(token, return_exceptions=True)


def free_port(wanted: int) -> int:
    """Find a free port on loopback, or see that the wanted one (not 0) is.

    Raises:
        ConfigError: it is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ConfigError(
                f"sglang.port = {wanted}: {error.strerror}; choose another one, or none: a free one is found"
            ) from error
        port: int = probe.getsockname()[1]
        return port
