"""Imported by a .pth file at the start of every interpreter of the test environment: lets SGLang run on its CPU path.

`torchvision` from the package index is linked against CUDA and asks for operators that a CPU build of torch lacks: they
are declared before it is imported. Everything else here is an environment variable.
"""

from __future__ import annotations

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


finder = DeclareOperators()
sys.meta_path.insert(0, finder)
