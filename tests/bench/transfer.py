"""A whole version to another process, fetched, verified and in its final place, against what else could carry it.

One model, many tensors, two processes of one host, over tcp and over ipc. Ours is the shipped WeightsServer and
WeightsFetcher: every byte lands in the mapping that an engine loads, hashed there (xxh3, as on one host; and apart from
that BLAKE3, as across hosts). The controls end with the same bytes in the same kind of mapping, and hash nothing:

    chunked    bare pyzmq: 256 KiB zero-copy chunks, 8 MiB asked for at a time, copied into place
    messages   bare pyzmq: one zero-copy message per tensor, copied into place
    gloo       torch.distributed broadcast of every tensor, from and into tensors over such mappings

`transfer_s` is without the time that ours spends hashing, `whole_s` with it.

Missed so far (524 MB, 5 rounds, quiet cores, 2026-11-30, twice): 0.82 and 0.73 of the chunks over tcp (worst 0.63),
0.74 and 0.67 over ipc (0.41); 0.70 and 0.68, 0.65 and 0.62 with every byte verified; 0.71 and 0.80 of gloo, for half
of its CPU seconds (4.7 against 9.4); 0.80 and 0.56 of a message per tensor, which at 2.6 MB is faster than chunks.
Until the second time the bookkeeping of a chunk counted as hashing. By perf 40 % of the CPU are system calls of the
I/O threads (half of that the kernel's copies), 10 % placing, 3 % hashing, a quarter Python, the start included.
Tried: chunks of 64 KiB to 4 MiB (256 KiB is best, chunks.py); a receive timeout in place of a poll for every chunk,
one walk over a chunk's blocks (kept, their effect not told from the noise); sending copies (0.6 s for 0.43). Quick
runs are of little use here: 1.01 and 0.73 for the same code a minute apart.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from protocol.versions import Version
from protocol.weights.chunks import CHUNK_BYTES
from protocol.weights.fetching import WeightsFetcher
from protocol.weights.layout import MappedWeights, build_manifest
from protocol.weights.manifest import Algorithm, Manifest, TensorSpec
from protocol.weights.serving import WeightsServer
from protocol.weights.specs import Layout
from tests.bench.harness import Figures, Row

NUM_TENSORS, QUICK_NUM_TENSORS = 200, 50
TENSOR = TensorSpec("", "BF16", (1280, 1024))
"""2.6 MB; 524 MB in all."""
AT_ONCE = 32
"""Chunks that a control asks for ahead, like ours."""


def specs(quick: bool) -> list[TensorSpec]:
    """The model's tensors."""
    count = QUICK_NUM_TENSORS if quick else NUM_TENSORS
    return [TensorSpec(f"layer.{number:03}", TENSOR.dtype, TENSOR.shape) for number in range(count)]


def make(path: Path, quick: bool) -> MappedWeights:
    """A mapping of random bytes."""
    weights = MappedWeights.create(path, Layout(specs(quick)))
    pattern = np.random.default_rng(0).integers(0, 256, 1 << 22, np.uint8)
    memory = np.frombuffer(weights.writable_bytes(0, weights.layout.file_bytes), np.uint8)
    for at in range(len(weights.layout.header), memory.size, pattern.size):
        memory[at : at + pattern.size] = np.roll(pattern, at >> 12)[: memory.size - at]
    return weights


def in_two_processes(
    transport: str, quick: bool, serve: Callable[..., None], fetch: Callable[..., Figures], *arguments: Any
) -> Figures:
    """Run `serve(address, file, pipe, quick, ...)` in a child, `fetch(address, pipe, destination, quick)` here; twice.

    The first time warms caches, connections and pages; the second is measured.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        directory = Path(name)
        source = make(directory / "source.safetensors", quick)
        destination = MappedWeights.create(directory / "destination.safetensors", Layout(specs(quick)))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        address = f"tcp://127.0.0.1:{port}" if transport == "tcp" else f"ipc://{directory}/socket"
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        child = spawn.Process(target=serve, args=(address, str(source.path), theirs, quick, *arguments), daemon=True)
        child.start()
        figures = fetch(address, ours, destination, quick)
        ours.send("end")
        child.join(30)
        assert destination.path.read_bytes() == source.path.read_bytes()
    return figures


def serve_ours(address: str, file: str, pipe: Connection, quick: bool, algorithm: Algorithm) -> None:
    """The learner's side."""
    weights = MappedWeights.open(Path(file))
    manifest = build_manifest(Version(1, 1), weights, algorithm)
    with WeightsServer(address) as server:
        server.serve(manifest, weights)
        pipe.send(manifest.to_json())
        pipe.recv()


def fetch_ours(address: str, pipe: Connection, destination: MappedWeights, quick: bool) -> Figures:
    """The server's side."""
    manifest = Manifest.from_json(pipe.recv())
    memory, shipment, fetcher = destination.writable_bytes(0, manifest.file_bytes), manifest.shipment, WeightsFetcher()
    for _ in range(2):
        begun_s = time.monotonic()
        report = fetcher.fetch(shipment, [address], memory, stop=threading.Event(), deadline_s=100, stall_s=10)
        whole_s = time.monotonic() - begun_s
    return {"whole_s": whole_s, "transfer_s": whole_s - report.verify_s}


def serve_chunks(address: str, file: str, pipe: Connection, quick: bool) -> None:
    """Answer each request, `offset, end` as text, with a message for each chunk."""
    weights = MappedWeights.open(Path(file))
    array = np.frombuffer(weights.bytes(0, weights.layout.file_bytes), np.uint8)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.set(zmq.SNDHWM, 0)
        dealer.bind(address)
        pipe.send("ready")
        while (request := dealer.recv()) != b"end":
            begin, end = map(int, request.split())
            for at in range(begin, end, CHUNK_BYTES):
                dealer.send_multipart([at.to_bytes(8, "little"), array[at : min(at + CHUNK_BYTES, end)]], copy=False)


