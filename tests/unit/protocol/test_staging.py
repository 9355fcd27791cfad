from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from protocol.errors import WeightsError
from protocol.weights import staging
from protocol.weights.staging import clean_staging, default_staging_directory, staging_path
from tests.weights import make_weights

OWNER = """
import sys
from pathlib import Path
from protocol.weights.layout import Layout, MappedWeights
from protocol.weights.manifest import TensorSpec
from protocol.weights.staging import staging_path
weights = MappedWeights.create(staging_path(Path(sys.argv[1])), Layout([TensorSpec("w", "F32", (4,))]))
print(weights.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    clean_staging(tmp_path / "staging")
    return tmp_path / "staging"


def test_directory_is_made_private(directory: Path) -> None:
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert clean_staging(directory) == 0


def test_files_of_the_living_stay_and_of_the_killed_go(directory: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        path = Path(owner.stdout.readline().strip())
        assert path.parent == directory
        assert clean_staging(directory) == 0
        owner.kill()
    assert path.exists()
    assert clean_staging(directory) == 1
    assert not path.exists()


def test_own_files_stay_until_the_last_view_is_gone(directory: Path) -> None:
    weights = make_weights(staging_path(directory), seed=0)
    view = weights.view("model.norm.weight")
    weights.close()
    assert clean_staging(directory) == 0
    view.release()
    assert clean_staging(directory) == 1


def test_other_files_are_not_touched(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"mine")
    (directory / "weights-notes.txt").write_bytes(b"mine")
    assert clean_staging(directory) == 0
    assert len(list(directory.iterdir())) == 2


def test_fresh_names_differ_and_are_cleaned(directory: Path) -> None:
    first, second = staging_path(directory), staging_path(directory)
    assert first != second
    first.touch()
    assert clean_staging(directory) == 1


def test_directory_open_to_others_is_refused(directory: Path) -> None:
    directory.chmod(0o755)
    with pytest.raises(WeightsError, match="mode 0755 lets others in: chmod 700 it"):
        clean_staging(directory)


def test_directory_of_somebody_else_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(WeightsError, match=f"owned by user {owner}, not by {owner + 1}"):
        clean_staging(directory)


def test_link_in_place_of_the_directory_is_refused(directory: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(directory)
    with pytest.raises(WeightsError, match="no directory, or a link to one"):
        clean_staging(link)


def test_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="File exists"):
        clean_staging(tmp_path / "file")


def test_default_directory_is_this_users_own() -> None:
    directory = default_staging_directory()
    assert directory.name == f"headway-{os.geteuid()}"
    assert os.access(directory.parent, os.W_OK)


def test_shared_memory_too_small_for_models_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "LEAST_SHARED_BYTES", 1)
    assert default_staging_directory(tmp_path).parent == tmp_path
    monkeypatch.setattr(staging, "LEAST_SHARED_BYTES", 1 << 60)
    assert default_staging_directory(tmp_path).parent == Path(tempfile.gettempdir())
    assert default_staging_directory(tmp_path / "none").parent == Path(tempfile.gettempdir())
