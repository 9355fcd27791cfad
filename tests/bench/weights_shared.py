"""Weights on one host: what publishing and applying cost beside the bare copy of their bytes.

1 GB of float32 parameters in 217 tensors, each allocated for itself as a model's are. The learner writes them into a
buffer that readers share and that has been written before; the server reads them there into live parameters. Controls
copy one flat tensor of as many bytes, private to shared memory and back. Best of several repetitions in each process.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.versions import Version
from protocol.weights.layout import build_manifest, make_manifest
from protocol.weights.manifest import Manifest, TensorSpec, new_hasher
from protocol.weights.shared import SharedBuffer, SharedReader
from protocol.weights.specs import Dtype, Layout
from protocol.weights.staging import clean_staging, default_staging_directory
from tests.bench.harness import Figures, Row

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN, VOCABULARY, LAYERS, QUICK_LAYERS = 768, 32000, 24, 6
REPEATS = 7


def shapes(quick: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of a model of 251 million parameters."""
    h = HIDDEN
    found: dict[str, tuple[int, ...]] = {"embed": (VOCABULARY, h)}
    for layer in range(QUICK_LAYERS if quick else LAYERS):
        for name in ("q", "k", "v", "o"):
            found[f"layers.{layer}.{name}"] = (h, h)
        for name in ("up", "gate", "down"):
            found[f"layers.{layer}.{name}"] = (4 * h, h)
        for name in ("norm1", "norm2"):
            found[f"layers.{layer}.{name}"] = (h,)
    return found


def parameters(quick: bool) -> dict[str, Tensor]:
    """Random float32 parameters by name."""
    import torch

    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes(quick).items()}


def num_elements(quick: bool) -> int:
    """Of all parameters."""
    return sum(tensor.numel() for tensor in parameters(quick).values())


@contextlib.contextmanager
def staging() -> Iterator[Path]:
    """A directory where versions lie, for this process alone."""
    with tempfile.TemporaryDirectory(prefix="headway-bench-", dir=default_staging_directory().parent) as directory:
        clean_staging(Path(directory))
        yield Path(directory)


@contextlib.contextmanager
def shared_buffer(quick: bool, dtype: Dtype) -> Iterator[SharedBuffer]:
    """A buffer to publish into, taken for writing."""
    with staging() as directory:
        specs = [TensorSpec(name, dtype, shape) for name, shape in shapes(quick).items()]
        buffer = SharedBuffer.create(directory, Layout(specs))
        assert buffer.begin()
        yield buffer
        buffer.remove()


def best(work: Callable[[], object]) -> Figures:
    """Wall and CPU seconds of the quickest repetition; the first one warms up."""
    work()
    walls, cpus = [], []
    for _ in range(REPEATS):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        work()
        cpus.append(time.process_time() - cpu_s)
        walls.append(time.perf_counter() - wall_s)
    return {"wall_s": min(walls), "cpu_s": min(cpus)}


def flat_copy(quick: bool, *, publish: bool) -> Figures:
    """One copy_ of all bytes, to or from shared memory."""
    import torch

    with shared_buffer(quick, "F32") as buffer:
        layout, private = buffer.mapped.layout, torch.randn(num_elements(quick))
        begin = len(layout.header)
        memory = buffer.mapped.writable_bytes(begin, layout.file_bytes - begin)
        shared = torch.frombuffer(memory, dtype=torch.float32)
        target, source = (shared, private) if publish else (private, shared)
        return best(lambda: target.copy_(source))


def flat_publish(quick: bool) -> Figures:
    """Private to shared."""
    return flat_copy(quick, publish=True)


def flat_apply(quick: bool) -> Figures:
    """Shared to private."""
    return flat_copy(quick, publish=False)


def publish(quick: bool) -> Figures:
    """Every tensor into its place, refused unless finite; no digest."""
    from learner.model.export import write_tensors

    tensors = parameters(quick)
    with shared_buffer(quick, "F32") as buffer:
        return best(lambda: write_tensors(tensors, "float32", buffer.mapped))


def offer(buffer: SharedBuffer, tensors: dict[str, Tensor]) -> Manifest:
    """Publish a version as the learner does, digests included."""
    from learner.model.export import write_tensors

    digests = write_tensors(tensors, "float32", buffer.mapped, "xxh3_128")
    buffer.finish(Version(1, 1))
    return make_manifest(Version(1, 1), buffer.mapped.layout, "xxh3_128", digests)


