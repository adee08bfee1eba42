"""Networks that others wrote, with random weights as wide as trained ones: no weights are fetched."""

import importlib

import pytest
import torch
from torch import nn

from salvit_core import compat


def timm():
    """The package, or the test is skipped."""
    compat.repair()  # it imports torchvision
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError:
        pytest.skip("needs timm")


def _timm(name, **options):
    return lambda: timm().create_model(name, **options)


def _torchvision(name, **options):
    return lambda: getattr(compat.torchvision("models"), name)(**options)


# By name: how it is made, and the side of its images: 224 where two cores take it.
NETWORKS = {
    "vit_b_16": (_torchvision("vit_b_16", image_size=32), 32),
    "swin_t": (_torchvision("swin_t"), 64),
    "resnet18": (_torchvision("resnet18"), 64),
    "mobilenet_v3_small": (_torchvision("mobilenet_v3_small"), 64),
    "vit_tiny_patch16_224": (_timm("vit_tiny_patch16_224"), 224),
    "deit_tiny_patch16_224": (_timm("deit_tiny_patch16_224"), 224),
    "efficientvit_b0": (_timm("efficientvit_b0"), 64),
    "convnext_atto": (_timm("convnext_atto"), 64),
    # To break it: depth-wise convolutions and squeeze-excite with SiLU, then attention with looked-up relative biases.
    "coatnet_nano_rw_224": (_timm("coatnet_nano_rw_224", img_size=64), 64),
}


def made(name):
    """A network of `NETWORKS` in evaluation mode, and an image of which it is sure."""
    torch.manual_seed(0)
    make, side = NETWORKS[name]
    network = lively(make(), side)
    images = torch.randn(8, 3, side, side)
    with torch.no_grad():
        margins = network(images).topk(2, 1).values.diff(dim=1)[:, 0].neg()
    best = int(margins.argmax())
    return network, images[best : best + 1]


def lively(network, side):
    """Weights as trained ones have them: no head or scale of nearly zero, fitting BatchNorm statistics, wide logits."""
    for part in network.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.weight.data.normal_(0, part.weight[0].numel() ** -0.5)
        if isinstance(part, nn.MultiheadAttention):
            part.in_proj_weight.data.normal_(0, part.embed_dim**-0.5)
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the mean of all batches
    for name, weight in network.named_parameters():
        if name.endswith(("gamma", "layer_scale")) and weight.abs().max() < 1e-3:
            weight.data.uniform_(0.1, 0.5)
    with torch.no_grad():
        if any(isinstance(part, nn.BatchNorm2d) for part in network.modules()):
            network.train()
            for _ in range(2):
                network(torch.randn(16, 3, side, side))
        network.eval()
        wide = network(torch.randn(4, 3, side, side)).std()
        head = [part for part in network.modules() if isinstance(part, nn.Linear)][-1]
        head.weight.data *= 2 / wide
        head.bias.data *= 2 / wide
    return network
