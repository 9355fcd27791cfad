"""What the last step of a process cost, and how far its memory rose above what it held before the first.

    meter = Meter()          # everything is loaded; nothing has run yet
    for _ in range(2):
        step()
        meter.lap()
    meter.figures(tokens)    # of the last step: the first one warmed up

CPU seconds, not wall clock, are what is judged: with one torch thread they are the same on an idle core, and on a
busy one only they are the work's own. Linux only: the high-water mark of resident memory is reset through /proc, so
that what loading needed is not in it.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path

PROCESS = Path("/proc/self")


class Meter:
    """See the module's docstring."""

    def __init__(self) -> None:
        gc.collect()
        (PROCESS / "clear_refs").write_text("5")
        self._base_kib = resident_kib("VmRSS")
        self._laps = [(time.perf_counter(), time.process_time())]

    def lap(self) -> None:
        """Note that a step has ended."""
        self._laps.append((time.perf_counter(), time.process_time()))

    @property
    def num_laps(self) -> int:
        """Steps so far."""
        return len(self._laps) - 1

    def figures(self, num_tokens: int) -> dict[str, float]:
        """Return tokens/s and seconds of the last step, and the peak of all steps over the start in MiB."""
        (wall_before, cpu_before), (wall, cpu) = self._laps[-2:]
        return {
            "tokens_per_s": num_tokens / (cpu - cpu_before),
            "cpu_s": cpu - cpu_before,
            "wall_s": wall - wall_before,
            "peak_mib": (resident_kib("VmHWM") - self._base_kib) / 1024,
        }


def resident_kib(field: str) -> int:
    """Read VmRSS (resident memory now) or VmHWM (its highest value) of this process."""
    lines = (PROCESS / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
