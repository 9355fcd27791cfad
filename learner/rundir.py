"""The run directory: who owns it, which run it is, and whether the configuration may continue it.

    runs/<name>/
      config.json  metrics.jsonl  summary.json  samples/  checkpoints/  weights/  journal/  logs/
      run.json             run_id, incarnation, and fingerprints of what config.json only names
      learner.lock         held (flock) for life by the one learner of this directory; see run_lock.py

The incarnation is the fencing token of invariant I5: it grows, synced, before a socket opens, so that servers can
tell this learner from a dead one. Until then nothing is written but the lock, and `close` takes that back: a start that
is refused for whatever reason leaves the disk as it was. This file knows paths and configuration; it must not know what
the other parts write into their directories.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import blake3
import msgspec

from learner.config import LearnerConfig
from learner.durable import write_all_atomic
from learner.run_lock import RunLock
from protocol.errors import ConfigError

CONFIG_FILE, RUN_FILE = "config.json", "run.json"
FREE_TO_CHANGE = frozenset(
    {
        # where the run is, how long it goes on, and what is written about it
        "output_dir", "run_name", "allow_changed", "resume", "max_steps", "save_steps", "save_total_limit",
        "keep_versions",
        "num_completions_logged", "eval_steps",
        # where the learner listens and how patient it is
        "bind", "key", "allowed_keys", "staging_dir", "insecure_plaintext", "delta_weights", "heartbeat_s",
        "liveness_s", "server_wait_s",
        "collective_timeout_s",
        # where and how fast the same numbers are computed
        "device", "token_budget", "share_prefix", "context_parallel_size",
    }
)  # fmt: skip
"""Keys that may differ when a run is continued; every other one changes what is learned, or what is compared, and must
be named in allow_changed. max_steps is free only while lr_scheduler_type is constant: else it bends the schedule."""


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """run.json."""

    run_id: str
    """32 hex digits, drawn once; part of every group id."""
    incarnation: int = 0
    """Of the learner that runs now, or ran last. 0: none has begun."""
    fingerprints: dict[str, str] = {}
    """What config.json only names: key (dataset, tokenizer, ...) -> digest of the content."""


class RunDirectory:
    """An open run directory. The lock is held until `close`, or until the process ends in whatever way.

    Nothing is written before `begin_incarnation`: what can be checked is checked by then.

    Example:
        >>> run = RunDirectory.open(config)
        >>> run.check_fingerprints({"dataset": prompts.fingerprint, "tokenizer": tokenizer_fingerprint})
        >>> incarnation = run.begin_incarnation()      # before the first socket
    """

    def __init__(self, lock: RunLock, identity: Identity, config: LearnerConfig) -> None:
        self.path = config.run_dir
        self.continued = identity.incarnation > 0
        """Whether a learner began this run before."""
        self.begun = False
        """Whether this one has."""
        self.config_fingerprint = config_fingerprint(config)
        """Goes into every checkpoint."""
        self._lock = lock
        self._identity = identity
        self._config = config

    @classmethod
    def open(cls, config: LearnerConfig) -> Self:
        """Lock `config.run_dir` and compare the configuration with the run that is there, if one is.

        Raises:
            ConfigError: another learner holds it; a key that matters has changed; it cannot be written.
        """
        try:
            lock = RunLock(config.run_dir)
            try:
                return cls(lock, read_run(config) or Identity(run_id=secrets.token_hex(16)), config)
            except BaseException:  # whatever it is, a refused learner must not keep the lock
                lock.undo()
                raise
        except OSError as error:
            raise _unwritable(config.run_dir, error) from error

    @property
    def run_id(self) -> str:
        """32 hex digits: which run this is, whatever its directory is called."""
        return self._identity.run_id

    @property
    def incarnation(self) -> int:
        """Of this learner, once begun; before that, of the one before it."""
        return self._identity.incarnation

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / CONFIG_FILE

    @property
    def metrics_path(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """Written when the run ends."""
        return self.path / "summary.json"

    @property
    def samples_dir(self) -> Path:
        """Some completions of every step."""
        return self.path / "samples"

    @property
    def checkpoints_dir(self) -> Path:
        """See checkpoint.py."""
        return self.path / "checkpoints"

    @property
    def journal_dir(self) -> Path:
        """See journal.py."""
        return self.path / "journal"

    @property
    def weights_dir(self) -> Path:
        """What is kept of the published versions (weights_archive)."""
        return self.path / "weights"

    @property
    def logs_dir(self) -> Path:
        """Log files of this process."""
        return self.path / "logs"

    def check_fingerprints(self, fingerprints: Mapping[str, str]) -> None:
        """Compare the contents that config.json only names with what the run began with; they are written at its start.

        Args:
            fingerprints: key -> digest. The key is the one to put into allow_changed: dataset, tokenizer, ...

        Raises:
            ConfigError: one differs and its key is not in allow_changed.
        """
        known = self._identity.fingerprints if self.continued else {}
        _refuse_changes(
            self.path,
            {
                key: (f"content {known[key]}", f"content {digest}")
                for key, digest in fingerprints.items()
                if key in known and known[key] != digest and key not in self._config.allow_changed
            },
        )
        self._identity = msgspec.structs.replace(self._identity, fingerprints={**known, **fingerprints})

    def require_unfinished(self, policy_version: int, max_steps: int) -> None:
        """Go on while there is something left: steps, or the last evaluation, which ends with summary.json.

        Raises:
            ConfigError: the run is over.
        """
        if policy_version >= max_steps and self.summary_path.exists():
            raise ConfigError(
                f"run {self.path} has trained its {policy_version} steps: raise max_steps to go on, or choose another"
                " run_name"
            )

    def begin_incarnation(self) -> int:
        """Return this learner's incarnation, above all earlier ones and on disk. Before a socket opens, once.

        Everything is written here: the places of the run, the resolved configuration, run.json. All has been checked.

        Raises:
            ConfigError: the directory cannot be written; it is left as it was.
        """
        identity = msgspec.structs.replace(self._identity, incarnation=self._identity.incarnation + 1)
        files = {
            self.config_path: msgspec.json.format(self._config.model_dump_json().encode(), indent=2),
            self.path / RUN_FILE: msgspec.json.format(msgspec.json.encode(identity), indent=2),
        }
        made: list[Path] = []
        try:
            for place in (self.samples_dir, self.checkpoints_dir, self.journal_dir, self.logs_dir):
                if not place.is_dir():
                    place.mkdir()
                    made.append(place)
            write_all_atomic(files)
            self.summary_path.unlink(missing_ok=True)  # of the run as it was before max_steps was raised
        except OSError as error:
            for place in made:
                place.rmdir()
            raise _unwritable(self.path, error) from error
        self._identity, self.begun = identity, True
        return identity.incarnation

    def close(self) -> None:
        """Let another learner have the directory; one that has not begun leaves it as it was."""
        if self.begun:
            self._lock.release()
        else:
            self._lock.undo()


def read_run(config: LearnerConfig) -> Identity | None:
    """Return which run `config.run_dir` holds, if this configuration may continue it; None: no run has begun there.

    Raises:
        ConfigError: it holds a run that began with another configuration, or damaged files.
        OSError: the files cannot be read.
    """
    path = config.run_dir / RUN_FILE
    if not path.exists():
        return None
    try:
        identity = msgspec.json.decode(path.read_bytes(), type=Identity)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    if identity.incarnation > 0:
        _check_config(config.run_dir / CONFIG_FILE, config)
    return identity


def config_fingerprint(config: LearnerConfig) -> str:
    """Digest of every key that changes what is learned: equal exactly when a run may be continued unasked."""
    matters = {key: value for key, value in _plain(config).items() if key not in _free(config)}
    return blake3.blake3(msgspec.json.encode(matters, order="sorted")).hexdigest()


def _plain(config: LearnerConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _free(config: LearnerConfig) -> frozenset[str]:
    return FREE_TO_CHANGE if config.lr_scheduler_type == "constant" else FREE_TO_CHANGE - {"max_steps"}


def _check_config(path: Path, config: LearnerConfig) -> None:
    """Refuse to continue with another configuration than `path` holds."""
    try:
        before = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    changes: dict[str, tuple[object, object]] = {}
    for key, value in _plain(config).items():
        # A key that an older headway did not have yet was, in effect, at its default.
        field = type(config).model_fields[key]
        old = before.get(key, field.get_default(call_default_factory=True, validated_data={}))
        if old != value and key not in _free(config) and key not in config.allow_changed:
            changes[key] = (old, value)
    _refuse_changes(path.parent, changes)


def _refuse_changes(run_dir: Path, changes: Mapping[str, tuple[object, object]]) -> None:
    if not changes:
        return
    listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in sorted(changes.items()))
    raise ConfigError(
        f"{run_dir} holds a run that began differently: {listed}. Set it back, choose another run_name, or allow it"
        f" with allow_changed = [{', '.join(repr(key) for key in sorted(changes))}]"
    )


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} is damaged ({error}): restore it, or choose another run_name")


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"the run directory {path} cannot be written ({error.strerror}): free some space, or choose another output_dir"
    )