def apply(quick: bool) -> Figures:
    """Claim the learner's file, check it against the model, copy it into the live parameters; no digest."""
    tensors = parameters(quick)
    with shared_buffer(quick, "F32") as buffer:
        manifest = offer(buffer, tensors)
        return best(apply_with(SharedReader(buffer.mapped.path.parent), buffer, manifest, tensors))


def apply_with(
    reader: SharedReader, buffer: SharedBuffer, manifest: Manifest, live: dict[str, Tensor]
) -> Callable[[], None]:
    """What a server does of a version, verification apart."""
    from rollout_server.engines.live_weights import copy_weights, read_weights

    layout = manifest.layout

    def work() -> None:
        mapped = reader.claim(buffer.name, layout)
        copy_weights(read_weights(mapped.path, live, mapped), live)
        reader.settle()

    return work


def cast_and_hash(quick: bool) -> Figures:
    """To bfloat16, refused unless finite, with its digests and its manifest."""
    from learner.model.export import write_tensors

    tensors = parameters(quick)

    def work() -> None:
        digests = write_tensors(tensors, "bfloat16", buffer.mapped, "xxh3_128")
        make_manifest(Version(1, 1), buffer.mapped.layout, "xxh3_128", digests)

    with shared_buffer(quick, "BF16") as buffer:
        return best(work)


def hand_written(quick: bool) -> Figures:
    """Cast and copy each tensor, hash it; nothing is looked at."""
    import torch

    tensors = parameters(quick)

    def work() -> None:
        for name, tensor in tensors.items():
            view = buffer.mapped.view(name)
            torch.frombuffer(view, dtype=torch.bfloat16).view(tensor.shape).copy_(tensor)
            hasher = new_hasher("xxh3_128")
            hasher.update(view)
            hasher.hexdigest()

    with shared_buffer(quick, "BF16") as buffer:
        return best(work)


def both(quick: bool) -> Figures:
    """Publish and apply; with `verified_*`, digests taken and checked as well."""
    from learner.model.export import write_tensors

    tensors = parameters(quick)
    live = {name: tensor.clone() for name, tensor in tensors.items()}
    with shared_buffer(quick, "F32") as buffer:
        reader = SharedReader(buffer.mapped.path.parent)
        manifest = offer(buffer, tensors)
        take = apply_with(reader, buffer, manifest, live)

        def bare() -> None:
            assert buffer.begin()
            write_tensors(tensors, "float32", buffer.mapped)
            buffer.finish(Version(1, 1))
            take()

        def verified() -> None:
            assert buffer.begin()
            new = offer(buffer, tensors)
            assert build_manifest(new.version, buffer.mapped, "xxh3_128") == new
            take()

        return best(bare) | {f"verified_{name}": figure for name, figure in best(verified).items()}


def safetensors_files(quick: bool) -> Figures:
    """save_file, load_file, copy_: in shared memory, without digests."""
    from safetensors.torch import load_file, save_file

    tensors = parameters(quick)
    live = {name: tensor.clone() for name, tensor in tensors.items()}

    def work() -> None:
        save_file(tensors, directory / "model.safetensors")
        for name, tensor in load_file(directory / "model.safetensors").items():
            live[name].copy_(tensor)

    with staging() as directory:
        figures = best(work)
        return figures | {f"verified_{name}": figure for name, figure in figures.items()}


ROWS = [
    Row(
        name="weights_shared_publish", control="one flat copy_ of the same bytes, private to shared", ours=publish,
        baseline=flat_publish, ratio="baseline/ours", target=0.8, unit="s", figure="wall_s",
    ),
    Row(
        name="weights_shared_apply", control="one flat copy_ of the same bytes, shared to private", ours=apply,
        baseline=flat_apply, ratio="baseline/ours", target=0.8, unit="s", figure="wall_s",
    ),
    Row(
        name="weights_shared_cast_hash", control="a loop of copy_ with cast and xxh3, unchecked", ours=cast_and_hash,
        baseline=hand_written, ratio="baseline/ours", target=0.9, unit="s", figure="wall_s",
    ),
    Row(
        name="weights_shared_both", control="save_file + load_file + copy_", ours=both, baseline=safetensors_files,
        ratio="baseline/ours", target=5.0, unit="s", figure="wall_s", contest="weights_shared_both",
    ),
    Row(
        name="weights_shared_both_verified", control="save_file + load_file + copy_, unverified", ours=both,
        baseline=safetensors_files, ratio="baseline/ours", target=5.0, unit="s", figure="verified_wall_s",
        contest="weights_shared_both",
    ),
]  # fmt: skip