def fetch_chunks(address: str, pipe: Connection, destination: MappedWeights, quick: bool) -> Figures:
    """Ask ahead, copy into place."""
    nbytes, begin = destination.layout.file_bytes, len(destination.layout.header)
    array = np.frombuffer(destination.writable_bytes(0, nbytes), np.uint8)
    pipe.recv()
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.set(zmq.RCVHWM, 0)
        dealer.connect(address)
        for _ in range(2):
            begun_s, asked, came, step = time.monotonic(), begin, begin, AT_ONCE // 2 * CHUNK_BYTES
            while came < nbytes:
                while asked < nbytes and asked - came <= step:
                    dealer.send(b"%d %d" % (asked, min(asked + step, nbytes)))
                    asked = min(asked + step, nbytes)
                head, data = dealer.recv_multipart(copy=False)
                at = int.from_bytes(head.bytes, "little")
                chunk = np.frombuffer(data.buffer, np.uint8)
                array[at : at + chunk.size] = chunk
                came += chunk.size
            took_s = time.monotonic() - begun_s
        dealer.send(b"end")
    return {"whole_s": took_s}


def serve_messages(address: str, file: str, pipe: Connection, quick: bool) -> None:
    """Send every tensor as one message, when asked for all."""
    weights = MappedWeights.open(Path(file))
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.bind(address)
        pipe.send("ready")
        while dealer.recv() != b"end":
            for spec in weights.layout.specs:
                dealer.send_multipart([spec.name.encode(), weights.view(spec.name)], copy=False)


def fetch_messages(address: str, pipe: Connection, destination: MappedWeights, quick: bool) -> Figures:
    """Copy every tensor into place."""
    pipe.recv()
    views = {spec.name: np.frombuffer(destination.view(spec.name), np.uint8) for spec in destination.layout.specs}
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.connect(address)
        for _ in range(2):
            begun_s = time.monotonic()
            dealer.send(b"all")
            for _ in views:
                name, data = dealer.recv_multipart(copy=False)
                views[name.bytes.decode()][:] = np.frombuffer(data.buffer, np.uint8)
            took_s = time.monotonic() - begun_s
        dealer.send(b"end")
    return {"whole_s": took_s}


def broadcast(address: str, rank: int, weights: MappedWeights, count: int) -> float:
    """Broadcast all tensors over gloo, in this process's part; return the seconds of the last time."""
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    tensors = [torch.frombuffer(weights.view(spec.name), dtype=torch.bfloat16) for spec in weights.layout.specs]
    for _ in range(count):
        dist.barrier()
        begun_s = time.monotonic()
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
        dist.barrier()
        took_s = time.monotonic() - begun_s
    dist.destroy_process_group()
    return took_s


def serve_gloo(address: str, file: str, pipe: Connection, quick: bool) -> None:
    """Rank 0."""
    broadcast(address, 0, MappedWeights.open(Path(file), writable=True), 2)


def fetch_gloo(address: str, pipe: Connection, destination: MappedWeights, quick: bool) -> Figures:
    """Rank 1."""
    return {"whole_s": broadcast(address, 1, destination, 2)}


class Ours:
    """The shipped two ends."""

    def __init__(self, transport: str, algorithm: Algorithm = "xxh3_128") -> None:
        self.transport, self.algorithm = transport, algorithm

    def __call__(self, quick: bool) -> Figures:
        return in_two_processes(self.transport, quick, serve_ours, fetch_ours, self.algorithm)


class Control:
    """Something else between the same two mappings."""

    def __init__(self, transport: str, serve: Callable[..., None], fetch: Callable[..., Figures]) -> None:
        self.transport, self.serve, self.fetch = transport, serve, fetch

    def __call__(self, quick: bool) -> Figures:
        figures = in_two_processes(self.transport, quick, self.serve, self.fetch)
        return {**figures, "transfer_s": figures["whole_s"]}


ours = {transport: Ours(transport) for transport in ("tcp", "ipc")}
chunked = {transport: Control(transport, serve_chunks, fetch_chunks) for transport in ("tcp", "ipc")}
messages = {transport: Control(transport, serve_messages, fetch_messages) for transport in ("tcp", "ipc")}
gloo = Control("tcp", serve_gloo, fetch_gloo)
across_hosts = Ours("tcp", "blake3")

UNIT = "s for 524 MB in 200 tensors (quick: 131 in 50)"


def row(name: str, control: str, our_side: Ours, baseline: Control, figure: str, target: float) -> Row:
    """One comparison of times."""
    return Row(
        name=name, control=control, ours=our_side, baseline=baseline, ratio="baseline/ours", target=target,
        unit=UNIT, figure=figure, contest="transfer",
    )  # fmt: skip


ROWS = [
    entry
    for transport in ("tcp", "ipc")
    for entry in (
        row(f"fetch_{transport}", f"256 KiB chunks, pyzmq, {transport}, no digest", ours[transport],
            chunked[transport], "transfer_s", 0.9),
        row(f"fetch_{transport}_verified", f"256 KiB chunks, pyzmq, {transport}, no digest", ours[transport],
            chunked[transport], "whole_s", 0.75),
        row(f"fetch_{transport}_messages", f"a message per tensor, pyzmq, {transport}", ours[transport],
            messages[transport], "whole_s", 2.0),
    )
] + [
    row("fetch_gloo", "torch gloo broadcast, tcp", ours["tcp"], gloo, "whole_s", 1.5),
    row("fetch_blake3_gloo", "torch gloo broadcast, tcp", across_hosts, gloo, "whole_s", 1.0),
]  # fmt: skip
