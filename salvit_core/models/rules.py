"""What the operations of torch.export become: a rule for each, by the name that it has in torch.ops.aten.

A rule has the adoption and then the operation's own arguments, of which activations are nodes of our graph and weights
are `Fixed`. It gives a node, or several where the operation does; what it does not cover it raises as `Unknown`.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .activations import ACTIVATIONS, TanhGELU
from .adoption import MASKED, Adoption, Fixed, Unknown, closed, is_open, name_of
from .normalizers import NORMALIZERS
from .operations import Divide, MatMul, Multiply, Resample, Sum, Take

RULES: dict[str, Callable[..., Any]] = {}
LARGEST_EPS = 2.0**-6  # what is more than that is added to a number of any sign, not to keep a sum from zero


def _rule(*names: str) -> Callable[[Callable], Callable]:
    """Enter a rule under names of torch.ops.aten; its arguments are those of the operation, after the adoption."""

    def enter(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def _secret(what: Any, name: str) -> fx.Node:
    """An argument that must be an activation."""
    if not isinstance(what, fx.Node):
        raise Unknown(f"{name} of what is no activation")
    return what


def _fixed(what: Any, name: str) -> Fixed | None:
    """An argument that must be a weight, or left out."""
    if what is not None and not isinstance(what, Fixed):
        raise Unknown(f"{name} with an activation for a weight")
    return what


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    """What torch keeps as one number or two."""
    first, second = sizes if len(sizes) == 2 else (sizes[0], sizes[0])
    return first, second


# What moves numbers about


@_rule(
    *("contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as", "positive", "lift_fresh_copy", "float"),
    *("dropout", "feature_dropout", "alpha_dropout", "native_dropout"),
)
def _nothing(adoption: Adoption, x: Any, *_, **__) -> Any:
    return x


@_rule("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size")
def _checked(adoption: Adoption, *_, **__) -> None:
    return None


@_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _reshaped(adoption: Adoption, x: Any, *_, **__) -> fx.Node:
    return adoption.moved(_secret(x, "reshape"), "reshape", adoption.shape)


@_rule("permute")
def _permuted(adoption: Adoption, x: fx.Node, dims: list[int]) -> fx.Node:
    return adoption.moved(x, "permute", tuple(dims))


@_rule("transpose", "swapaxes", "swapdims")
def _transposed(adoption: Adoption, x: fx.Node, first: int, second: int) -> fx.Node:
    return adoption.moved(x, "transpose", first, second)


@_rule("t", "numpy_T", "mT")
def _turned(adoption: Adoption, x: fx.Node) -> fx.Node:
    return adoption.moved(x, "transpose", -2, -1)


@_rule("movedim", "moveaxis")
def _moved(adoption: Adoption, x: fx.Node, source: int | list[int], target: int | list[int]) -> fx.Node:
    count = len(adoption.shape)
    order = torch.empty((0, *range(1, count + 1))).movedim(
        *([s + 1 if s >= 0 else s for s in ([side] if isinstance(side, int) else side)] for side in (source, target))
    )
    return adoption.moved(x, "permute", tuple(size - 1 for size in order.shape[1:]))


@_rule("expand", "expand_as", "broadcast_to")
def _expanded(adoption: Adoption, x: Any, *_, **__) -> fx.Node:
    value = adoption.node.meta["val"]
    if isinstance(x, Fixed):
        lead = len(value.shape) - x.value.dim()
        whole = x.value.expand(*[1] * lead, *x.value.shape)
        if str(value.shape[0]) != str(adoption.batch) or whole.shape[0] != 1:
            raise Unknown("expand of a weight, but not along the batch")
        return adoption.repeated(Fixed(whole.expand(1, *adoption.shape[1:]), x.learnt, x.name))
    if adoption.shape == adoption.shape_of(0):
        return x
    return adoption.moved(x, "expand", adoption.shape)


@_rule("repeat")
def _tiled(adoption: Adoption, x: Any, repeats: Sequence[Any]) -> fx.Node:
    value = adoption.node.meta["val"]
    if not isinstance(x, Fixed) or str(value.shape[0]) != str(adoption.batch):
        raise Unknown("repeat of an activation")
    with torch.no_grad():
        return adoption.repeated(Fixed(x.value.repeat(1, *repeats[1:])[:1], x.learnt, x.name))


@_rule("select")
def _selected(adoption: Adoption, x: fx.Node, dim: int, index: int) -> fx.Node:
    shape = adoption.shape_of(0)
    dim %= len(shape)
    if shape[dim] == -1:
        raise Unknown("select of one image of the batch")
    return adoption.at(x, dim, index % shape[dim])


@_rule("slice")
def _sliced(
    adoption: Adoption, x: fx.Node, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> fx.Node:
    shape = adoption.shape_of(0)
    dim %= len(shape)
    if shape == adoption.shape and step == 1:
        return x
    if shape[dim] == -1:
        raise Unknown("slice of the batch")
    first, last, step = slice(start, end, step).indices(shape[dim])
    return adoption.at(x, dim, slice(first, last, step))


@_rule("narrow")
def _narrowed(adoption: Adoption, x: fx.Node, dim: int, start: int, length: int) -> fx.Node:
    return _sliced(adoption, x, dim, start, start + length)


@_rule("unbind")
def _unbound(adoption: Adoption, x: fx.Node, dim: int = 0) -> list[fx.Node]:
    dim %= len(adoption.shape_of(0))
    if adoption.shape_of(0)[dim] == -1:
        raise Unknown("unbind of the batch")
    return [adoption.at(x, dim, i) for i in range(adoption.shape_of(0)[dim])]


@_rule("split", "chunk", "split_with_sizes", "tensor_split")
def _split(adoption: Adoption, x: fx.Node, sizes: Any, dim: int = 0) -> list[fx.Node]:
    dim %= len(adoption.shape_of(0))
    made, start = [], 0
    for part in adoption.node.meta["val"]:
        size = part.shape[dim]
        if is_open(size):
            raise Unknown("split of the batch")
        made.append(adoption.at(x, dim, slice(start, start + size)))
        start += size
    return made


@_rule("cat", "concat", "concatenate")
def _joined(adoption: Adoption, parts: Sequence[Any], dim: int = 0) -> fx.Node:
    made = [part if isinstance(part, fx.Node) else adoption.repeated(_single(part)) for part in parts]
    return adoption.graph.call_function(torch.cat, (made, dim % len(adoption.shape)))


def _single(part: Fixed) -> Fixed:
    if part.value.shape[0] != 1:
        raise Unknown("cat of a weight along the batch")
    return part


@_rule("stack")
def _stacked(adoption: Adoption, parts: Sequence[Any], dim: int = 0) -> fx.Node:
    shape = adoption.shape
    dim %= len(shape)
    one = tuple(1 if i == dim else size for i, size in enumerate(shape))
    made = [adoption.moved(_secret(part, "stack"), "reshape", one) for part in parts]
    return adoption.graph.call_function(torch.cat, (made, dim))


@_rule("roll")
def _rolled(adoption: Adoption, x: fx.Node, shifts: list[int], dims: Sequence[int] = ()) -> fx.Node:
    if not dims or 0 in [dim % len(adoption.shape) for dim in dims]:
        raise Unknown("roll of the batch")
    return adoption.moved(x, "roll", tuple(shifts), tuple(dims))


@_rule("pad", "constant_pad_nd")
def _padded(
    adoption: Adoption, x: fx.Node, pads: Sequence[int], mode: str = "constant", value: float | None = None
) -> fx.Node:
    if not isinstance(mode, str):  # of constant_pad_nd, which has none
        mode, value = "constant", mode
    if mode != "constant":
        raise Unknown(f"pad, {mode}")
    if not any(pads):
        return x
    made = adoption.function(F.pad, x, tuple(pads))
    if not value:
        return made
    made_of = adoption.node.meta["val"]
    inside = tuple(max(size, 1) for size in adoption.shape_of(0)[-(len(pads) // 2) :])
    zeros = torch.zeros(inside, dtype=made_of.dtype, device=made_of.device)
    return adoption.plus(made, Fixed(F.pad(zeros, tuple(pads), value=value)), adoption.shape)


@_rule("index", "index_select")
def _taken(adoption: Adoption, x: fx.Node, *where: Any) -> fx.Node:
    """Entries along one dimension, by a table that everybody knows."""
    if isinstance(where[0], int):
        dim, table = where
    else:
        there = [(i, one) for i, one in enumerate(where[0]) if one is not None]
        if len(there) != 1:
            raise Unknown("index along several dimensions")
        dim, table = there[0]
    shape = adoption.shape_of(0)
    dim %= len(shape)
    if not isinstance(table, Fixed) or table.value.dim() != 1 or shape[dim] == -1 or table.value.is_floating_point():
        raise Unknown("index by what is no fixed list of places")
    places = table.value.nonzero().flatten() if table.value.dtype == torch.bool else table.value % shape[dim]
    if dim == len(shape) - 2:
        return adoption.module("take", Take(places.tolist()), x)
    if len(shape) == 1:
        raise Unknown("index of the batch")
    turned = adoption.moved(x, "transpose", dim, -2)
    return adoption.moved(adoption.module("take", Take(places.tolist()), turned), "transpose", dim, -2)


# Sums and products


@_rule("add")
def _added(adoption: Adoption, x: Any, y: Any, *, alpha: float = 1) -> fx.Node:
    if isinstance(y, fx.Node) and alpha != 1:
        y = adoption.function(operator.mul, y, float(alpha))
    elif alpha != 1:
        y = Fixed(y.value * alpha, y.learnt) if isinstance(y, Fixed) else y * alpha
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        return adoption.function(operator.add, x, y)
    secret, other, which = (x, y, 0) if isinstance(x, fx.Node) else (y, x, 1)
    if isinstance(other, Fixed):
        return adoption.plus(secret, other, adoption.shape_of(which))
    return adoption.function(operator.add, secret, float(other))


@_rule("sub", "subtract")
def _subtracted(adoption: Adoption, x: Any, y: Any, *, alpha: float = 1) -> fx.Node:
    if isinstance(x, fx.Node):
        if isinstance(y, fx.Node) and alpha == 1:
            return adoption.function(operator.sub, x, y)
        return _added(adoption, x, y, alpha=-alpha)
    negative = adoption.function(operator.neg, y if alpha == 1 else adoption.function(operator.mul, y, float(alpha)))
    if isinstance(x, Fixed):
        return adoption.plus(negative, x, adoption.shape_of(1))
    return adoption.function(operator.add, negative, float(x))


@_rule("rsub")
def _taken_from(adoption: Adoption, x: Any, y: Any, *, alpha: float = 1) -> fx.Node:
    if alpha != 1 or isinstance(y, Fixed):
        raise Unknown("rsub of a weight")
    negative = adoption.function(operator.neg, x)
    return adoption.function(operator.add, negative, y if isinstance(y, fx.Node) else float(y))


@_rule("neg")
def _negated(adoption: Adoption, x: fx.Node) -> fx.Node:
    return adoption.function(operator.neg, x)


@_rule("mul", "multiply")
def _multiplied(adoption: Adoption, x: Any, y: Any) -> fx.Node:
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        return adoption.module("product", Multiply(), x, y)
    secret, other, which = (x, y, 0) if isinstance(x, fx.Node) else (y, x, 1)
    if isinstance(other, Fixed):
        return adoption.gain(secret, other, adoption.shape_of(which))
    return adoption.function(operator.mul, secret, float(other))


@_rule("addcmul")
def _affinely(adoption: Adoption, x: Any, first: Any, second: Any, *, value: float = 1) -> fx.Node:
    if isinstance(first, fx.Node) and isinstance(second, fx.Node):
        made = adoption.module("product", Multiply(), first, second)
    else:
        secret, fixed = (first, second) if isinstance(first, fx.Node) else (second, first)
        made = adoption.gain(_secret(secret, "addcmul"), fixed, adoption.shape)
    made = made if value == 1 else adoption.function(operator.mul, made, float(value))
    return adoption.plus(made, x, adoption.shape) if isinstance(x, Fixed) else adoption.function(operator.add, x, made)


@_rule("square")
def _squared(adoption: Adoption, x: fx.Node) -> fx.Node:
    return adoption.module("square", Multiply(), x, x)


@_rule("pow")
def _raised(adoption: Adoption, x: Any, exponent: Any) -> fx.Node:
    if not isinstance(x, fx.Node) or exponent != 2:
        raise Unknown("pow but for the square")
    return _squared(adoption, x)


@_rule("div", "divide", "true_divide")
def _divided(adoption: Adoption, x: Any, y: Any) -> fx.Node:
    if isinstance(y, Fixed):
        return adoption.gain(x, Fixed(1 / y.value, y.learnt), adoption.shape_of(0))
    if isinstance(y, fx.Node):
        eps = 0.0
        added = y.args[1] if y.op == "call_function" and y.target is operator.add else None
        if isinstance(added, float) and 0 < added <= LARGEST_EPS:
            y, eps = y.all_input_nodes[0], added  # said to the division, which then knows how near zero is
        divide = Divide(eps=eps)
        divide.sized = True
        return adoption.module("quotient", divide, _secret(x, "div"), y)
    return adoption.function(operator.truediv, x, float(y))


@_rule("matmul", "bmm", "mm")
def _product(adoption: Adoption, x: Any, y: Any) -> fx.Node:
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        if min(len(adoption.shape_of(0)), len(adoption.shape_of(1))) < 2:
            raise Unknown("matmul with a vector")
        return adoption.module("product", MatMul(), x, y)
    weight, turned = (y, False) if isinstance(y, Fixed) else (x, True)
    if weight.value.dim() != 2:
        raise Unknown("matmul with more than one matrix of weights")
    if turned:  # W x = (x^T W^T)^T
        made = _linear(adoption, adoption.moved(y, "transpose", -2, -1), Fixed(weight.value, weight.learnt))
        return adoption.moved(made, "transpose", -2, -1)
    return _linear(adoption, x, Fixed(weight.value.t(), weight.learnt))


@_rule("einsum")
def _summation(adoption: Adoption, equation: str, parts: Sequence[Any], **__: Any) -> fx.Node:
    """A product of two activations over named dimensions, as one of matrices."""
    given, _, out = equation.replace(" ", "").partition("->")
    names = given.split(",")
    plain = all(len(set(side)) == len(side) and side.isalpha() for side in (*names, out))
    if len(parts) != 2 or not out or not plain or not all(isinstance(part, fx.Node) for part in parts):
        raise Unknown("einsum but of two activations, each dimension named once")
    first, second = names
    batch = [name for name in out if name in first and name in second]
    inner = [name for name in first if name in second and name not in out]
    rows, columns = [name for name in out if name not in second], [name for name in out if name not in first]
    if set(first) != {*batch, *inner, *rows} or set(second) != {*batch, *inner, *columns}:
        raise Unknown("einsum that sums a dimension of one activation alone")
    sizes: dict[str, int] = {}
    for letters, part in zip(names, adoption.node.args[1]):
        sizes |= dict(zip(letters, closed(part.meta["val"].shape)))

    def whole(letters: list[str]) -> int:
        product = math.prod(sizes[name] for name in letters)
        return product if product > 0 else -1

    def matrix(part: fx.Node, letters: str, left: list[str], right: list[str]) -> fx.Node:
        turned = adoption.moved(part, "permute", tuple(letters.index(name) for name in (*batch, *left, *right)))
        return adoption.moved(turned, "reshape", (*(sizes[name] for name in batch), whole(left), whole(right)))

    left, right = matrix(parts[0], first, rows, inner), matrix(parts[1], second, inner, columns)
    made = adoption.module("product", MatMul(), left, right)
    order = [*batch, *rows, *columns]
    made = adoption.moved(made, "reshape", tuple(sizes[name] for name in order))
    return adoption.moved(made, "permute", tuple(order.index(name) for name in out))


@_rule("addmm")
def _affine(adoption: Adoption, bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> fx.Node:
    weight, bias = _fixed(weight, "addmm"), _fixed(bias, "addmm")
    if (beta, alpha) != (1, 1) or weight is None or bias is None or bias.value.dim() != 1:
        raise Unknown("addmm but for a linear map")
    return _linear(adoption, _secret(x, "addmm"), Fixed(weight.value.t(), weight.learnt), bias)


@_rule("linear")
def _linear(adoption: Adoption, x: Any, weight: Any, bias: Any = None) -> fx.Node:
    x, weight, bias = _secret(x, "linear"), _fixed(weight, "linear"), _fixed(bias, "linear")
    assert weight is not None
    out, inside = weight.value.shape
    module = nn.Linear(inside, out, bias is not None, device="meta")
    module.weight, module.bias = adoption.parameter(weight), adoption.parameter(bias)
    return adoption.module("linear", module, x, weights=(weight, bias))


@_rule("conv2d")
def _convolved(
    adoption: Adoption,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Any = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> fx.Node:
    x, weight, bias = _secret(x, "conv2d"), _fixed(weight, "conv2d"), _fixed(bias, "conv2d")
    assert weight is not None
    out, inside, *kernel = weight.value.shape
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        whole = [0, 0] if padding == "valid" else [d * (k - 1) for d, k in zip(dilation, kernel)]
        if any(size % 2 for size in whole):  # the odd one goes behind, as torch has it
            left, top = whole[1] // 2, whole[0] // 2
            x = adoption.function(F.pad, x, (left, whole[1] - left, top, whole[0] - top))
            whole = [0, 0]
        padding = [size // 2 for size in whole]
    options = dict(stride=stride, padding=_pair(padding), dilation=dilation, groups=groups)
    module = nn.Conv2d(inside * groups, out, tuple(kernel), bias=bias is not None, device="meta", **options)
    module.weight, module.bias = adoption.parameter(weight), adoption.parameter(bias)
    return adoption.module("conv", module, x, weights=(weight, bias))


# Normalisation


@_rule("batch_norm")
def _batch_norm(
    adoption: Adoption, x: fx.Node, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *rest: Any
) -> fx.Node:
    """Into the map before it, where nothing else reads that; else a scale and a shift."""
    if training or not isinstance(mean, Fixed) or not isinstance(variance, Fixed):
        raise Unknown("batch_norm with the batch's own statistics")
    eps = rest[1]
    scale = (variance.value + eps).rsqrt()
    scale = scale if weight is None else scale * weight.value
    shift = -mean.value * scale
    shift = shift if bias is None else shift + bias.value
    source = adoption.node.args[0]
    alone = name_of(source.target) in ("conv2d", "linear") and len(source.users) == len(source.args[1].users) == 1
    before: Any = adoption.root.get_submodule(x.target) if x.op == "call_module" else None
    flat = isinstance(before, nn.Linear) and len(adoption.shape) == 2
    if alone and (isinstance(before, nn.Conv2d) or flat):
        # What folds is learnt as one: the map's weight and bias.
        factor = scale.view(-1, *[1] * (before.weight.dim() - 1))
        before.weight = nn.Parameter((before.weight * factor).detach())
        bias = shift if before.bias is None else shift + before.bias * scale
        before.bias = nn.Parameter(bias.detach())
        return x
    shape = (-1, *[1] * (len(adoption.shape) - 2))
    made = adoption.gain(x, Fixed(scale.detach().view(shape), True), adoption.shape)
    return adoption.plus(made, Fixed(shift.detach().view(shape), True), adoption.shape)


@_rule("layer_norm")
def _layer_norm(
    adoption: Adoption,
    x: Any,
    sizes: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    fused: bool = True,
) -> fx.Node:
    x, weight, bias = _secret(x, "layer_norm"), _fixed(weight, "layer_norm"), _fixed(bias, "layer_norm")
    if len(sizes) == 1 and (weight is not None or bias is None):
        module = nn.LayerNorm(sizes[0], eps, weight is not None, bias is not None, device="meta")
        if weight is not None:
            module.weight, module.bias = adoption.parameter(weight), adoption.parameter(bias)
        return adoption.module("norm", module, x, weights=(weight, bias))
    flat = adoption.moved(x, "reshape", (*adoption.shape[: -len(sizes)], math.prod(sizes)))
    return _scaled(adoption, _plain_norm(adoption, flat, math.prod(sizes), eps), weight, bias)


@_rule("group_norm")
def _group_norm(
    adoption: Adoption, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> fx.Node:
    batch, channels, *rest = adoption.shape
    size = channels // groups * math.prod(rest)
    flat = adoption.moved(_secret(x, "group_norm"), "reshape", (batch, groups, size))
    apart = [None if one is None else Fixed(one.value.view(-1, *[1] * len(rest)), True) for one in (weight, bias)]
    return _scaled(adoption, _plain_norm(adoption, flat, size, eps), *apart)


def _plain_norm(adoption: Adoption, x: fx.Node, size: int, eps: float) -> fx.Node:
    return adoption.module("norm", nn.LayerNorm(size, eps, elementwise_affine=False), x)


def _scaled(adoption: Adoption, x: fx.Node, weight: Fixed | None, bias: Fixed | None) -> fx.Node:
    """Numbers in the shape of the node's result, scaled and shifted."""
    made = adoption.moved(x, "reshape", adoption.shape)
    made = made if weight is None else adoption.gain(made, weight, adoption.shape)
    return made if bias is None else adoption.plus(made, bias, adoption.shape)


