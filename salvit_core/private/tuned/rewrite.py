"""A network's graph in an order that is cheaper on shares: the same function."""

import operator

import torch
from torch import fx, nn

from ...models.operations import Gain


def _absorbing(reader: nn.Linear, norm: nn.LayerNorm) -> nn.Linear:
    """The linear map that reads what the norm would have scaled and shifted."""
    whole = nn.Linear(reader.in_features, reader.out_features, device="meta")
    bias = 0 if norm.bias is None else reader.weight @ norm.bias
    bias = bias + (torch.zeros_like(reader.weight[:, 0]) if reader.bias is None else reader.bias)
    whole.weight, whole.bias = nn.Parameter((reader.weight * norm.weight).detach()), nn.Parameter(bias.detach())
    return whole


def _apart(graph: fx.GraphModule, node: fx.Node, norm: nn.LayerNorm, readers: list[fx.Node]) -> None:
    """Scale and shift of a norm that has none, for these readers."""
    scale = Gain(tuple(norm.weight.shape))
    scale.weight = norm.weight
    graph.add_submodule(f"{node.target}.scale", scale)
    with graph.graph.inserting_after(node):
        scaled = graph.graph.call_module(f"{node.target}.scale", (node,))
    new = [scaled]
    if norm.bias is not None:
        name = f"{node.name}_shift"
        graph.register_parameter(name, norm.bias)
        with graph.graph.inserting_after(scaled):
            new.append(graph.graph.get_attr(name))
        with graph.graph.inserting_after(new[-1]):
            new.append(graph.graph.call_function(operator.add, (scaled, new[-1])))
    for each in new:
        each.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, new[-1])


def rewrite(graph: fx.GraphModule) -> fx.GraphModule:
    """The same function in a cheaper order, found from the architecture alone: both parties do it by themselves.

    A max-pool goes before the ReLU that only it reads: a quarter of the comparisons. A LayerNorm hands its scale and
    shift to the linear maps that read it; whoever else does reads them from a node of its own, beside these maps.
    """
    modules = dict(graph.named_modules())
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    for node in calls:
        readers = list(node.users)
        kinds = {type(modules.get(reader.target)) if reader.op == "call_module" else None for reader in readers}
        module = modules[node.target]
        if isinstance(module, nn.ReLU) and len(readers) == 1 and kinds == {nn.MaxPool2d}:
            pool = readers[0]
            pool.replace_all_uses_with(node)
            pool.args, node.args = node.args, (pool,)
            pool.append(node)
        elif isinstance(module, nn.LayerNorm) and module.weight is not None and nn.Linear in kinds:
            linear = [reader for reader in readers if type(modules.get(reader.target)) is nn.Linear]
            targets = [reader.target for reader in linear]
            if all(sum(call.target == target for call in calls) == 1 for target in [node.target, *targets]):
                for target in targets:
                    graph.add_submodule(target, _absorbing(modules[target], module))
                graph.add_submodule(node.target, nn.LayerNorm(module.normalized_shape, module.eps, False))
                if others := [reader for reader in readers if reader not in linear]:
                    _apart(graph, node, module, others)
    graph.recompile()
    return graph
