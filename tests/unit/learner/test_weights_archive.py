"""What a run keeps of its versions: any of them comes back bit for bit, or an error says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.deltas import DeltaChain, Published
from learner.links import Links
from learner.model.export import write_tensors
from learner.weights_archive.archive import (
    DATA,
    DELTA,
    MANIFEST,
    PublishedRow,
    WeightsArchive,
    kept_versions,
    read_rows,
)
from learner.weights_archive.command import weights
from protocol.errors import ConfigError, WeightsError
from protocol.messages import WeightsLive, WeightsPath
from protocol.versions import Version
from protocol.weights.layout import Layout, MappedWeights, build_manifest
from protocol.weights.manifest import TensorSpec

SHAPES = {"model.embed.weight": (50, 32), "model.norm.weight": (32,)}


class Run:
    """A run of float32 master weights, published in bfloat16; checkpoints where asked for."""

    def __init__(self, directory: Path, keep_versions: int) -> None:
        self.directory = directory
        (directory / "checkpoints").mkdir(parents=True)
        self.archive = WeightsArchive(directory / "weights", keep_versions)
        self.chain = DeltaChain(self, Links(local=True), "never", keep=keep_versions > 0)  # type: ignore[arg-type]
        self.specs = [TensorSpec(name, "BF16", shape) for name, shape in SHAPES.items()]
        torch.manual_seed(0)
        self.master = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        self.published: dict[int, dict[str, torch.Tensor]] = {}
        self.previous: Published | None = None

    def publish(
        self, policy_version: int, *, checkpoint: bool = False, incarnation: int = 1, drift: float = 0.01
    ) -> None:
        for tensor in self.master.values():
            tensor += drift * torch.randn(tensor.shape) * (torch.rand(tensor.shape) < 0.1)
        mapped = MappedWeights.create(
            self.directory / f"{incarnation}.{policy_version}.safetensors", Layout(self.specs)
        )
        write_tensors(self.master, "bfloat16", mapped)
        new = Published(build_manifest(Version(incarnation, policy_version), mapped, "xxh3_128"), mapped)
        made = None if self.previous is None else self.chain.extend(self.previous, new)
        row = PublishedRow(
            version=new.manifest.version, bytes=new.manifest.file_bytes, density=self.chain.density,
            delta_bytes=None if made is None else made.manifest.nbytes, snapshot_s=0.1, hash_s=0.2, delta_s=0.3,
        )  # fmt: skip
        self.archive.published(row, new.manifest, made)
        self.previous = new
        self.published[policy_version] = {name: tensor.bfloat16() for name, tensor in self.master.items()}
        if checkpoint:
            home = self.directory / "checkpoints" / f"step-{policy_version:06d}"
            home.mkdir()
            (home / "MANIFEST.json").write_text(json.dumps({"incarnation": incarnation}))
            save_file({name: tensor.clone() for name, tensor in self.master.items()}, home / "model.safetensors")
            for name in ("config.json", "tokenizer.json", "state.json", "trainer.json", "optimizer.safetensors"):
                (home / name).write_text(json.dumps({"of": policy_version, "dtype": "float32"}))

    def command(self, *flags: str) -> int:
        return weights([str(self.directory), *flags], prog="headway-learner weights")

    def restored(self, policy_version: int) -> dict[str, torch.Tensor]:
        output = self.directory / f"out-{policy_version}"
        assert self.command("--restore", f"1.{policy_version}", "--output", str(output)) == 0
        return load_file(output / "model.safetensors")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Versions 0 to 6; of 3 there is a checkpoint."""
    made = Run(tmp_path / "run", keep_versions=10)
    for policy_version in range(7):
        made.publish(policy_version, checkpoint=policy_version == 3)
    return made


