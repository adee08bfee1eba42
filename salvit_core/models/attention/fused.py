"""Attention while training on a CPU: in pieces that stay in cache, with dropout that draws several weights at once.

Autograd writes every step from the scores to the weights to memory, in float32 because softmax is and c and d are, and
reads them all back. The three functions here keep little more than the dropout's mask, compute the scores again on the
way back, and work in the type of their input: bfloat16 under autocast, c and d rounded to it like any weight there.

"o" multiplies entry by entry, everything else is a matrix product; m is 0 where a weight is dropped (probability p),
else 1; G = dL/dout; "sum" without a subscript runs over images, and over heads where they share the parameter.

Self-attention, per head and image, the normalisation (Eq. 2) over the keys, which are the columns:

    a = Q K^T / sqrt(D)    t = d o a + c    s = t o t    z = sum_keys s + eps    out = ((m o s) V) / ((1 - p) z)

    dL/dV = (m o s)^T E                 E = G / ((1 - p) z)
    dL/dt = 2 t o (m o (E V^T) - r)     r = sum_D (G o out) / z: what the normalisation takes away
    dL/dc = sum dL/dt                   dL/dd = sum a o dL/dt                       dL/da = d o dL/dt
    dL/dQ = dL/da K / sqrt(D)           dL/dK = (dL/da)^T Q / sqrt(D)

External attention, normalised over the tokens (rows) first and over the slots (columns) then (L1), memories K and V:

    a = Q K^T    t, s as above    z = sum_tokens s + eps    w = s / z    y = sum_slots w + eps'
    out = ((m o w) V^T) / ((1 - p) y)

    dL/dV = sum E^T (m o w)             E = G / ((1 - p) y)
    dL/dw = m o (E V) - r               r = sum_D (G o out) / y
    dL/dt = 2 t o (dL/dw - sum_tokens (w o dL/dw)) / z
    dL/dc, dL/dd, dL/da as above        dL/dQ = dL/da K                             dL/dK = sum (dL/da)^T Q

Softmax in self-attention, over the keys:

    a = Q K^T / sqrt(D)    w = softmax(a)    out = ((m o w) V) / (1 - p)

    dL/dV = (m o w)^T E                 E = G / (1 - p)
    dL/da = (m o w) o (E V^T) - w o r   r = sum_D (G o out)                         dL/dQ, dL/dK as above

torch's scaled_dot_product_attention has no kernel for a CPU that drops weights: with dropout, which the recipe has, it
takes the plain steps, and longer than they do. Without dropout softmax trains through it (`flash`).

On a GPU these loops would starve it. There softmax trains through scaled_dot_product_attention, dropout and all, and of
every other normaliser torch.compile joins the steps between the two products (`weigh`): they are bound by memory, each
alone would write and read the scores of all heads in float32.

Letters in the shape comments: B batch, b images of a piece, N tokens, H heads, D dimension of a head, S memory slots.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..normalizers import L1, L2Q, Softmax
from ..operations import Operation

ENABLED = True  # False: the plain form everywhere, to compare with

# Scores in a piece: 1 MiB in bfloat16, 8 images of one head at N = 256. Smaller pieces fit a smaller cache, but lose
# more to the calls themselves than they gain (measured from 2^15 to 2^21).
PIECE = 2**19

# Fewest tokens. At 49 and 64 a module's step takes 0.7 to 0.9 of the plain form's time, at 16 it takes 1.0 to 1.5.
TOKENS = 32

# Masks are integers as wide as the weights, all bits set where a weight stays: to drop is then to "and", which is 20
# times as fast as to multiply by a bool.
_INTEGER = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def applies(attention: nn.Module, x: torch.Tensor, *normalizers: type[nn.Module]) -> bool:
    """Whether a module of self- or external attention should call this file's function on x (B, N, ...).

    Args:
        attention: the module.
        x: its queries, or all of queries, keys and values.
        normalizers: what the function can have besides L2Q.
    """
    return (
        attention.training  # first: while a graph is traced, in evaluation mode, x is no tensor
        and ENABLED
        and isinstance(attention.normalizer, (L2Q, *normalizers))
        and x.device.type == "cpu"
        and x.dtype in _INTEGER
        and x.shape[1] >= TOKENS
        and attention.dropout.p < 1
        and not torch.compiler.is_compiling()
    )


def flash(attention: nn.Module, x: torch.Tensor) -> bool:
    """Whether a module of self-attention should train through torch's fused one on x (B, N, ...), compiled or not."""
    if not (attention.training and ENABLED and isinstance(attention.normalizer, Softmax)):
        return False
    # In bfloat16 the plain steps are faster than torch's form for a CPU (AMX); in float32 they are slower.
    apt = x.device.type == "cpu" and not attention.dropout.p and x.dtype != torch.bfloat16 and x.shape[1] >= TOKENS
    return apt or on_gpu(attention, x)


