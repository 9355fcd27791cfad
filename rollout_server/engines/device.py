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
    """`auto` is bfloat16 where the hardware has it, else float32."""
    import torch

    if dtype != "auto":
        return dtype
    native = torch.cuda.is_bf16_supported() if device.startswith("cuda") else torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies tiles, which SGLang's own kernels for CPUs need."""
    try:
        return "amx_tile" in cpuinfo.read_text("utf-8").split()
    except OSError:
        return False
