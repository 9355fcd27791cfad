"""Starts the real SGLang on a CPU, for the tests: as the product does, but in the environment that has it.

`python` is the interpreter of that environment (the Makefile builds it); its own recipe makes SGLang run without a GPU.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from rollout_server.config import LORA_TARGET_MODULES
from rollout_server.engines.sglang.child import kill_group, log_tail
from rollout_server.engines.sglang.command import build_options, child_environment, keys_yaml, to_flags
from rollout_server.engines.sglang.host import free_port

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("HEADWAY_SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
START_S = 120.0
ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, kw_only=True)
class RunningSGLang:
    """One that answers."""

    model: Path
    url: str
    api_key: str
    admin_key: str
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def pid(self) -> int:
        """Of the process that leads its group."""
        return self.process.pid

    @classmethod
    def start(
        cls, model: Path, *, room: int = 16, max_model_length: int = 512, max_lora_rank: int = 0, **chosen: Any
    ) -> Self:
        """Start it and wait until it answers; `chosen` are SGLang's own arguments."""
        directory = Path(tempfile.mkdtemp(prefix="headway-test-"))
        api_key, admin_key = secrets.token_hex(8), secrets.token_hex(8)
        (directory / "keys.yaml").write_text(keys_yaml(api_key, admin_key))
        port = free_port(0)
        options = build_options(
            model=model, port=port, keys_file=directory / "keys.yaml", device="cpu", dtype="float32", room=room,
            context_length=max_model_length, has_amx=False, max_lora_rank=max_lora_rank,
            lora_target_modules=LORA_TARGET_MODULES, chosen=chosen,
        )  # fmt: skip
        log_file = directory / "sglang.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [PYTHON, "-m", "sglang.launch_server", *to_flags(options)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=child_environment(os.environ | ENVIRONMENT, directory=directory, options=options),
            )  # fmt: skip
        started = cls(
            model=model, url=f"http://127.0.0.1:{port}", api_key=api_key, admin_key=admin_key, process=process,
            log_file=log_file,
        )  # fmt: skip
        deadline = time.monotonic() + START_S
        while not started.answers():
            assert process.poll() is None, f"SGLang ended with {process.returncode}\n{log_tail(log_file)}"
            assert time.monotonic() < deadline, f"SGLang was not up in {START_S:g} s\n{log_tail(log_file)}"
            time.sleep(0.1)
        return started

    def answers(self) -> bool:
        """Whether it takes calls."""
        request = urllib.request.Request(f"{self.url}/model_info", headers={"Authorization": f"Bearer {self.api_key}"})
        try:
            with urllib.request.urlopen(request, timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def processes(self) -> list[psutil.Process]:
        """It and everything it has started."""
        leader = psutil.Process(self.pid)
        return [leader, *leader.children(recursive=True)]

    def stop(self) -> None:
        """End it, with all it started, and remove its files."""
        kill_group(self.pid)
        self.process.wait(5)
        shutil.rmtree(self.log_file.parent, ignore_errors=True)
