"""What a machine has, asked without torch, which takes seconds to say it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CUDA_SIGNS = ("/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/dxg")
"""Any of them is there where CUDA is (the last under WSL)."""


def has_cuda(environment: Mapping[str, str], *, root: Path = Path("/")) -> bool:
    """Tell whether there are signs of a CUDA device that this process may use."""
    hidden = environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any((root / sign.lstrip("/")).exists() for sign in CUDA_SIGNS)
