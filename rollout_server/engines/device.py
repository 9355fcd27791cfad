"""Where a model runs and in which numbers, once the hardware is known. Imports torch when called."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16"]


def resolve_device(device: str) -> str:
    """`auto` is cuda where there is one, else cpu."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: Dtype, device: str) -> Literal["float32", "bfloat16"]:
    """`auto` is bfloat16 on a GPU, and on a CPU that has it; else float32.

    A GPU is not asked: that would take memory of it for good, and all since 2020 have it.
    """
    import torch

    if dtype != "auto":
        return dtype
    return "bfloat16" if device.startswith("cuda") or torch.cpu._is_avx512_bf16_supported() else "float32"


def has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies tiles, which SGLang's own kernels for CPUs need."""
    try:
        return "amx_tile" in cpuinfo.read_text("utf-8").split()
    except OSError:
        return False
