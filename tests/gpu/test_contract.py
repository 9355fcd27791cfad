"""The suite that every engine passes (tests/contract/test_engines.py), on SGLang on this device.

Every case starts an SGLang of its own: a minute each. The model is tiny, its heads as wide as kernels want them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from protocol.versions import Version
from protocol.waits import Waits
from rollout_server.engines.base import Engine, StagedWeights
from tests.contract import test_engines as contract
from tests.gpu.rig import Rig
from tests.models import build_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]
CASE_S = 1000.0
SHAPE = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 256,
}

globals().update({name: case for name, case in vars(contract).items() if name.startswith("test_")})


@pytest.fixture
def kind(device: str, tmp_path: Path) -> contract.Kind:
    from rollout_server.engines.sglang import SGLangEngine

    rig = Rig(device=device, model=build_tiny_model(tmp_path / "model", **SHAPE), directory=tmp_path, vocab_size=44)

    def make(room: int) -> Engine:
        return SGLangEngine(rig.config(room=room), Waits())

    def weights(version: Version) -> StagedWeights:
        path = tmp_path / f"{version}.safetensors"
        if not path.exists():
            built = build_tiny_model(tmp_path / f"made-{version}", seed=version.policy_version, **SHAPE)
            path.write_bytes((built / "model.safetensors").read_bytes())
        return StagedWeights(version=version, path=path, digest=str(version))

    return contract.Kind("sglang", make, weights, contract.broken_weights(tmp_path), reproducible=False)


@pytest.fixture(autouse=True)
def _time_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(case: Coroutine[Any, Any, None]) -> None:
        async def limited() -> None:
            async with asyncio.timeout(CASE_S):
                await case

        asyncio.run(limited())

    monkeypatch.setattr(contract, "run", run)
