"""Count everything that would make the host wait for a GPU: reads of tensor values, and operations whose result's size
depends on values. Also counts collectives."""

import collections
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy", "nonzero", "masked_select"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal"}
INDEXING = {"index", "index_put", "index_put_"}  # by a mask they wait


class _Calls(TorchFunctionMode):
    """Counts calls in the code; `tolist` and similar never reach the dispatcher."""

    def __init__(self, count: collections.Counter):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (name := getattr(func, "__name__", "")) in READS:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Counts dispatched operations, also in the backward."""

    def __init__(self, waits: collections.Counter, operations: collections.Counter):
        super().__init__()
        self.waits, self.operations = waits, operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.operations[name] += 1
        indices = args[1] if name in INDEXING else ()
        if name in WAITS or any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


class Reads:
    """reads: called functions that read values; waits: dispatched operations that wait; operations: all dispatched."""

    def __init__(self):
        self.reads, self.waits, self.operations = (collections.Counter() for _ in range(3))

    @contextmanager
    def counted(self):
        """Count within a `with` block."""
        with _Calls(self.reads), _Operations(self.waits, self.operations):
            yield
