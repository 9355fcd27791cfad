"""Imported at the start of every interpreter of the environment that install.sh makes."""

from __future__ import annotations

import os

# The kernels are those of the host's torch, older than the version that SGLang asks for.
os.environ.setdefault("SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK", "1")
