"""A model as a torch.fx graph, and where in the network each node stands: what cost counts and protocols run."""

import threading
from copy import deepcopy

import torch
from torch import fx, nn

from .activations import LearnedQuad, Quad
from .attention.fused import Dropout
from .attention.operations import OPERATIONS
from .cct import StochasticDepth
from .normalizers import Normalizer

# The kinds of operation that the tables and figures tell apart, in the order in which they are drawn.
KINDS = (
    "tokenizer",
    "LayerNorm",
    "projection",
    "scores",
    "normaliser",
    "values",
    "MLP",
    "activation",
    "pooling",
    "head",
)

# An operation's kind is that of the innermost module on its path with a name listed here.
_KIND_OF_NAME = {
    "tokenizer": "tokenizer",
    "norm": "LayerNorm",
    "norm1": "LayerNorm",
    "norm2": "LayerNorm",
    "qkv": "projection",
    "query": "projection",
    "key": "projection",
    "value": "projection",
    "lower": "projection",  # Hamburger's
    "projection": "projection",
    "gather": "scores",  # dilated attention's windows, and back
    "landmarks": "scores",
    "reduction": "scores",  # Linformer's
    "norms": "scores",
    "scores": "scores",
    "normalizer": "normaliser",
    "l1": "normaliser",
    # Feature maps, kernels and inverses stand in the normaliser's place, Hamburger's iterations too.
    "features": "normaliser",
    "relu": "normaliser",
    "reweight": "normaliser",
    "exponentials": "normaliser",
    "kernel": "normaliser",
    "sum": "normaliser",
    "denominator": "normaliser",
    "inverse": "normaliser",
    "code_updates": "normaliser",
    "base_updates": "normaliser",
    "conv": "values",
    "gate": "values",
    "scatter": "values",
    "values": "values",
    "mlp": "MLP",
    "activation": "activation",
    "pool": "pooling",
    "head": "head",
}

# While torch.fx traces, it replaces nn.Module.__call__ for all threads: another that traces or calls a module meanwhile
# gets in its way, and may leave the replacement behind. Who works on graphs in several threads holds this.
TRACING = threading.RLock()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        whole = (Normalizer, *OPERATIONS, Dropout, StochasticDepth, Quad, LearnedQuad)
        return isinstance(module, whole) or super().is_leaf_module(module, name)


def trace(model: nn.Module) -> fx.GraphModule:
    """The model in evaluation mode as a graph whose every node carries `meta["layer"]` and `meta["kind"]`.

    Normalisers, `MatMul` and torch.nn's own modules stay whole, so that each can have a protocol.

    Args:
        model: any module that torch.fx can trace; it is not changed.

    Raises:
        ValueError: the model's forward depends on its data (a Python `if` on a tensor, say).
    """
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
        path = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()][-1:]
        path = str(node.target) if node.op == "call_module" else (path[0] if path else "")
        node.meta["layer"], node.meta["kind"] = _place(path)
    return fx.GraphModule(tracer.root, graph).eval()


def _place(path: str) -> tuple[str, str]:
    """Layer ("tokenizer", "block 1", ..., "pool", "head") and kind of the operation in module `path`."""
    names = path.split(".")
    if names[0] == "blocks" and len(names) > 1:
        layer = f"block {int(names[1]) + 1}"
    else:
        layer = names[0] or "tokenizer"
    if names[0] == "pool":
        return layer, "pooling"
    for name in reversed(names):
        if name in _KIND_OF_NAME:
            return layer, _KIND_OF_NAME[name]
    # What is left is local work: residual additions in a block, the position embedding after the tokenizer, scales and
    # reshapes between an attention's modules.
    return layer, "scores" if "attention" in names else "MLP" if names[0] == "blocks" else "tokenizer"


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A leaf module's own parameters and buffers by name."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
