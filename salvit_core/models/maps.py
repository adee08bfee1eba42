"""Attention maps: which tokens a network looks at, layer by layer, through all layers, and in the last one.

Every attention has effective weights, `attention.weights(x)`: what it multiplies the values with, (B, H, N, N), even
where it never writes that matrix down. External attention's are (B, H, N, S), over memory slots instead of tokens. What
stands in attention's place has none: there they are how much token j moves token i, a gradient without scale.

Letters: B batch, H heads, N tokens (a ViT's class token first), M dimension of the model, S memory slots.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from .attention.external import ExternalAttention
from .vit import ViT


def weights(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """The effective attention weights of every layer, in the clear and in evaluation mode.

    Args:
        model: a CCT or a ViT; its training flag is put back.
        images: (B, C, height, width), normalised.

    Returns:
        per layer (B, H, N, N), for external attention (B, H, N, S).

    Raises:
        ValueError: a layer's attention has no `weights`, such as one that differs from head to head.
    """
    for layer, block in enumerate(model.blocks, 1):
        if not hasattr(block.attention, "weights"):
            raise ValueError(f"{type(block.attention).__name__} of block {layer} has no attention map")
    seen = _inputs(model, [block.attention for block in model.blocks], images)
    with torch.no_grad(), _evaluation(model):
        return [block.attention.weights(x) for block, x in zip(model.blocks, seen, strict=True)]


def rollout(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Attention rollout: how much of each input token is in each token after the last layer (Abnar and Zuidema, 2020).

    A = A_L ... A_1, where A_l is (mean over heads of |weights|) + I, each row divided by its sum: I stands for the
    residual connection. Absolute values, because some mechanisms weigh negatively and would cancel; softmax's rows sum
    to one, so that with it A_l is the paper's 0.5 W + 0.5 I. External attention moves nothing from token to token but
    through its normaliser's sums, and counts as I. A CCT's second norm replaces the residual stream, but works token by
    token, so that it does not show here either.

    Args:
        model: a CCT or a ViT.
        images: (B, C, height, width), normalised.

    Returns:
        (B, N, N), each row summing to one: row i says what token i consists of.

    Raises:
        ValueError: as `weights`.
    """
    layers = _token_weights(model, weights(model, images))
    one = torch.eye(layers[0].shape[-1], device=layers[0].device)
    rolled = one
    for layer in layers:
        step = layer.abs().mean(1) + one  # (B, N, N)
        rolled = step / step.sum(-1, keepdim=True) @ rolled
    return rolled


def last(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Which tokens the network's answer looks at in its last layer, by head.

    A ViT's answer is its class token: its row of the last layer's weights, (B, H, N). A CCT's is the mean of all tokens
    under the weights p of its sequence pooling: sum_i p_i W_ij. External attention counts as I, as in `rollout`.

    Args:
        model: a CCT or a ViT.
        images: (B, C, height, width), normalised.

    Returns:
        (B, H, N).

    Raises:
        ValueError: as `weights`.
    """
    layer = _token_weights(model, weights(model, images))[-1]  # (B, H, N, N)
    if isinstance(model, ViT):
        return layer[:, :, 0]
    (x,) = _inputs(model, [model.pool], images)  # (B, N, M)
    with torch.no_grad():
        pooled = model.pool.normalizer(model.pool.scores(x))  # (B, N, 1)
    return torch.einsum("bi,bhij->bhj", pooled[..., 0], layer)


def importance(model: nn.Module, images: torch.Tensor, last: int = 0) -> list[torch.Tensor]:
    """How much every token that a block gives moves with every token that it reads (FAR, arXiv 2505.21535).

    T_ij = sum over features c of |d (sum of the features of out_i) / d in_jc|, in FAR the mean over images. Every block
    has it, whatever mixes its tokens: a recurrence has no attention weights. The residual connection and the MLP are in
    it, unlike in `weights`; the diagonal is theirs above all.

    Args:
        model: a CCT or a ViT; its training flag is put back.
        images: (B, C, height, width), normalised.
        last: of how many of the last blocks (0: all).

    Returns:
        per block (B, N, N): row i is a token of the output, column j one of the input.
    """
    blocks = list(model.blocks)[-last:]
    seen, found = _inputs(model, blocks, images), []
    with _evaluation(model), torch.enable_grad():
        for block, x in zip(blocks, seen, strict=True):
            x = x.detach().requires_grad_()
            sums = block(x).sum((0, 2))  # (N): images are apart, so that the gradient of their sum is each one's
            rows = [torch.autograd.grad(one, x, retain_graph=True)[0].abs().sum(-1) for one in sums]
            found.append(torch.stack(rows, 1))
    return found


def read(model: nn.Module, moved: torch.Tensor) -> torch.Tensor:
    """What of a block's tokens the answer reads: the class token's row of `importance` in a ViT, else their mean.

    Args:
        model: a CCT or a ViT.
        moved: (..., N, N), as `importance` and `rollout` give.

    Returns:
        (..., N): by token of the block's input.
    """
    return moved[..., 0, :] if isinstance(model, ViT) else moved.mean(-2)


def grid(tokens: torch.Tensor) -> torch.Tensor:
    """A value per token as a square picture; a class token, which has no place in it, is dropped.

    Args:
        tokens: (..., N), N a square, or a square and the class token before it.

    Returns:
        (..., side, side).

    Raises:
        ValueError: N is neither.
    """
    count = tokens.shape[-1]
    side = math.isqrt(count)
    if side**2 not in (count, count - 1):
        raise ValueError(f"{count} tokens make no square picture, with a class token or without")
    return tokens[..., count - side**2 :].unflatten(-1, (side, side))


def _token_weights(model: nn.Module, found: list[torch.Tensor]) -> list[torch.Tensor]:
    """The weights between tokens, (B, H, N, N) of every layer: I for external attention."""
    layers = []
    for block, layer in zip(model.blocks, found, strict=True):
        if isinstance(block.attention, ExternalAttention):
            layer = torch.eye(layer.shape[-2], device=layer.device).expand(*layer.shape[:-1], -1)
        layers.append(layer)
    return layers


def _inputs(model: nn.Module, modules: list[nn.Module], images: torch.Tensor) -> list[torch.Tensor]:
    """What each of these modules is given in a forward pass, in their order in the network."""
    seen = []
    hooks = [module.register_forward_pre_hook(lambda module, given: seen.append(given[0])) for module in modules]
    try:
        with torch.no_grad(), _evaluation(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
