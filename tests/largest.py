"""The largest tensor that a computation makes, for tests of memory."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that anything gave."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.count = max(self.count, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result
