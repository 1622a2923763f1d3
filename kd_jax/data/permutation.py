"""Counter-based random numbers, and permutations whose element at any index is computed directly.

Everything that looks random in the data (row order, masks, finetuning samples) is a pure function of integers through
these. So nothing is replayed to reach step k, and no generator's state is saved.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6  # four are proven to suffice with random round functions (Luby and Rackoff 1988); two more for a mere hash


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Mixes uint64 [...] to uint64 [...], a bijection; SplitMix64 of Steele, Lea and Flood, OOPSLA 2014."""
    mixed = values + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def name_key(*parts: str | int) -> int:
    """A 64-bit key from names and numbers."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def counter_keys(base: int | np.ndarray, *counters: np.ndarray) -> np.ndarray:
    """uint64 [n] keys, one for each tuple of counters (non-negative integers [n]).

    base: the key that they all depend on, a scalar or uint64 [n].
    """
    keys = np.broadcast_to(np.asarray(base, np.uint64), np.shape(counters[0]))
    for counter in counters:
        # Mixed before it is added, so that neighboring counters of two bases do not meet.
        keys = splitmix64(keys + splitmix64(np.asarray(counter).astype(np.uint64)))
    return keys


def _feistel(values: np.ndarray, bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A bijection of range(2**bits) for each key; the halves differ by one bit where `bits` is odd.

    Each round changes one half by a hash of the other, which any hash function makes reversible.
    """
    low_bits = bits - bits // np.uint64(2)
    masks = ((np.uint64(1) << low_bits) - np.uint64(1), (np.uint64(1) << (bits // np.uint64(2))) - np.uint64(1))
    low, high = values & masks[0], values >> low_bits
    for number in range(0, _ROUNDS, 2):
        low = low ^ (splitmix64(keys + high + np.uint64(number << 56)) & masks[0])
        high = high ^ (splitmix64(keys + low + np.uint64((number + 1) << 56)) & masks[1])
    return (high << low_bits) | low


def permute(index: np.ndarray, size: np.ndarray | int, keys: np.ndarray) -> np.ndarray:
    """Where a random permutation of range(size) sends `index`: int64 [n], with a permutation for each key (uint64 [n]).

    index: int64 [n] in [0, size). size: a scalar or int64 [n], below 2**52. Takes no memory beyond its result: a
    Feistel network permutes the next power of two, and values outside the range go through it again until they fall
    inside (cycle walking; Black and Rogaway, CT-RSA 2002), which takes fewer than two passes on average.
    """
    size = np.broadcast_to(np.asarray(size, np.int64), np.shape(index))
    bits = np.frexp((size - 1).astype(np.float64))[1].astype(np.uint64)  # bit length of size - 1, exact below 2**53
    size = size.astype(np.uint64)
    result = np.asarray(index).astype(np.uint64)
    outside = np.arange(len(result))
    while outside.size:
        values = _feistel(result[outside], bits[outside], keys[outside])
        result[outside] = values
        outside = outside[values >= size[outside]]
    return result.astype(np.int64)
