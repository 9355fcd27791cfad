"""Run once by .venv-sglang's own Python: from then on every interpreter there finds the stand-ins."""

from __future__ import annotations

import sysconfig
from pathlib import Path

STUBS = Path(__file__).resolve().parent / "stubs"


def enable(site_packages: Path) -> Path:
    """Write the .pth file: the stubs come last on the path, so that what is really installed wins."""
    file = site_packages / "sglang_cpu.pth"
    file.write_text(f"{STUBS}\nimport sglang_cpu_recipe\n", "utf-8")
    return file


if __name__ == "__main__":
    enable(Path(sysconfig.get_path("purelib")))
