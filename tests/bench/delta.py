"""What changed in the weights, against all of them XORed and compressed, which is what one would do first.

The pairs are 64 MiB of bf16 from N(0, 0.02) of which a share moved by one unit in the last place, and a small
transformer before and after a real step of AdamW at lr 1e-6. The control is the XOR of the whole tensor through zstd
at level 1, into a buffer that is there already; its reverse decompresses and XORs. All count CPU seconds of one
thread, the best of several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.bench.harness import Row, cpu_clock

Pair = tuple[Any, Any]
"""[N] uint16: bits of the last version and of the new one."""
NUM_ELEMENTS = 32 << 20
WARM_UP_STEPS = 10


def drifted(share: float) -> Pair:
    """Return weights of which that share moved by one unit in the last place, up or down."""
    import numpy as np

    rng = np.random.default_rng(0)
    normal = rng.standard_normal(NUM_ELEMENTS, np.float32) * np.float32(0.02)
    base = (normal.view(np.uint32) >> 16).astype(np.uint16)
    new = base.copy()
    moved = rng.random(NUM_ELEMENTS, np.float32) < share
    new[moved] += rng.choice(np.array([1, 0xFFFF], np.uint16), int(moved.sum()))
    return base, new


def trained() -> Pair:
    """Return the bf16 weights of a small transformer before and after one step, in the middle of training it."""
    import numpy as np
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=16_384, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def bits() -> Any:
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        return flat.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).copy()

    for number in range(WARM_UP_STEPS + 1):
        if number == WARM_UP_STEPS:
            base = bits()
        tokens = torch.randint(0, config.vocab_size, (2, 64))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return base, bits()


def best_cpu_s(work: Callable[[], object], quick: bool) -> float:
    times = []
    for _ in range(3 if quick else 9):
        started_s = cpu_clock()
        work()
        times.append(cpu_clock() - started_s)
    return min(times)


def encode(base: Any, new: Any) -> bytes:
    from protocol.weights.delta import encode_tensor

    part = encode_tensor(base, new, 2)
    assert part is not None
    return part


def xor_zstd(base: Any, new: Any, buffer: Any) -> bytes:
    import numpy as np
    import zstandard

    np.bitwise_xor(base, new, out=buffer)
    return zstandard.ZstdCompressor(level=1).compress(buffer.data)


def decode_and_apply(part: bytes, target: Any) -> None:
    from protocol.weights.delta import apply_tensor, decode_tensor

    apply_tensor(decode_tensor(part, num_elements=target.size, item_bytes=2), target)


def unxor(packed: bytes, target: Any) -> None:
    import numpy as np
    import zstandard

    target ^= np.frombuffer(zstandard.ZstdDecompressor().decompress(packed), np.uint16)


@dataclass(frozen=True)
class Ours:
    """Figures of the delta: encoding and applying, in GB of model per CPU second; share of the dense bytes."""

    pair: Callable[[], Pair]

    def __call__(self, quick: bool) -> dict[str, float]:
        import numpy as np

        base, new = self.pair()
        part = encode(base, new)
        target = base.copy()
        decode_and_apply(part, target)
        assert np.array_equal(target, new)
        return figures(
            base.nbytes,
            len(part),
            best_cpu_s(lambda: encode(base, new), quick),
            best_cpu_s(lambda: decode_and_apply(part, target), quick),
        )


@dataclass(frozen=True)
class Control:
    """Figures of XOR and zstd."""

    pair: Callable[[], Pair]

    def __call__(self, quick: bool) -> dict[str, float]:
        import numpy as np

        base, new = self.pair()
        buffer = np.empty_like(base)
        packed = xor_zstd(base, new, buffer)
        target = base.copy()
        unxor(packed, target)
        assert np.array_equal(target, new)
        return figures(
            base.nbytes,
            len(packed),
            best_cpu_s(lambda: xor_zstd(base, new, buffer), quick),
            best_cpu_s(lambda: unxor(packed, target), quick),
        )


def figures(dense_bytes: int, delta_bytes: int, encode_s: float, apply_s: float) -> dict[str, float]:
    return {
        "share": delta_bytes / dense_bytes,
        "encode": dense_bytes / encode_s / 1e9,
        "apply": dense_bytes / apply_s / 1e9,
        "cpu_s": encode_s + apply_s,
    }


def dense(quick: bool) -> dict[str, float]:
    """Return the share of all bytes; its work is the copy into place."""
    import numpy as np

    source = np.ones(NUM_ELEMENTS, np.uint16)
    target = np.zeros_like(source)
    return {"share": 1.0, "cpu_s": best_cpu_s(lambda: np.copyto(target, source), quick)}


def _rows(name: str, pair: Callable[[], Pair], share: float | None) -> list[Row]:
    ours, control = Ours(pair), Control(pair)
    contest: dict[str, Any] = {"contest": f"delta_{name}", "ours": ours}
    speed: dict[str, Any] = {"baseline": control, "ratio": "ours/baseline", "unit": "GB of model / CPU s"}
    wire = [
        Row(
            name=f"delta_{name}_wire", control="all bytes", baseline=dense, ratio="ours/baseline", target=share,
            sense="lower", unit="of the dense bytes", figure="share", **contest,
        )
    ] if share else []  # fmt: skip
    return [
        *wire,
        Row(
            name=f"delta_{name}_wire_xor", control="XOR and zstd-1", baseline=control, ratio="ours/baseline",
            target=0.75, sense="lower", unit="of the dense bytes", figure="share", **contest,
        ),
        Row(name=f"delta_{name}_encode", control="XOR and zstd-1", target=1.5, figure="encode", **speed, **contest),
        Row(name=f"delta_{name}_apply", control="zstd-1 and XOR", target=2.0, figure="apply", **speed, **contest),
    ]  # fmt: skip


ROWS = [
    *_rows("1pct", partial(drifted, 0.01), 0.015),
    *_rows("3pct", partial(drifted, 0.03), 0.037),
    *_rows("adam", trained, None),
]
