"""What the client may learn: logits, rounded exactly, or the place of the highest one."""

import torch

from ..arithmetic.polynomials import Polynomials
from ..arithmetic.ring import log2_above
from ..arithmetic.share import Share, session
from .compare import DIGIT
from .curve import unchecked
from .maximum import largest
from .truncate import truncate

CLASS_RANGE = 9  # logits stay below 2^9 where only the label is opened


def lowest_bits(x: Share, count: int) -> Share:
    """X mod 2^count, in raw units, exactly. Three rounds; n words.

    The shares' lowest bits add up to that and a carry, which a comparison tells.
    """
    mask = (1 << count) - 1
    low = (x.data & mask).reshape(-1)
    carry = Polynomials([2.0**count], [(0.0, [0.0]), (0.0, [1.0])], 0, 0)
    over = unchecked(low, carry, 0, max(2, -(-(count + 2) // DIGIT))).view(x.shape)
    return Share((x.data & mask) - (over << count), 0)


def exactly_rounded(x: Share, bits: int) -> Share:
    """The value with fewer fractional bits, rounded to the nearest, upwards from the middle: never otherwise.

    For |x| below 2^62 units. Four rounds; 2 n words.
    """
    shift = x.bits - bits
    x = x.plus(1 << (shift - 1))
    return truncate(Share(x.data - lowest_bits(x, shift).data, x.bits), bits, multiple=True)


def answer(logits: Share, reveal: str) -> Share:
    """What the client may learn: the logits, rounded, or the place of the highest one, and nothing besides.

    Logits (B, K) are rounded to `session.bits` - 1 exactly: what is opened is a function of the value alone, where a
    truncation on shares would show in the last bit how the value lay between two steps. For the label the rounded
    logits carry their places in their lowest bits, and of the highest only these are opened; of equal ones it is the
    first. 4 rounds for the logits; 7 and those of `largest` for the label.

    Functionality:
        Inputs: Logits shared, below 2^9 where only the label is asked for.
        Output: The logits rounded, or the highest one's place; to the client alone, by the server's last message.
        Opened: Masked words and bits, to both; by `truncate`, a masked word. The server's share of the output, to the
            client.
        Simulator: uniform words and bits, and at the client the output, less its own share.
        Failure: 0.
    """
    logits = logits.settle()
    count = logits.shape[-1]
    room = log2_above(count)
    bits = session.bits - 1 if reveal == "logits" else min(session.bits - 1, 30 - CLASS_RANGE - room)
    rounded = exactly_rounded(logits, bits)
    if reveal == "logits":
        return rounded
    places = torch.arange(count - 1, -1, -1, device=logits.data.device)
    keyed = Share(rounded.data << room, 0).plus(places)
    best = largest(keyed, -1, 0, -(-(bits + room + CLASS_RANGE + 2) // DIGIT))
    return -lowest_bits(best, room) + (count - 1)
