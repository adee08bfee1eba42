"""A network carried to another data set: a new head, the rest as it was trained or pruned, all of it fine-tuned."""

from dataclasses import replace

import torch
from torch import nn

from ..datasets import Data
from .pruning import hidden, shaped


def carried(model: nn.Module, data: Data, drop_path: float = 0.0, seed: int = 0) -> nn.Module:
    """A copy of a network with a head for the classes of another data set, drawn anew.

    What was pruned stays away: the copy has the hidden sizes of the network.

    Args:
        model: a CCT or a ViT, replaced and pruned or not.
        data: the other data set, its images of the network's size.
        drop_path: stochastic depth of the copy.
        seed: of the new head.

    Raises:
        ValueError: images of other channels or another size.
    """
    config = model.config
    _, channels, _, side = data.train.images.shape
    if (channels, side) != (config.channels, config.image):
        raise ValueError(
            f"{data.name} has images of {channels} channels and {side} pixels, the network reads {config.channels} and "
            f"{config.image}: load it with that size, or take a network of as many channels"
        )
    torch.manual_seed(seed)
    made = shaped(replace(config, classes=data.classes, stochastic_depth=drop_path), hidden(model))
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    made.load_state_dict(weights, strict=False)
    return made.to(data.train.images.device)
