"""What a teacher adds to the loss: its logits, its last features, what its blocks and its attentions give.

Letters in the shape comments: B batch, N tokens, M dimension of the model.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .recipe import Recipe, autocast

Outputs = tuple[torch.Tensor, ...]  # logits (B, classes), features (B, M), then what was watched, each (B, N, M)
Place = tuple[str, str]  # a module's dotted name, and "input" or "output"


class Watched(nn.Module):
    """A network that also gives what its head reads, and what some of its modules read or give, in one forward.

    One call, because DistributedDataParallel must see a single one.

    Args:
        model: the network.
        places: what else it gives, in this order.
    """

    def __init__(self, model: nn.Module, places: Sequence[Place] = ()):
        super().__init__()
        self.model = model
        self.places = tuple(places)

    def forward(self, images: torch.Tensor) -> Outputs:
        """Images (B, C, height, width) -> logits (B, classes), features (B, M), and each place's (B, N, M).

        What the head of a network that others wrote reads has no name: its logits stand for it.
        """
        seen: dict[Place, torch.Tensor] = {}
        hooks = [self._watch(place, seen) for place in self.places]
        try:
            if not hasattr(self.model, "features"):
                logits = features = self.model(images)
            else:
                features = self.model.features(images)  # (B, M)
                logits = self.model.head(features)
        finally:
            for hook in hooks:
                hook.remove()
        return logits, features, *(seen[place] for place in self.places)

    def _watch(self, place: Place, seen: dict[Place, torch.Tensor]) -> Any:
        name, side = place
        module = self.model.get_submodule(name)
        if side == "input":
            return module.register_forward_pre_hook(lambda module, given: seen.update({place: given[0]}))
        return module.register_forward_hook(lambda module, given, result: seen.update({place: result}))


def places(model: nn.Module, recipe: Recipe, teacher: nn.Module | None) -> list[Place]:
    """Where a network and its teacher are compared, the same places in both.

    Blocks are where they end. Attentions are before their projections where both have one that maps M features to M,
    and where they end elsewhere.
    """
    if teacher is None or not (recipe.distill_blocks or recipe.distill_attention):
        return []
    count = len(model.blocks)
    found = [(f"blocks.{i}", "output") for i in range(count)] if recipe.distill_blocks else []
    for i in range(count) if recipe.distill_attention else ():
        same = projected(model.blocks[i].attention) and projected(teacher.blocks[i].attention)
        found.append((f"blocks.{i}.attention.projection", "input") if same else (f"blocks.{i}.attention", "output"))
    return found


def projected(attention: nn.Module) -> bool:
    """Whether an attention ends with a linear map of M features to M, as softmax attention does."""
    projection = getattr(attention, "projection", None)
    return isinstance(projection, nn.Linear) and projection.in_features == attention.heads * attention.head


def losses(
    recipe: Recipe,
    outputs: Outputs,
    labels: torch.Tensor,
    images: torch.Tensor,
    teacher: Watched | None,
) -> dict[str, torch.Tensor]:
    """The loss in named parts, each weighted and summed over the images of this process."""
    logits, features = outputs[0].float(), outputs[1].float()
    sums = {}
    if recipe.cross_entropy:
        smoothing = recipe.label_smoothing
        right = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        sums["cross_entropy"] = right if recipe.cross_entropy == 1 else recipe.cross_entropy * right
    if teacher is None:
        return sums
    with torch.no_grad(), autocast(recipe.bf16, images.device):
        target, target_features, *targets = teacher(images)
    if recipe.distill_logits:
        t = recipe.temperature
        divergence = F.kl_div(
            F.log_softmax(logits / t, 1), F.log_softmax(target.float() / t, 1), reduction="sum", log_target=True
        )
        sums["distill_logits"] = recipe.distill_logits * t**2 * divergence  # t^2: gradients as large as the others'
    if recipe.distill_features:
        difference = F.mse_loss(features, target_features.float(), reduction="sum") / features.shape[1]
        sums["distill_features"] = recipe.distill_features * difference
    pairs = list(zip(outputs[2:], targets, strict=True))
    for name, weight in (("distill_blocks", recipe.distill_blocks), ("distill_attention", recipe.distill_attention)):
        if weight:
            count = len(pairs) if name == "distill_attention" or not recipe.distill_attention else len(pairs) // 2
            sums[name] = weight * sum(unlike(*pair) for pair in pairs[:count])
            pairs = pairs[count:]
    return sums


def unlike(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The cosine loss of tokens (B, N, M), a scalar: 1 - cos of every token, mean over the tokens, sum over images."""
    return (1 - F.cosine_similarity(one.float(), other.float(), -1)).mean(1).sum()


def check_teacher(model: nn.Module, recipe: Recipe, teacher: nn.Module | None) -> None:
    """Refuse a teacher that does not fit, or is not needed; move one that does to the model's device.

    Raises:
        ValueError: a teacher without a weight above zero or the other way round, of another size, or without features
            where they are to be distilled.
    """
    weights = ("distill_logits", "distill_features", "distill_blocks", "distill_attention")
    if recipe.distills != (teacher is not None):
        what = "no teacher is given" if recipe.distills else "a teacher is given"
        told = ", ".join(f"{name} {getattr(recipe, name):g}" for name in weights)
        raise ValueError(f"{what} and {told}: distilling needs a teacher and a weight above 0")
    if not recipe.distills and not recipe.cross_entropy:
        raise ValueError("cross_entropy is 0 and nothing is distilled: no loss is left, give one of them a weight")
    if teacher is None:
        return
    teacher.to(next(model.parameters()).device).eval()
    if recipe.distill_blocks or recipe.distill_attention:
        if recipe.compile:
            raise ValueError("compile is True: what blocks give is not seen in a compiled network, leave it off")
        _refuse_other_blocks(model, teacher)
    if not (hasattr(teacher, "features") and hasattr(model, "features")):
        if recipe.distill_features:
            raise ValueError(
                f"distill_features is {recipe.distill_features}: what the head of a network that others wrote reads "
                "has no name: use distill_logits"
            )
        return
    for name, weight, size in (
        ("classes", recipe.distill_logits, "out_features"),
        ("width", recipe.distill_features, "in_features"),
    ):
        theirs, ours = getattr(teacher.head, size), getattr(model.head, size)
        if weight and theirs != ours:
            raise ValueError(f"the teacher's {name} is {theirs}, the model's {ours}: distil from a teacher of the same")


def _refuse_other_blocks(model: nn.Module, teacher: nn.Module) -> None:
    if not (hasattr(model, "blocks") and hasattr(teacher, "blocks")):
        raise ValueError(
            "blocks are to be distilled, and one of both networks has none of that name: give a CCT or a ViT"
        )
    for name, theirs, ours in (
        ("blocks", len(teacher.blocks), len(model.blocks)),
        ("tokens", teacher.config.tokens, model.config.tokens),
        ("width", teacher.config.width, model.config.width),
    ):
        if theirs != ours:
            raise ValueError(
                f"the teacher's {name} is {theirs}, the model's {ours}: distil blocks from one of the same"
            )
