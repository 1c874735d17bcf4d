"""Counter-based order and randomness: the whole state of the loader is (seed, epoch, position).

Nothing here remembers anything. The row at a position of an epoch, and every random draw made for
it, follow from the three integers, so a resumed run is the uninterrupted run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1
_ROUNDS = 4
# Below this size the network's digits are too small to reach all orders (of 3 rows: 3 of 6).
_FEW = 32
# Values outside the range, less than √size, that are walked ahead; 2^16 suffice for 2^32 rows.
_MAX_DETOURS = 1 << 16


def mix(*keys: int) -> int:
    """Hash integers to one of 63 bits (SplitMix64 finaliser, Steele et al. 2014, per key)."""
    state = 0x9E3779B97F4A7C15
    for key in keys:
        state = (state ^ (key & _MASK_64)) * 0xBF58476D1CE4E5B9 & _MASK_64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK_64
        state ^= state >> 31
    return state >> 1


def generator(device: torch.device | str, *keys: int) -> torch.Generator:
    """A generator that starts at the state named by ``keys``, for example (seed, epoch, step)."""
    return torch.Generator(device=device).manual_seed(mix(*keys))


def scrambled(values: Tensor) -> Tensor:
    """Int64 to int64, one to one: SplitMix64's finaliser (Steele et al. 2014), of all 64 bits."""
    state = (values ^ _right(values, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    state = (state ^ _right(state, 27)) * (0x94D049BB133111EB - (1 << 64))
    return state ^ _right(state, 31)


def keyed_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Draws that follow from (seed, position), whatever their number and shape.

    Args:
        seeds: int64. positions: int64 of a shape that broadcasts with theirs.

    Returns:
        float32 in [0, 1), multiples of 2^-24: the SplitMix64 stream of each seed.
    """
    return _right(keyed_bits(seeds, positions), 40).float() * 2.0**-24


def keyed_below(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """As ``keyed_uniform``, whole numbers in [0, size), int64.

    Args:
        size: at least 1 and below 2^32; no number is likelier than another by more than 2^-20.
    """
    bits = _right(keyed_bits(seeds, positions), 11)
    return (bits.double() * 2.0**-53 * size).long()


def keyed_bits(seeds: Tensor, positions: Tensor) -> Tensor:
    """64 bits for each (seed, position), int64: the SplitMix64 stream of each seed.

    Args:
        seeds, positions: as ``keyed_uniform`` takes them.
    """
    return scrambled(seeds + (positions + 1) * (0x9E3779B97F4A7C15 - (1 << 64)))


def _right(values: Tensor, count: int) -> Tensor:
    """Shifted by ``count`` bits, with zeros for what comes in: int64 has a sign to PyTorch."""
    return (values >> count) & ((1 << (64 - count)) - 1)


def permuted(positions: Tensor, size: int, *keys: int) -> Tensor:
    """Where a keyed permutation of ``range(size)`` sends ``positions``.

    A generalised Feistel network over a·b >= size with a ≈ b ≈ √size, and cycle walking for the few
    values beyond (Black and Rogaway 2002): a bijection without an array of ``size`` entries.

    Args:
        positions: int64 [M], each in [0, size).
        size: number of rows, at least 1 and below 2^60.
        keys: name the permutation, for example (seed, epoch).

    Returns:
        int64 [M], distinct for distinct positions.
    """
    if size < _FEW:
        shuffled = torch.randperm(size, generator=generator("cpu", *keys))
        return shuffled.to(positions.device)[positions]
    high = max(1, math.isqrt(size))
    low = -(-size // high)
    round_keys = [mix(*keys, number) & 0x7FFFFFFF for number in range(_ROUNDS)]
    result = _feistel(positions, high, low, round_keys)
    num_outside = high * low - size
    if num_outside <= _MAX_DETOURS:
        if num_outside:
            detours = _detours(num_outside, size, high, low, round_keys, positions.device)
            outside = (result - size).clamp_(min=0)
            result = torch.where(result >= size, detours[outside], result)
        return result
    outside = (result >= size).nonzero().squeeze(1)
    while len(outside):
        # At most one value in √size lies outside, so this ends at once.
        result[outside] = _feistel(result[outside], high, low, round_keys)
        outside = outside[result[outside] >= size]
    return result


def _detours(
    num_outside: int,
    size: int,
    high: int,
    low: int,
    round_keys: list[int],
    device: torch.device,
) -> Tensor:
    """Where cycle walking takes the values from ``size`` on, int64 [num_outside].

    By doubling, so that nothing depends on what is found and a GPU is never waited for. A cycle of
    values that are all outside stays there; no position leads into it.
    """
    values = torch.arange(size, size + num_outside, device=device)
    walked = _feistel(values, high, low, round_keys)
    for _ in range(num_outside.bit_length()):
        further = walked[(walked - size).clamp_(min=0)]
        walked = torch.where(walked >= size, further, walked)
    return walked


def _feistel(values: Tensor, high: int, low: int, round_keys: list[int]) -> Tensor:
    """A bijection of [0, high·low): the two digits are shifted by hashes of each other in turn."""
    left = values // low
    right = values - left * low
    for number, key in enumerate(round_keys):
        if number % 2 == 0:
            left = _hash(right, key).add_(left).remainder_(high)
        else:
            right = _hash(left, key).add_(right).remainder_(low)
    return left.mul_(low).add_(right)


def _hash(values: Tensor, key: int) -> Tensor:
    """Scramble int64 below 2^30 to int64 below 2^31; every product stays below 2^62."""
    # In place: over a window of positions each new tensor would be a walk through memory.
    mixed = (values + key).bitwise_and_(0x7FFFFFFF).mul_(0x45D9F3B)
    mixed.bitwise_xor_(mixed >> 16).bitwise_and_(0x7FFFFFFF)
    return mixed.mul_(0x119DE1F3).bitwise_right_shift_(20).bitwise_and_(0x7FFFFFFF)
