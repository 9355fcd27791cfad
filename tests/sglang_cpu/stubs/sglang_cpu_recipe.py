"""Imported by a .pth file at the start of every interpreter of the test environment: lets SGLang run on its CPU path.

`torchvision` from the package index is linked against CUDA and asks for operators that a CPU build of torch lacks: they
are declared before it is imported. SGLang's adapters pin host memory, which torch refuses where there is no accelerator
to copy it to: ordinary memory is given instead. Everything else here is an environment variable.
"""

from __future__ import annotations

import functools
import os
import sys
from importlib.abc import MetaPathFinder
from typing import Any

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


class DeclareOperators(MetaPathFinder):
    """Runs once, when torchvision is about to be imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is not None:  # a build with CUDA, run on a CPU: torchvision finds its operators there
            return
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold, float scale, int zero_point) -> Tensor")
        self.library = library


class PinNothing(MetaPathFinder):
    """Runs once, when SGLang's adapters are about to be imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "sglang.srt.lora":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.cuda.is_available():
            return
        for factory in ("tensor", "empty", "zeros", "arange"):
            setattr(torch, factory, unpinned(getattr(torch, factory)))
        torch.Tensor.pin_memory = lambda tensor, device=None: tensor


def unpinned(make: Any) -> Any:
    """Wrap a function that makes tensors: `pin_memory` is passed over."""

    @functools.wraps(make)
    def made(*arguments: Any, pin_memory: bool = False, **options: Any) -> Any:
        return make(*arguments, **options)

    return made


finders = DeclareOperators(), PinNothing()
sys.meta_path[:0] = finders
