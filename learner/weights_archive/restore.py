"""Any kept version out of a checkpoint and the deltas between the two, verified against what it must hash to.

A delta says which bits differ, so it leads both ways: a version restores from a checkpoint before it or after it. A
checkpoint holds the master weights; cast to the published dtype they are the version of that step, which its own
manifest proves.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec

from learner.checkpoint import MANIFEST as CHECKPOINT_MANIFEST
from learner.weights_archive.archive import DATA, DELTA, MANIFEST, PublishedRow, kept_versions, read_rows
from protocol.errors import ConfigError, HeadwayError, MalformedMessage, WeightsError
from protocol.versions import Version
from protocol.weights.delta import apply_tensor, decode_tensor
from protocol.weights.delta_manifest import DeltaManifest
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Manifest, digest
from protocol.weights.specs import ITEM_BYTES

WEIGHTS_FILE = "model.safetensors"
_NOT_THE_MODEL = ("state.json", "MANIFEST.json", "trainer.json", WEIGHTS_FILE)


class Kept:
    """The kept versions of a run, the deltas between them, and its checkpoints.

    Raises:
        ConfigError: The run keeps none.
        HeadwayError: A file of them is not what was written.
    """

    def __init__(self, weights_dir: Path, checkpoints_dir: Path) -> None:
        self._directory = weights_dir
        self.manifests: dict[Version, Manifest] = {}
        self.deltas: dict[Version, DeltaManifest] = {}
        """By the version that each leads to."""
        for version in kept_versions(weights_dir) if weights_dir.is_dir() else []:
            home = weights_dir / str(version)
            self.manifests[version] = Manifest.from_json((home / MANIFEST).read_bytes())
            if (home / DELTA).exists():
                self.deltas[version] = _read_delta(home / DELTA)
        if not self.manifests:
            raise ConfigError(f"{weights_dir} keeps no versions: a run does with --keep-versions N")
        self.checkpoints = {
            int(path.name.removeprefix("step-")): path
            for path in checkpoints_dir.glob("step-??????*")
            if path.suffix == "" and (path / WEIGHTS_FILE).exists() and (path / CHECKPOINT_MANIFEST).exists()
        }
        self._saved_by = {step: _incarnation(path) for step, path in self.checkpoints.items()}
        self._began: dict[int, int] = {}
        """Incarnation -> the first version that it published."""
        for row in read_rows(weights_dir):
            if isinstance(row, PublishedRow):
                self._began.setdefault(row.version.incarnation, row.version.policy_version)

    def _is_held(self, version: Version) -> bool:
        """Whether the checkpoint of that step is of that version: saved by its incarnation, or what that began with."""
        saved = self._saved_by.get(version.policy_version)
        if saved is None or saved > version.incarnation:
            return False
        return saved == version.incarnation or self._began.get(version.incarnation) == version.policy_version

    def path_to(self, version: Version) -> tuple[Version, list[Version]] | None:
        """Return (a version that a checkpoint holds, the deltas to apply from there on, in order); None: no way."""
        ahead: deque[tuple[Version, list[Version]]] = deque([(version, [])])
        seen = {version}
        while ahead:
            here, applied = ahead.popleft()
            if self._is_held(here):
                return here, applied
            for delta in self.deltas.values():
                for other in {delta.version, delta.base} - {here} if here in (delta.version, delta.base) else ():
                    if other in self.manifests and other not in seen:
                        seen.add(other)
                        ahead.append((other, [delta.version, *applied]))
        return None

    def write(self, version: Version, mapped: MappedWeights) -> None:
        """Fill a mapping of the version's layout, and verify all of it.

        Raises:
            ConfigError: It is not kept, or nothing leads to it any more.
            WeightsError: What comes of it is not the version.
        """
        if version not in self.manifests:
            raise ConfigError(f"version {version} is not kept; there are {_listed(self.manifests)}")
        way = self.path_to(version)
        if way is None:
            raise ConfigError(
                f"version {version} cannot be restored: no checkpoint is left that deltas connect it with (there are"
                f" {', '.join(f'step {step}' for step in sorted(self.checkpoints)) or 'none'})"
            )
        anchor, deltas = way
        _cast(self.checkpoints[anchor.policy_version] / WEIGHTS_FILE, mapped)
        _check(self.manifests[anchor], mapped, f"the checkpoint of step {anchor.policy_version}")
        for step in deltas:
            self._apply(self.deltas[step], mapped)
        _check(self.manifests[version], mapped, f"version {version}, restored from step {anchor.policy_version}")

    def checkpoint_for(self, version: Version) -> Path:
        """Return the checkpoint whose other files go with a version that `write` has restored."""
        way = self.path_to(version)
        assert way is not None
        return self.checkpoints[way[0].policy_version]

    def verify(self) -> Iterator[tuple[Version, str]]:
        """Read every kept delta back; yield each version with what is wrong with it, "" for nothing."""
        for version in self.manifests:
            delta = self.deltas.get(version)
            try:
                if delta is not None:
                    self._read_parts(delta)
                yield version, ""
            except (OSError, HeadwayError) as error:
                yield version, str(error)

    def verify_checkpoint(self, step: int) -> str:
        """Cast a checkpoint anew and compare with the versions published at its step; "" for nothing wrong."""
        for version, manifest in self.manifests.items():
            if version.policy_version == step and manifest.adapter is None and self._is_held(version):
                with tempfile.TemporaryDirectory() as directory:
                    mapped = MappedWeights.create(Path(directory) / WEIGHTS_FILE, manifest.layout)
                    try:
                        _cast(self.checkpoints[step] / WEIGHTS_FILE, mapped)
                        _check(manifest, mapped, f"the checkpoint of step {step}")
                    except (OSError, HeadwayError) as error:
                        return str(error)
        return ""

    def _apply(self, delta: DeltaManifest, mapped: MappedWeights) -> None:
        data, offset = self._read_parts(delta), 0
        for part in delta.parts:
            spec = mapped.layout.spec(part.name)
            item_bytes = ITEM_BYTES[spec.dtype]
            octets, offset = data[offset : offset + part.nbytes], offset + part.nbytes
            decoded = decode_tensor(octets, num_elements=spec.nbytes // item_bytes, item_bytes=item_bytes)
            apply_tensor(decoded, mapped.view(part.name))

    def _read_parts(self, delta: DeltaManifest) -> memoryview:
        path = self._directory / str(delta.version) / DATA
        data = memoryview(path.read_bytes())
        shipment = delta.shipment
        if len(data) != shipment.nbytes:
            raise WeightsError(f"{path} has {len(data)} bytes, {shipment.nbytes} were written")
        for block in shipment.blocks:
            if digest(delta.algorithm, data[block.offset : block.offset + block.nbytes]) != block.digest:
                raise WeightsError(f"{path}: its {block.what} does not hash to what was written")
        return data


def restore(kept: Kept, version: Version, output: Path) -> None:
    """Write a kept version as a directory that `from_pretrained` loads, in the dtype it was published in.

    Raises:
        ConfigError: It cannot be restored, or `output` exists.
        WeightsError: What comes of it is not the version; nothing is left behind.
    """
    if output.exists():
        raise ConfigError(f"output {output} exists: name a directory that does not")
    if version not in kept.manifests or kept.manifests[version].adapter is not None:
        what = "is of an adapter" if version in kept.manifests else f"is not kept; there are {_listed(kept.manifests)}"
        raise ConfigError(f"version {version} {what}")
    temporary = output.with_name(f"{output.name}.tmp")
    temporary.mkdir(parents=True)
    try:
        with MappedWeights.create(temporary / WEIGHTS_FILE, kept.manifests[version].layout) as mapped:
            kept.write(version, mapped)
        for path in kept.checkpoint_for(version).iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in _NOT_THE_MODEL:
                shutil.copy(path, temporary / path.name)
        _name_dtype(temporary / "config.json", kept.manifests[version])
        temporary.rename(output)
    except BaseException:  # also an interrupt: nothing half-written stays
        shutil.rmtree(temporary)
        raise


def _cast(file: Path, mapped: MappedWeights) -> None:
    """Write a checkpoint's tensors into the mapping as the trainer publishes them."""
    from safetensors import safe_open

    from learner.model.export import write_tensors

    with safe_open(file, framework="pt") as source:
        names = set(source.keys())
        for spec in mapped.layout.specs:
            if spec.name not in names:
                raise WeightsError(f"{file} has no tensor {spec.name}")
            write_tensors({spec.name: source.get_tensor(spec.name)}, _DTYPES[spec.dtype], mapped)


_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


def _name_dtype(config: Path, manifest: Manifest) -> None:
    """Say in config.json which dtype the weights have: the checkpoint's are the master weights'."""
    content = msgspec.json.decode(config.read_bytes())
    content["dtype"] = _DTYPES[manifest.tensors[0].spec.dtype]
    config.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def _check(manifest: Manifest, mapped: MappedWeights, what: str) -> None:
    for block in manifest.shipment.blocks:
        if digest(manifest.algorithm, mapped.bytes(block.offset, block.nbytes)) != block.digest:
            raise WeightsError(f"{what}: {block.what} does not hash to what was published as {manifest.version}")


def _read_delta(path: Path) -> DeltaManifest:
    try:
        return msgspec.json.decode(path.read_bytes(), type=DeltaManifest)
    except msgspec.DecodeError as error:
        raise MalformedMessage(f"{path}: {error}") from None


def _incarnation(checkpoint: Path) -> int:
    """Who saved it."""
    found: int = msgspec.json.decode((checkpoint / CHECKPOINT_MANIFEST).read_bytes())["incarnation"]
    return found


def _listed(versions: dict[Version, Manifest]) -> str:
    ordered = sorted(versions)
    return str(ordered[0]) if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"
