"""What CrypTen 0.4.1 and torchvision 0.28 need before they import beside today's torch on a CPU.

`repair()` is safe to call more than once and where nothing is broken.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch.overrides import TorchFunctionMode


def repair() -> None:
    """Make `import crypten` and `import torchvision` work in this process."""
    _alias_onnx_registration()
    declare_torchvision_operators()


def torchvision(module: str) -> ModuleType:
    """A module of torchvision, such as "datasets", imported late: models and digits need none of it."""
    repair()
    return importlib.import_module(f"torchvision.{module}")


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Keep torch.compile's machinery from being imported.

    On the meta device torch finds shapes with Python functions that import it, 2 s, to be told to leave them alone.
    """
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = stand_in = ModuleType(name)
    setattr(stand_in, "disable", lambda function, *_, **__: function)  # noqa: B010  a module has no such attribute
    try:
        yield
    finally:
        del sys.modules[name]


# Functions whose result has the shape of their arguments together, and those that write it over the first.
ENTRYWISE = {
    *(torch.mul, torch.Tensor.mul, torch.Tensor.add, torch.Tensor.sub, torch.Tensor.__rsub__),
    *(torch.Tensor.__xor__, torch.Tensor.__and__, torch.Tensor.__lshift__, torch.Tensor.__rshift__),
    *(torch.Tensor.neg, torch.Tensor.__rmul__),
}
IN_PLACE = {
    *(torch.Tensor.mul_, torch.Tensor.add_, torch.Tensor.sub_, torch.Tensor.div_, torch.Tensor.neg_),
    *(torch.Tensor.__ixor__, torch.Tensor.__iand__, torch.Tensor.__irshift__, torch.Tensor.__ilshift__),
}


class Shapes(TorchFunctionMode):
    """Finds the shapes of entrywise functions by itself: torch's way, in Python, takes most of the time on meta."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """What `func` gives, without its values where some argument has none."""
        if not kwargs and (func in IN_PLACE or func in ENTRYWISE):
            parts = [part for part in args if isinstance(part, torch.Tensor)]
            if any(part.is_meta for part in parts):
                if func in IN_PLACE:
                    return args[0]
                shape = parts[0].shape
                if shape != parts[-1].shape:
                    shape = torch.broadcast_shapes(shape, parts[-1].shape)
                return torch.empty(
                    shape, dtype=torch.result_type(*args[:2]) if len(args) > 1 else args[0].dtype, device="meta"
                )
        return func(*args, **(kwargs or {}))


def _alias_onnx_registration() -> None:
    # crypten.nn imports torch.onnx._internal.registration; torch 2.9 moved that module.
    old = "torch.onnx._internal.registration"
    new = "torch.onnx._internal.torchscript_exporter.registration"
    if old not in sys.modules and importlib.util.find_spec(old) is None:
        sys.modules[old] = importlib.import_module(new)


# Kept alive: torch forgets the declarations of a library object that is collected.
_LIBRARIES: list[torch.library.Library] = []

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def declare_torchvision_operators() -> None:
    """Make `import torchvision` work; `import salvit_core` does it, so that the README's lines run in that order."""
    # torchvision's wheel is compiled for CUDA builds of torch. Beside a CPU build its operators stay undeclared, and
    # registering their fake versions at import fails. The study uses data sets and transforms, never these operators.
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None or torch.version.cuda:
        return
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(schema)
            _LIBRARIES.append(library)
