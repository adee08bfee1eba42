"""What a model costs in the clear: parameters, FLOPs, latency, peak memory, and where in the network they arise."""

import contextlib
import operator
import statistics
import time
import weakref
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pandas as pd
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from ..fields import Range, shown, whole
from . import operations
from .foreign import read, unknown
from .operations import KINDS

CONVENTIONS = ("paper", "torch")
PASSES = Range(1, 10**6)  # that anybody waits for


def parameters(model: nn.Module) -> int:
    """Number of parameters, drawn ones that are not learnt among them; one that is shared (global L2Q) counts once.

    Raises:
        ValueError: no model.
    """
    _refuse(model)
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, convention: str = "paper", images: torch.Tensor | None = None) -> int:
    """FLOPs of one forward pass of one image.

    Args:
        model: a CCT, a ViT, or any module if `images` is given.
        convention: "paper", the rules that reproduce Table 7, as `operations` has them; beside them 1 per element of a
            scale of the scores, a residual addition and a subtraction, nothing for the position embedding.
            "torch", torch.utils.flop_counter: every matrix product and convolution, nothing else.
        images: (B, C, height, width), only their shape counts; taken from `model.config` if left out.

    Raises:
        ValueError: unknown convention, no images for a model without a config, or such as it does not read.
    """
    if not isinstance(convention, str) or convention not in CONVENTIONS:
        raise ValueError(f"FLOP convention {shown(convention)} is unknown: choose from {', '.join(CONVENTIONS)}")
    _refuse(model)
    model = deepcopy(model).to("meta").eval()
    images = _one_image(model) if images is None else images
    with _fitting(images):
        images = images.to("meta")
        if convention == "torch":
            with FlopCounterMode(display=False) as counter:
                model(images)
            return counter.get_total_flops() // len(images)
        count = _PaperFlops(read(model, images, unknown))
        count.run(images)
        return sum(count.flops.values()) // len(images)


def _refuse(model: Any, **passes: Any) -> None:
    """Refuse what is no model, and a number of passes that is none."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {type(model).__name__}: give a torch.nn.Module")
    for name, number in passes.items():
        if not whole(number) or not PASSES.holds(number):
            raise ValueError(f"{name} is {shown(number)}: give a whole number, 1 to {PASSES.most}")


@contextlib.contextmanager
def _fitting(images: Any) -> Iterator[None]:
    """Refuse what are no images, and say of those that a model cannot read which they are."""
    if not isinstance(images, torch.Tensor) or not images.is_floating_point() or not images.numel():
        kind = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, torch.Tensor) else shown(images)
        raise ValueError(f"images are {kind}: give a float32 tensor (B, C, height, width) with at least one image")
    try:
        yield
    except torch.OutOfMemoryError:  # it is not the images' kind
        raise
    except RuntimeError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        kind = f"{str(images.dtype).removeprefix('torch.')}, {images.layout}, on {images.device}"
        said = f"images of shape {tuple(images.shape)} ({kind}) do not fit the network"
        raise ValueError(f"{said}: {reason[:300]}") from error


def _one_image(model: nn.Module) -> torch.Tensor:
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config to tell its image shape: pass images")
    device = next(model.parameters()).device
    return torch.zeros(1, config.channels, config.image, config.image, device=device)


_ELEMENTWISE = {operator.mul, operator.add, operator.sub}


class _PaperFlops(fx.Interpreter):
    """Sums the paper's FLOPs of every node it runs."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        count = 0
        if node.op == "call_module":
            inputs, _ = self.fetch_args_kwargs_from_env(node)
            count = operations.flops(self.fetch_attr(node.target), result, *inputs)
        elif node.target in _ELEMENTWISE and node.meta["layer"] != "tokenizer":
            count = result.numel()
        self.flops[node] = count
        return result


def latency(model: nn.Module, images: torch.Tensor, repeats: int = 10, warmup: int = 3) -> list[float]:
    """Seconds of each of `repeats` forward passes in the clear, on the device where model and images are.

    Args:
        model: any module.
        images: (B, C, height, width).
        repeats: passes that count.
        warmup: passes before them.

    Raises:
        ValueError: no model, images that it does not read, or a number of passes that is none.
    """
    _refuse(model, repeats=repeats)
    if not whole(warmup) or not 0 <= warmup <= PASSES.most:
        raise ValueError(f"warmup is {shown(warmup)}: give a whole number, 0 to {PASSES.most}")
    model = model.eval()
    seconds = []
    with _fitting(images), torch.inference_mode():
        for repeat in range(warmup + repeats):
            begin = _now(images)
            model(images)
            if repeat >= warmup:
                seconds.append(_now(images) - begin)
    return seconds


def _now(tensor: torch.Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def peak_memory(model: nn.Module, images: torch.Tensor) -> int:
    """Most bytes that one forward pass holds at a time in tensors it made: activations, without weights and images.

    Raises:
        ValueError: no model, or images that it does not read.
    """
    _refuse(model)
    with _fitting(images):
        return _peak_memory(model, images)


def _peak_memory(model: nn.Module, images: torch.Tensor) -> int:
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        with torch.inference_mode():
            model.eval()(images)
        return torch.cuda.max_memory_allocated(images.device) - before
    known = [parameter.untyped_storage() for parameter in model.parameters()] + [images.untyped_storage()]
    with torch.inference_mode(), _LiveStorages(known) as live:
        model.eval()(images)
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages that operations create while they live; CPU tensors have no allocator statistics."""

    def __init__(self, known: list[torch.UntypedStorage]):
        super().__init__()
        self.seen = {storage.data_ptr() for storage in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        return result

    def _freed(self, pointer: int, size: int) -> None:
        self.seen.discard(pointer)
        self.now -= size


def breakdown(model: nn.Module, images: torch.Tensor, repeats: int = 5) -> pd.DataFrame:
    """Where the clear forward pass spends its time and its FLOPs.

    Args:
        model: any module that torch.fx can trace or `foreign.adopt` can read.
        images: (B, C, height, width).
        repeats: forward passes, after one to warm up; the median counts.

    Returns:
        One row per layer and kind of operation: seconds (median over the passes) and flops (paper's convention, of all
        images together).

    Raises:
        ValueError: no model, images that it does not read, or a number of passes that is none.
    """
    _refuse(model, repeats=repeats)
    with _fitting(images):
        graph = read(model, images, unknown)
    timed, count = _Timed(graph), _PaperFlops(deepcopy(graph).to("meta"))
    with _fitting(images), torch.inference_mode():
        for _ in range(repeats + 1):
            timed.run(images)
        count.run(images.to("meta"))
    rows = [
        {
            "layer": node.meta["layer"],
            "kind": node.meta["kind"],
            "seconds": statistics.median(timed.seconds[node][1:]),
            "flops": flop,
        }
        for node, flop in zip(graph.graph.nodes, count.flops.values(), strict=True)
    ]
    table = pd.DataFrame(rows).groupby(["layer", "kind"], sort=False).sum().reset_index()
    table["kind"] = pd.Categorical(table["kind"], KINDS)
    return table


class _Timed(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.seconds: dict[fx.Node, list[float]] = {node: [] for node in graph.graph.nodes}

    def run(self, images):
        self._images = images
        return super().run(images)

    def run_node(self, node: fx.Node):
        begin = _now(self._images)
        result = super().run_node(node)
        self.seconds[node].append(_now(self._images) - begin)
        return result