@pytest.mark.parametrize("policy_version", range(7))
def test_every_kept_version_restores_bit_for_bit_before_a_checkpoint_and_after_it(
    run: Run, policy_version: int
) -> None:
    restored = run.restored(policy_version)
    expected = run.published[policy_version]
    assert restored.keys() == expected.keys()
    assert all(torch.equal(restored[name], expected[name]) for name in expected)
    assert all(restored[name].dtype == torch.bfloat16 for name in expected)


def test_a_restored_directory_has_the_models_other_files_and_says_its_dtype(run: Run) -> None:
    run.restored(5)
    names = {path.name for path in (run.directory / "out-5").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json"}
    assert json.loads((run.directory / "out-5" / "config.json").read_text()) == {"of": 3, "dtype": "bfloat16"}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", keep_versions=3)
    for policy_version in range(6):
        run.publish(policy_version, checkpoint=policy_version == 1)
    assert kept_versions(run.archive.directory) == [Version(1, 3), Version(1, 4), Version(1, 5)]
    with pytest.raises(ConfigError, match=r"version 1\.2 is not kept; there are 1\.3 to 1\.5"):
        run.restored(2)
    with pytest.raises(ConfigError, match=r"version 1\.4 cannot be restored: no checkpoint .* \(there are step 1\)"):
        run.restored(4)
    assert not (run.directory / "out-4.tmp").exists()


def test_without_keep_versions_there_is_a_list_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run", keep_versions=0)
    for policy_version in range(2):
        run.publish(policy_version, checkpoint=True)
    assert [path.name for path in run.archive.directory.iterdir()] == ["versions.jsonl"]
    assert run.command() == 0
    assert capsys.readouterr().out.count(" no\n") == 2
    with pytest.raises(ConfigError, match="keeps no versions: a run does with --keep-versions N"):
        run.restored(1)


def test_the_table_shows_what_versions_took_the_worst_server_of_each(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for server, pause_s in (("a", 0.5), ("b", 0.25)):
        path = WeightsPath.DELTA if server == "a" else WeightsPath.DENSE
        run.archive.live(server, WeightsLive(version=Version(1, 5), path=path, bytes=2_000_000, pause_s=pause_s))
    assert run.command() == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    cells = dict(
        zip(
            heading.replace("delta MB", "delta-MB").replace("fetched MB", "MB-in").split(),
            lines[5].replace(" %", "%").split(),
            strict=True,
        )
    )
    assert (cells["version"], cells["servers"], cells["by"], cells["MB-in"]) == ("1.5", "2", "delta+dense", "2.0")
    assert (cells["pause"], cells["snapshot"], cells["restores"]) == ("0.500", "0.100", "yes")
    assert 0 < float(cells["changed"].removesuffix("%")) < 12
    assert "-" in lines[0].split(), "nothing came before the first"


def test_a_torn_last_line_is_no_row(run: Run) -> None:
    before = read_rows(run.archive.directory)
    with (run.archive.directory / "versions.jsonl").open("ab") as file:
        file.write(b'{"what":"publ')
    assert read_rows(run.archive.directory) == before


def test_verify_finds_nothing_where_nothing_is_wrong(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.command("--verify") == 0
    out = capsys.readouterr().out
    assert out.count("as it was written; restores") == 7
    assert "step-000003: as it was published" in out


def test_a_flipped_bit_of_a_delta_is_found_and_never_restored(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    data = run.archive.directory / "1.5" / DATA
    octets = bytearray(data.read_bytes())
    octets[40] ^= 1
    data.write_bytes(octets)
    assert run.command("--verify") == 1
    assert "does not hash to what was written" in capsys.readouterr().out
    with pytest.raises(WeightsError, match=r"1\.5/delta\.bin: its delta of tensor \S+ does not hash"):
        run.restored(6)
    assert not (run.directory / "out-6.tmp").exists()
    run.restored(4)


def test_a_checkpoint_that_is_not_what_was_published_is_found_and_not_built_on(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    home = run.directory / "checkpoints" / "step-000003" / "model.safetensors"
    tensors = load_file(home)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, home)
    assert run.command("--verify") == 1
    assert "does not hash to what was published as 1.3" in capsys.readouterr().out
    with pytest.raises(WeightsError, match=r"tensor model\.norm\.weight does not hash to what was published as 1\.3"):
        run.restored(4)


def test_a_version_that_was_half_written_is_gone_at_the_next_start(run: Run) -> None:
    (run.archive.directory / "1.9.tmp").mkdir()
    (run.archive.directory / "1.9.tmp" / MANIFEST).write_bytes(b"{")
    WeightsArchive(run.archive.directory, 10)
    assert kept_versions(run.archive.directory)[-1] == Version(1, 6)
    assert not (run.archive.directory / "1.9.tmp").exists()


def test_deltas_are_kept_though_none_is_served(run: Run) -> None:
    assert (run.archive.directory / "1.1" / DELTA).exists()
    assert not (run.archive.directory / "1.0" / DELTA).exists()
    assert run.chain.offers(Version(1, 6)) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--restore", "1.5"), "restore and output go together"),
        (("--output", "x"), "restore and output go together"),
        (("--restore", "5", "--output", "x"), "restore '5': expected INCARNATION.POLICY_VERSION"),
        (("--restore", "1.99", "--output", "x"), "version 1.99 is not kept; there are 1.0 to 1.6"),
        (("--restore", "1.5", "--output", "."), "output . exists"),
        (("--restore", "1.5", "--output", "x", "--verify"), "two commands"),
        (("--restor", "1.5"), "--restore"),
    ],
)
def test_wrong_flags_are_one_clear_error(run: Run, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        run.command(*flags)


def test_no_run_directory_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run directory: headway-learner weights RUN_DIR"):
        weights([], prog="headway-learner weights")
    with pytest.raises(ConfigError, match=r"holds no weights/versions\.jsonl"):
        weights([str(tmp_path)], prog="headway-learner weights")


def test_a_full_disk_ends_the_keeping_and_not_the_run(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    versions = run.archive.directory / "versions.jsonl"
    versions.unlink()
    versions.symlink_to("/dev/full")
    run.publish(7)
    run.publish(8)
    run.archive.live("a", WeightsLive(version=Version(1, 8)))
    (told,) = [record.getMessage() for record in caplog.records if "weights_not_kept" in record.getMessage()]
    assert "No space left on device; the run goes on" in told
    assert kept_versions(run.archive.directory)[-1] == Version(1, 6)


def test_a_run_that_goes_on_begins_a_line_of_its_own(run: Run) -> None:
    before = read_rows(run.archive.directory)
    with (run.archive.directory / "versions.jsonl").open("ab") as file:
        file.write(b'{"what":"publ')
    run.archive = WeightsArchive(run.archive.directory, 10)
    run.publish(7)
    assert len(read_rows(run.archive.directory)) == len(before) + 1


def test_a_checkpoint_of_another_incarnation_is_not_taken_for_a_version_of_the_same_number(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """1.3 was saved, 1.4 to 1.6 are orphaned: incarnation 2 went on from step 3 and saved its own step 5."""
    orphaned = run.published[5]
    run.previous = None
    saved = load_file(run.directory / "checkpoints" / "step-000003" / "model.safetensors")
    run.master = {name: tensor.clone() for name, tensor in saved.items()}
    run.publish(3, incarnation=2, drift=0.0)
    for policy_version in (4, 5):
        run.publish(policy_version, incarnation=2, checkpoint=policy_version == 5)
    assert run.command("--verify") == 0, capsys.readouterr().out
    restored = run.restored(5)
    assert all(torch.equal(restored[name], orphaned[name]) for name in orphaned), "1.5, from step 3"
    output = run.directory / "out-2.4"
    assert run.command("--restore", "2.4", "--output", str(output)) == 0
    assert all(
        torch.equal(tensor, run.published[4][name]) for name, tensor in load_file(output / "model.safetensors").items()
    )
