"""Several operations side by side in one module, so that one start of the parties measures them all."""

import torch
from torch import nn


class Zoo(nn.Module):
    """Applies operation i to input i and returns all results, flattened, as "logits".

    Input i has shape shapes[i] and lies in shifts[i] +- scales[i]: a slice of the image, scaled and shifted, which is
    local arithmetic on shares. Operation i is "block i + 1" in the table of costs.
    """

    def __init__(self, operations, shapes, scales, shifts):
        super().__init__()
        self.blocks = nn.ModuleList(operations)
        self.shapes, self.scales, self.shifts = shapes, scales, shifts

    def inputs(self, images):
        flat = images.flatten(1)
        made = []
        start = 0
        for shape, scale, shift in zip(self.shapes, self.scales, self.shifts):
            size = torch.Size(shape).numel()
            made.append(flat[:, start : start + size].unflatten(1, shape) * scale + shift)
            start += size
        return made

    def results(self, images):
        return [block(x) for block, x in zip(self.blocks, self.inputs(images))]

    def forward(self, images):
        return torch.cat([result.flatten(1) for result in self.results(images)], 1)

    def images(self, seed=0):
        size = sum(torch.Size(shape).numel() for shape in self.shapes)
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(1, 1, 1, size, generator=generator) * 2 - 1
