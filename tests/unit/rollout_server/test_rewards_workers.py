"""Worker processes that are stopped while they start."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]

STOPPED_WHILE_STARTING = """
import asyncio, os, sys
from pathlib import Path

from pebble.pool.process import WorkerManager

from rollout_server.rewards.workers import Workers

directory, = map(Path, sys.argv[1:])
gate = directory / "gate"  # whoever opens it waits for the other end

if __name__ == "__mp_main__":  # in a worker, before it has read what it is to do: all but one wait
    try:
        (directory / "first").open("x").close()
    except FileExistsError:
        gate.open("r").close()

if __name__ == "__main__":
    stop = WorkerManager.force_stop_workers

    def slowly(manager):
        assert workers._ready.acquire(timeout=1.0)  # of `close` itself
        gate.open("w").close()  # pebble has closed its channel, and kills next: the late one goes on
        started = False
        while not started and all(p.is_alive() for p in manager.workers.values()):
            started = workers._ready.acquire(timeout=0.01)
        print("the late one started:", started)
        stop(manager)

    os.mkfifo(gate)
    WorkerManager.force_stop_workers = slowly
    workers = Workers(["exact_match"], count=1, start_s=60.0)

    async def main():
        first = workers._pool.schedule(abs, args=(-1,))
        assert await asyncio.wrap_future(first) == 1
        assert workers._ready.acquire(timeout=0)
        await workers.close()

    asyncio.run(main())
"""


def test_a_worker_that_is_stopped_while_it_starts_says_nothing(tmp_path):
    """pebble closes its channel, and with it unlinks the semaphores of a process that has yet to open them."""
    script = tmp_path / "main.py"
    script.write_text(STOPPED_WHILE_STARTING)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120.0,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "the late one started: True\n"