@_rule("softmax", "_softmax")
def _softmax(adoption: Adoption, x: Any, dim: int, *_: Any, **__: Any) -> fx.Node:
    return _normalised(adoption, _secret(x, "softmax"), dim, adoption.shape)


def _normalised(adoption: Adoption, scores: fx.Node, dim: int, shape: tuple[int, ...]) -> fx.Node:
    """The normaliser that was asked for, of scores of this shape."""
    kind = NORMALIZERS[adoption.softmax]
    options: dict[str, Any] = {"dim": dim - len(shape) if dim >= 0 else dim}
    if len(shape) == 4:
        options |= {"heads": shape[1], "shape": shape[1:]}
    elif adoption.softmax == "l2q":
        options |= {"granularity": "global"}
    return adoption.module("normalizer", kind(**options), scores)


@_rule("scaled_dot_product_attention")
def _attention(
    adoption: Adoption,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> fx.Node:
    query, key, value = (_secret(x, "scaled_dot_product_attention") for x in (query, key, value))
    if enable_gqa or isinstance(mask, fx.Node):
        raise Unknown("scaled_dot_product_attention with " + ("grouped heads" if enable_gqa else "a secret mask"))
    *lead, tokens, width = adoption.shape_of(0)
    shape = (*lead, tokens, adoption.shape_of(1)[-2])
    scores = adoption.module("scores", MatMul(), query, adoption.moved(key, "transpose", -2, -1))
    scores = adoption.function(operator.mul, scores, width**-0.5 if scale is None else float(scale))
    if is_causal:
        mask = Fixed(torch.ones(shape[-2:], dtype=torch.bool).tril())
    if mask is not None:
        if mask.value.dtype == torch.bool:
            zeros = torch.zeros(mask.value.shape, dtype=adoption.node.meta["val"].dtype, device=mask.value.device)
            mask = Fixed(zeros.masked_fill(~mask.value, MASKED))
        scores = adoption.plus(scores, mask, shape)
    return adoption.module("values", MatMul(), _normalised(adoption, scores, -1, shape), value)


# Activations


def _activation(name: str, make: Callable[..., nn.Module]) -> Callable[..., fx.Node]:
    """The rule of a function of one number: `make` has the operation's arguments but the first."""

    def rule(adoption: Adoption, x: fx.Node, *options: Any) -> fx.Node:
        return adoption.module(name, make(*options), x)

    return rule


def _clipped(low: float | None = None, high: float | None = None) -> nn.Module:
    if high is None and low == 0:
        return nn.ReLU()
    if low is None or high is None or isinstance(low, Fixed) or isinstance(high, Fixed):
        raise Unknown("clamp but for two bounds, or zero below")
    return nn.Hardtanh(float(low), float(high))


RULES.update(
    {
        "relu": _activation("relu", nn.ReLU),
        "relu6": _activation("relu6", nn.ReLU6),
        "hardtanh": _activation("hardtanh", nn.Hardtanh),
        "clamp": _activation("clip", _clipped),
        "clip": _activation("clip", _clipped),
        "clamp_min": _activation("clip", _clipped),
        "hardswish": _activation("hardswish", nn.Hardswish),
        "hardsigmoid": _activation("hardsigmoid", nn.Hardsigmoid),
        "silu": _activation("silu", nn.SiLU),
        "sigmoid": _activation("sigmoid", nn.Sigmoid),
        "tanh": _activation("tanh", nn.Tanh),
        "leaky_relu": _activation("leaky_relu", nn.LeakyReLU),
    }
)


@_rule("gelu")
def _gelu(adoption: Adoption, x: fx.Node, *, approximate: str = "none") -> fx.Node:
    if adoption.gelu == "gelu":
        return adoption.module("gelu", TanhGELU() if approximate == "tanh" else nn.GELU(), x)
    return adoption.module("gelu", ACTIVATIONS[adoption.gelu](adoption.shape[-1]), x)


# Pooling and interpolation


@_rule("sum")
def _summed(adoption: Adoption, x: fx.Node, dims: Any = None, keepdim: bool = False, **_: Any) -> fx.Node:
    shape = adoption.shape_of(0)
    dims = tuple(range(len(shape))) if not dims else (dims,) if isinstance(dims, int) else tuple(dims)
    dims = tuple(dim % len(shape) for dim in dims)
    if any(shape[dim] == -1 for dim in dims):
        raise Unknown("sum over the batch")
    return adoption.module("sum", Sum(tuple(dim - len(shape) for dim in dims), keepdim), x)


@_rule("mean")
def _mean(adoption: Adoption, x: fx.Node, dims: Any = None, keepdim: bool = False, **_: Any) -> fx.Node:
    made = _summed(adoption, x, dims, keepdim)
    shape = adoption.shape_of(0)
    count = math.prod(shape[dim] for dim in adoption.root.get_submodule(made.target).dims)
    # First by a power of two, which is free on shares and leaves numbers as small as what was summed.
    power = (count - 1).bit_length()
    made = adoption.function(operator.mul, made, 2.0**-power)
    return made if count == 1 << power else adoption.function(operator.mul, made, (1 << power) / count)


@_rule("adaptive_avg_pool2d")
def _adapted(adoption: Adoption, x: fx.Node, size: Sequence[int]) -> fx.Node:
    if adoption.shape == adoption.shape_of(0):
        return x
    if tuple(adoption.shape[-2:]) == (1, 1):
        return _mean(adoption, x, (-2, -1), True)
    return _resampled(adoption, x, lambda line, axis: F.adaptive_avg_pool1d(line, adoption.shape[axis - 2]))


@_rule("avg_pool2d")
def _averaged(
    adoption: Adoption,
    x: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil: bool = False,
    with_pads: bool = True,
    divisor: int | None = None,
) -> fx.Node:
    if divisor is not None:
        raise Unknown("avg_pool2d with a divisor of its own")
    sizes = [_pair(one) for one in (kernel, stride or kernel, padding)]

    def one(line: torch.Tensor, axis: int) -> torch.Tensor:
        return F.avg_pool1d(line, *(pair[axis] for pair in sizes), ceil, with_pads)

    return _resampled(adoption, x, one)


@_rule("upsample_nearest2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d")
def _interpolated(adoption: Adoption, x: fx.Node, *options: Any, **more: Any) -> fx.Node:
    """What is separable and fixed is a product with a matrix on either side; torch says which."""

    def one(line: torch.Tensor, axis: int) -> torch.Tensor:
        # A picture of one unit line: along the axis it is what torch makes of it, across it is all the same.
        picture = line[..., :, None] if axis == 0 else line[..., None, :]
        across = adoption.shape_of(0)[-1 - axis]
        picture = picture.repeat(*[1] * picture.dim()).expand(
            *(across if s == 1 and i == picture.dim() - 2 + (1 - axis) else s for i, s in enumerate(picture.shape))
        )
        made = adoption.node.target(picture.contiguous(), *options, **more)
        return made[..., :, 0] if axis == 0 else made[..., 0, :]

    return _resampled(adoption, x, one)


def _resampled(adoption: Adoption, x: fx.Node, one: Callable[[torch.Tensor, int], torch.Tensor]) -> fx.Node:
    """A map of the last two dimensions, each by itself: `one` has unit lines (1, size, size) and the axis, -2 or -1."""
    shape = adoption.shape_of(0)
    matrices = []
    for axis in (0, 1):
        made = one(torch.eye(shape[axis - 2], dtype=torch.float64)[None], axis)  # (1, before, after)
        matrices.append(made[0].t().tolist())
    return adoption.module("pool", Resample(*matrices), x)


@_rule("max_pool2d", "adaptive_max_pool2d")
def _max_pooled(
    adoption: Adoption,
    x: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil: bool = False,
) -> fx.Node:
    shape, sizes = adoption.shape_of(0), adoption.node.meta["val"]
    if isinstance(sizes, tuple | list):
        raise Unknown("max_pool2d with indices")
    if name_of(adoption.node.target) == "adaptive_max_pool2d":
        raise Unknown("adaptive_max_pool2d")
    if _pair(dilation) != (1, 1):
        raise Unknown("max_pool2d, dilated")
    kernel, stride, padding = _pair(kernel), _pair(stride or kernel), _pair(padding)
    for axis in (0, 1):
        # A last window that is not full has the last line once more: the maximum may count it twice.
        after = adoption.shape[axis - 2]
        short = (after - 1) * stride[axis] + kernel[axis] - shape[axis - 2] - 2 * padding[axis]
        if ceil and short > 0:
            last = adoption.at(x, 2 + axis, slice(shape[axis - 2] - 1, shape[axis - 2]))
            x = adoption.graph.call_function(torch.cat, ([x, *[last] * short], 2 + axis))
    return adoption.module("pool", nn.MaxPool2d(kernel, stride, padding), x)