def on_gpu(attention: nn.Module, x: torch.Tensor) -> bool:
    """Whether a module trains on a GPU."""
    return attention.training and ENABLED and x.device.type == "cuda"


def weigh(attention: nn.Module, scores: torch.Tensor, *normalizers: nn.Module) -> torch.Tensor:
    """Scores (B, H, N, K) -> weights of the same shape, normalised one way after the other, some dropped."""
    apart = on_gpu(attention, scores) and not torch.compiler.is_compiling()
    return (_compiled() if apart else _weigh)(scores, attention.dropout, *normalizers)


def _weigh(scores: torch.Tensor, dropout: nn.Module, *normalizers: nn.Module) -> torch.Tensor:
    for normalizer in normalizers:
        scores = normalizer(scores)
    return dropout(scores)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    """`_weigh` in one piece, once for all layers that are alike, and once more for an epoch's last batch, smaller."""

    def weigh(scores: torch.Tensor, dropout: nn.Module, *normalizers: nn.Module) -> torch.Tensor:
        return _weigh(scores, dropout, *normalizers).to(scores.dtype)  # as autocast does in the product that comes next

    # A process may train many networks, one after the other; past the limit torch would leave the plain form.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(weigh, dynamic=False)


def self_attention(qkv: torch.Tensor, normalizer: L2Q | Softmax, dropout: float) -> torch.Tensor:
    """L2Q(Q K^T / sqrt(D)) V, or with softmax in L2Q's place, weights dropped in between.

    Args:
        qkv: queries, keys and values, (B, N, 3, H, D).
        normalizer: over the keys; an L2Q holds c and d, tensors or numbers, and eps.
        dropout: probability of dropping a weight, to 16 bits; torch's global generator draws.

    Returns:
        values (B, N, H, D).
    """
    if isinstance(normalizer, Softmax):
        return _SoftmaxAttention.apply(qkv, dropout)
    return _SelfAttention.apply(qkv, *_parameters(normalizer), normalizer.eps, dropout)


def external_attention(
    query: torch.Tensor, keys: torch.Tensor, normalizer: L2Q, values: torch.Tensor, dropout: float
) -> torch.Tensor:
    """L1(L2Q(Q K^T)) V^T, weights dropped in between.

    Args:
        query: queries (B, N, H, D).
        keys: memory (S, D).
        normalizer: over the tokens; holds c and d, tensors or numbers, and eps.
        values: memory (D, S).
        dropout: as in `self_attention`.

    Returns:
        values (B, N, H, D).
    """
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    return _ExternalAttention.apply(query, keys, values, *_parameters(normalizer), normalizer.eps, dropout)


