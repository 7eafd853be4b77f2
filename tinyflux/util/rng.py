"""Counter-based randomness: every draw is a function of named integers, never of global state.

The hash is splitmix64 (Steele et al., 2014, "Fast splittable pseudorandom number generators").
Integer draws are the same on every device; float draws differ only by rounding.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_CHUNK = 1 << 15  # elements to hash at a time, so that temporaries stay in the cache
_LARGE = 1 << 20  # from this many elements on, two threads make an order
_ROUNDS = 12  # even; with fewer, orders of five elements are not equally likely


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Hash of each element of a uint64 array."""
    x = np.asarray(x, np.uint64) + np.uint64(_GOLDEN)
    x ^= x >> np.uint64(30)
    x *= np.uint64(_MIX1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_MIX2)
    x ^= x >> np.uint64(31)
    return x


def key(*parts: int | str) -> int:
    """One unsigned 64-bit integer for an ordered tuple of integers and strings."""
    state = 0
    for part in parts:
        data = part.encode() if isinstance(part, str) else (part & _MASK).to_bytes(8, "little")
        # the length separates ("ab", "c") from ("a", "bc")
        for word in (len(data), *(int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8))):
            state = (state ^ word) + _GOLDEN & _MASK
            state = (state ^ (state >> 30)) * _MIX1 & _MASK
            state = (state ^ (state >> 27)) * _MIX2 & _MASK
            state ^= state >> 31
    return state


def signed_key(*parts: int | str) -> int:
    """`key` as a signed 64-bit integer, for int64 tensors."""
    return _signed(key(*parts))


def permutation(n: int, *parts: int | str) -> np.ndarray:
    """The order of `range(n)` keyed by `parts`, int64 [n]."""
    bits, start = np.uint64(n.bit_length()), np.uint64(key(*parts))
    keys, half = np.empty(n, np.uint64), n // 2

    def fill(begin: int, end: int) -> None:
        for first in range(begin, end, _CHUNK):
            index = np.arange(first, min(first + _CHUNK, end), dtype=np.uint64)
            # sorting values with their index in the low bits takes a sixth of the time of argsort
            keys[first : first + len(index)] = splitmix64(start + index) >> bits << bits | index

    if n < _LARGE:
        fill(0, n)
        keys.sort()
    else:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(fill, (0, half), (half, n)))
            keys.partition(half)  # the smaller half comes first; it takes a tenth of the time of sorting
            list(pool.map(np.ndarray.sort, (keys[:half], keys[half:])))
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.view(np.int64)


def shuffled(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The element at `places[i]` in the order of `range(sizes[i])` keyed by `keys[i]`, int64 like `places`.

    Works for many orders at once, without tables: a Feistel network over the smallest power of two that covers the
    range, applied until the result is in the range (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains").
    """
    found = np.empty(len(places), np.int64)
    for i in range(0, len(places), _CHUNK):
        found[i : i + _CHUNK] = _walk(*(np.asarray(x[i : i + _CHUNK], np.uint64) for x in (places, sizes, keys)))
    return found


def _walk(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    one, found, todo = np.uint64(1), places.copy(), np.arange(len(places))
    low = np.frexp((sizes - one).astype(np.float64))[1].astype(np.uint64)  # bits of the largest element
    low, high = low >> one, low - (low >> one)
    while len(todo):
        left, right, key = found[todo] >> low, found[todo] & (one << low) - one, keys
        for _ in range(_ROUNDS):
            key = key * np.uint64(_MIX1) ^ key >> np.uint64(32)
            # the high bits after two multiplications are a good enough hash
            hashes = (right * np.uint64(_MIX2) ^ key) * np.uint64(_GOLDEN) >> np.uint64(40)
            left, right = right, left ^ hashes & (one << high) - one
            low, high = high, low
        found[todo] = left << low | right
        again = found[todo] >= sizes
        todo, sizes, keys, low, high = (x[again] for x in (todo, sizes, keys, low, high))
    return found.view(np.int64)


def sample_seeds(seed: int, step: int, slots: np.ndarray) -> np.ndarray:
    """One seed for each slot of the global batch of a step, int64 like `slots`."""
    return splitmix64(np.uint64(key(seed, "sample", step)) + np.asarray(slots, np.uint64)).view(np.int64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: torch has no unsigned 64-bit shift


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX2)
    return x ^ _shift_right(x, 31)


def _bits(seeds: Tensor, what: str, n: int) -> Tensor:
    streams = _mix(seeds ^ _signed(key(what)))  # [B]
    return _mix(streams[:, None] + torch.arange(n, device=seeds.device))  # [B, n]


def uniform(seeds: Tensor, what: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Draws in [0, 1) for each sample.

    seeds int64 [B]; `what` names the draw. Returns float32 [B, *shape] on the seeds' device.
    """
    bits = _bits(seeds, what, math.prod(shape))
    return (_shift_right(bits, 40).float() * 2.0**-24).view(len(seeds), *shape)


def normal(seeds: Tensor, what: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal draws for each sample (Box-Muller).

    seeds int64 [B]; `what` names the draw. Returns float32 [B, *shape] on the seeds' device.
    """
    n = math.prod(shape)
    bits = _bits(seeds, what, (n + 1) // 2)
    radius = torch.sqrt(-2 * torch.log((_shift_right(bits, 32).float() + 1) * 2.0**-32))
    angle = (bits & 0xFFFFFF).float() * (2 * math.pi * 2.0**-24)
    draws = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return draws.flatten(1)[:, :n].reshape(len(seeds), *shape)
