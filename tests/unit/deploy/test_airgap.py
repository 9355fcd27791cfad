"""The scripts for hosts without a network, as far as they go without one."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploy.airgap import strip_wheel

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "deploy" / "airgap"
FILES = {
    "big/__init__.py": b"x = 1\n",
    "big/sm90/ops.so": b"\x7fELF90",
    "big/sm100/ops.so": b"\x7fELF100",
    "big/flash.so": b"\x7fELF" * 100,
    "big-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: big\nVersion: 1.0\n",
    "big-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "big-1.0.dist-info/RECORD": b"old\n",
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "big-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    return path


def test_a_stripped_wheel_keeps_what_is_kept_and_records_it(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.whl"
    assert strip_wheel.strip_wheel(wheel, target, drop=["*.so"], keep=["big/sm90/*.so"]) == 2
    with zipfile.ZipFile(target) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    record = found.pop("big-1.0.dist-info/RECORD").decode().splitlines()
    assert found == {name: FILES[name] for name in FILES if name in found}
    assert set(FILES) - set(found) == {"big/sm100/ops.so", "big/flash.so", "big-1.0.dist-info/RECORD"}
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"x = 1\n").digest()).decode().rstrip("=")
    assert f"big/__init__.py,sha256={digest},6" in record
    assert record[-1] == "big-1.0.dist-info/RECORD,,"
    assert len(record) == len(found) + 1


def test_patterns_that_match_nothing_are_refused(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.whl"
    with pytest.raises(ValueError, match=r"big-1\.0-py3-none-any\.whl: nothing matches \['other/\*'\]"):
        strip_wheel.strip_wheel(wheel, target, drop=["other/*"], keep=[])
    assert not target.exists()


def test_the_command_says_what_it_saved(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    strip_wheel.main([str(wheel), str(tmp_path / "out"), "--drop", "*.so", "--keep", "big/sm90/*"])
    assert capsys.readouterr().out == f"{wheel.name}: 2 files left out, 0.0 -> 0.0 MB\n"
    assert (tmp_path / "out" / wheel.name).is_file()


def script(name: str, *argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPTS / name), *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=60)


@pytest.mark.parametrize("name", ["collect.sh", "install.sh"])
def test_help_and_wrong_options(name: str) -> None:
    assert os.access(SCRIPTS / name, os.X_OK)
    assert script(name, "--help").stdout.startswith(f"usage: {name} [options]")
    wrong = script(name, "--oops")
    assert (wrong.returncode, wrong.stderr) == (2, f"{name}: unknown option --oops; see --help\n")
    lonely = script(name, "--python")
    assert (lonely.returncode, lonely.stderr) == (2, f"{name}: --python takes a value; see --help\n")


def test_a_dry_collection_downloads_nothing(tmp_path: Path) -> None:
    done = script("collect.sh", "--dry-run", "--out", str(tmp_path / "out"), "--arch", "sm100", "--python", "3.13")
    assert done.returncode == 0
    assert "pip download" in done.stdout
    assert "--python-version 3.13 --abi cp313" in done.stdout
    assert "--keep sgl_kernel/sm100/*.so" in done.stdout
    assert not (tmp_path / "out").exists()


def unpacked(folder: Path, python_version: str) -> Path:
    (folder / "wheels").mkdir(parents=True)
    shutil.copy(SCRIPTS / "install.sh", folder)
    (folder / "PYTHON_VERSION").write_text(python_version)
    names = ["PYTHON_VERSION", "install.sh"]
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder


def install(folder: Path, *argv: str) -> str:
    command = ["bash", str(folder / "install.sh"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=folder)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_installing_refuses_what_cannot_work(tmp_path: Path) -> None:
    assert install_alone(tmp_path).startswith("install.sh: no SHA256SUMS in ")
    folder = unpacked(tmp_path / "other", "3.1")
    found = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert install(folder, "--python", sys.executable).endswith(f"are for 3.1: collect.sh --python {found}")
    (folder / "PYTHON_VERSION").write_text("9.9")
    assert install(folder) == "install.sh: files are damaged: copy the .tar again"


def install_alone(tmp_path: Path) -> str:
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(SCRIPTS / "install.sh", folder)
    return install(folder)


def test_the_hosts_own_packages_are_looked_for(tmp_path: Path) -> None:
    """In a Python without site-packages nothing is there."""
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    folder = unpacked(tmp_path / "host", f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert install(folder, "--python", str(bare)).endswith("has no torch: install.sh builds on the host's own")
