"""Networks that others wrote, as graphs of our operations: read for what they compute, not for what it is called.

torch.export gives a network as a list of tensor operations with every shape, the batch's size left open (`adoption`),
and each of them becomes one or more of our operations (`rules`). An operation that has no rule is a refusal, by name
and place, with what could stand in for it.
"""

import math
import operator
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import fx, nn

from .activations import ACTIVATIONS
from .adoption import Adoption
from .graph import TRACING, placed, trace
from .normalizers import NORMALIZERS, Normalizer
from .operations import Divide, MatMul, Resample, Sum, known, of_kind
from .rules import RULES


def adopt(
    model: nn.Module,
    example: torch.Tensor,
    softmax: str = "softmax",
    gelu: str = "gelu",
) -> fx.GraphModule:
    """A network that others wrote, as a graph of our operations, in evaluation mode.

    It computes what the network does, within float's rounding: BatchNorm is folded into the convolution or linear map
    before it, and is an affine map where there is none; dropout is gone. Parameters stay parameters under their names
    where they are used as they are, so that the graph can be trained; a table that is only looked up by position, such
    as Swin's relative biases, becomes the matrix that it was looked up for.

    Args:
        model: any module that torch.export can read, whose forward maps images to logits; it is not changed.
        example: images (B, C, height, width) as it reads them. Their shape counts, the batch's size aside; their values
            only where the network divides by an activation, whose usual size a protocol has to know.
        softmax: what stands in softmax's place, a name of `NORMALIZERS`.
        gelu: what stands in GELU's place, a name of `ACTIVATIONS`.

    Returns:
        (B, C, height, width) -> (B, classes), a graph that `private`, `cost` and training take as they take our own.

    Raises:
        ValueError: an unknown name, a network that torch.export cannot read, or operations that have no rule here: one
            line each, with the place and what could stand in for it.
    """
    if softmax not in NORMALIZERS:
        raise ValueError(f"softmax {softmax!r} is unknown: choose from {', '.join(NORMALIZERS)}")
    if gelu not in ACTIVATIONS:
        raise ValueError(f"gelu {gelu!r} is unknown: choose from {', '.join(ACTIVATIONS)}")
    model = deepcopy(model).eval()
    adoption = Adoption(model, RULES, softmax, gelu)
    graph = adoption.graph_of(_exported(model, example))
    if adoption.refused:
        raise ValueError(";\n".join(dict.fromkeys(adoption.refused)))
    _place(graph, graph.graph)
    _size_divisions(graph, example)
    return graph


def read(model: nn.Module, images: torch.Tensor, lacking: Callable[[fx.GraphModule], list[str]]) -> fx.GraphModule:
    """A model's graph: as it is traced where nothing is lacking, else adopted.

    Args:
        model: any module.
        images: (B, C, height, width); their shape counts.
        lacking: what of a graph cannot be dealt with.

    Raises:
        ValueError: as `adopt`.
    """
    try:
        graph = trace(model)
        if placed(model) or not lacking(graph):
            return graph
    except ValueError:
        pass
    parameter = next(model.parameters(), images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))  # public, unlike the images
    return trace(adopt(model, noise.to(parameter.device, parameter.dtype)))


def unknown(graph: fx.GraphModule) -> list[str]:
    """The modules of a graph that are no operation of ours, by name and place."""
    calls = [(node.target, graph.get_submodule(node.target)) for node in graph.graph.nodes if node.op == "call_module"]
    return [f"{type(module).__name__} ({place})" for place, module in calls if type(module) not in known()]


# Reading


def _exported(model: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    """The network's operations, in evaluation mode, for any size of batch."""
    # Two images: of one, torch.export would take its size for a constant.
    images = example[:1].expand(2, *example.shape[1:]).contiguous()
    try:
        with TRACING, _plain_attention():
            return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)
    except Exception as error:  # torch's own, of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        tried = f"cannot be traced by torch.fx, nor by torch.export for images of shape {tuple(example.shape)}"
        raise ValueError(f"{type(model).__name__} {tried}: {reason}") from error


@contextmanager
def _plain_attention():
    """Without the fused kernel of nn.MultiheadAttention, which is one operation and says nothing of what it does."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# Where in the network, and of what kind


def _place(root: nn.Module, graph: fx.Graph) -> None:
    """Note of every node in which layer it is, and of which kind."""
    modules = dict(root.named_modules())
    nodes = list(graph.nodes)
    output = nodes[-1].args[0]
    for node in nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if module is None:
            continue
        kind = None
        if isinstance(module, nn.Linear):
            mixed = any(isinstance(modules[near.target], MatMul) for near in _near(node, back=True) | _near(node))
            kind = "head" if _carried(output) is node else "projection" if mixed else "MLP"
        elif isinstance(module, MatMul):
            weighed = any(isinstance(modules[near.target], Normalizer) for near in _near(node, back=True))
            kind = "values" if weighed else "scores"
        else:
            kind = next((kind for types, kind in _KINDS if isinstance(module, types)), None)
        if kind and getattr(module, "kind", None) is None:
            of_kind(kind, module)
    for node in nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        before = next((one for one in node.all_input_nodes if "kind" in one.meta and one.op != "get_attr"), None)
        inherited = before.meta if before else {"layer": "tokenizer", "kind": "tokenizer"}
        kind = getattr(module, "kind", None) or inherited["kind"]
        node.meta["kind"] = kind
        node.meta["layer"] = _layer(str(node.target)) if module is not None else inherited["layer"]
    if (last := _carried(output)).meta["kind"] == "head":
        last.meta["layer"] = "head"


_KINDS: list[tuple[tuple[type, ...], str]] = [
    ((nn.Conv2d,), "convolution"),
    ((nn.LayerNorm,), "LayerNorm"),
    ((nn.MaxPool2d, Resample, Sum), "pooling"),
    (
        (nn.ReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.GELU),
        "activation",
    ),
]


def _carried(node: fx.Node) -> fx.Node:
    """The last call of a module before a node, or the node itself."""
    while node.op in ("call_method", "call_function") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _near(node: fx.Node, back: bool = False) -> set[fx.Node]:
    """The next modules that read a node's result, or that it reads, with nothing but moves and sums in between."""
    found, waiting, seen = set(), list(node.all_input_nodes if back else node.users), set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.op == "call_module":
            found.add(one)
        elif one.op in ("call_method", "call_function") and one.target is not operator.add:
            waiting += one.all_input_nodes if back else one.users
    return found


def _layer(path: str) -> str:
    """Where in the network a module is: its path up to the first part that ends in a number, and numbers after it."""
    names = path.split(".")
    first = next((i for i, name in enumerate(names) if name[-1:].isdigit()), 0)
    last = first + 1
    while last < len(names) - 1 and names[last].isdigit():
        last += 1
    return ".".join(names[:last])


def _size_divisions(graph: fx.GraphModule, example: torch.Tensor) -> None:
    """Tell each division how large its denominators are on the example: a protocol has to know about how large.

    A hundred times as large as what was seen, and an eight thousandth of it, are within what `tuned` divides by.
    """
    if not any(isinstance(module, Divide) for module in graph.modules()) or example.device.type == "meta":
        return
    _Sizing(graph).run(example)


class _Sizing(fx.Interpreter):
    def run_node(self, node: fx.Node) -> Any:
        module = self.module.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, Divide):
            seen = float(self.env[node.args[1]].max())  # nothing is seen of an example of zeros
            module.scale = 2.0 ** (math.ceil(math.log2(seen + module.eps)) - 2) if seen > 0 else 1.0
        with torch.no_grad():
            return super().run_node(node)
