"""What one call of an op reads, writes and multiplies, by its schema.

Every tensor that is given is read once and every result written once; what the schema says is mutated is read and
written. Dimensions that are only expanded do not count. Some ops and arguments depart from that:

- Some mutated arguments are only written, such as the gradient of `gather_norm_backward`, and some ops read nothing.
- An op that is given `index` or `slots` touches at most so many rows of each matrix; an index with the name of one
  argument before it says so of that one alone.
- Arguments of three dimensions of this project's ops are banks [slots, …]: of these the rows of the clients at work
  count, once per launch, however often the programs of a kernel read them.
- Of `partials`, sums of gradients by chunk of rows, an op that changes them writes its own factors' columns.
- Attention is flash attention: q, k, v are read, output and log-sums written; backward reads these five and the
  output's gradient and writes three gradients.

FLOPs are those of products. torch counts its own, attention's backward with the scores that it computes again; of
causal attention half of them count. In this project's ops each row is multiplied by each matrix `weight` and, in each
bank, by its client's matrix; sums of gradients are products, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.kernels.work import Pass
from benchmarks.launches import computes

Kind = Literal["products", "attention", "the rest"]
OURS = "fedra_kernels"
META = torch.device("meta")

_ONLY_WRITTEN = {
    ("copy_", "self"),
    ("fill_", "self"),
    ("zero_", "self"),
    ("index_fill_", "self"),
    ("index_copy_", "self"),
    ("gather_norm_backward", "grad_hidden"),
    ("activation_gradient", "grad_x"),
    ("activation_gradient", "grad_up"),
}
"""Mutated arguments that are not read, by op; arguments named `out`, `shadow` or `partials` are not read by any op
that changes them."""
_READ_NOTHING = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "arange", "scalar_tensor")
_OF_SOME_ROWS = ("index_select", "index_add_", "index_copy_", "index_fill_", "gather", "scatter_", "scatter_add_")
"""Ops of torch that touch only so many entries along `dim` of `self` as `index` has there."""
_GROUP_TABLES = ("filled", "slots", "groups")
"""Tables with an entry for each client at work."""
_WITHOUT_PRODUCTS = ("lora_grad_reduce",)
_OTHER_MATRICES = {"low_rank_add_": ("down", "up")}
"""What each row is multiplied by besides `weight`."""
_MATRICES = ("weight", "down", "up")
"""Of these an index does not name rows."""


class OpCall(NamedTuple):
    """One call: the op's name with that of its library, FLOPs of its products, and bytes read and written."""

    op: str
    kind: Kind
    flops: float
    read: int
    written: int

    @property
    def is_ours(self) -> bool:
        """Whether it launches a kernel of this project."""
        return self.op.startswith(f"{OURS}::")

    @property
    def work(self) -> Pass:
        """The call as one pass over memory."""
        return Pass(self.flops, self.read + self.written)


def count_call(func: Any, args: Any, kwargs: Any, result: Any, rows_of_client: Sequence[int]) -> OpCall | None:
    """What a call takes of a GPU; None for views, allocations and empty results.

    `rows_of_client` are the rows of one client in matrices, the largest first: tokens and samples of its batch. Ops
    whose tables do not tell the number of clients have a multiple of them.
    """
    name = func._schema.name.partition("::")[2]
    if not computes(func, name, result):
        return None
    return _Call(func, name, args, kwargs, result, rows_of_client).counted()


class _Argument(NamedTuple):
    name: str
    tensor: Tensor
    is_written: bool


