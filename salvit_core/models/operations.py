"""What a graph names: every operation that is no plain function, its kind in the tables and its FLOPs.

Each is a module so that a graph, a FLOP count or a private protocol can name it; `known` lists them all. What attention
mechanisms compute besides Linear and normalisers stands here; normalisers and activations have files of their own.
None depends on the values it is given, only on shapes.

FLOPs are in the paper's convention, the rules that reproduce Table 7: 2 per multiply-add of what has weights, products
of activations not counted; per element LayerNorm 2, GELU, ReLU, scale of the scores and residual addition 1;
normalisers 3 (softmax; square, sum, divide), 2Quad 4, L2Q 3 plus one per element of C and D; max-pooling and external
attention's second (L1) normalisation nothing. What the paper has no row for is counted in its spirit.

Letters: B batch, H heads, N tokens, D dimension of a head, m landmarks.
"""

import functools
import math
import operator
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

# Keeps sums that may be zero from dividing by zero. A multiple of 2^-16, so that it survives 16-bit fixed point.
EPS = 2.0**-14


# The kinds of operation that tables and figures tell apart, in the order in which they are drawn.
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
    "convolution",
    "recurrence",
)


class Operation(nn.Module):
    """A module that stays whole in a graph. Its `kind` is its own, or what `of_kind` says where it is used."""

    kind: str | None = None

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """FLOPs of one call in the paper's convention, of all images together."""
        raise TypeError(f"{type(self).__name__} does not say its FLOPs")


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def of_kind(kind: str, module: AnyModule) -> AnyModule:
    """A module marked as being of a kind: it, and all in it that is not marked otherwise.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown: choose from {', '.join(KINDS)}")
    module.kind = kind  # type: ignore[assignment]  # torch types every attribute as a tensor or a module
    return module


class MatMul(Operation):
    """Matrix product of two activations: the only products in attention in which neither side is a weight."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """(..., N, K) and (..., K, D) -> (..., N, D)."""
        return left @ right

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return 0


class Multiply(Operation):
    """Product of two activations, entry by entry."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Two tensors that broadcast -> their product."""
        return left * right

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return result.numel()


