"""Products with weights, which the server knows: one message of the client, and one product at each party.

W - B is opened once per session (`Session.open_weights`); x1 - r once per product.
"""

import torch
from torch import nn

from ....models.operations import Gain, HeadLinear, TokenConv
from ..arithmetic.randomness import CLIENT, Dealing, correlation
from ..arithmetic.ring import apply, prepared
from ..arithmetic.share import Share, Weight, session


@correlation("by_weight")
def deal_by_weight(deal: Dealing, name: str, operation: tuple, shape: tuple, out: tuple):
    """For W x: a mask r of the client's share of x, and shares of W r (the client has W - B for its own part)."""
    r = deal.own(CLIENT, *shape)
    share = deal.share(lambda: apply(operation, r.clear, deal.factor(operation, name)), *out)
    if deal.rank == CLIENT and not deal.meta:
        share = share.add_(apply(operation, r.mine, deal.factor(operation, name)))
    return r.mine, share


def by_weight(operation: tuple, name: str, x: Share, value: Weight, out: tuple) -> Share:
    """W x, W known to the server: the client sends x1 - r. One round; half the words of x."""
    bits = session.bits
    weight = session.known(name, value.shape, lambda: value.encode(bits))
    r, share = session.correlation("by_weight", name, operation, tuple(x.shape), out)
    if session.recording:
        # What each number of the result is a sum of: a row of the matrix, a kernel of the convolution.
        if operation[0] in ("conv", "grouped"):
            summed = value.shape[1:]
        else:
            summed = value.shape[-1:] if operation[0] != "multiply" else ()
        count = torch.Size(out).numel() * torch.Size(summed).numel()
        if operation[0] == "blocks":  # by block
            count = x.shape[:-1].numel() * value.shape.numel()
        session.tape.costs[session.here()].products += count
    if session.rank == CLIENT:
        session.send(x.data - r)
        return Share(share, x.bits + bits)
    (masked,) = session.receive(x.shape)
    if not session.recording:
        assert weight is not None  # this is the server
        if name not in session.factors:
            size = 1 + int(weight.abs().max()).bit_length() if weight.numel() else 1  # blocks may all be empty
            session.factors[name] = prepared(operation, weight, size)
        weight = session.factors[name]
    return Share(apply(operation, x.data + masked, weight).add_(share), x.bits + bits)


def linear(module: nn.Linear, secret: dict, x: Share) -> Share:
    """The affine map x W^T + b. One round; n / 2 words.

    Functionality:
        Inputs: x shared; W and the bias of the server.
        Output: W x + b, shared, at twice `session.bits`.
        Opened: x1 - r, to the server; what waits for x, as by `times_rows`.
        Simulator: uniform words.
        Failure: 2^-34 a number of x.
    """
    over = x.over if "bias" not in secret and x.over is not None and x.over.shape[-1] == 1 else None
    x = Share(x.data, x.bits) if over is not None else x.settle()
    x = x.to(min(x.bits, session.bits + 7) if over is not None else session.bits)
    y = by_weight(("linear",), secret["weight"].name, x, secret["weight"], (*x.shape[:-1], module.out_features))
    y = y + secret["bias"] if "bias" in secret else y
    return y if over is None else Share(y.to(session.bits).data, session.bits, over)


def conv2d(module: nn.Conv2d, secret: dict, x: Share) -> Share:
    """Convolution; the image is masked before its windows overlap. One round; n / 2 words.

    Functionality:
        Inputs: x shared; the kernels and the bias of the server.
        Output: The convolution, shared, at twice `session.bits`.
        Opened: x1 - r, to the server.
        Simulator: uniform words.
        Failure: 2^-38 a number of x; 0 of an image, which has no bits to lose.
    """
    kernel, stride, padding = module.kernel_size, module.stride, module.padding
    dilation, groups = module.dilation, module.groups
    reach = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    side = [(x.shape[2 + i] + 2 * padding[i] - reach[i]) // stride[i] + 1 for i in (0, 1)]
    operation: tuple = ("conv", kernel, stride, padding)
    operation += (dilation,) if dilation != (1, 1) else ()
    if groups > 1:
        operation = ("grouped", kernel, stride, padding, dilation, groups)
    out = (x.shape[0], side[0] * side[1], module.out_channels)
    y = by_weight(operation, secret["weight"].name, x.settle().to(session.bits), secret["weight"], out)
    y = y + secret["bias"] if "bias" in secret else y
    return Share(y.data.transpose(1, 2).unflatten(2, side), y.bits)


def head_linear(module: HeadLinear, secret: dict, x: Share) -> Share:
    """A matrix per head times the tokens, known to the server. One round; n / 2 words.

    Functionality:
        Inputs: x shared; a matrix per head of the server.
        Output: W x, shared, at twice `session.bits`.
        Opened: x1 - r, to the server.
        Simulator: uniform words.
        Failure: 2^-38 a number of x.
    """
    weight = secret["weight"]
    out = (*x.shape[:-2], weight.shape[-2], x.shape[-1])
    return by_weight(("heads",), weight.name, x.settle().to(session.bits), weight, out)


def token_conv(module: TokenConv, secret: dict, x: Share) -> Share:
    """A kernel per head along the tokens, known to the server; masked before shifts overlap. One round; n / 2 words.

    Functionality:
        Inputs: x shared; the kernels of the server.
        Output: The convolution, shared, at twice `session.bits`.
        Opened: x1 - r, to the server.
        Simulator: uniform words.
        Failure: 2^-38 a number of x.
    """
    weight = secret["weight"]
    return by_weight(("taps",), weight.name, x.settle().to(session.bits), weight, tuple(x.shape))


def gain(module: Gain, secret: dict, x: Share) -> Share:
    """A factor that the server knows, entry by entry. One round; n / 2 words.

    Functionality:
        Inputs: x shared; the factors of the server.
        Output: w x, shared, at twice `session.bits`.
        Opened: x1 - r, to the server.
        Simulator: uniform words.
        Failure: 2^-37 a number of x.
    """
    weight = secret["weight"]
    out = tuple(torch.broadcast_shapes(x.shape, weight.shape))
    return by_weight(("multiply",), weight.name, x.settle().to(session.bits), weight, out)
