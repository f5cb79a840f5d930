"""A device that is not there: torch's fake tensors, which have a place and a shape but no values.

As on a GPU, an operator that is given tensors of two places is an error. And whoever waits for the device, because
Python asks for a value or because memory is copied in turn, can be named.
"""

import os
import sys
from pathlib import Path

import torch
import torch.utils.backend_registration
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretended"
OURS = Path(__file__).parents[1]
TORCH = f"{Path(torch.__file__).parent}{os.sep}"
registration = torch.utils.backend_registration
POSSIBLE = hasattr(registration, "_setup_privateuseone_for_python_backend")  # with this torch


def begin():
    """Before the first backward of the process, to whose end it stays."""

    class Backend(registration._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.bfloat16]

    registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())


class Device(TorchDispatchMode):
    """While it lasts nothing of logo_plugin may wait for the device; whoever else asks for a value is given 0."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.fake.__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.name()
        target = kwargs.get("device")
        if name == "aten::_local_scalar_dense" and args[0].device.type == NAME:
            _ours_never("asks for a value")
            return 0
        if name == "aten::_to_copy" and target is not None and target.type != args[0].device.type:
            if not kwargs.get("non_blocking"):
                _ours_never("waits for a copy")
            return torch.empty(args[0].shape, device=target, dtype=kwargs.get("dtype") or args[0].dtype)
        indexed = name.startswith(("aten::index.", "aten::index_put")) and args[0].device.type == NAME
        if indexed and any(index is not None and index.device.type != NAME for index in args[1]):
            _ours_never("waits for a copy")  # that of the indices, which may lie anywhere
        return func(*args, **kwargs)

    def put(self, value):
        """A tensor, or all tensors of a module, in place, on the device; what is one before is one after."""
        if isinstance(value, Tensor):
            return self.fake.from_tensor(value).detach().to(NAME, non_blocking=True)
        moved = {}  # holds the old ones, too, so that no other has the place of one that is gone
        for module in value.modules():
            for held in (module._parameters, module._buffers, vars(module)):
                for key, old in held.items():
                    if not isinstance(old, Tensor):
                        continue
                    if old not in moved:
                        new = self.put(old)
                        moved[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    held[key] = moved[old]
        return value


def _ours_never(what):
    """Raises if it is code of logo_plugin, and no other's that it calls, that does this."""
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    file = Path(frame.f_code.co_filename) if frame else None  # none where autograd's own thread asks
    if file and ("logo_plugin" in file.parts or OURS / "adapters" in file.parents):
        raise AssertionError(f"{file}:{frame.f_lineno} {what} on the device.")
