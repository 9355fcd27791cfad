"""What the last step of a process cost, and how far its memory rose above what it held before the first.

    meter = Meter()          # everything is loaded; nothing has run yet
    for _ in range(2):
        step()
        meter.lap()
    meter.figures(tokens)    # of the last step: the first one warmed up

CPU seconds, not wall clock, are what is judged: with one torch thread they are the same on an idle core, and on a
busy one only they are the work's own. What loading needed is not in the peak.
"""

from __future__ import annotations

import ctypes
import gc
import time

from tests.bench.memory import peak_mib, reset_peak


class Meter:
    """See the module's docstring."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what loading has freed is no base
        self._base_mib = reset_peak()
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
            "peak_mib": peak_mib() - self._base_mib,
        }
