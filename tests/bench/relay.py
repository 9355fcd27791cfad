"""New weights to eight hosts, every link of 200 Mbit/s: the learner's uplink, like any other, carries about one copy.

Sides are the same but for the number of servers. A server is a process with the shipped Stage, fetcher and relay; whom
it fetches from the shipped plan says. A host is a link of 200 Mbit/s out and 200 Mbit/s in (links.py), for the learner
and for every server, in one process apart. What is timed: from the announcement until every server has the version
whole, verified (BLAKE3) and staged. Swaps are not: they roll over the fleet whatever the link.

Seen 2026-11-30 on two cores with 14 to 20 other processes running: 4.10 to 4.12 s for 8 servers, 2.45 s for one (1.68),
1.02 times the bytes; with the third server at a tenth the others 5.6 to 5.7 s, itself 24.6 s (its link takes 23.9).
With --quick, half as many blocks in the same chain, 2.04: its floor is 1.9.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from learner.relay_plan import Holder, plan_relay, route
from protocol.versions import Version
from protocol.weights.fetching import WeightsFetcher
from protocol.weights.layout import MappedWeights, build_manifest
from protocol.weights.manifest import Manifest, TensorSpec
from protocol.weights.serving import WeightsServer
from protocol.weights.specs import Layout
from rollout_server.relay import Relay
from rollout_server.stage import Stage, Wanted
from tests.bench.harness import Figures, Row
from tests.bench.links import open_links

LINK_BYTES_PER_S = 200e6 / 8
LEARNER = 0
NUM_SERVERS = 8
HIDDEN, INTERMEDIATE, HEADS = 896, 4864, 128
"""A layer as Qwen2.5-0.5B has 24 of: 30 MB in BF16, tensors of 0.2 to 8.7 MB."""


def layer_specs(layers: int) -> list[TensorSpec]:
    """Tensors of so many layers."""
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HEADS, HIDDEN), "self_attn.v_proj": (HEADS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE), "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    return [
        TensorSpec(f"model.layers.{layer}.{name}.weight", "BF16", shape)
        for layer in range(layers)
        for name, shape in shapes.items()
    ]


def publish(directory: Path, layers: int) -> tuple[MappedWeights, Manifest]:
    """Make a version of random bytes."""
    weights = MappedWeights.create(directory / "published.safetensors", Layout(layer_specs(layers)))
    writable = np.frombuffer(weights.writable_bytes(0, weights.layout.file_bytes), np.uint8)
    begin = len(weights.layout.header)
    writable[begin:] = np.random.default_rng(0).integers(0, 256, writable.size - begin, np.uint8)
    return weights, build_manifest(Version(1, 1), weights, "blake3")


def serve_host(directory: str, pipe: Connection) -> None:
    """One rollout server's host: say where it passes on, be told whom to ask, fetch when told to."""
    with Relay("tcp://127.0.0.1:*") as relay:
        pipe.send(relay.address)
        manifest, addresses = Manifest.from_json(pipe.recv()), pipe.recv()
        fetcher = WeightsFetcher()
        stage = Stage(Path(directory), fetcher, relay)
        pipe.send("ready")
        pipe.recv()
        delivery = stage.bring(Wanted(manifest, addresses, None), threading.Event())
        pipe.send((delivery.bytes, fetcher.counters.moves, fetcher.counters.reconnects))
        pipe.recv()  # it passes on as long as others may want it
        stage.discard()


class Spread:
    """A version to so many servers at once."""

    def __init__(self, servers: int, slow: int = -1) -> None:
        self.servers = servers
        self.slow = slow
        """The server whose link has a tenth."""

    def __call__(self, quick: bool) -> Figures:
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_shared_memory())))
            weights, manifest = publish(directory, layers=1 if quick else 2)
            learner = stack.enter_context(WeightsServer("tcp://127.0.0.1:*"))
            learner.serve(manifest, weights)
            return self._run(stack, directory, learner, manifest)

    def _run(self, stack: contextlib.ExitStack, directory: Path, learner: WeightsServer, manifest: Manifest) -> Figures:
        spawn = multiprocessing.get_context("spawn")
        pipes: list[Connection] = []
        for number in range(self.servers):
            ours, theirs = spawn.Pipe()
            staging = directory / f"host-{number}"
            process = spawn.Process(target=serve_host, args=(str(staging), theirs), daemon=True)
            process.start()
            stack.callback(process.join, 10)
            theirs.close()
            pipes.append(ours)
        holders = {str(n + 1): Holder(str(n + 1), pipe.recv()) for n, pipe in enumerate(pipes)}
        routes = self._routes(holders, learner.address)
        rates = dict.fromkeys(range(self.servers + 1), LINK_BYTES_PER_S)
        if self.slow >= 0:
            rates[self.slow + 1] /= 10
        targets = {(source, sink): address for sink, way in routes.items() for source, address in way}
        dialed = stack.enter_context(open_links(rates, targets))
        for number, pipe in enumerate(pipes):
            pipe.send(manifest.to_json())
            pipe.send(tuple(dialed[source, number + 1] for source, _ in routes[number + 1]))
            assert pipe.recv() == "ready"
        begun_s = time.monotonic()
        for pipe in pipes:
            pipe.send("go")
        ends_s: dict[int, float] = {}
        waiting = dict(enumerate(pipes))
        while waiting:
            for pipe in multiprocessing.connection.wait(list(waiting.values())):
                number = next(n for n, other in waiting.items() if other is pipe)
                waiting.pop(number).recv()
                ends_s[number] = time.monotonic() - begun_s
        for pipe in pipes:
            pipe.send("end")
        others_s = max(end_s for number, end_s in ends_s.items() if number != self.slow)
        return {"all_s": max(ends_s.values()), "others_s": others_s, "learner_bytes": float(learner.counters.bytes)}

    def _routes(self, holders: dict[str, Holder], learner: str) -> dict[int, list[tuple[int, str]]]:
        """By host: whom it is told to ask, each as (host, address)."""
        parents = plan_relay(list(holders.values()), {})
        return {
            int(name): [(int(h.name), h.address) for h in route(name, parents, holders)] + [(LEARNER, learner)]
            for name in holders
        }


def _shared_memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


one, eight = Spread(1), Spread(NUM_SERVERS)
a_slow_one = Spread(NUM_SERVERS, slow=2)
CONTROL = "one server, the same links"

ROWS = [
    Row(
        name="relay_seconds", control=CONTROL, ours=eight, baseline=one, ratio="ours/baseline", target=2.0,
        sense="lower", unit="s until 8 servers (1) have 60 MB (quick: 30)", figure="all_s", contest="relay",
        rounds=3,
    ),
    Row(
        name="relay_learner_bytes", control=CONTROL, ours=eight, baseline=one, ratio="ours/baseline", target=1.3,
        sense="lower", unit="bytes that the learner sends", figure="learner_bytes", contest="relay",
        rounds=3,
    ),
    Row(
        name="relay_one_slow", control="8 servers, none of them slow", ours=a_slow_one, baseline=eight,
        ratio="ours/baseline", target=2.0, sense="lower", figure="others_s", contest="relay",
        rounds=3,
        unit="s until the others have 60 MB (quick: 30), the third of 8 at a tenth, unknown",
    ),
]  # fmt: skip
