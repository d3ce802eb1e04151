"""What autograd keeps of a forward pass for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(run: Callable[[], object], excluded: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of what `run` returns, without those of `excluded` tensors."""
    sizes: list[int] = []
    record_saved(run, excluded, sizes.append)
    return sum(sizes)


def record_saved(run: Callable[[], object], excluded: Iterable[Tensor], record: Callable[[int], None]) -> None:
    """Call `record` with the bytes of each storage that autograd keeps, at the time when it first keeps it.

    Args:
        run: makes a pass and returns what backward would start from.
        excluded: tensors whose storages do not count.
        record: is called while `run` is.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in excluded}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            record(storage.nbytes())
        # With its history, an output that its own node keeps would hold that node, and the pass would never be freed.
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held until all is counted: an address that is free again could be taken for one seen before.
        result = run()
    del result
