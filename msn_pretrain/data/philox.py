"""Philox: random numbers by their place instead of by their order, so that nobody's drawing moves anybody else's."""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_WORDS_A_BLOCK = 4


def philox(counters: NDArray[np.uint64], *, key: int) -> NDArray[np.uint64]:
    """Give four random 32-bit words for each counter, a pure function of counter and key.

    counters: (n, 4), each in [0, 2^32)
    key:      in [0, 2^64)
    returns:  (n, 4), each in [0, 2^32)
    Source: Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    one, two, three, four = (counters[:, word] for word in range(_WORDS_A_BLOCK))
    keys = np.array([key & 0xFFFFFFFF, key >> 32], dtype=np.uint64)
    for _ in range(_ROUNDS):
        left, right = one * _MULTIPLIERS[0], three * _MULTIPLIERS[1]  # below 2^64
        one, three = (right >> _WORD) ^ two ^ keys[0], (left >> _WORD) ^ four ^ keys[1]
        two, four = right & _LOW, left & _LOW
        keys = (keys + _KEY_STEPS) & _LOW
    return np.stack([one, two, three, four], axis=1)


def uniforms(places: NDArray[np.int64], *, seed: int, count: int) -> NDArray[np.float64]:
    """Give `count` numbers in (0, 1) for each place, a pure function of the place and the seed.

    places:  (n, 3) whole numbers, each in [0, 2^32): what the numbers are for, such as (epoch, image, view)
    returns: (n, count)
    """
    blocks = -(-count // _WORDS_A_BLOCK)
    counters = np.empty((len(places), blocks, _WORDS_A_BLOCK), dtype=np.uint64)
    counters[:, :, 0] = np.arange(blocks, dtype=np.uint64)
    counters[:, :, 1:] = places.astype(np.uint64)[:, None]
    words = philox(counters.reshape(-1, _WORDS_A_BLOCK), key=seed % 2**64)
    return (words.reshape(len(places), -1)[:, :count].astype(np.float64) + 0.5) / 2**32


def seed_at(*places: int, seed: int) -> int:
    """Give a seed in [0, 2^63) for one place, for generators that draw in order; up to three numbers in [0, 2^32)."""
    counters = np.zeros((1, _WORDS_A_BLOCK), dtype=np.uint64)
    counters[0, 0] = 0xFFFFFFFF  # a block that `uniforms` never reaches
    counters[0, 1 : 1 + len(places)] = places
    high, low = (int(word) for word in philox(counters, key=seed % 2**64)[0, :2])
    return ((high << 32) | low) >> 1
