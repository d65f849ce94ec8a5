"""What a forward calls and does with memory, as PyTorch's dispatcher sees it."""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Calls(TorchDispatchMode):
    """The names of our ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ldm_fused":
            self.names.append(function.__name__)
        return function(*args, **kwargs or {})


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made within it that live at once, behind any op. What an op uses inside is not seen."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in given:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: (ref, size) for key, (ref, size) in self.storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


def peak_of(call, *args):
    """Live bytes at their peak, and what the call gave."""
    with LiveBytes() as live:
        result = call(*args)
    return live.peak, result


class LayoutCopies(TorchDispatchMode):
    """Lists (op, shape) of what copies a tensor into channels_last or out of it: copies that change strides, and
    convolutions and ops of this library that must reorder an input."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        x = next((t for t in tree_leaves(args) if isinstance(t, Tensor)), None)
        if name in ("aten::clone", "aten::_to_copy", "aten::contiguous") and x.dim() >= 3:
            if result.stride() != x.stride():
                self.found.append((name, tuple(x.shape)))
        elif name.startswith("ldm_fused::") or name == "aten::convolution":
            if not self.is_channels_last(x):
                self.found.append((name, tuple(x.shape)))
            if name == "ldm_fused::bias_add_residual" and not self.is_channels_last(args[1]):
                self.found.append((name, tuple(x.shape)))
        elif name in ("aten::add", "aten::add_") and x.dim() >= 4 and isinstance(args[1], Tensor):
            if args[1].dim() == x.dim() and self.is_channels_last(x) != self.is_channels_last(args[1]):
                self.found.append((name, tuple(x.shape)))
        return result

    @staticmethod
    def is_channels_last(x):
        return x.movedim(1, -1).is_contiguous()

