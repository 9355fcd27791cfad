"""Several ranks as torchrun would start them, without torchrun: every one's exit code and output, within a deadline."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 90.0
"""Of all ranks together, imports of torch included; a hang is what it is for."""


@dataclass(frozen=True)
class Ended:
    """A rank that has ended."""

    code: int
    """Negative when a signal ended it."""
    output: str

    @property
    def errors(self) -> list[str]:
        """The lines that a user would take for errors."""
        return [line for line in self.output.splitlines() if ": error:" in line or line.startswith("Traceback")]


def run_ranks(commands: Sequence[Sequence[str]], directory: Path) -> list[Ended]:
    """Start `python -m` each command as one rank of the same world, and wait for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, command in enumerate(commands):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        with (directory / f"rank-{rank}.out").open("wb") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=ROOT,
                    env=environment,
                )
            )  # fmt: skip
    try:
        codes = [process.wait(DEADLINE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [Ended(code, (directory / f"rank-{rank}.out").read_text()) for rank, code in enumerate(codes)]
