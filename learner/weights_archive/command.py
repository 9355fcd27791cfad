"""headway-learner weights RUN_DIR: what the published versions took, and any kept one back as a directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from pydantic import model_validator

from learner.config.section import Section
from learner.weights_archive.archive import VERSIONS, LiveRow, PublishedRow, read_rows
from learner.weights_archive.listing import render
from learner.weights_archive.restore import Kept, restore
from protocol.errors import ConfigError
from protocol.settings import load_settings
from protocol.versions import Version


class WeightsCommand(Section):
    """List the versions that a run has published, with what each of them took; verify or restore the kept ones."""

    verify: bool = False
    """Read every kept delta and every checkpoint back, and compare with what was published."""
    restore: str = ""
    """A version to write out, as INCARNATION.POLICY_VERSION (1.40): a directory that from_pretrained loads."""
    output: str = ""
    """Where to write it: a directory that does not exist yet."""

    @model_validator(mode="after")
    def _check(self) -> WeightsCommand:
        if bool(self.restore) != bool(self.output):
            raise ValueError("restore and output go together: --restore 1.40 --output DIR")
        if self.restore and self.verify:
            raise ValueError("verify and restore are two commands: give one of them (a restore verifies what it reads)")
        return self


def weights(argv: Sequence[str], *, prog: str) -> int:
    """Run the command and return its exit code: 1 when --verify has found something wrong.

    Raises:
        ConfigError: No run directory, or a wrong flag.
        WeightsError: What is kept is not what was published.
    """
    if not argv or argv[0].startswith("-"):
        load_settings(WeightsCommand, argv, prog=f"{prog} RUN_DIR")  # --help, or what is wrong with the flags
        raise ConfigError(
            f"no run directory: {prog} RUN_DIR, the directory under output_dir that has config.json in it"
        )
    run_dir, *flags = argv
    options = load_settings(WeightsCommand, flags, prog=f"{prog} RUN_DIR")
    weights_dir, checkpoints_dir = Path(run_dir) / "weights", Path(run_dir) / "checkpoints"
    if not (weights_dir / VERSIONS).is_file():
        raise ConfigError(f"{run_dir} holds no weights/{VERSIONS}: name the directory of a run that has published")
    if options.restore:
        version = _version(options.restore)
        restore(Kept(weights_dir, checkpoints_dir), version, Path(options.output))
        print(f"version {version} is in {options.output}")
        return 0
    if options.verify:
        return _verify(Kept(weights_dir, checkpoints_dir))
    print(render(_rows(weights_dir), _restorable(weights_dir, checkpoints_dir)))
    return 0


def _verify(kept: Kept) -> int:
    wrong = 0
    for version, problem in kept.verify():
        way = "no checkpoint is left that deltas connect it with" if kept.path_to(version) is None else "restores"
        print(f"{version}: {problem or f'as it was written; {way}'}")
        wrong += bool(problem)
    for step, path in sorted(kept.checkpoints.items()):
        problem = kept.verify_checkpoint(step)
        print(f"{path.name}: {problem or 'as it was published'}")
        wrong += bool(problem)
    return int(wrong > 0)


def _rows(weights_dir: Path) -> list[PublishedRow | LiveRow]:
    try:
        return read_rows(weights_dir)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{weights_dir / VERSIONS} is damaged: {error}") from None


def _restorable(weights_dir: Path, checkpoints_dir: Path) -> set[Version]:
    try:
        kept = Kept(weights_dir, checkpoints_dir)
    except ConfigError:
        return set()
    return {version for version in kept.manifests if kept.path_to(version) is not None}


def _version(text: str) -> Version:
    incarnation, dot, policy_version = text.partition(".")
    if not (dot and incarnation.isdigit() and policy_version.isdigit()):
        raise ConfigError(
            f"restore {text!r}: expected INCARNATION.POLICY_VERSION as the table shows it, 1.40 for example"
        )
    return Version(int(incarnation), int(policy_version))
