"""A version in the memory of one host: claims, the version in the name, and what may not be read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import protocol.weights.shared as shared_module
import protocol.weights.staging as staging_module
from protocol.errors import WeightsError
from protocol.versions import Version
from protocol.weights.layout import Layout
from protocol.weights.manifest import TensorSpec
from protocol.weights.shared import SharedBuffer, SharedReader
from protocol.weights.staging import clean_staging, links_directory
from tests.weights import SMALL_SPECS, fill, tensors

LAYOUT = Layout(SMALL_SPECS)
OTHER = """
import sys
from pathlib import Path
from protocol.versions import Version
from protocol.weights.layout import Layout
from protocol.weights.shared import SharedBuffer, SharedReader
from tests.weights import SMALL_SPECS, fill
what, directory, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
layout = Layout(SMALL_SPECS)
if what == "write":
    buffer = SharedBuffer.create(directory, layout)
    assert buffer.begin()
    fill(buffer.mapped, seed=1)
    if name == "finish":
        buffer.finish(Version(1, 1))
    print(buffer.name, flush=True)
else:
    reader = SharedReader(directory)
    reader.claim(name, layout)
    print("claimed", flush=True)
sys.stdin.read()
"""


class Other:
    """Another process, that writes a version or claims one, and is killed."""

    def __init__(self, what: str, directory: Path, name: str) -> None:
        command = [sys.executable, "-c", OTHER, what, str(directory), name]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._popen.stdout is not None
        self.said = self._popen.stdout.readline().strip()

    def kill(self) -> None:
        self._popen.kill()
        self._popen.communicate()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    clean_staging(tmp_path / "staging")
    return tmp_path / "staging"


@pytest.fixture
def buffer(directory: Path) -> Iterator[SharedBuffer]:
    buffer = SharedBuffer.create(directory, LAYOUT)
    yield buffer
    buffer.remove()


@pytest.fixture
def reader(directory: Path) -> Iterator[SharedReader]:
    reader = SharedReader(directory)
    yield reader
    reader.close()


def write(buffer: SharedBuffer, policy_version: int) -> str:
    assert buffer.begin()
    fill(buffer.mapped, seed=policy_version)
    buffer.finish(Version(1, policy_version))
    return buffer.name


def test_a_version_is_read_where_it_lies(buffer: SharedBuffer, reader: SharedReader) -> None:
    name = write(buffer, 7)
    assert name.endswith("-1.7.safetensors")
    mapped = reader.claim(name, LAYOUT)
    assert mapped.path == buffer.mapped.path
    assert (tensors(mapped) == tensors(buffer.mapped)).all()
    fill(buffer.mapped, seed=8)
    assert (tensors(mapped) == tensors(buffer.mapped)).all(), "the same memory"
    with pytest.raises(TypeError, match="read-only"):
        mapped.view("model.norm.weight")[0] = 0


def test_what_is_claimed_is_not_written_and_what_is_written_is_not_claimed(
    buffer: SharedBuffer, reader: SharedReader
) -> None:
    assert not buffer.name, "it holds nothing yet"
    name = write(buffer, 1)
    reader.claim(name, LAYOUT)
    assert not buffer.begin()
    assert (buffer.name, buffer.version) == (name, Version(1, 1))
    reader.release()
    known = reader._known.copy()
    assert buffer.begin()
    assert not buffer.name
    with pytest.raises(WeightsError, match=r"cannot be opened in .*: it is not here"):
        reader.claim(name, LAYOUT)
    with pytest.MonkeyPatch.context() as patch:  # whoever had opened it before cannot claim it
        patch.setattr(reader, "_open", lambda path, layout: next(iter(known.values())))
        with pytest.raises(WeightsError, match="is being written"):
            reader.claim(name, LAYOUT)
    buffer.finish(Version(1, 2))
    reader.claim(buffer.name, LAYOUT)


def test_a_version_written_over_between_open_and_claim_is_not_read(
    buffer: SharedBuffer, reader: SharedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write(buffer, 1)
    claim = shared_module.claim_shared

    def late(descriptor: int) -> bool:
        write(buffer, 2)
        return claim(descriptor)

    monkeypatch.setattr(shared_module, "claim_shared", late)
    with pytest.raises(WeightsError, match="holds that version no longer"):
        reader.claim(name, LAYOUT)
    assert buffer.begin(), "and nothing is left claimed"


def test_another_file_of_the_same_name_is_not_read(
    buffer: SharedBuffer, reader: SharedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write(buffer, 1)
    claim = shared_module.claim_shared

    def replaced(descriptor: int) -> bool:
        buffer.mapped.path.unlink()
        buffer.mapped.path.write_bytes(b"another")
        return claim(descriptor)

    monkeypatch.setattr(shared_module, "claim_shared", replaced)
    with pytest.raises(WeightsError, match="is another file by now"):
        reader.claim(name, LAYOUT)


def test_files_are_mapped_once_and_given_up_when_they_are_deleted(directory: Path, reader: SharedReader) -> None:
    buffer, second = SharedBuffer.create(directory, LAYOUT), SharedBuffer.create(directory, LAYOUT)
    first = reader.claim(write(buffer, 1), LAYOUT)
    reader.release()
    descriptors = len(os.listdir("/proc/self/fd"))
    for version in (2, 3):
        assert reader.claim(write(buffer, version), LAYOUT) is first
        reader.release()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    buffer.remove()
    reader.claim(write(second, 4), LAYOUT)
    assert list(reader._known.values()) == [reader._claimed]
    second.remove()
    reader.close()
    assert str(directory) not in Path("/proc/self/maps").read_text()


def test_several_readers_share_one_and_the_last_lets_it_go(directory: Path, buffer: SharedBuffer) -> None:
    readers = [SharedReader(directory) for _ in range(3)]
    name = write(buffer, 1)
    for reader in readers:
        reader.claim(name, LAYOUT)
    for reader in readers:
        assert not buffer.begin()
        reader.close()
    assert buffer.begin()


def test_a_claim_in_doubt_is_kept_and_nothing_else_is_claimed_until_it_is_settled(
    buffer: SharedBuffer, reader: SharedReader
) -> None:
    name = write(buffer, 1)
    reader.claim(name, LAYOUT)
    reader.doubt()
    reader.release()
    assert not buffer.begin()
    with pytest.raises(WeightsError, match="an engine may still be reading the version before"):
        reader.claim(name, LAYOUT)
    reader.settle()
    assert buffer.begin()


@pytest.mark.parametrize(
    "name",
    ["", "..", "../staging/x", "weights-1-0123abcd.safetensors", "weights-1-0123abcd-1.1.safetensors/../x",
     "/etc/passwd", "weights-1-0123abcd-1.1.safetensors\n"],
)  # fmt: skip
def test_only_names_of_versions_are_opened(reader: SharedReader, name: str) -> None:
    with pytest.raises(WeightsError, match="is no name of a version's file"):
        reader.claim(name, LAYOUT)


def test_links_pipes_and_what_others_may_touch_are_not_read(
    buffer: SharedBuffer, reader: SharedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write(buffer, 1)
    link = buffer.mapped.path.with_name("weights-1-0123abcd-1.1.safetensors")
    link.symlink_to(name)
    with pytest.raises(WeightsError, match="cannot be opened in"):
        reader.claim(link.name, LAYOUT)
    link.unlink()
    os.mkfifo(link, 0o600)
    with pytest.raises(WeightsError, match="is not a regular file"):
        reader.claim(link.name, LAYOUT)
    link.unlink()
    buffer.mapped.path.chmod(0o640)
    with pytest.raises(WeightsError, match=r"is owned by user \d+, mode 0640: expected user \d+ and 0600"):
        reader.claim(name, LAYOUT)
    buffer.mapped.path.chmod(0o600)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(WeightsError, match=rf"is owned by user {owner}, mode 0600: expected user {owner + 1}"):
        reader.claim(name, LAYOUT)


def test_a_file_of_another_layout_is_not_read(buffer: SharedBuffer, reader: SharedReader) -> None:
    name = write(buffer, 1)
    with pytest.raises(WeightsError, match=r"has \d+ bytes, its manifest describes \d+"):
        reader.claim(name, Layout(SMALL_SPECS[1:]))
    last = TensorSpec("model.norm.weighs", "F32", (513,))  # as long as the name of the last one
    with pytest.raises(WeightsError, match="has another header than the manifest implies"):
        reader.claim(name, Layout([*SMALL_SPECS[:-1], last]))
    assert buffer.begin(), "and nothing is left claimed"


def test_a_buffer_whose_file_somebody_deleted_is_no_longer_offered(directory: Path) -> None:
    buffer = SharedBuffer.create(directory, LAYOUT)
    assert write(buffer, 1)
    buffer.mapped.path.unlink()
    assert write(buffer, 2) == "", "the bulk plane still has it"
    buffer.remove()


def test_a_reader_that_is_killed_lets_go(directory: Path, buffer: SharedBuffer) -> None:
    name = write(buffer, 1)
    other = Other("read", directory, name)
    assert other.said == "claimed"
    assert not buffer.begin()
    other.kill()
    assert buffer.begin()


def test_what_a_killed_learner_leaves_is_removed_by_its_last_reader(directory: Path, reader: SharedReader) -> None:
    learner = Other("write", directory, "finish")
    mapped = reader.claim(learner.said, LAYOUT)
    before = tensors(mapped).copy()
    learner.kill()
    assert clean_staging(directory) == 0, "an engine may be about to open it"
    assert [path.name for path in directory.iterdir()] == [learner.said]
    assert (tensors(mapped) == before).all()
    reader.release()
    assert list(directory.iterdir()) == []


def test_what_a_learner_leaves_that_ends_is_removed_by_its_last_reader(directory: Path, reader: SharedReader) -> None:
    buffer = SharedBuffer.create(directory, LAYOUT)
    name = write(buffer, 1)
    reader.claim(name, LAYOUT)
    buffer.remove()
    assert [path.name for path in directory.iterdir()] == [name], "an engine may be about to open it"
    assert clean_staging(directory) == 0
    reader.release()
    assert list(directory.iterdir()) == []


def test_a_version_that_is_still_served_is_removed_by_its_last_reader(directory: Path, reader: SharedReader) -> None:
    """Views keep the mapping, and with it a duplicate of the owner's descriptor, until the server has closed."""
    buffer = SharedBuffer.create(directory, LAYOUT)
    name = write(buffer, 1)
    views = [buffer.mapped.bytes(0, 64)]
    reader.claim(name, LAYOUT)
    buffer.remove()
    reader.release()
    assert list(directory.iterdir()) == []
    assert len(views[0]) == 64


