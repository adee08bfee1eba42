"""How good a network is on a split, and which epoch of a training was the best."""

import torch
import torch.nn.functional as F
from torch import nn

from .. import datasets
from .processes import process, summed
from .recipe import autocast


def evaluate(
    model: nn.Module,
    split: "datasets.Split",
    batch: int = 256,
    bf16: bool = False,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy (%) and mean cross-entropy of a split, without augmentation; processes share the work.

    Args:
        model: maps images (B, C, height, width) to logits (B, classes); its training flag is put back.
        split: the images, on the model's device.
        batch: images at a time.
        bf16: autocast to bfloat16 where the device multiplies in it.

    Raises:
        ValueError: the split is empty.
    """
    if not len(split.labels):
        raise ValueError("the split to evaluate holds no images: load the data with a larger share for it")
    rank, world = process()
    training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=split.images.device)  # right, among the best five, loss
    with torch.inference_mode(), autocast(bf16, split.images.device):
        for images, labels in datasets.batches(split, batch, part=(rank, world)):
            logits = model(images).float()  # (B, classes)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
            totals += torch.stack([(logits.argmax(1) == labels).sum(), best.sum(), loss])
    model.train(training)
    right, among, loss = (summed(totals) / len(split.labels)).tolist()
    return {"loss": loss, "accuracy": 100 * right, "top5": 100 * among}


def best_epoch(history: list[dict]) -> int:
    """The epoch (from 0) of highest validation accuracy, among equals of lowest validation loss, then the first."""
    return max(range(len(history)), key=lambda i: (history[i]["validation_accuracy"], -history[i]["validation_loss"]))
