"""Whether an address is free, before anything is opened; and that a socket's file goes with its owner."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.channel import listen
from protocol.errors import ConfigError
from protocol.free_address import check_free
from protocol.weights.serving import WeightsServer


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A directory with a short name: a socket's path may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="hw-") as name:
        yield Path(name)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "*"])
def test_a_port_that_another_process_has(taken: int, host: str) -> None:
    with pytest.raises(ConfigError, match=rf"^cannot listen on tcp://.*:{taken}: another process has it: stop that"):
        check_free(f"tcp://{host}:{taken}")


def test_the_port_of_the_weights_counts_too(taken: int) -> None:
    with pytest.raises(ConfigError, match=rf"^cannot listen on tcp://127.0.0.1:{taken}: another process has it"):
        check_free(f"tcp://127.0.0.1:{taken - 1}")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://[::1]:*", "ipc://@abstract"])
def test_any_free_one_is_free(address: str) -> None:
    check_free(address)


def test_a_host_that_is_not_here() -> None:
    with pytest.raises(ConfigError, match=r"^cannot listen on tcp://192\.0\.2\.1:5: Cannot assign requested address"):
        check_free("tcp://192.0.2.1:5")


def test_paths(sockets: Path) -> None:
    check_free(f"ipc://{sockets}/free")
    (sockets / "file-weights").write_text("precious")
    with pytest.raises(ConfigError, match="file-weights: a file that is no socket lies there"):
        check_free(f"ipc://{sockets}/file")
    with pytest.raises(ConfigError, match=r"No such file or directory: make the directory .*/missing"):
        check_free(f"ipc://{sockets}/missing/x")
    with pytest.raises(ConfigError, match=r"the path has \d+ bytes, a socket's may have 107"):
        check_free(f"ipc://{sockets}/{'x' * 107}")
    assert [path.name for path in sockets.iterdir()] == ["file-weights"]


LISTEN = """
import asyncio, os, signal, sys
from protocol.channel import bulk_address, listen
from protocol.weights.serving import WeightsServer

async def main():
    async with listen(sys.argv[1]) as listener:
        with WeightsServer(bulk_address(listener.address)):
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_sockets_of_a_killed_process_are_no_obstacle_and_a_clean_end_leaves_none(sockets: Path) -> None:
    address = f"ipc://{sockets}/learner"
    killed = subprocess.run([sys.executable, "-c", LISTEN, address], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = ["learner", "learner-weights"]
    assert sorted(path.name for path in sockets.iterdir()) == left, "a kill leaves both"
    check_free(address)

    async def main() -> None:
        async with listen(address) as listener:
            with WeightsServer(f"{listener.address}-weights") as server:
                assert sorted(path.name for path in sockets.iterdir()) == left
                with pytest.raises(ConfigError, match="another process has it"):
                    check_free(address)
            server.close()
        await listener.close()

    asyncio.run(main())
    assert list(sockets.iterdir()) == []