def test_of_several_who_let_go_at_once_one_removes_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner finds it claimed; before it has let go of the file, the only reader lets go, too."""
    buffer, reader = SharedBuffer.create(directory, LAYOUT), SharedReader(directory)
    reader.claim(write(buffer, 1), LAYOUT)
    claim, released = staging_module.claim_alone, []

    def late(descriptor: int) -> bool:
        alone = claim(descriptor)
        if not released:
            released.append(alone)
            reader.release()
        return alone

    monkeypatch.setattr(staging_module, "claim_alone", late)
    buffer.remove()
    assert released == [False]
    assert list(directory.iterdir()) == []
    reader.close()


def test_nobody_claims_what_is_being_removed(
    directory: Path, reader: SharedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = SharedBuffer.create(directory, LAYOUT)
    name = write(buffer, 1)
    unlink, refused = Path.unlink, []

    def late(path: Path, missing_ok: bool = False) -> None:
        with pytest.raises(WeightsError, match="is being written") as error:
            reader.claim(name, LAYOUT)
        refused.append(error.value)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", late)
    buffer.remove()
    assert len(refused) == 1


def test_half_a_version_of_a_killed_learner_cannot_be_read(directory: Path, reader: SharedReader) -> None:
    learner = Other("write", directory, "not")
    assert learner.said == "", "no name leads to it"
    (half,) = directory.iterdir()
    learner.kill()
    with pytest.raises(WeightsError, match="is no name of a version's file"):
        reader.claim(half.name, LAYOUT)
    assert clean_staging(directory) == 1


def test_links_beside_a_file_go_with_it(directory: Path, buffer: SharedBuffer) -> None:
    links = links_directory(buffer.mapped.path)
    links.mkdir()
    (links / "model.safetensors").symlink_to(f"../{buffer.mapped.path.name}")
    clean_staging(directory)
    assert links.exists(), "in use"
    write(buffer, 1)
    clean_staging(directory)
    assert [path.name for path in directory.iterdir()] == [buffer.name]


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from protocol.errors import WeightsError
from protocol.versions import Version
from protocol.weights.layout import Layout
from protocol.weights.manifest import TensorSpec
from protocol.weights.shared import SharedBuffer, SharedReader
from protocol.weights.staging import clean_staging
directory, kills = Path(sys.argv[1]), int(sys.argv[2])
clean_staging(directory)
layout = Layout([TensorSpec("w", "F32", (5000,))])

def child(seed):
    dice = random.Random(seed)
    buffers, reader = [], SharedReader(directory)
    while True:
        if len(buffers) < 3:
            buffers.append(SharedBuffer.create(directory, layout))
        buffer = dice.choice(buffers)
        if buffer.begin():
            buffer.mapped.view("w")[:] = bytes([dice.randrange(256)]) * 20000
            buffer.finish(Version(1, dice.randrange(9)))
        try:
            reader.claim(dice.choice([path.name for path in directory.iterdir()]), layout)
        except WeightsError:
            pass

dice = random.Random(0)
descriptors = len(os.listdir("/proc/self/fd"))
left, pids = 0, []
for number in range(kills):
    pid = os.fork()
    if pid == 0:
        try:
            child(number)
        finally:
            os._exit(1)
    pids.append(pid)
    time.sleep(dice.random() * 0.01)
    if len(pids) == 3:  # the others go on: they claim what the dead leave
        pid = pids.pop(dice.randrange(3))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "it ended by itself"
    left += clean_staging(directory) if number % 10 == 9 else 0
for pid in pids:
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "it ended by itself"
left += clean_staging(directory)
assert list(directory.iterdir()) == [], list(directory.iterdir())
assert len(os.listdir("/proc/self/fd")) == descriptors
print(left)
"""


def test_nothing_is_left_of_200_killed_processes(directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(directory), "200"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40, "they had something to leave"