def mask(shape: tuple[int, ...], dropout: float, dtype: torch.dtype) -> torch.Tensor:
    """A dropout mask for weights of type `dtype`: integers of that width, 0 with probability `dropout`, else -1.

    torch's global generator gives the seed of a faster one, whose words hold four draws each.
    """
    count = torch.Size(shape).numel()
    words = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_())).random_raw(-(-count // 4))
    bits = torch.from_numpy(words.view(np.int16)[:count]).view(shape)
    return bits.ge_(min(round(dropout * 2**16) - 2**15, 2**15 - 1)).neg_().to(_INTEGER[dtype])


class Dropout(Operation, nn.Dropout):
    """torch's, about twice as fast while training on a CPU: p to 16 bits, `mask`'s draws."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape -> the same; gradients as torch's."""
        fast = self.training and ENABLED and 0 < self.p < 1 and x.device.type == "cpu" and x.dtype in _INTEGER
        return _Dropout.apply(x, self.p) if fast and not torch.compiler.is_compiling() else super().forward(x)

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """Nothing: at inference it does nothing."""
        return 0


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        kept = mask(x.shape, p, x.dtype)
        ctx.save_for_backward(kept)
        ctx.scale = 1 / (1 - p)
        y = x * ctx.scale
        _drop(y, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad * ctx.scale
        _drop(grad, *ctx.saved_tensors)
        return grad, None


class _SelfAttention(torch.autograd.Function):
    """The module's equations, but a stands for Q K^T, and d for d / sqrt(D): one multiplication less."""

    @staticmethod
    def forward(ctx, qkv, c, d, eps, dropout):
        batch, tokens, _, heads, head = qkv.shape
        wide = torch.promote_types(qkv.dtype, torch.float32)
        qkv = qkv.permute(2, 3, 0, 1, 4).contiguous()  # the products below would copy each piece
        query, key, value = qkv  # 3 x (H, B, N, D)
        out = qkv.new_empty(batch, tokens, heads, head)
        z = qkv.new_empty(heads, batch, tokens, 1, dtype=wide)
        kept = []  # m
        shift, factor = _per_head(c, qkv.dtype), _per_head(d * head**-0.5, qkv.dtype)
        for i in range(heads):
            for part in _parts(batch, tokens**2):
                q, k, v = query[i, part], key[i, part], value[i, part]  # (b, N, D)
                s = torch.addcmul(shift[i % len(shift)], factor[i % len(factor)], q @ k.mT).square_()  # (b, N, N)
                z[i, part] = s.sum(-1, keepdim=True, dtype=wide) + eps
                if dropout:
                    kept.append(mask(s.shape, dropout, s.dtype))
                    _drop(s, kept[-1])
                out[part, :, i] = s @ v / ((1 - dropout) * z[i, part])
        ctx.save_for_backward(qkv, c, d, out, z, *kept)
        ctx.dropout = dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        qkv, c, d, out, z, *kept = ctx.saved_tensors
        query, key, value = qkv  # 3 x (H, B, N, D)
        heads, batch, tokens, head = query.shape
        kept = iter(kept)
        grad_qkv = qkv.new_empty(batch, tokens, 3, heads, head)
        grad_c, grad_d = (_zeros(needed, z, heads, tokens, tokens) for needed in ctx.needs_input_grad[1:3])
        shift, factor = _per_head(c, qkv.dtype), _per_head(d * head**-0.5, qkv.dtype)
        for i in range(heads):
            ci, di = shift[i % len(shift)], factor[i % len(factor)]
            for part in _parts(batch, tokens**2):
                q, k, v, g = query[i, part], key[i, part], value[i, part], grad[part, :, i]  # (b, N, D)
                r = (g * out[part, :, i]).sum(-1, keepdim=True).div(z[i, part]).to(g.dtype)  # (b, N, 1)
                e = (g / ((1 - ctx.dropout) * z[i, part])).to(g.dtype)  # (b, N, D)
                a = q @ k.mT  # (b, N, N)
                t = torch.addcmul(ci, di, a)
                s, slope = t.square(), e @ v.mT
                if ctx.dropout:
                    m = next(kept)
                    _drop(s, m)
                    _drop(slope, m)
                grad_qkv[part, :, 2, i] = s.mT @ e
                slope = slope.sub_(r).mul_(t)  # dL/dt / 2
                if grad_c is not None:
                    grad_c[i] += slope.sum(0)
                if grad_d is not None:
                    grad_d[i] += a.mul_(slope).sum(0)
                slope *= 2 * di  # dL/da
                grad_qkv[part, :, 0, i] = slope @ k
                grad_qkv[part, :, 1, i] = slope.mT @ q
        return grad_qkv, _as(grad_c, c, 2), _as(grad_d, d, 2 * head**-0.5), None, None


class _SoftmaxAttention(torch.autograd.Function):
    """The module's equations, the queries divided by sqrt(D) beforehand."""

    @staticmethod
    def forward(ctx, qkv, dropout):
        batch, tokens, _, heads, head = qkv.shape
        qkv = qkv.permute(2, 3, 0, 1, 4).contiguous()  # 3 x (H, B, N, D)
        qkv[0] *= head**-0.5
        query, key, value = qkv
        out = qkv.new_empty(batch, tokens, heads, head)
        kept = []  # m
        for i in range(heads):
            for part in _parts(batch, tokens**2):
                w = (query[i, part] @ key[i, part].mT).softmax(-1)  # (b, N, N)
                if dropout:
                    kept.append(mask(w.shape, dropout, w.dtype))
                    _drop(w, kept[-1])
                out[part, :, i] = w @ value[i, part]
        out *= 1 / (1 - dropout)
        ctx.save_for_backward(qkv, out, *kept)
        ctx.dropout = dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        qkv, out, *kept = ctx.saved_tensors
        query, key, value = qkv  # 3 x (H, B, N, D)
        heads, batch, tokens, head = query.shape
        kept = iter(kept)
        grad_qkv = qkv.new_empty(batch, tokens, 3, heads, head)
        # For all heads at once, and contiguous: head by head, strided, these took as long as the products in bfloat16.
        away = (grad * out).sum(-1, keepdim=True).permute(2, 0, 1, 3).contiguous()  # r, (H, B, N, 1)
        scaled = (grad * (1 / (1 - ctx.dropout))).permute(2, 0, 1, 3).contiguous()  # E, (H, B, N, D)
        for i in range(heads):
            for part in _parts(batch, tokens**2):
                q, k, v, e = query[i, part], key[i, part], value[i, part], scaled[i, part]  # (b, N, D)
                w = (q @ k.mT).softmax(-1)  # (b, N, N)
                slope = e @ v.mT
                if ctx.dropout:
                    _drop(slope, m := next(kept))
                slope = slope.sub_(away[i, part]).mul_(w)  # dL/da
                if ctx.dropout:
                    _drop(w, m)
                grad_qkv[part, :, 2, i] = w.mT @ e
                grad_qkv[part, :, 1, i] = slope.mT @ q
                grad_qkv[part, :, 0, i] = slope @ k
        grad_qkv[:, :, 0] *= head**-0.5
        return grad_qkv, None


class _ExternalAttention(torch.autograd.Function):
    """The module's equations; heads lie beside the slots, so that no step has to transpose."""

    @staticmethod
    def forward(ctx, query, keys, values, c, d, eps, dropout):
        batch, tokens, heads, head = query.shape
        slots = len(keys)
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.empty_like(query)
        z = query.new_empty(batch, 1, heads, slots, dtype=wide)
        y = query.new_empty(batch, tokens, heads, 1, dtype=wide)
        kept = []  # m
        shift, factor = (_beside(x, tokens, heads, slots, query.dtype) for x in (c, d))  # (N, H, S)
        for part in _parts(batch, tokens * heads * slots):
            a = query[part] @ keys.T  # (b, N, H, S)
            w = torch.addcmul(shift, factor, a).square_()
            z[part] = w.sum(1, keepdim=True, dtype=wide) + eps
            w *= z[part].reciprocal().to(w.dtype)
            y[part] = w.sum(-1, keepdim=True, dtype=wide) + L1.eps
            if dropout:
                kept.append(mask(w.shape, dropout, w.dtype))
                _drop(w, kept[-1])
            out[part] = w @ values.T / ((1 - dropout) * y[part])
        ctx.save_for_backward(query, keys, values, c, d, out, z, y, *kept)
        ctx.dropout = dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, keys, values, c, d, out, z, y, *kept = ctx.saved_tensors
        batch, tokens, heads, head = query.shape
        slots = len(keys)
        kept = iter(kept)
        grad_query = torch.empty_like(query)
        grad_keys, grad_values = torch.zeros_like(keys, dtype=z.dtype), torch.zeros_like(values, dtype=z.dtype)
        grad_c, grad_d = (_zeros(needed, z, tokens, heads, slots) for needed in ctx.needs_input_grad[3:5])
        shift, factor = (_beside(x, tokens, heads, slots, query.dtype) for x in (c, d))  # (N, H, S)
        for part in _parts(batch, tokens * heads * slots):
            g, inverse = grad[part], z[part].reciprocal().to(query.dtype)
            r = (g * out[part]).sum(-1, keepdim=True).div(y[part]).to(g.dtype)  # (b, N, H, 1)
            e = (g / ((1 - ctx.dropout) * y[part])).to(g.dtype)  # (b, N, H, D)
            a = query[part] @ keys.T  # (b, N, H, S)
            t = torch.addcmul(shift, factor, a)
            w, slope = t.square().mul_(inverse), e @ values
            m = next(kept) if ctx.dropout else None
            if m is not None:
                _drop(slope, m)
            slope -= r  # dL/dw
            slope -= (w * slope).sum(1, keepdim=True)
            slope = slope.mul_(inverse).mul_(t)  # dL/dt / 2
            if m is not None:
                _drop(w, m)
            grad_values += e.flatten(0, 2).T @ w.flatten(0, 2)
            if grad_c is not None:
                grad_c += slope.sum(0)
            if grad_d is not None:
                grad_d += a.mul_(slope).sum(0)
            slope *= 2 * factor  # dL/da
            grad_query[part] = slope @ keys
            grad_keys += slope.flatten(0, 2).T @ query[part].flatten(0, 2)
        grad_c, grad_d = (None if x is None else x.transpose(0, 1) for x in (grad_c, grad_d))  # (H, N, S)
        grads = grad_query, grad_keys.to(keys.dtype), grad_values.to(values.dtype), _as(grad_c, c, 2), _as(grad_d, d, 2)
        return *grads, None, None


def _parameters(normalizer: L2Q) -> list[torch.Tensor]:
    """The normaliser's c and d as tensors with the four axes of the scores; what is a number is not learnt."""
    pair = normalizer.c, normalizer.d
    return [x if isinstance(x, torch.Tensor) else torch.full((1, 1, 1, 1), x, dtype=torch.double) for x in pair]


def _per_head(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(1, H or 1, ...) -> (H or 1, ...)."""
    return x[0].to(dtype)


def _beside(x: torch.Tensor, tokens: int, heads: int, slots: int, dtype: torch.dtype) -> torch.Tensor:
    """(1, H or 1, N or 1, S or 1) -> (N, H, S), contiguous."""
    return x[0].to(dtype).expand(heads, tokens, slots).transpose(0, 1).contiguous()


def _parts(batch: int, scores: int):
    """Slices of the batch, of as many images of so many scores each as make a piece."""
    size = max(1, PIECE // scores)
    return (slice(start, start + size) for start in range(0, batch, size))


def _drop(weights: torch.Tensor, kept: torch.Tensor) -> None:
    weights.view(kept.dtype).bitwise_and_(kept)


def _zeros(needed: bool, like: torch.Tensor, *shape: int) -> torch.Tensor | None:
    return like.new_zeros(shape) if needed else None


def _as(grad: torch.Tensor | None, x: torch.Tensor, factor: float) -> torch.Tensor | None:
    """What was collected for every entry, as the gradient of x, whose entries several may share."""
    return None if grad is None else (factor * grad)[None].sum_to_size(x.shape).to(x.dtype)