@dataclass(frozen=True)
class _Call:
    func: Any
    name: str
    args: Any
    kwargs: Any
    result: Any
    rows_of_client: Sequence[int]

    def counted(self) -> OpCall:
        arguments = self._arguments
        given = {id(argument.tensor): argument for argument in arguments if self._is_read(argument)}
        read = sum(self._bytes(argument) for argument in given.values())
        written = sum(self._bytes(argument) for argument in arguments if argument.is_written)
        written += sum(_footprint(tensor) for tensor in self._results)
        flops = self._flops_of_ours() if self._is_ours else self._flops_of_torch()
        return OpCall(f"{self.func.namespace}::{self.name}", self._kind(flops), flops, read, written)

    @property
    def _is_ours(self) -> bool:
        return self.func.namespace == OURS

    @cached_property
    def _values(self) -> Mapping[str, Any]:
        names = (argument.name for argument in self.func._schema.arguments)
        return dict(zip(names, self.args, strict=False)) | self.kwargs

    @cached_property
    def _arguments(self) -> list[_Argument]:
        written = {a.name for a in self.func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        return [
            _Argument(name, leaf, name in written)
            for name, value in self._values.items()
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor) and leaf.device == META
        ]

    @cached_property
    def _results(self) -> list[Tensor]:
        """The results that are no arguments."""
        known = {id(argument.tensor) for argument in self._arguments}
        leaves = (leaf for leaf in tree_leaves(self.result) if isinstance(leaf, Tensor))
        return [leaf for leaf in leaves if id(leaf) not in known]

    def _is_read(self, argument: _Argument) -> bool:
        if self.name.removesuffix("_like") in _READ_NOTHING:
            return False
        only_written = argument.name in ("out", "shadow", "partials") or (self.name, argument.name) in _ONLY_WRITTEN
        return not (argument.is_written and only_written)

    def _kind(self, flops: float) -> Kind:
        if "attention" in self.name:
            return "attention"
        multiplies = bool(list(self._matrices())) if self._is_ours else flops > 0
        return "products" if multiplies else "the rest"

    def _bytes(self, argument: _Argument) -> int:
        """Of an argument, what the op touches."""
        tensor, limit, dimension = argument.tensor, None, 0
        if not self._is_ours:
            if self.name in _OF_SOME_ROWS and argument.name == "self":
                dimension = self._values["dim"]
                limit = self._values["index"].shape[dimension if self._values["index"].dim() > 1 else 0]
            elif self.name == "embedding" and argument.name == "weight":
                limit = self._values["indices"].numel()
        elif argument.name == "partials" and argument.is_written:
            return len(tensor) * self._entries_of_partials() * tensor.itemsize
        elif tensor.dim() == 3:
            limit = self._clients
        elif tensor.dim() == 2 and argument.name not in _MATRICES:
            tables = (f"{argument.name}_index", "index", "slots", *(["groups"] if argument.is_written else []))
            lengths = (self._length(name) for name in tables)
            limit = next((length for length in lengths if length is not None), None)
        return _footprint(tensor, limit, dimension)

    def _length(self, name: str) -> int | None:
        """Entries of the argument of this name, if it was given."""
        lengths = (len(argument.tensor) for argument in self._arguments if argument.name == name)
        return next(lengths, None)

    @property
    def _rows(self) -> int:
        """Rows that are computed: as many as an index has, or the first matrix."""
        indices = (len(argument.tensor) for argument in self._arguments if argument.name.endswith("index"))
        matrices = (len(argument.tensor) for argument in self._arguments if argument.tensor.dim() == 2)
        return next(indices, next(matrices, 0))

    @property
    def _clients(self) -> int | None:
        lengths = (self._length(name) for name in _GROUP_TABLES)
        shares = (self._rows // rows for rows in self.rows_of_client if self._rows % rows == 0)
        return next((length for length in lengths if length is not None), next(shares, None))

    def _matrices(self) -> Iterator[Tensor]:
        """Frozen matrices that each row is multiplied by."""
        return (a.tensor for a in self._arguments if a.name == "weight" and a.tensor.dim() == 2)

    def _flops_of_ours(self) -> float:
        if self.name in _WITHOUT_PRODUCTS:
            return 0.0
        others = _OTHER_MATRICES.get(self.name, ())
        entries = sum(matrix.numel() for matrix in self._matrices())
        entries += sum(argument.tensor.numel() for argument in self._arguments if argument.name in others)
        entries += sum(math.prod(a.tensor.shape[1:]) for a in self._arguments if a.tensor.dim() == 3)
        if any(argument.name == "partials" and argument.is_written for argument in self._arguments):
            entries += self._entries_of_partials()
        return 2.0 * self._rows * entries

    def _entries_of_partials(self) -> int:
        """Entries of the factors whose gradients an op sums up."""
        values = self._values
        if self.name == "lora_grad_output":
            return sum(math.prod(factor.shape[1:]) for factor in values["lora_b"])
        if self.name == "lora_grad_outer":
            return int(values["wide"].shape[1] * values["rank"])
        narrow = (values[name] for name in ("grad_shrunk", "shrunk"))
        return sum(values["grad_y"].shape[1] * part.shape[1] for part in narrow if part is not None)

    def _flops_of_torch(self) -> float:
        counter = flop_registry.get(self.func.overloadpacket)
        flops = 0.0 if counter is None else float(counter(*self.args, **self.kwargs, out_val=self.result))
        return flops / 2 if self._values.get("is_causal") else flops


def _footprint(tensor: Tensor, limit: int | None = None, dimension: int = 0) -> int:
    """Bytes of a tensor, of which at most `limit` entries along a dimension count."""
    sizes = list(tensor.shape)
    if limit is not None:
        sizes[dimension] = min(sizes[dimension], limit)
    entries = (size for size, stride in zip(sizes, tensor.stride(), strict=True) if stride != 0 or size == 0)
    return math.prod(entries) * tensor.itemsize
