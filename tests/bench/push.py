"""A whole push, as what changed and as everything: from a snapshot that is hashed to a version that is verified there.

Both sides run the shipped chain of deltas, bulk plane and stage, learner's end and server's end in one process (each
has its thread); the link is loopback tcp, or tcp through a token bucket of 1 Gbit/s in a process of its own. 1 % of the
elements change from version to version, by a unit in the last place.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tests.bench.harness import Row

if TYPE_CHECKING:
    from learner.deltas import Published

SHARE = 0.01
TENSORS, ELEMENTS = 64, 1 << 20
"""128 MiB of bf16."""
PUSHES = 5
GIGABIT = 125e6


@dataclass(frozen=True)
class Push:
    """Seconds of a push, the median of several.

    Args:
        mode: of the chain.
        bytes_per_s: of the link; None: loopback.
    """

    mode: Literal["always", "never", "auto"]
    bytes_per_s: float | None

    def __call__(self, quick: bool) -> float:
        from learner.deltas import DeltaChain
        from learner.links import Links
        from protocol.messages import WeightsLive, WeightsPath
        from protocol.weights.delta import prepare_decoding, prepare_encoding
        from protocol.weights.delta_manifest import read_deltas
        from protocol.weights.fetching import WeightsFetcher
        from protocol.weights.serving import WeightsServer
        from rollout_server.stage import Stage, Wanted

        prepare_encoding()
        prepare_decoding([2])
        times = []
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory, WeightsServer("tcp://127.0.0.1:*") as server:
            links = Links(local=False)
            links.joined("server")
            chain = DeltaChain(server, links, self.mode)
            stage = Stage(Path(directory) / "staging", WeightsFetcher())
            base = None
            with self._link(server.address) as address:
                for new in versions(Path(directory), 2 if quick else PUSHES):
                    begun_s = time.monotonic()
                    if base is not None:
                        chain.extend(base, new)
                    server.serve(new.manifest, new.mapped)
                    offered = chain.offers(new.manifest.version)
                    deltas = () if offered is None else read_deltas(offered)
                    delivery = stage.bring(Wanted(new.manifest, (address,), None, deltas), threading.Event())
                    if base is not None:
                        times.append(time.monotonic() - begun_s)
                        assert self.mode == "auto" or (delivery.path is WeightsPath.DELTA) == (self.mode == "always")
                    assert delivery.file.read_bytes() == new.mapped.path.read_bytes()
                    live = WeightsLive(
                        version=new.manifest.version, path=delivery.path, bytes=delivery.bytes,
                        transfer_s=delivery.transfer_s,
                    )  # fmt: skip
                    links.live("server", live)
                    base = new
            stage.discard()
        return statistics.median(times)

    @contextlib.contextmanager
    def _link(self, address: str) -> Iterator[str]:
        if self.bytes_per_s is None:
            yield address
        else:
            from tests.bench.links import open_links

            with open_links({0: self.bytes_per_s, 1: self.bytes_per_s}, {(0, 1): address}) as dialed:
                yield dialed[0, 1]


def versions(directory: Path, count: int) -> Iterator[Published]:
    """Yield count + 1 versions, each already hashed; three mappings in turn, since two versions are served."""
    import numpy as np

    from learner.deltas import Published
    from protocol.versions import Version
    from protocol.weights.layout import Layout, MappedWeights, build_manifest
    from protocol.weights.manifest import TensorSpec

    dice = np.random.default_rng(0)
    specs = [TensorSpec(f"model.layers.{number}.weight", "BF16", (1024, ELEMENTS // 1024)) for number in range(TENSORS)]
    mappings = [MappedWeights.create(directory / f"{name}.safetensors", Layout(specs)) for name in "abc"]
    bits = [
        np.frombuffer(mapped.bytes(len(mapped.layout.header), 2 * TENSORS * ELEMENTS), np.uint16) for mapped in mappings
    ]
    for number in range(count + 1):
        mapped = mappings[number % 3]
        new = np.frombuffer(mapped.writable_bytes(len(mapped.layout.header), 2 * TENSORS * ELEMENTS), np.uint16)
        if number == 0:
            new[:] = (dice.standard_normal(new.size, np.float32) * np.float32(0.02)).view(np.uint32) >> 16
        else:
            new[:] = bits[(number - 1) % 3]
            moved = dice.random(new.size, np.float32) < SHARE
            new[moved] += dice.choice(np.array([1, 0xFFFF], np.uint16), int(moved.sum()))
        yield Published(build_manifest(Version(1, number), mapped, "xxh3_128"), mapped)


ROWS = [
    Row(
        name="delta_push_loopback", control="the same push of all bytes, loopback tcp", ours=Push("always", None),
        baseline=Push("never", None), ratio="baseline/ours", target=1.5, unit="s",
    ),
    Row(
        name="delta_push_1gbit", control="the same push of all bytes, 1 Gbit/s", ours=Push("always", GIGABIT),
        baseline=Push("never", GIGABIT), ratio="baseline/ours", target=10.0, unit="s", rounds=3,
    ),
]  # fmt: skip
