"""What a teacher adds to the loss: its logits, its last features.

Letters in the shape comments: B batch, M dimension of the model.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .recipe import Recipe, autocast


def losses(
    recipe: Recipe,
    outputs: tuple[torch.Tensor, torch.Tensor],
    labels: torch.Tensor,
    images: torch.Tensor,
    teacher: nn.Module | None,
) -> dict[str, torch.Tensor]:
    """The loss in named parts, each weighted and summed over the images of this process."""
    logits, features = outputs[0].float(), outputs[1].float()
    smoothing = recipe.label_smoothing
    sums = {"cross_entropy": F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)}
    if teacher is None:
        return sums
    with torch.no_grad(), autocast(recipe.bf16, images.device):
        if hasattr(teacher, "features"):
            target_features = teacher.features(images)
            target = teacher.head(target_features).float()
        else:
            target = teacher(images).float()
    if recipe.distill_logits:
        t = recipe.temperature
        divergence = F.kl_div(
            F.log_softmax(logits / t, 1), F.log_softmax(target / t, 1), reduction="sum", log_target=True
        )
        sums["distill_logits"] = recipe.distill_logits * t**2 * divergence  # t^2: gradients as large as the others'
    if recipe.distill_features:
        difference = F.mse_loss(features, target_features.float(), reduction="sum") / features.shape[1]
        sums["distill_features"] = recipe.distill_features * difference
    return sums


def check_teacher(model: nn.Module, recipe: Recipe, teacher: nn.Module | None) -> None:
    """Refuse a teacher that does not fit, or is not needed; move one that does to the model's device.

    Raises:
        ValueError: a teacher without a weight above zero or the other way round, of another size, or without features
            where they are to be distilled.
    """
    distills = recipe.distill_logits or recipe.distill_features
    if bool(distills) != (teacher is not None):
        what = "no teacher is given" if distills else "a teacher is given"
        raise ValueError(
            f"{what} and distill_logits is {recipe.distill_logits}, distill_features {recipe.distill_features}: "
            "distilling needs a teacher and a weight above 0"
        )
    if teacher is None:
        return
    teacher.to(next(model.parameters()).device).eval()
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
