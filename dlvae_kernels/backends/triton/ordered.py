"""Floats as integers of the same order: for the k-th largest of a row, and for sorting values with their indices."""

from __future__ import annotations

import triton
import triton.language as tl

# The key of what is not there: after all others.
NO_KEY = tl.constexpr(9223372036854775807)


@triton.jit
def to_ordered(value):
    """The int32 of a float32 that sorts as it does; of NaN as of -inf."""
    # Of the two zeros only one stays, as they are equal.
    value = tl.where(value == 0, 0.0, tl.where(value == value, value, float("-inf")))
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def to_key(value, index):
    """int64 that sorts by value, and then by index, which is in [0, 2^32)."""
    return (to_ordered(value).to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def value_of(key):
    return from_ordered((key >> 32).to(tl.int32))


@triton.jit
def index_of(key):
    return key & 0xFFFFFFFF


@triton.jit
def sort_keys(keys, DESCENDING: tl.constexpr, INTERPRETED: tl.constexpr):
    """Each row of keys [R, C] sorted."""
    if not INTERPRETED:
        return tl.sort(keys, dim=1, descending=DESCENDING)
    # The interpreter exchanges one by one: the same bitonic network by whole rows.
    place = tl.arange(0, keys.shape[1])[None, :] + tl.zeros(keys.shape, tl.int32)
    size = 2
    while size <= keys.shape[1]:
        apart = size // 2
        while apart > 0:
            other = tl.gather(keys, place ^ apart, axis=1)
            takes_lesser = ((place & apart) == 0) == (((place & size) == 0) != DESCENDING)
            keys = tl.where(takes_lesser, tl.minimum(keys, other), tl.maximum(keys, other))
            apart //= 2
        size *= 2
    return keys


@triton.jit
def kth_largest(ordered, k):
    """Of each row of ordered [R, C] a threshold that at least k of it reach, and how many do: more than k only by ties.

    By halving the interval between the least and the largest; C >= k.
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
