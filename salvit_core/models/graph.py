"""A model as a torch.fx graph, and where in the network each node stands: what cost counts and protocols run."""

import threading
from copy import deepcopy

import torch
from torch import fx, nn

from .operations import Operation

# While torch.fx traces, it replaces nn.Module.__call__ for all threads: another that traces or calls a module meanwhile
# gets in its way, and may leave the replacement behind. Who works on graphs in several threads holds this.
TRACING = threading.RLock()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Operation) or super().is_leaf_module(module, name)


def placed(model: nn.Module) -> bool:
    """Whether a model is a graph whose nodes know their places."""
    return isinstance(model, fx.GraphModule) and all("layer" in node.meta for node in model.graph.nodes)


def trace(model: nn.Module) -> fx.GraphModule:
    """The model in evaluation mode as a graph whose every node carries `meta["layer"]` and `meta["kind"]`.

    Operations and torch.nn's own modules stay whole, so that each can have a protocol.

    Args:
        model: any module that torch.fx can trace; it is not changed.

    A graph whose nodes know their places, such as `foreign.adopt` makes, is such a graph already: a copy is given.

    Raises:
        ValueError: the model's forward depends on its data (a Python `if` on a tensor, say).
    """
    if placed(model):
        return deepcopy(model).eval()
    # A copy: the graph shares its modules, and must stay in evaluation mode whatever becomes of the model.
    model = deepcopy(model).eval()
    try:
        tracer = _Tracer()
        with TRACING:
            graph = tracer.trace(model)
    except (fx.proxy.TraceError, TypeError) as error:
        raise ValueError(f"{type(model).__name__} cannot be traced by torch.fx: {error}") from error
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        around = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
        path = str(node.target) if node.op == "call_module" else (around[-1] if around else "")
        node.meta["layer"], node.meta["kind"] = _layer(path), _kind(tracer.root, path)
    return fx.GraphModule(tracer.root, graph).eval()


def _layer(path: str) -> str:
    """Where in the network module `path` is: "tokenizer", "block 1", ..., "pool", "head"."""
    names = path.split(".")
    if names[0] == "blocks" and len(names) > 1:
        return f"block {int(names[1]) + 1}"
    return names[0] or "tokenizer"


def _kind(model: nn.Module, path: str) -> str:
    """The kind that the innermost module on the way to `path` has; work at the top is the tokenizer's."""
    names = path.split(".") if path else []
    for length in range(len(names), 0, -1):
        if kind := getattr(model.get_submodule(".".join(names[:length])), "kind", None):
            return str(kind)
    return "tokenizer"


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A leaf module's own parameters and buffers by name."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
