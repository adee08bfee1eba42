"""What a trained L2Q network learnt: C and D by layer and head, beside how far its attention reaches (Figure 9)."""

import math
from copy import deepcopy

import pandas as pd
import torch
from torch import fx, nn

from ..models.cct import CCT
from ..models.graph import trace
from ..models.normalizers import L2Q, Normalizer
from ..training.recipe import Recipe


def matrices(model: CCT) -> dict[int, dict[str, torch.Tensor]]:
    """The learnt C and D of each layer that has L2Q: layer (from 1) to {"c": (H, N, K), "d": (H, N, K)}.

    External attention shares one matrix among its heads: (1, N, S). A parameter that is not learnt is left out.
    """
    found = {}
    for layer, block in enumerate(model.blocks, 1):
        for module in block.attention.modules():
            if isinstance(module, L2Q):
                learnt = dict(module.named_parameters(recurse=False))
                found[layer] = {name: learnt[name].detach()[0] for name in ("c", "d") if name in learnt}
    return found


def spread(model: CCT) -> pd.DataFrame:
    """Figure 9: per layer and head, the mean, variance, smallest and largest of C and of D.

    Returns:
        columns layer, attention, head, parameter ("c" or "d"), mean, variance, low, high.
    """
    rows = []
    for layer, learnt in matrices(model).items():
        for name, tensor in learnt.items():
            for head, values in enumerate(tensor, 1):
                rows.append(
                    {
                        "layer": layer,
                        "attention": model.config.attention[layer - 1],
                        "head": head,
                        "parameter": name,
                        "mean": values.mean().item(),
                        "variance": values.var(unbiased=False).item(),
                        "low": values.min().item(),
                        "high": values.max().item(),
                    }
                )
    return pd.DataFrame(rows)


def stripes(model: CCT) -> pd.DataFrame:
    """How much of C and of D is one number per key, or per query: the part of their variance that it explains.

    Of N x N numbers without structure each explains about 1 / N.

    Returns:
        columns layer, parameter ("c" or "d"), key and query (%, means over the heads).
    """
    rows = []
    for layer, learnt in matrices(model).items():
        for name, tensor in learnt.items():
            parts = {"key": tensor.mean(-2), "query": tensor.mean(-1)}  # (H, K), (H, N)
            whole = tensor.flatten(1).var(1, unbiased=False)  # (H,)
            told = {along: 100 * (each.var(1, unbiased=False) / whole).mean().item() for along, each in parts.items()}
            rows.append({"layer": layer, "parameter": name, **told})
    return pd.DataFrame(rows)


def attention_distance(model: CCT, images: torch.Tensor) -> pd.DataFrame:
    """How far self-attention reaches: the mean distance between a token and what it attends to, by layer and head.

    Weighted by the attention weights, in units of tokens on the grid, averaged over queries and images (Dosovitskiy et
    al., "An image is worth 16x16 words", Figure 7). External attention has no such distance and is left out.

    Args:
        model: a CCT with self-attention in at least one layer.
        images: (B, C, height, width), normalised.

    Returns:
        columns layer, head, distance.
    """
    side = math.isqrt(model.config.tokens)
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).reshape(-1, 2).float()
    apart = torch.cdist(grid, grid)  # (N, N)
    watch = _Weights(trace(model))
    with torch.inference_mode():
        watch.run(images)
    rows = []
    for name, weights in watch.weights.items():
        parts = name.split(".")
        if parts[0] == "blocks" and model.config.attention[int(parts[1])] == "self":
            distance = (weights * apart).sum(-1).mean((0, 2))  # (B, H, N, N) -> (H,)
            layer = int(parts[1]) + 1
            rows += [{"layer": layer, "head": h, "distance": d} for h, d in enumerate(distance.tolist(), 1)]
    return pd.DataFrame(rows, columns=["layer", "head", "distance"])


class _Weights(fx.Interpreter):
    """Keeps what every normaliser gives."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.weights: dict[str, torch.Tensor] = {}

    def call_module(self, target, args, kwargs):
        result = super().call_module(target, args, kwargs)
        if isinstance(self.fetch_attr(target), Normalizer):
            self.weights[target] = result
        return result


def reset(model: CCT, parameter: str, granularity: str) -> CCT:
    """A copy of the network in which C or D is replaced by its mean: what did learning it element by element buy?

    Args:
        model: a trained CCT with L2Q.
        parameter: "c", "d" or "both".
        granularity: mean per "head" (over its matrix) or per "layer".

    Raises:
        ValueError: unknown parameter or granularity.
    """
    names = {"c": ("c",), "d": ("d",), "both": ("c", "d")}.get(parameter)
    if names is None:
        raise ValueError(f"parameter {parameter!r} is unknown: choose c, d or both")
    if granularity not in ("head", "layer"):
        raise ValueError(f"granularity {granularity!r} is unknown: choose head or layer")
    model = deepcopy(model)
    for module in model.modules():
        if isinstance(module, L2Q):
            for name in names:
                if isinstance(tensor := getattr(module, name), nn.Parameter):
                    mean = tensor.data.mean((-2, -1) if granularity == "head" else None, keepdim=True)
                    tensor.data.copy_(mean.expand_as(tensor))
    return model


# Tables of a reading (`execute`, study "learned")

REACH = "distance (tokens)"


def reach(facts: dict) -> pd.DataFrame:
    """One row per self-attention head: how far it reaches, and mean and variance of its C and D."""
    wide = pd.DataFrame(facts["spread"]).pivot(
        index=["layer", "head"], columns="parameter", values=["mean", "variance"]
    )
    wide.columns = pd.Index([f"{quantity} of {name.upper()}" for quantity, name in wide.columns])
    distance = pd.DataFrame(facts["distance"])
    return distance.merge(wide.reset_index(), on=["layer", "head"]).rename(columns={"distance": REACH})


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of a head's reach with what it learnt."""
    ranks = table.drop(columns=["layer", "head"]).corr(method="spearman")
    return ranks.iloc[0, 1:].rename("rank correlation").to_frame()


def resets(facts: dict) -> pd.DataFrame:
    """Accuracy (%) with C or D replaced by its mean: columns replaced, mean over, accuracy, change (points)."""
    table = pd.DataFrame(facts["resets"])
    return table.assign(change=table["accuracy"] - facts["accuracy"])


def said(facts: dict, training: dict, recipe: Recipe) -> str:
    """Markdown: how far C and D moved, and what their details are worth.

    Args:
        facts: metrics of the reading.
        training: metrics of the training that was read.
        recipe: of that training.
    """
    before, kind = training["test_accuracy"], "bfloat16" if recipe.bf16 else "float32"
    other = f" (its training, in {kind}, counted {before:.2f} %)" if abs(before - facts["accuracy"]) >= 0.005 else ""
    loss = resets(facts)
    worst = loss.loc[loss["change"].idxmin()]
    ranges = pd.DataFrame(facts["spread"]).groupby("parameter").agg(low=("low", "min"), high=("high", "max"))
    return f"""
- C ranges from {ranges.low["c"]:.2f} to {ranges.high["c"]:.2f}, D from {ranges.low["d"]:.2f} to
  {ranges.high["d"]:.2f}; both started at 1.
- The trained network, read in float32, has {facts["accuracy"]:.2f} % on the test images{other};
  replacing {worst["replaced"]} by the mean over each {worst["mean over"]} changes that by
  {worst["change"]:+.2f} points, the largest change of the six.
- Training length matters to all of this: after {recipe.epochs} epochs the parameters have moved only so far. The
  paper trained for 600.
"""
