"""What a piece of code allocates: its largest tensor, and the most bytes alive at once."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Sees every operator of forward and backward; what existed before counts as nothing."""

    def __init__(self, *before: Tensor):
        super().__init__()
        self.largest, self.peak, self.now = 0, 0, 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def __torch_dispatch__(
        self, operator: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.seen:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.seen.add(storage)
        self.largest = max(self.largest, storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.now -= size
