"""Random numbers by counter: the k-th number of a seed is a hash of (seed, k), never the state of a generator.

So a sample's tokens do not depend on batch mates, admission order, retries or restarts. numpy only.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protocol.messages import Float32

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_64_BITS = (1 << 64) - 1


def hash_counters(seeds: UInt64, counters: UInt64) -> UInt64:
    """Mix seeds with counters into 64 uniform bits, elementwise (shapes broadcast).

    Output number `counter` of SplitMix64 started at `seed` (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
    Generators, OOPSLA 2014, with the mixing constants of Stafford's variant 13), computed without those before it.
    """
    z: UInt64 = seeds + (counters + np.uint64(1)) * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    mixed: UInt64 = np.bitwise_xor(z, z >> np.uint64(31))
    return mixed


def hash_counter(seed: int, counter: int) -> int:
    """`hash_counters` of one number, at a tenth of the time."""
    z = (seed + (counter + 1) * _GOLDEN) & _64_BITS
    z = ((z ^ (z >> 30)) * _MIX_1) & _64_BITS
    z = ((z ^ (z >> 27)) * _MIX_2) & _64_BITS
    return z ^ (z >> 31)


def uniform(seed: int, position: int) -> float:
    """`uniforms` of one number."""
    return (hash_counter(seed, position) >> 40) * 2**-24


def uniforms(seeds: UInt64, positions: Int64) -> Float32:
    """Float32 in [0, 1), elementwise: the top 24 bits of the hash, as many as a float32 holds exactly."""
    bits = hash_counters(seeds, positions.astype(np.uint64)) >> np.uint64(40)
    return bits.astype(np.float32) * np.float32(2**-24)
