"""float32 numbers as integers of the same order, to select the k largest and to sort values with their indices."""

from __future__ import annotations

import triton
import triton.language as tl

from ..architectures import INTERPRETED

# The key of a missing element, which sorts after all others.
NO_KEY = tl.constexpr(9223372036854775807)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def to_ordered(value):
    """The int32 that sorts as a float32 does; NaN sorts as -inf."""
    # Both zeros become one, because they are equal.
    value = tl.where(value == 0, 0.0, tl.where(value == value, value, float("-inf")))
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(ordered):
    """The float32 of an int32 of `to_ordered`."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def to_key(value, index):
    """The int64 that sorts by value and then by index, which is in [0, 2^32)."""
    return (to_ordered(value).to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def value_of(key):
    """The value of a key."""
    return from_ordered((key >> 32).to(tl.int32))


@triton.jit
def index_of(key):
    """The index of a key."""
    return key & 0xFFFFFFFF


@triton.jit
def sort_keys(keys, DESCENDING: tl.constexpr):
    """Each row of keys [R, C] sorted."""
    if not _INTERPRETED:
        return tl.sort(keys, dim=1, descending=DESCENDING)
    # The interpreter's sort exchanges elements one by one. This is the same bitonic network on whole rows.
    place = tl.arange(0, keys.shape[1])[None, :] + tl.zeros(keys.shape, tl.int32)
    size = 2
    while size <= keys.shape[1]:
        distance = size // 2
        while distance > 0:
            other = tl.gather(keys, place ^ distance, axis=1)
            takes_lesser = ((place & distance) == 0) == (((place & size) == 0) != DESCENDING)
            keys = tl.where(takes_lesser, tl.minimum(keys, other), tl.maximum(keys, other))
            distance //= 2
        size *= 2
    return keys


@triton.jit
def kth_largest(ordered, k):
    """A threshold for the k largest of each row of ordered [R, C], and the number of elements at or above it; k <= C.

    It lies above the (k + 1)-th largest element and at or below the k-th. Where these tie, it is their value, and more
    than k elements are at or above it. The interval from the least to the largest element is halved.
    """
    low = tl.min(ordered, axis=1)
    high = tl.max(ordered, axis=1) + 1
    reached = tl.sum((ordered >= low[:, None]).to(tl.int32), axis=1)
    middle = (low & high) + ((low ^ high) >> 1)
    while tl.max((middle != low).to(tl.int32), axis=0) > 0:
        count = tl.sum((ordered >= middle[:, None]).to(tl.int32), axis=1)
        is_enough = count >= k
        low = tl.where(is_enough, middle, low)
        reached = tl.where(is_enough, count, reached)
        high = tl.where(is_enough, tl.where(count == k, middle + 1, high), middle)
        middle = (low & high) + ((low ^ high) >> 1)
    return low, reached
