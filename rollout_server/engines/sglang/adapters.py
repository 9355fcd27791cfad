"""Adapters in one life of SGLang: each version is one, and lasts as long as anything is sampled with it.

    load -> check by canaries -> new samples begin with it -> a newer one comes -> its last sample ends -> unload

A sample keeps the adapter that it began with: nothing pauses for a new version, nothing is computed again, and every
token is of the one version that its completion is named after. SGLang keeps cached prompts apart by adapter.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import shutil
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from protocol.logs import event
from protocol.versions import Version
from protocol.weights.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, changed_weights, peft_config
from protocol.weights.layout import MappedWeights
from protocol.weights.staging import links_directory
from rollout_server.engines.base import EngineFailure, StagedWeights
from rollout_server.engines.sglang.client import Client

log = logging.getLogger(__name__)


class Adapters:
    """Which adapters SGLang has, and how many samples each is used by.

    Args:
        client: of this life.
        keep: does what nobody waits for (`Life.keep`).
    """

    def __init__(self, client: Client, keep: Callable[[Coroutine[Any, Any, None]], object]) -> None:
        self._client, self._keep = client, keep
        self._prefix = secrets.token_hex(4)
        """SGLang never forgets a name; those of another life, or of another server at the same SGLang, are not ours."""
        self._users: dict[Version, int] = {}
        self._newest: Version | None = None
        self.base_checksum = ""
        """`kind:checksum` of the base model, once it has been looked at."""

    def name(self, version: Version) -> str:
        """What SGLang calls the adapter."""
        return f"{self._prefix}-{version}"

    async def load(self, version: Version, directory: Path) -> None:
        """Have SGLang read an adapter; samples go on with theirs.

        Raises:
            EngineFailure: SGLang says no.
        """
        await self._client.load_adapter(self.name(version), str(directory))
        self._users[version] = 0

    def switch(self, version: Version) -> None:
        """Begin samples with that version from now on; those that no sample uses go."""
        self._newest = version
        for other in list(self._users):
            self._drop_unused(other)

    def drop(self, version: Version) -> None:
        """Give up a version that was loaded, if it was, and that nothing is sampled with."""
        if version in self._users:
            self._drop_unused(version)

    @contextlib.contextmanager
    def using(self, version: Version) -> Iterator[str]:
        """Keep a version in SGLang while something is sampled with it; gives its name."""
        self._users[version] += 1
        try:
            yield self.name(version)
        finally:
            self._users[version] -= 1
            self._drop_unused(version)

    def _drop_unused(self, version: Version) -> None:
        if version != self._newest and not self._users[version]:
            del self._users[version]
            # Only now: SGLang lets nobody load an adapter while it waits for the users of one that it unloads.
            self._keep(self._unload(version))

    async def _unload(self, version: Version) -> None:
        try:
            await self._client.unload_adapter(self.name(version))
        except EngineFailure as failure:  # it takes memory in SGLang, and nothing else
            event(log, "adapter_not_unloaded", level=logging.WARNING, version=version, reason=failure)


def write_adapter(weights: StagedWeights, model: Path) -> Path:
    """Give an adapter a directory as SGLang wants it, with a copy of the file.

    A copy: SGLang may map the file, and go on reading it when the next version is written in its place.

    Raises:
        EngineFailure: none can be made.
    """
    assert weights.adapter is not None
    directory = links_directory(weights.path)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        shutil.copyfile(weights.path, directory / ADAPTER_WEIGHTS)
        with MappedWeights.open(weights.path) as mapped:
            changed = changed_weights(mapped.layout.specs, weights.adapter.r)
        config = peft_config(weights.adapter, changed, base_model=str(model))
        (directory / ADAPTER_CONFIG).write_text(json.dumps(config), "utf-8")
    except OSError as error:
        raise EngineFailure(f"adapter {weights.path.name} cannot be given a directory for SGLang: {error}") from error
    return directory
