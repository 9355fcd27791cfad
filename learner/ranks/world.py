"""How the ranks talk: torch's process group for tensors and commands, its key-value store for what must not hang.

All ranks belong to one job of one user and trust each other; the ports between them (torchrun's store, gloo, NCCL)
have no authentication and belong on a network of their own. Every collective has the deadline collective_timeout_s. A
rank that dies is noticed at once where the kernel closes its connections, else by that deadline; its last words, if it
had time for any, are in the store.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Self

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from learner.model.context import Context
from learner.ranks.place import Place
from protocol.codec import Buffer
from protocol.errors import ConfigError, HeadwayError

LAST_WORDS_S = 3.0
"""How long rank 0 waits for the others to say that they live."""
LOOK_S = 1.0
"""While a rank is waited for, whether it has ended is looked up so often."""
PATIENCE_S = 5.0
"""A rank that waits longer for another one to start says so."""
_CLOSED = ("gloo", "nccl", "connection", "timed out", "socket")
"""In the texts of plain RuntimeErrors that torch raises when a peer is gone."""


class RankLost(HeadwayError, ConnectionError):
    """A rank ended or does not answer: the others cannot go on without its shards."""


class RankSilent(RankLost):
    """A rank never said anything: it cannot have said what is wrong either."""


class World:
    """This process among the ranks. Collectives: every rank calls the same ones in the same order, from one thread."""

    def __init__(self, place: Place, device: torch.device, store: Store, timeout_s: float) -> None:
        self.place = place
        self.device = device
        self._store = store
        self._timeout_s = timeout_s
        self._agreements = 0
        self._busy = False
        """A collective is under way, or has failed: no other may begin."""
        self.failure: RankLost | None = None
        """Why no collective will ever work again."""

    @classmethod
    def join(cls, place: Place, device: torch.device, timeout_s: float) -> Self:
        """Reach the store. No rank waits for another here, but all for the process that has the store.

        Raises:
            RankLost: nobody answers at MASTER_ADDR:MASTER_PORT.
        """
        timeout = timedelta(seconds=timeout_s)
        waiting = threading.Timer(
            PATIENCE_S, _say_waiting, [place.rank, "the process that starts the ranks", timeout_s]
        )
        waiting.daemon = True
        waiting.start()
        try:
            store, _, _ = next(rendezvous("env://", place.rank, place.world_size, timeout=timeout))
        except (dist.DistError, ValueError) as error:
            raise RankLost(f"rank {place.rank} cannot join the others: {_first_line(error)}") from error
        finally:
            waiting.cancel()
        store.set_timeout(timeout)
        return cls(place, device, PrefixStore("headway", store), timeout_s)

    def agree(self, statement: Mapping[str, str]) -> None:
        """Check that all ranks say the same. Every rank must call it; costs no collective.

        Raises:
            ConfigError: on rank 0: which rank says what.
            RankLost: on rank 0: a rank says nothing; on the others: rank 0 has found a disagreement, or is gone.
        """
        place, topic = self.place, f"agreement {self._agreements}"
        self._agreements += 1
        self._store.set(f"{topic}/{place.rank}", msgspec.json.encode(dict(statement)).decode())
        if place.leads:
            difference = ""
            for rank in range(1, place.world_size):
                theirs = msgspec.json.decode(self._get(f"{topic}/{rank}", rank), type=dict[str, str])
                difference = difference or disagreement(statement, theirs, rank)
            self._store.set(f"{topic}/verdict", difference)
            if difference:
                raise ConfigError(difference)
        elif self._get(f"{topic}/verdict", 0):
            raise RankLost("rank 0 says why")

    def open(self) -> None:
        """Make the process group: from here on collectives work."""
        with self.watched("the process group"):
            dist.init_process_group(
                "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl",
                store=self._store,
                rank=self.place.rank,
                world_size=self.place.world_size,
                timeout=timedelta(seconds=self._timeout_s),
            )

    def mesh(self) -> DeviceMesh:
        """All ranks in a row."""
        return init_device_mesh(self.device.type, (self.place.world_size,))

    def context(self, size: int) -> Context:
        """The `size` consecutive ranks that this one shares rows with."""
        shape = self.place.world_size // size, size
        return Context(init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "context")).get_group(1))

    def broadcast(self, payload: bytes = b"") -> Buffer:
        """Return rank 0's payload on every rank."""
        size = torch.tensor([len(payload)])
        dist.broadcast(size, 0)
        data = torch.empty(int(size), dtype=torch.uint8)
        if self.place.leads:
            data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(data, 0)
        return data.numpy().data

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by its sum over the ranks, the same bits on each."""
        dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Give what is raised inside to the other ranks, and say which of them was lost.

        Raises:
            RankLost: a collective has failed, now or before.
        """
        if self.failure is not None:
            raise self.failure
        assert not self._busy, f"{what}: another collective is under way"
        self._busy = True
        try:
            yield
        except Exception as error:  # whatever it is, the other ranks must hear of it
            lost = isinstance(error, dist.DistError) or (
                type(error) is RuntimeError and any(word in str(error).lower() for word in _CLOSED)
            )
            self._leave_word("" if lost else f"{type(error).__name__}: {_first_line(error)}")
            if not lost:
                raise
            self.failure = RankLost(
                f"{self._who_was_lost()}; during {what}: {_first_line(error)}. The same command goes on from the last"
                " checkpoint, on any number of ranks"
            )
            raise self.failure from error
        self._busy = False

    @property
    def can_talk(self) -> bool:
        """Whether the other ranks are waiting for a command."""
        return not self._busy

    def close(self) -> None:
        """Leave the process group, without waiting for anybody."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _get(self, key: str, rank: int) -> bytes:
        words = f"last words/{rank}"
        look_s = min(LOOK_S, self._timeout_s)
        for look in range(math.ceil(self._timeout_s / look_s)):
            if look == math.ceil(PATIENCE_S / look_s):
                _say_waiting(self.place.rank, f"rank {rank}", self._timeout_s)
            try:
                self._store.wait([key], timedelta(seconds=look_s))
                return bytes(self._store.get(key))
            except dist.DistStoreError:  # not there yet
                if self._store.check([words]):
                    reason = self._store.get(words).decode() or "without a word"
                    raise RankLost(f"rank {rank} ended: {reason}") from None
            except dist.DistError as error:
                raise RankLost(f"rank {rank} is out of reach: {_first_line(error)}") from error
        raise RankSilent(
            f"rank {rank} was not heard of within {self._timeout_s:g} s (collective_timeout_s): start it, too"
        )

    def _leave_word(self, text: str) -> None:
        with contextlib.suppress(dist.DistError):  # the store may be gone, too
            self._store.set(f"last words/{self.place.rank}", text)

    def _who_was_lost(self) -> str:
        """Tell from what the others have left in the store. On rank 0; elsewhere the reason is rank 0's to find."""
        if not self.place.leads:
            return f"rank {self.place.rank} has lost the others"
        silent = []
        for rank in range(1, self.place.world_size):
            key = f"last words/{rank}"
            try:
                self._store.wait([key], timedelta(seconds=LAST_WORDS_S))
            except dist.DistError:
                silent.append(str(rank))
                continue
            if words := self._store.get(key).decode():
                return f"rank {rank} ended: {words}"
        if not silent:
            return "the ranks have lost each other"
        return f"rank {', '.join(silent)} ended or hangs, without a word (killed, out of memory, or its host is gone)"


def _say_waiting(rank: int, other: str, timeout_s: float) -> None:
    """On stderr: there is no screen yet, and no log."""
    print(
        f"headway-learner: rank {rank} waits for {other}, at most {timeout_s:g} s (collective_timeout_s); one that was"
        " started with --dry-run takes no part",
        file=sys.stderr,
        flush=True,
    )


def disagreement(ours: Mapping[str, str], theirs: Mapping[str, str], rank: int) -> str:
    """Name what a rank says otherwise than rank 0; empty if nothing."""
    if error := theirs.get("error"):
        return f"rank {rank}: {error}"
    different = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if not different:
        return ""
    key = different[0]
    others = f" (and on {', '.join(different[1:])})" if different[1:] else ""
    return (
        f"ranks disagree on {key}{others}: {ours.get(key, 'nothing')} on rank 0, {theirs.get(key, 'nothing')} on rank"
        f" {rank}; all ranks need the same configuration, code and model"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
