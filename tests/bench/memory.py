"""Peak memory of the running process, from Linux."""

from __future__ import annotations

import re
from pathlib import Path


def reset_peak() -> float:
    """Forget the peak so far. Returns what is resident now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mib("VmRSS")


def peak_mib() -> float:
    """Read the largest resident set since `reset_peak`."""
    return _status_mib("VmHWM")


def _status_mib(field: str) -> float:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) / 1024
