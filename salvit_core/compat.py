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


def repair() -> None:
    """Make `import crypten` and `import torchvision` work in this process."""
    _alias_onnx_registration()
    _declare_torchvision_operators()


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


def _declare_torchvision_operators() -> None:
    # torchvision's wheel is compiled for CUDA builds of torch. Beside a CPU build its operators stay undeclared, and
    # registering their fake versions at import fails. The study uses data sets and transforms, never these operators.
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None or torch.version.cuda:
        return
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(schema)
            _LIBRARIES.append(library)