class Divide(Operation):
    """Quotient of two activations, entry by entry, the denominator positive: a / (b + eps).

    Args:
        scale: public estimate of the denominator's size, for protocols that need to know; the result does not
            depend on it.
        eps: another, such as zero where the denominator has been kept from zero before.
    """

    eps = EPS
    sized = False  # whether the scale is what was seen on an example

    def __init__(self, scale: float = 1.0, eps: float | None = None):
        super().__init__()
        self.scale = scale
        if eps is not None:
            self.eps = eps

    def forward(self, numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
        """Numerators and denominators >= 0 that broadcast -> their quotients."""
        return numerator / (denominator + self.eps)

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        eps = f", eps={self.eps:g}" if self.eps != EPS else ""
        return f"scale={self.scale:g}{eps}{', sized' if self.sized else ''}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return result.numel()


class ShiftDivide(Operation):
    """Quotient whose divisor is the power of two next to it in ratio, so that plain hardware shifts (Trio-ViT, III.C).

    a / 2^y, y = floor(log2 (b + eps)), one more where (b + eps) / 2^y > 2^(y+1) / (b + eps), which is above
    2^(y + 1/2); within [least, most]. Off by a factor of sqrt(2) at most, where y is within.

    Args:
        least: exponent of the smallest divisor.
        most: of the largest; 4 bits hold 16 exponents.
        eps: keeps the divisor from zero.
    """

    def __init__(self, least: int = -6, most: int = 9, eps: float = EPS):
        super().__init__()
        self.least, self.most, self.eps = least, most, eps

    def forward(self, numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
        """Numerators and denominators >= 0 that broadcast -> their quotients."""
        exponent = torch.ceil(torch.log2(denominator + self.eps) - 0.5)
        return numerator * torch.exp2(-exponent.clamp(self.least, self.most))

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"least={self.least}, most={self.most}, eps={self.eps:g}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return result.numel()


# What a `Lookup` may have in its table.
TABLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "hardswish": nn.functional.hardswish,
    "gelu": nn.functional.gelu,
    "tanh gelu": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


class Lookup(Operation):
    """A function of a number in few bits, as a table: f(step (clamp(round(x / step) + zero, 0, 2^bits - 1) - zero)).

    With "identity" it is a quantizer and nothing else.

    Args:
        function: a name of `TABLES`.
        bits: of the number.
        step: between two points of its grid, public as the architecture is.
        zero: the point that stands for zero, a whole number.
        spare: bits that a private table has besides, so that what lies beyond the grid is clamped by it. The table
            reaches (2^spare - 1) / 2 of the grid's range beyond either end.

    Raises:
        ValueError: an unknown function, or a table that no dealer would send.
    """

    def __init__(self, function: str, bits: int, step: float, zero: int = 0, spare: int = 1):
        super().__init__()
        if function not in TABLES:
            raise ValueError(f"function {function!r} is unknown: choose from {', '.join(TABLES)}")
        if not (bits >= 1 and spare >= 0 and bits + spare <= 16):
            raise ValueError(f"a table of {bits} and {spare} bits: give 1 bit to 16 of both")
        if not 0 < step < math.inf:
            raise ValueError(f"step is {step}: give a positive number")
        self.function, self.bits, self.step, self.zero, self.spare = function, bits, float(step), int(zero), spare

    def points(self, number: torch.Tensor) -> torch.Tensor:
        """The function at points of the grid, whole numbers of any size, which are clamped to it."""
        return TABLES[self.function]((number.clamp(0, 2**self.bits - 1) - self.zero) * self.step)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(...) -> the same shape."""
        return self.points((x / self.step).round() + self.zero)

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"{self.function}, bits={self.bits}, step={self.step!r}, zero={self.zero}, spare={self.spare}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return result.numel()


class Exponential(Operation):
    """exp(a - max a), the largest entry along `dims` becoming one: an exponential that cannot overflow.

    Args:
        dims: how many of the last dimensions the maximum runs over; 0: none is subtracted, and a <= 0 is expected.
    """

    def __init__(self, dims: int = 1):
        super().__init__()
        self.dims = dims

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """(...) -> exponentials of the same shape, at most one."""
        if self.dims:
            a = a - a.amax(tuple(range(-self.dims, 0)), keepdim=True)
        return a.exp()

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"dims={self.dims}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return result.numel()


class SquaredNorm(Operation):
    """Sum of squares along the last dimension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., 1)."""
        return x.square().sum(-1, keepdim=True)

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return 2 * inputs[0].numel()


class HeadLinear(Operation):
    """A linear map over the tokens with a matrix of each head's own: W_h x_h.

    Args:
        heads: number of heads H.
        inputs: number of tokens N before.
        outputs: number of rows k after.
    """

    def __init__(self, heads: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, outputs, inputs))
        nn.init.trunc_normal_(self.weight, std=0.02)  # as the network's Linear have it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) -> (B, H, k, D)."""
        return self.weight @ x

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """(H, k, N): N is what is summed over."""
        return 2 * self.weight.shape[-1] * result.numel()


class TokenConv(Operation):
    """Depth-wise convolution over the tokens, one kernel per head, zeros beyond the ends.

    Args:
        heads: number of heads H.
        kernel: number of taps, odd.
    """

    def __init__(self, heads: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, kernel))
        nn.init.trunc_normal_(self.weight, std=kernel**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) -> (B, H, N, D): y_n = sum_t w_t x_(n + t - kernel // 2)."""
        heads, kernel = self.weight.shape
        weight = self.weight[:, None, :, None]  # (H, 1, kernel, 1)
        return nn.functional.conv2d(x, weight, padding=(kernel // 2, 0), groups=heads)

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """(H, taps)."""
        return 2 * self.weight.shape[-1] * result.numel()


class Gain(Operation):
    """A learnt factor that multiplies an activation.

    Args:
        shape: of the factor; it broadcasts with the activation.
        initial: value that it starts from.
    """

    def __init__(self, shape: tuple[int, ...], initial: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, initial))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(...) -> the same shape."""
        return self.weight * x

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return result.numel()


class Take(Operation):
    """Rows of an activation by a public table of indices; an index may occur more than once.

    Args:
        index: the rows to take, plain integers.
    """

    def __init__(self, index: list[int]):
        super().__init__()
        self.index = list(index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N, D) -> (..., len(index), D)."""
        return x[..., _tensor(tuple(self.index), x.device), :]

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"index={self.index}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return 0


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept must serve training too
def _tensor(values: tuple, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device="cpu" if device.type == "meta" else device)


class SegmentMeans(Operation):
    """Landmarks: the mean of the tokens in each of m segments.

    Where N and m are squares, the segments are the cells of a grid on the image; else they are runs of tokens. Sizes
    differ by one row or column, or token, where they do not divide.

    Args:
        tokens: number of tokens N.
        segments: number of segments m <= N.
    """

    def __init__(self, tokens: int, segments: int):
        super().__init__()
        self.tokens, self.segments = tokens, segments

    def assignment(self) -> list[int]:
        """The segment of every token."""
        side, cells = math.isqrt(self.tokens), math.isqrt(self.segments)
        if side * side == self.tokens and cells * cells == self.segments:
            place = [i * cells // side for i in range(side)]
            return [place[i] * cells + place[j] for i in range(side) for j in range(side)]
        return [i * self.segments // self.tokens for i in range(self.tokens)]

    def matrix(self) -> torch.Tensor:
        """(m, N): what the tokens are multiplied with, public numbers."""
        matrix = torch.zeros(self.segments, self.tokens)
        matrix[self.assignment(), range(self.tokens)] = 1.0
        return matrix / matrix.sum(1, keepdim=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N, D) -> (..., m, D)."""
        return _matrix(self.tokens, self.segments, x.device, x.dtype) @ x

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"tokens={self.tokens}, segments={self.segments}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return inputs[0].numel()


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _matrix(tokens: int, segments: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return SegmentMeans(tokens, segments).matrix().to(device=device, dtype=dtype)


class NewtonInverse(Operation):
    """Inverse of symmetric positive semi-definite matrices plus a ridge, by Newton's iteration Z <- Z (2 I - A Z).

    The start is Z = 1.5 / |A + ridge I| I, |.| the largest row sum: the eigenvalues of A Z lie within (0, 1.5], and
    each iteration squares the distance of A Z from I. With m landmarks the condition number is at most (m + ridge) /
    ridge, which 2 + log2 of it iterations overcome.

    Args:
        iterations: number of steps.
        ridge: added to the diagonal; without it rounding grows twofold per step wherever A is nearly singular.
    """

    def __init__(self, iterations: int = 20, ridge: float = 0.1):
        super().__init__()
        self.iterations, self.ridge = iterations, ridge

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """(..., m, m), entries >= 0 -> (..., m, m)."""
        one = torch.eye(a.shape[-1], device=a.device, dtype=a.dtype)
        a = a + self.ridge * one
        z = 1.5 / a.sum(-1).amax(-1)[..., None, None].detach() * one
        for _ in range(self.iterations):
            z = z @ (2 * one - a @ z)
        return z

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"iterations={self.iterations}, ridge={self.ridge:g}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """It consists of products of activations."""
        return 0


class PseudoInverse(Operation):
    """Moore-Penrose inverse of matrices whose rows sum to one (Razavi et al., 2014; Nystromformer, Xiong et al., 2021).

    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from Z = A^T / (|A|_1 |A|_inf), where |A|_inf, the largest row sum,
    is one and |A|_1 is the largest column sum.

    Args:
        iterations: number of steps.
    """

    def __init__(self, iterations: int = 6):
        super().__init__()
        self.iterations = iterations

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """(..., m, m), entries >= 0, rows summing to one -> (..., m, m)."""
        one = torch.eye(a.shape[-1], device=a.device, dtype=a.dtype)
        z = a.mT / (a.sum(-2).amax(-1)[..., None, None] + EPS)
        for _ in range(self.iterations):
            az = a @ z
            z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
        return z

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"iterations={self.iterations}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """It consists of products of activations."""
        return 0


class Reweight(Operation):
    """Features times the cosines and sines of their token's position, whose products are cosines of differences.

    Along a line of n places let c_i = cos(pi i / (2 n)) and s_i = sin(pi i / (2 n)): c_i c_j + s_i s_j =
    cos(pi (i - j) / (2 n)) >= 0, cosFormer's re-weighting. Where N is a square the image's rows and columns are two
    such lines, and the four products of a row's and a column's factor give the product of the two cosines; else the
    tokens are one line.

    Args:
        tokens: number of tokens N.
    """

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens

    def factors(self) -> torch.Tensor:
        """(F, N), F = 4 where N is a square, else 2: public numbers."""
        side = math.isqrt(self.tokens)
        length = side if side * side == self.tokens else self.tokens
        angles = torch.arange(length, dtype=torch.float64) * (math.pi / 2 / length)
        line = torch.stack([angles.cos(), angles.sin()])  # (2, length)
        if length == self.tokens:
            return line
        return (line[:, None, :, None] * line[None, :, None, :]).reshape(4, self.tokens)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) -> (B, H, N, F D): F blocks of D features."""
        return (x.unsqueeze(-2) * _factors(self.tokens, x.device, x.dtype)).flatten(-2)

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"tokens={self.tokens}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return result.numel()


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _factors(tokens: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return Reweight(tokens).factors().T[:, :, None].to(device=device, dtype=dtype)  # (N, F, 1)


class TokenSum(Operation):
    """Sum over the tokens: the denominators of attention that is linear in them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N, D) -> (..., 1, D)."""
        return x.sum(-2, keepdim=True)

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return inputs[0].numel()


class Sum(Operation):
    """Sum over dimensions.

    Args:
        dims: which, counted from the last, such as (-2, -1).
        keepdim: leave them, of size one.
    """

    def __init__(self, dims: tuple[int, ...], keepdim: bool = False):
        super().__init__()
        self.dims, self.keepdim = dims, keepdim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(...) -> what is left of the shape."""
        return x.sum(self.dims, keepdim=self.keepdim)

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"dims={self.dims}, keepdim={self.keepdim}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return inputs[0].numel()


class Resample(Operation):
    """Average pooling, adaptive pooling, interpolation: a public matrix on either side of every picture, R x C^T.

    Args:
        rows: R (height', height), plain numbers.
        columns: C (width', width), plain numbers.
    """

    def __init__(self, rows: list[list[float]], columns: list[list[float]]):
        super().__init__()
        self.rows, self.columns = rows, columns

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """R and C: public numbers."""
        return torch.tensor(self.rows, dtype=torch.float64), torch.tensor(self.columns, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., height, width) -> (..., height', width')."""
        rows, columns = (matrix.to(x.device, x.dtype) for matrix in self.matrices())
        return rows @ x @ columns.T

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        sizes = [f"{len(matrix)}x{len(matrix[0])}" for matrix in (self.rows, self.columns)]
        return f"{', '.join(sizes)}, {zlib.crc32(repr((self.rows, self.columns)).encode()):08x}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size, as pooling's sums."""
        return inputs[0].numel()


class Repeat(Operation):
    """A learnt tensor for every image of a batch, such as a class token.

    Args:
        shape: (1, ...), of the tensor.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, ...), of which only the number counts -> (B, ...)."""
        return self.weight.expand(images.shape[0], *self.weight.shape[1:])

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size."""
        return 0


class BlockLinear(Operation):
    """A block-diagonal linear map: features cut into blocks, y_b = W_b x_b + c_b.

    Its weight is flat, one block's matrix (outputs, inputs) after the other, since blocks may differ in size;
    `matrices` has them apart.

    Args:
        inputs: features of each block before; a block may have none.
        outputs: features of each block after.

    Raises:
        ValueError: no block, a negative size, or not as many inputs as outputs.
    """

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int]):
        super().__init__()
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        if not self.inputs or len(self.inputs) != len(self.outputs) or min(*self.inputs, *self.outputs) < 0:
            sizes = f"blocks of {self.inputs} inputs and {self.outputs} outputs"
            raise ValueError(f"{sizes}: give as many of both, none below 0")
        self.alike = len(set(self.inputs)) == len(set(self.outputs)) == 1 and 0 not in (*self.inputs, *self.outputs)
        # Of two axes, as what decays in training.
        self.weight = nn.Parameter(torch.empty(1, sum(map(operator.mul, self.inputs, self.outputs))))
        self.bias = nn.Parameter(torch.zeros(sum(self.outputs)))
        for matrix in self.matrices():
            nn.init.uniform_(matrix.detach(), -(max(1, matrix.shape[1]) ** -0.5), max(1, matrix.shape[1]) ** -0.5)

    def matrices(self) -> list[torch.Tensor]:
        """W_b (outputs, inputs) of every block: views of the weight."""
        return views(self.weight, zip(self.outputs, self.inputs, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., sum of inputs) -> (..., sum of outputs)."""
        if self.alike:
            weight = self.weight.view(-1, self.outputs[0], self.inputs[0])  # (blocks, outputs, inputs)
            rows = x.reshape(-1, len(weight), self.inputs[0]).transpose(0, 1)  # (blocks, rows, inputs)
            made = torch.bmm(rows, weight.mT).transpose(0, 1)
            return made.reshape(*x.shape[:-1], -1) + self.bias
        parts = zip(x.split(self.inputs, -1), self.matrices(), strict=True)
        return torch.cat([part @ matrix.mT for part, matrix in parts], -1) + self.bias

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"inputs={self.inputs}, outputs={self.outputs}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By block."""
        return 2 * self.weight.numel() * inputs[0].shape[:-1].numel()


class LSTM(Operation):
    """The recurrence of LSTMs side by side: what a step reads of the input, z_t, comes from a map outside.

    Of one cell, U and b its own (Hochreiter and Schmidhuber, 1997, with forget gates):

        (i, f, g, o) = z_t + U h_(t-1) + b    c_t = s(f) c_(t-1) + s(i) tanh(g)    h_t = s(o) tanh(c_t)

    s the logistic function, h and c zero before the first step. Each head has two cells, one that goes through the
    tokens from the first, one from the last. The weight is flat, U (4 k, k) of one cell after the other, head by head,
    the forward cell first: `matrices`. Gates are in the order of torch.nn.LSTM, so are a head's two cells.

    Args:
        hidden: for every head the hidden sizes k of its forward and its backward cell; either may be zero.

    Raises:
        ValueError: no head, or a negative size.
    """

    def __init__(self, hidden: Sequence[tuple[int, int]]):
        super().__init__()
        self.hidden = tuple((int(forward), int(backward)) for forward, backward in hidden)
        self.cells = tuple(size for pair in self.hidden for size in pair)  # k of every cell
        if not self.cells or min(self.cells) < 0:
            raise ValueError(f"hidden sizes {self.hidden}: give two for every head, none below 0")
        self.weight = nn.Parameter(torch.empty(1, sum(4 * k * k for k in self.cells)))
        self.bias = nn.Parameter(torch.zeros(4 * sum(self.cells)))
        for matrix in self.matrices():
            nn.init.uniform_(matrix.detach(), -(max(1, matrix.shape[1]) ** -0.5), max(1, matrix.shape[1]) ** -0.5)

    def matrices(self) -> list[torch.Tensor]:
        """U (4 k, k) of every cell: views of the weight."""
        return views(self.weight, ((4 * k, k) for k in self.cells))

    def biases(self) -> tuple[torch.Tensor, ...]:
        """The bias (4 k) of every cell: views."""
        return self.bias.split([4 * k for k in self.cells])

    # Cells side by side, all as large as the largest, K. Only numbers moved about and zeros, as shares have them,
    # too. What is added to a smaller cell stays zero: tanh(0) enters it, and nothing of it enters the others.

    def steps(self, z: torch.Tensor) -> torch.Tensor:
        """What the steps read (..., N, sum of 4 k) -> (C, N, B, 4 K), the backward cells' last token first."""
        features = _places(self.cells)[0].to(z.device)
        return self._turned(nn.functional.pad(z.flatten(0, -3), (0, 1))[..., features].permute(2, 1, 0, 3))

    def factors(self, weight: torch.Tensor) -> torch.Tensor:
        """The flat weight as U^T of every cell, (C, K, 4 K)."""
        return nn.functional.pad(weight[0], (0, 1))[_places(self.cells)[1].to(weight.device)].mT

    def tokens(self, made: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Hidden states (C, N, B, K) -> (..., N, sum of k), `shape` being that of "..."."""
        taken = _places(self.cells)[2].to(made.device)
        return self._turned(made).permute(2, 1, 0, 3).flatten(2)[..., taken].unflatten(0, tuple(shape))

    @staticmethod
    def _turned(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[0::2], x[1::2].flip(1)], 1).flatten(0, 1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """What the steps read (..., N, sum of 4 k) -> hidden states (..., N, sum of k), in the order of the cells."""
        return self.run(z) if sum(self.cells) else z

    def run(self, z: torch.Tensor, watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None) -> torch.Tensor:
        """As `forward`; `watch` is shown what gates read (C, B, 4 K) and c (C, B, K) of every step."""
        rows, weight = self.steps(z + self.bias), self.factors(self.weight)
        weight = weight.to(rows.dtype)
        h = c = rows.new_zeros(*rows[:, 0].shape[:2], weight.shape[1])  # (C, B, K)
        made = []
        for t in range(rows.shape[1]):
            read = torch.baddbmm(rows[:, t], h, weight)
            i, f, g, o = read.chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            if watch is not None:
                watch(read, c)
            h = o.sigmoid() * c.tanh()
            made.append(h)
        return self.tokens(torch.stack(made, 1), z.shape[:-2])

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"hidden={self.hidden}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """The products by U, and by size five curves, three products and a sum for every hidden unit."""
        return 2 * self.weight.numel() * inputs[0].shape[:-1].numel() + 9 * result.numel()


def views(flat: torch.Tensor, shapes: Iterable[tuple[int, int]]) -> list[torch.Tensor]:
    """A flat weight as the matrices that lie in it one after the other."""
    shapes = list(shapes)
    parts = flat.reshape(-1).split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _places(cells: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where `LSTM` finds what its padded cells hold, a zero being past the end; and the results among them.

    Args:
        cells: hidden size k of every cell.

    Returns:
        indices of features (C, 4 K), of the flat weight (C, 4 K, K), and of results (sum of k) among C K.
    """
    size, device = max(cells), "cpu"
    features = torch.full((len(cells), 4, size), 4 * sum(cells), device=device)
    places = torch.full((len(cells), 4, size, size), sum(4 * k * k for k in cells), device=device)
    taken, first, start = [], 0, 0
    for cell, k in enumerate(cells):
        features[cell, :, :k] = torch.arange(4 * k, device=device).view(4, k) + first
        places[cell, :, :k, :k] = torch.arange(4 * k * k, device=device).view(4, k, k) + start
        taken += [cell * size + unit for unit in range(k)]
        first, start = first + 4 * k, start + 4 * k * k
    return features.flatten(1), places.flatten(1, 2), torch.tensor(taken, dtype=torch.int64, device=device)


class LinearScan(Operation):
    """The recurrence h_t = f_t h_(t-1) + i_t, entry by entry, h zero before the first step.

    As f and i do not depend on h, all steps are found in log2 N (Hillis and Steele, 1986; Blelloch, 1990): whoever
    holds the sum over the last s steps and the product of their f has those over 2 s from the neighbour s before.

    Args:
        forward: how many of the features go through the tokens from the first.
        backward: how many, after these, from the last.
    """

    def __init__(self, forward: int, backward: int):
        super().__init__()
        self.sizes = forward, backward

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N, K), of which the backward features' tokens are in the other order."""
        forward, backward = x.split(self.sizes, -1)
        return torch.cat([forward, backward.flip(-2)], -1)

    @staticmethod
    def before(x: torch.Tensor, distance: int) -> torch.Tensor:
        """(..., N, K), of every token the one that lies so far before it, or zeros."""
        return nn.functional.pad(x[..., :-distance, :], (0, 0, distance, 0))

    def forward(self, f: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        """Factors and what is added, each (..., N, K) -> h (..., N, K)."""
        f, h, tokens = self.turned(f), self.turned(i), i.shape[-2]
        distance = 1
        while distance < tokens:
            h = h + f * self.before(h, distance)
            f = f * self.before(f, distance)
            distance *= 2
        return self.turned(h)

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"sizes={self.sizes}"

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """By size: a product and a sum a step."""
        return 2 * result.numel()


def unit_values(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Values of which the j-th is the j-th unit vector: attention to them returns its weights.

    Args:
        x: tokens (B, N, M).
        heads: number of heads H.

    Returns:
        (B, H, N, N).
    """
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), heads, -1, -1)


def _linear(module: nn.Linear, result: torch.Tensor) -> int:
    return 2 * module.in_features * result.numel()


def _conv2d(module: nn.Conv2d, result: torch.Tensor) -> int:
    return 2 * module.weight[0].numel() * result.numel()


# torch's own modules that networks use, and their FLOPs.
TORCH: dict[type[nn.Module], Callable[..., int]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.LayerNorm: lambda module, result: 2 * result.numel(),
    nn.GELU: lambda module, result: result.numel(),
    nn.ReLU: lambda module, result: result.numel(),
    nn.ReLU6: lambda module, result: result.numel(),
    nn.Hardtanh: lambda module, result: result.numel(),
    nn.LeakyReLU: lambda module, result: result.numel(),
    nn.Hardswish: lambda module, result: result.numel(),
    nn.Hardsigmoid: lambda module, result: result.numel(),
    nn.SiLU: lambda module, result: result.numel(),
    nn.Sigmoid: lambda module, result: result.numel(),
    nn.Tanh: lambda module, result: result.numel(),
    nn.MaxPool2d: lambda module, result: 0,
    nn.Dropout: lambda module, result: 0,
    nn.Identity: lambda module, result: 0,
}


def flops(module: nn.Module, result: torch.Tensor, *inputs: torch.Tensor) -> int:
    """FLOPs of one call of an operation, in the paper's convention; of a module that is none, zero."""
    if isinstance(module, Operation):
        return module.flops(result, *inputs)
    return TORCH[type(module)](module, result) if type(module) in TORCH else 0


def known() -> list[type[nn.Module]]:
    """Every operation: torch's modules, and all subclasses of `Operation` that are not there to be derived from."""
    found: list[type[nn.Module]] = []
    waiting = [Operation]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.forward is not Operation.forward:
            found.append(kind)
    return [*TORCH, *sorted(found, key=lambda kind: kind.__name__)]
