"""The Triton half of the counter hash of `dropout`: bit for bit the same mask as `keep_mask`."""

import triton
import triton.language as tl


@triton.jit
def _mix(values):
    """murmur3's 32-bit finalizer on uint32."""
    values ^= values >> 16
    values *= 0x85EBCA6B
    values ^= values >> 13
    values *= 0xC2B2AE35
    values ^= values >> 16
    return values


@triton.jit
def row_seeds(keys_ptr, group, numbers):
    """uint32 seed of each row from its group's key and its number inside the group."""
    key = tl.load(keys_ptr + group)
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    return _mix(_mix(numbers.to(tl.uint32) + low) ^ high)


@triton.jit
def keep_entries(seeds, columns, threshold):
    """bool [rows, columns]: whether dropout keeps the entry."""
    hashed = seeds[:, None] ^ _mix(columns.to(tl.uint32))[None, :]
    hashed *= 0x7FEB352D
    hashed ^= hashed >> 15
    hashed *= 0x846CA68B
    return hashed.to(tl.int32, bitcast=True) >= threshold
