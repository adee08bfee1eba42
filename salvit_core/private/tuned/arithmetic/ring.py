"""Exact arithmetic on int64 mod 2^64: matrix products, and the linear operations whose weight the server knows.

A processor with AVX-512 multiplies int64, so that torch's own products are the fastest. Without it they are some forty
times slower, and a product is one of float64: that holds integers up to 2^53, so both sides are cut into limbs small
enough that a whole sum of products of limbs stays below. The result is the same, and parties may differ. Shapes are
those of the clear operation.
"""

import torch

WIDTH, TERMS = 22, 256  # bits of a limb; terms of a sum that stays exact
NATIVE = torch.backends.cpu.get_cpu_capability() == "AVX512"


def _native(x: torch.Tensor) -> bool:
    """Whether torch multiplies matrices of int64 where a tensor is, and fast; of shapes alone nothing is multiplied."""
    return x.device.type == "meta" or NATIVE and x.device.type == "cpu"


def signed(value: int) -> int:
    """An integer mod 2^64 as int64 has it."""
    return (value + 2**63) % 2**64 - 2**63


def log2_above(count: int) -> int:
    """The exponent of the least power of two that is no smaller than a count."""
    return (count - 1).bit_length()


def windows(
    images: torch.Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
):
    """Images (B, C, height, width) as one row per output pixel: (B, pixels, C k k). A convolution is then a product."""
    padded = torch.nn.functional.pad(images, (padding[1], padding[1], padding[0], padding[0]))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    patches = padded.unfold(2, reach[0], stride[0]).unfold(3, reach[1], stride[1])  # (B, C, h, w, reach, reach)
    patches = patches[..., :: dilation[0], :: dilation[1]]  # (B, C, h, w, k, k)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def grouped(
    images: torch.Tensor,
    weight: "torch.Tensor | Factor",
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    """A convolution in groups: (B, C, height, width) -> (B, pixels, C'); the weight is as `prepared` leaves it."""
    if isinstance(weight, torch.Tensor):
        # A channel each: tap by tap, no product of matrices.
        padded = torch.nn.functional.pad(images, (padding[1], padding[1], padding[0], padding[0]))
        side = [(padded.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
        made = None
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                top, left = i * dilation[0], j * dilation[1]
                part = padded[..., top : top + (side[0] - 1) * stride[0] + 1 : stride[0], :]
                part = part[..., left : left + (side[1] - 1) * stride[1] + 1 : stride[1]]  # (B, C, h, w)
                part = part.unsqueeze(2) * weight[..., i, j, None, None]  # (B, C, C' / C, h, w)
                made = part if made is None else made.add_(part)
        assert made is not None  # a kernel has entries
        return made.flatten(1, 2).flatten(2).mT
    rows = windows(images.unflatten(1, (groups, -1)).flatten(0, 1), kernel, stride, padding, dilation)
    rows = rows.unflatten(0, (-1, groups)).transpose(0, 1)  # (G, B, pixels, C k k / G)
    made = product(rows.flatten(1, 2), weight).unflatten(1, rows.shape[1:3])  # (G, B, pixels, C' / G)
    return made.permute(1, 2, 0, 3).flatten(2)


def _limbs(x: torch.Tensor, width: int, count: int) -> list[torch.Tensor]:
    """int64 as `count` float64 with x = sum of limb i times 2^(width i) mod 2^64; limbs are signed, of `width` bits."""
    limbs, half, mask = [], 1 << (width - 1), (1 << width) - 1
    for i in range(count):
        if i == count - 1:
            limb = x << (64 - width) >> (64 - width) if width * count > 64 else x
        else:
            limb = (x + half & mask) - half
            x = x - limb >> width
        limbs.append(limb.double())
    return limbs


class Factor:
    """The right side of matrix products mod 2^64, cut into limbs once where limbs are multiplied.

    Args:
        right: (..., K, M), int64.
        bits: |right| is below 2^(bits - 1): a clear weight takes one limb.
    """

    def __init__(self, right: torch.Tensor, bits: int = 64):
        self.right, self.bits = right, bits
        if _native(right):
            return
        self.parts = right.split(TERMS, -2)
        if bits > 64 - WIDTH:
            self.limbs = [_limbs(part, WIDTH, 3) for part in self.parts]
            self.sums = [(part[0] + part[1], torch.cat([part[2], part[0]], -2)) for part in self.limbs]
        else:
            self.limbs = [part.double() for part in self.parts]


def product(left: torch.Tensor, right: "torch.Tensor | Factor", bits: int = 64) -> torch.Tensor:
    """Matrix product of int64 mod 2^64, exact whichever way it is made.

    Args:
        left: (..., N, K).
        right: (..., K, M), or the factor made of it.
        bits: |right| is below 2^(bits - 1), where it is a tensor.
    """
    if _native(left):
        return left @ (right.right if isinstance(right, Factor) else right)
    right = right if isinstance(right, Factor) else Factor(right, bits)
    total = None
    for i, part in enumerate(left.split(TERMS, -1)):
        made = _full(part, right.limbs[i], *right.sums[i]) if right.bits > 64 - WIDTH else _small(part, right, i)
        total = made if total is None else total.add_(made)
    return total


def _small(left: torch.Tensor, right: Factor, i: int) -> torch.Tensor:
    """The right side is one limb: the left's may be as wide as the sum allows."""
    width = 55 - right.bits - (TERMS - 1).bit_length()  # signed limbs: (width - 1) + (bits - 1) + log2 terms <= 53
    count = -(-64 // width)
    width = -(-64 // count)
    parts = torch.stack(_limbs(left, width, count)) @ right.limbs[i]
    return sum(part.long() << (width * j) for j, part in enumerate(parts))


def _full(left: torch.Tensor, theirs: list[torch.Tensor], low: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Three limbs by three, of which six products count mod 2^64; the middle two come from one (Karatsuba)."""
    ours = _limbs(left, WIDTH, 3)
    first, middle = (ours[0] @ theirs[0]).long(), (ours[1] @ theirs[1]).long()
    cross = ((ours[0] + ours[1]) @ low).long().sub_(first).sub_(middle)
    outer = (torch.cat([ours[0], ours[2]], -1) @ ends).long().add_(middle)
    return first.add_(cross << WIDTH).add_(outer << 2 * WIDTH)


class Blocks:
    """The matrices of a block-diagonal product, ready: blocks that are alike as one factor, else one each.

    Args:
        weight: flat, the matrices (outputs, inputs) of the blocks one after the other.
        inputs: of each block.
        outputs: of each block.
        bits: as `Factor`.
    """

    def __init__(self, weight: torch.Tensor, inputs: tuple[int, ...], outputs: tuple[int, ...], bits: int):
        self.inputs = inputs
        self.alike = len(set(inputs)) == len(set(outputs)) == 1 and 0 not in (*inputs, *outputs)
        parts = weight.flatten().split([k * m for k, m in zip(inputs, outputs)])
        matrices = [part.view(m, k).t() for part, k, m in zip(parts, inputs, outputs)]
        self.factors = [Factor(x, bits) for x in ([torch.stack(matrices)] if self.alike else matrices)]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """(..., sum of inputs) -> (..., sum of outputs)."""
        if self.alike:
            rows = x.reshape(-1, len(self.inputs), self.inputs[0]).transpose(0, 1)  # (blocks, rows, K)
            return product(rows, self.factors[0]).transpose(0, 1).reshape(*x.shape[:-1], -1)
        parts = zip(x.flatten(0, -2).split(self.inputs, -1), self.factors)
        made = [product(part, factor) if part.shape[-1] else _nothing(part, factor) for part, factor in parts]
        return torch.cat(made, -1).unflatten(0, x.shape[:-1])


def _nothing(x: torch.Tensor, factor: Factor) -> torch.Tensor:
    return x.new_zeros(len(x), factor.right.shape[-1])


def prepared(operation: tuple, weight: torch.Tensor, bits: int = 64) -> "torch.Tensor | Factor | Blocks":
    """A weight, ready for `apply`: cut into limbs where the operation is a matrix product."""
    if operation[0] == "blocks":
        return Blocks(weight, operation[1], operation[2], bits)
    if operation[0] == "grouped":
        apart = weight.unflatten(0, (operation[-1], -1))  # (G, C' / G, C / G, k, k)
        return apart[:, :, 0].contiguous() if apart.shape[2] == 1 else Factor(apart.flatten(2).mT.contiguous(), bits)
    if operation[0] in ("multiply", "taps"):
        return weight
    return Factor(weight.mT if operation[0] == "heads" else weight.flatten(1).t(), bits)


def apply(operation: tuple, x: torch.Tensor, weight: "torch.Tensor | Factor | Blocks", bits: int = 64) -> torch.Tensor:
    """An activation times a weight, in the ring.

    Operations: ("linear",), ("conv", kernel, stride, padding) and, where it is dilated, its dilation, ("grouped",
    kernel, stride, padding, dilation, groups), ("multiply",) entry by entry, ("heads",) a matrix per head that
    multiplies the tokens, ("taps",) a kernel per head along the tokens, ("blocks", inputs, outputs) a matrix per block
    of features.
    """
    if operation[0] == "blocks":
        return (weight if isinstance(weight, Blocks) else Blocks(weight, operation[1], operation[2], bits)).product(x)
    assert not isinstance(weight, Blocks)
    if operation[0] == "multiply":
        return x * weight
    if operation[0] == "taps":
        assert isinstance(weight, torch.Tensor)  # only matrix products are cut into limbs
        taps, tokens = weight.shape[1], x.shape[-2]
        padded = torch.nn.functional.pad(x, (0, 0, taps // 2, taps // 2))
        return sum(padded[..., t : t + tokens, :] * weight[:, t, None, None] for t in range(taps))
    if operation[0] == "grouped":
        ready = isinstance(weight, Factor) or weight.dim() == 4 and weight.shape[0] == operation[-1] == x.shape[1]
        return grouped(x, weight if ready else prepared(operation, weight, bits), *operation[1:])
    weight = weight if isinstance(weight, Factor) else prepared(operation, weight, bits)
    if operation[0] == "heads":
        return product(x.mT, weight).mT
    if operation[0] == "conv":
        x = windows(x, *operation[1:])
    return product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
