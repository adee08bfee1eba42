"""What is asked of a private run, held to its types and ranges before anything meets: by `infer`, `evaluate`, parties.

What is wrong is said in one line: the value, what was expected, and what to do.
"""

import os
from dataclasses import dataclass
from typing import Annotated, Any

import psutil
import torch
from torch import nn

from ..fields import Among, Count, Range, check, shown
from ..models.config import Network
from .links import Link
from .protocol import DEALT, LIMIT, PROTOCOLS, PROVIDERS, REVEALS

PIXEL = 1024.0  # fixed point has room for images up to here
DAYS = 2e6  # seconds: poll waits for 2^31 milliseconds at most


@dataclass(frozen=True)
class Asked:
    """The options of a run that all parties know; see `infer`.

    Raises:
        ValueError: names the option, its value and what is expected.
    """

    protocol: Annotated[str, Among(*PROTOCOLS)] = "tuned"
    provider: Annotated[str, Among(*PROVIDERS)] = "TFP"
    timeout: Annotated[float, Range(0, DAYS, open=True)] = 600.0
    bits: Annotated[int, Range(8, 22)] | None = None
    batch: Count | None = None
    check: bool = False
    drift: bool = False
    reveal: Annotated[str, Among(*REVEALS)] = "logits"
    dealt: Annotated[str, Among(*DEALT)] = "along"
    device: str = "cpu"

    def __post_init__(self):
        check(self)
        if problem := device_problem(self.device):
            raise ValueError(problem)
        if self.protocol == "tuned":
            return
        said = f"protocol {self.protocol!r}"
        if self.check:
            raise ValueError(f"{said} knows no check: choose tuned")
        if self.reveal == "label":
            raise ValueError(f"{said} opens the logits: choose tuned to reveal the label alone")
        if self.dealt == "ahead":
            raise ValueError(f"{said} deals as it goes: choose tuned to deal ahead")
        if self.device != "cpu":
            raise ValueError(f"{said} computes on the CPU: choose tuned for device {self.device!r}")


def device_problem(name: str) -> str | None:
    """Why no party can compute on this device, in one line, or None."""
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.int64, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = str(error).splitlines()[0]
        return f"device is {name!r}: torch has none here ({why}); give cpu, or cuda where there is a GPU"
    return None if device.type in ("cpu", "cuda") else f"device is {name!r}: give cpu, or cuda where there is a GPU"


def image_problem(images: Any, config: Any = None) -> str | None:
    """Why these images cannot be shared, in one line, or None.

    Args:
        images: should be (B, C, height, width), float.
        config: of the network that is to read them, if it has one.
    """
    if not isinstance(images, torch.Tensor) or images.dtype not in (torch.float32, torch.float64):
        kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        return f"images are {kind}: give a float32 tensor of normalised pixels"
    if images.layout != torch.strided or images.device.type == "meta":
        kind = "on the meta device" if images.device.type == "meta" else str(images.layout).removeprefix("torch.")
        return f"images are {kind}: give a dense tensor that holds numbers"
    if images.dim() != 4 or images.numel() < 1:
        return f"images have shape {tuple(images.shape)}: give (B, C, height, width) with at least one image"
    if config is not None and tuple(images.shape[1:]) != (config.channels, config.image, config.image):
        expected = f"(B, {config.channels}, {config.image}, {config.image})"
        return f"images have shape {tuple(images.shape)}: this network reads {expected}"
    if not images.isfinite().all():
        return f"images hold {int((~images.isfinite()).sum())} NaN or infinite values: clean them first"
    if images.abs().max() > PIXEL:
        return f"images reach {images.abs().max():.3g}: fixed point needs values within 1024, so normalise the pixels"
    return None


def config_of(model: nn.Module) -> Network | None:
    """The configuration of a network of ours: others' may have one that says something else."""
    config = getattr(model, "config", None)
    return config if isinstance(config, Network) else None


def weight_problem(weights: dict[str, torch.Tensor]) -> str | None:
    """Why a network's weights, biases among them, cannot be shared, in one line, or None."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            return f"weights {name} hold NaN or infinite values: they cannot be shared"
        if tensor.numel() and tensor.abs().max() > LIMIT:
            return f"weights {name} reach {tensor.abs().max():.3g}: fixed point needs values within {LIMIT:g}"
    return None


def model_problem(model: Any) -> str | None:
    """Why a model is not what its graph would compute, in one line, or None."""
    if not isinstance(model, nn.Module):
        return f"model is {type(model).__name__}: give a torch.nn.Module"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            place = name or type(module).__name__
            return f"model has hooks on {place}, which would not run on shares: remove them, and what registered them"
    return None


def folder_problem(name: str, folder: Any) -> str | None:
    """Why an option is no folder to write to, in one line, or None."""
    if folder is None or (isinstance(folder, str | os.PathLike) and os.fspath(folder)):
        return None
    return f"{name} is {shown(folder)}: give a folder, or None"


def link_problem(link: Any) -> str | None:
    """Why an option is no link, in one line, or None."""
    if link is None or isinstance(link, Link):
        return None
    return f"link is {shown(link)}: give a Link, such as LINKS['LAN (Cheetah)'], or None"


def query_size(images: int, batch: int | None) -> int:
    """Images in each query: as many as asked for or fewer, so that the last one is filled up by the fewest."""
    queries = -(-images // min(batch or images, images))
    return -(-images // queries)


def memory_problem(largest: float, parties: int) -> str | None:
    """Why a query cannot fit in this machine's memory, in one line, or None.

    Args:
        largest: bytes that the dearest operation opens and is dealt, for one query.
        parties: processes that run on this machine.
    """
    # Of each word there are a mask, a share and a few results at once.
    needed, there = 4 * largest * parties, psutil.virtual_memory().available
    if needed <= there:
        return None
    return f"a query would take about {needed / 1e9:.1f} GB and {there / 1e9:.1f} GB are free: give a smaller batch"
