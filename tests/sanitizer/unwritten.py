"""Bit patterns for memory that nothing has written, and tensors with such memory around them."""

import torch

# NaNs that no arithmetic produces, and integers that no test uses: the sanitizer reports a kernel
# that loads one. Narrow integers have no value to spare.
PATTERNS = {
    torch.float64: (torch.int64, 0x7FF8_A5A5_A5A5_A5A5),
    torch.float32: (torch.int32, 0x7FC5_A5A5),
    torch.float16: (torch.int16, 0x7E5A),
    torch.bfloat16: (torch.int16, 0x7FE5),
    torch.int64: (torch.int64, 0x5A5A_A5A5_5A5A_A5A5),
    torch.int32: (torch.int32, 0x5A5A_A5A5),
}


def fill(tensor):
    """Mark every element as unwritten; dtypes without a pattern are left as they are."""
    if tensor.dtype in PATTERNS:
        integer, pattern = PATTERNS[tensor.dtype]
        with torch.no_grad():
            tensor.view(integer).fill_(pattern)
    return tensor


def is_unwritten(tensor):
    """Which elements still hold the pattern."""
    integer, pattern = PATTERNS[tensor.dtype]
    return tensor.view(integer) == pattern


def guarded(tensor, before=0, between=3, after=5):
    """A copy of ``tensor`` with unwritten elements before it, after it and between its rows.

    The sanitizer knows where a storage ends, not where a view does. In this copy a load outside
    the view is a load of unwritten memory, and a store outside it is seen by ``intact``. The
    last stride is 1, the base is aligned if ``before`` is a multiple of 16 bytes, the rows are if
    ``between`` makes them so.
    """
    *lead, last = tensor.shape
    rows = tensor.numel() // last if last else 0
    storage = fill(tensor.new_empty(before + rows * (last + between) + after))
    strides = [last + between]
    for size in reversed(lead[1:]):
        strides.insert(0, strides[0] * size)
    view = storage.as_strided(tensor.shape, [*strides[: len(lead)], 1], before)
    return view.copy_(tensor)


def intact(view):
    """Whether nothing in the storage of a ``guarded`` tensor but the view itself was written."""
    storage = view.new_tensor([]).set_(view.untyped_storage()).clone()
    fill(storage.as_strided(view.shape, view.stride(), view.storage_offset()))
    return bool(is_unwritten(storage).all())
