"""Private protocols of what efficient attention computes: against the clear modules, then whole networks.

The protocols of `tuned` run with two threads as parties, as in test_private_tuned; those of `stock`, and networks,
between real parties, in one start each.
"""

import math

import pytest
import torch
from test_private_tuned import Several, looks_random, on_grid, opened, random_like_trained, together
from torch import nn
from zoo import Zoo

from salvit_core import CCT, preset, private
from salvit_core.models import operations
from salvit_core.models.attention import ATTENTION
from salvit_core.models.operations import (
    EPS,
    LSTM,
    BlockLinear,
    Divide,
    Exponential,
    Gain,
    HeadLinear,
    LinearScan,
    Lookup,
    MatMul,
    Multiply,
    NewtonInverse,
    PseudoInverse,
    Repeat,
    Resample,
    Reweight,
    SegmentMeans,
    ShiftDivide,
    SquaredNorm,
    Sum,
    Take,
    TokenConv,
    TokenSum,
    known,
)
from salvit_core.private import stock
from salvit_core.private.protocol import SERVER
from salvit_core.private.tuned import gates
from salvit_core.private.tuned import protocol as tuned
from salvit_core.private.tuned.arithmetic import share as shares
from salvit_core.private.tuned.arithmetic.share import Weight

ULP = 2.0**-13


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def privately(module, *inputs, bits=13, fine=0, check=False):
    """A module of `tuned.MODULES` on inputs rounded to bits + fine: (shared, clear, sessions)."""
    integers = [(x.double() * 2.0 ** (bits + fine)).round().long() for x in inputs]

    def protocol(*given):
        secret = {name: Weight(name, p, shares.session.rank == SERVER) for name, p in module.named_parameters()}
        return tuned.MODULES[type(module)](module, secret, *given)

    results, parties = together(protocol, *((x, bits + fine) for x in integers), bits=bits, check=check)
    with torch.no_grad():
        clear = module.double()(*(x.double() / 2.0 ** (bits + fine) for x in integers))
    assert results[0].shape == clear.shape and results[0].bits == results[1].bits
    return opened(results), clear, parties


def gaussian_kernel(size, spread, seed=0):
    """A matrix as SOFT inverts it: exp(-|x - y|^2 / 2) between points; the closer they lie, the nearer to singular."""
    points = normal(2, 3, size, 8, seed=seed, scale=spread)
    return torch.exp(-torch.cdist(points, points).square() / 2)


def stochastic(size, spread, seed=0):
    """A matrix as Nystromformer inverts it: a softmax over each row."""
    return (normal(2, 3, size, size, seed=seed) * spread).softmax(-1)


# Between two threads: module, inputs, and the bound on the error: a number, or a function of the clear result.
DENOMINATORS = torch.logspace(-12, 9, 300, 2, dtype=torch.float64)[1:-1]
OCTAVES = torch.exp2(torch.linspace(-7, 10, 60, dtype=torch.float64).round())[:, None]
RATIOS = normal(298, seed=3).clamp(-3, 3)
SIDES = normal(2, 3, 8, 4, scale=4), normal(2, 3, 8, 1, seed=1)


def relative(part, steps=2.0):
    return lambda clear: part * clear.abs() + steps * ULP


def means(before, after):
    """Adaptive average pooling of a line, as a matrix."""
    return torch.nn.functional.adaptive_avg_pool1d(torch.eye(before)[None], after)[0].T.tolist()


def repeated():
    module = Repeat((1, 2, 5))
    module.weight.data = normal(1, 2, 5).float()
    return on_grid(module)


EXACT = 2.0**-40  # rounding of float64 only
CASES = {
    "multiply": (Multiply(), SIDES, EXACT),
    "multiply, the other way": (Multiply(), SIDES[::-1], EXACT),
    **{
        f"divide, scale {scale}": (
            Divide(scale),
            (DENOMINATORS * RATIOS * 2.0 ** round(math.log2(scale)), DENOMINATORS * 2.0 ** round(math.log2(scale))),
            relative(1e-3),
        )
        for scale in (1.0, 0.05, 0.159, 20.0, 250.0)
    },
    "divide by a row's": (Divide(), (normal(2, 5, 8), uniform(2, 5, 1, seed=1) + 0.1), relative(1e-3)),
    # Two columns of divisors between the knots, which lie at the odd multiples of half an octave.
    "shift divide": (
        ShiftDivide(),
        (normal(60, 2, seed=5) * OCTAVES, OCTAVES * torch.tensor([0.8, 1.3])),
        relative(0.0),
    ),
    "shift divide by few": (
        ShiftDivide(-2, 3),
        (normal(60, 1, seed=5) * OCTAVES.clamp(0.05, 20), OCTAVES.clamp(0.05, 20)),
        relative(0.0),
    ),
    **{
        f"lookup {name}": (Lookup(name, 9, 2.0**-5, 200), (torch.arange(-200, 300) / 2.0**5,), 2 * ULP)
        for name in operations.TABLES
    },
    "exponential of a row": (Exponential(1), (normal(64, 30, scale=8),), relative(2.2e-3)),
    "exponential of a long row": (Exponential(1), (normal(4, 700, scale=8),), relative(3.5e-3)),
    "exponential of a matrix": (Exponential(2), (normal(2, 3, 10, 7, scale=3),), relative(2.8e-3)),
    "exponential of everything": (Exponential(3), (normal(2, 3, 5, 7, scale=3),), relative(2.8e-3)),
    "exponential of one": (Exponential(1), (normal(4, 1),), relative(1e-3)),
    "exponential": (Exponential(0), (-normal(100, 30).abs() * 6,), relative(1e-3)),
    "exponential far below": (Exponential(0), (-torch.linspace(0, 117, 999),), relative(1e-3)),
    "squared norm": (SquaredNorm(), (normal(2, 3, 5, 32, scale=6),), EXACT),
    "head linear": (on_grid(HeadLinear(3, 9, 4)), (normal(2, 3, 9, 5, scale=6),), EXACT),
    "head linear, many tokens": (on_grid(HeadLinear(2, 300, 3)), (normal(1, 2, 300, 5, scale=6),), EXACT),
    "token conv": (on_grid(TokenConv(3, 5)), (normal(2, 3, 9, 4, scale=6),), EXACT),
    "token conv, wider than the tokens": (on_grid(TokenConv(2, 7)), (normal(2, 2, 3, 4, scale=6),), EXACT),
    "gain": (on_grid(Gain((3, 1, 1), 0.7)), (normal(2, 3, 5, 4, scale=6),), EXACT),
    "gain of all": (on_grid(Gain((), 0.3)), (normal(2, 5, 4, scale=6),), EXACT),
    "gain that broadcasts": (on_grid(Gain((3, 5, 1), 0.3)), (normal(2, 1, 5, 4, scale=6),), EXACT),
    "block linear": (on_grid(BlockLinear((4, 1), (3, 2))), (normal(2, 3, 9, 5, scale=6),), EXACT),
    "lstm": (on_grid(LSTM([(3, 0), (1, 4)])), (normal(2, 3, 9, 32, scale=2),), 1e-3),
    "linear scan": (LinearScan(3, 2), (uniform(2, 3, 9, 5), normal(2, 3, 9, 5, seed=1)), 12 * ULP),
    "take": (Take([3, 3, 0, 8]), (normal(2, 3, 9, 5),), EXACT),
    "token sum": (TokenSum(), (normal(2, 3, 9, 5),), EXACT),
    "sum": (Sum((-3, -1)), (normal(2, 3, 9, 5),), EXACT),
    "sum, dimensions kept": (Sum((-2, -1), True), (normal(2, 3, 9, 5),), EXACT),
    "repeat": (repeated(), (normal(3, 1, 2, 2),), EXACT),
    # Values up to 20 times entries to 2^-17, and a rounding after each product.
    "resample": (Resample(means(7, 3), means(5, 4)), (normal(2, 3, 7, 5, scale=5),), 2.0**-17 * 20 * 4 + 3 * ULP),
    "resample to more": (Resample(means(2, 5), means(3, 3)), (normal(2, 3, 2, 3, scale=5),), 2.0**-17 * 40 + 3 * ULP),
    **{
        f"means of {tokens} in {segments}": (
            SegmentMeans(tokens, segments),
            (normal(2, 3, tokens, 5, scale=4),),
            relative(2.0**-14, 1.0),
        )
        for tokens, segments in ((16, 4), (49, 16), (17, 4), (10, 10), (65, 1))
    },
    **{
        f"reweight {tokens}": (
            Reweight(tokens),
            (normal(2, 3, tokens, 5),),
            lambda clear: ULP + 2.0**-14 * 5,  # inputs are at most 5, factors rounded to 13 bits
        )
        for tokens in (16, 17, 64)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_shares_against_clear_text(name):
    module, inputs, bound = CASES[name]
    shared, clear, _ = privately(module, *inputs)
    bound = torch.as_tensor(bound(clear) if callable(bound) else bound)
    error = (shared - clear).abs()
    assert (error <= bound).all(), f"{error.max()}, {(error / bound).max()} of the bound"
    assert (clear.abs() / bound).max() > 30


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0, 250.0])
def test_sums_next_to_zero(scale):
    """Down to zero itself where eps keeps what is divided by within the octaves; a numerator is no larger than 3 b."""
    b = torch.logspace(-22, 9, 300, 2, dtype=torch.float64)[:-1] * 2.0 ** round(math.log2(scale))
    b[0] = 0
    numerators = b * normal(299, seed=4).clamp(-3, 3)
    shared, clear, _ = privately(Divide(scale), numerators, b, fine=13)
    units = (b + operations.EPS) / 2.0 ** round(math.log2(scale))
    # 3e-3 in the first octave, of which the comparison sees a sixteenth.
    part = torch.where(units < 2.0 ** (gates.divide._quotient(Divide(scale))[0][0] + 1), 3e-3, 1e-3)
    assert ((shared - clear).abs() <= part * clear.abs() + 2 * ULP)[units >= 2.0**-17].all()


@pytest.mark.parametrize("scale, eps", [(0.05, 1e-6), (1e-3, 1e-6), (1e-3, 3e-5), (1.0, 1e-5), (1.0, 1.0), (1e4, 1.0)])
def test_an_eps_has_bits_of_its_own(scale, eps):
    """What is divided by where a sum is zero, however few bits the sum came with."""
    division = Divide(scale, eps)
    numerators = torch.tensor([1.0, 5.0, 9.0]) * 16 * eps
    numerators = (numerators / ULP).round().clamp(1) * ULP
    shared, clear, _ = privately(division, numerators, torch.zeros(3))
    covered = clear.abs() < 2.0**8
    assert covered.any() and ((shared - clear).abs() <= 4e-3 * clear + 2 * ULP)[covered].all()


def test_an_eps_below_what_is_covered_takes_the_lowest_octave():
    division = Divide(1.0, 1e-15)
    assert gates.divide._quotient(division) == ((-17, 9), False)
    b = 2.0 ** torch.arange(-17, 9).double() * 1.3
    shared, clear, _ = privately(division, b, b, fine=13)
    assert ((shared - clear).abs() <= 4e-3 * clear + 2 * ULP).all()


def test_a_negative_sum_that_eps_all_but_cancels_is_said():
    division = Divide(1.0, 2.0**-7)
    a, within = torch.ones(2), torch.tensor([0.0, 1.0])
    assert all(span.outside is None for span in tuned.DOMAINS[Divide](division, a / 10, within))
    outside = [span.what for span in tuned.DOMAINS[Divide](division, a / 10, within - 2.0**-7 + 2.0**-11)]
    assert "scaled denominators that count" in outside


def test_a_shift_keeps_the_bits_of_the_numerator():
    """Those of a product that was not truncated: by 2^-10 one divides what lies a thousand times below a step."""
    divisors = torch.exp2(torch.arange(-10, 6).double()).repeat(20)[:, None] * 1.1
    inputs = normal(320, 3, seed=6) * divisors, divisors
    shared, clear, _ = privately(ShiftDivide(-10, 5, eps=0.0), *inputs, fine=13)
    assert (shared - clear).abs().max() <= 2 * ULP


def test_cases_cover_the_operations():
    used = {type(module) for module, _, _ in CASES.values()} | {MatMul, NewtonInverse, PseudoInverse}
    assert {kind for kind in known() if kind.__module__ == operations.__name__} == used
    for table in (stock, tuned):
        assert used <= set(table.MODULES)


@pytest.mark.parametrize("bits", [10, 16, 20])
@pytest.mark.parametrize("name", ["multiply", "divide, scale 1.0", "divide, scale 250.0", "exponential", "reweight 17"])
def test_with_other_bits(name, bits):
    module, inputs, bound = CASES[name]
    # Denominators come with the bits of a product: with fewer the smallest would be out of range.
    shared, clear, _ = privately(module, *inputs, bits=bits, fine=26 - bits if isinstance(module, Divide) else 0)
    bound = (bound(clear) if callable(bound) else bound) + 2.0 ** (1 - bits) * (1 + 2 * clear.abs())
    assert ((shared - clear).abs() <= bound).all()


def test_nothing_over_nothing_is_nothing():
    denominators = torch.tensor([0.0, 2.0**-13, 2.0**-11, 0.1, 1, 60])
    for scale in (1.0, 2.0**-4, 100.0):
        shared, _, _ = privately(Divide(scale), torch.zeros(6), denominators)
        assert shared.abs().max() == 0
    # What is below the range of the reciprocal stays bounded: 5 * 2^12 / scale.
    shared, _, _ = privately(Divide(4.0, eps=0.0), torch.full((6,), 2.0**-13), denominators)
    assert shared[0] > 0 and shared[0] < 5 * 2.0**12 / 4 * 2.0**-13


def test_eps_is_added():
    """2^-14 is half a step of the inputs, and a quarter of the smallest denominator."""
    numerator, denominator = torch.full((2,), 2.0**-9), torch.tensor([2.0**-9, 2.0**-8])
    shared, clear, _ = privately(Divide(), numerator, denominator)
    assert (clear - numerator.double() / denominator.double()).abs().min() > 7e-3 and EPS == 2.0**-14
    assert ((shared - clear).abs() <= 4e-3 * clear).all()


# Inverses. Bounds are those that the protocols state, with float64's part nowhere near.


def newton_bound(size, ridge=0.1):
    """The last step's rounding, and the ridge's."""
    return (size**0.5 / ridge + 0.5 / ridge**2) * 2.0**-24


@pytest.mark.parametrize("size, spread", [(1, 1.0), (2, 0.01), (7, 0.2), (7, 1.0), (49, 0.01), (49, 0.5)])
def test_newton_inverse(size, spread):
    """Landmarks from all but equal, where the inverse is 1 / ridge, to far apart."""
    a = gaussian_kernel(size, spread, size)
    shared, clear, _ = privately(NewtonInverse(), a, fine=11)
    assert (shared - clear).abs().max() <= newton_bound(size)
    exact = torch.linalg.inv((a * 2.0**24).round() / 2.0**24 + 0.1 * torch.eye(size))
    assert (shared - exact).abs().max() <= 1e-5 and exact.abs().max() > 0.5


@pytest.mark.parametrize("ridge, iterations", [(0.07, 20), (1.0, 9)])
def test_newton_inverse_with_other_options(ridge, iterations):
    shared, clear, _ = privately(NewtonInverse(iterations, ridge), gaussian_kernel(9, 0.1))
    assert (shared - clear).abs().max() <= newton_bound(9, ridge)


@pytest.mark.parametrize("size, spread", [(1, 1.0), (2, 0.05), (7, 1.0), (7, 5.0), (49, 0.05), (49, 2.0)])
def test_pseudo_inverse(size, spread):
    """From the start, where all rows are alike, to rows of one large entry each."""
    shared, clear, _ = privately(PseudoInverse(), stochastic(size, spread, size), fine=11)
    # Singular values that the iteration has not reached keep the starting value's relative error, 4e-6.
    assert (shared - clear).abs().max() <= size**0.5 * 2.0**-24 * 3.25**6 + 5e-6 * torch.linalg.matrix_norm(clear).max()
    assert clear.abs().max() > 0.5


# Operands, ranges, messages


def test_a_weight_may_be_an_operand():
    """Of a product, on either side, or after it was moved: what Hamburger does with its first bases."""
    x, weight = normal(2, 4, 5, scale=3), normal(1, 5, 3, seed=1)
    integers = [(value / ULP).round().long() for value in (x, weight)]

    def protocol(x):
        bases = Weight("bases", integers[1].double() * ULP, shares.session.rank == SERVER)
        turned = tuned.FUNCTIONS["transpose"](bases, -2, -1)
        right, left = gates.product.matmul(None, {}, x, bases), gates.product.matmul(None, {}, bases, turned)
        square, some = gates.product.times(None, {}, bases, bases), gates.product.times(None, {}, x[:1, :3], turned)
        return right, left, square, some

    results, _ = together(protocol, (integers[0], 13))
    found = [opened(pair) for pair in zip(*results, strict=True)]
    x, weight = (value.double() * ULP for value in integers)
    clear = [x @ weight, weight @ weight.mT, weight * weight, x[:1, :3] * weight.mT]
    for shared, exact in zip(found, clear, strict=True):
        assert torch.equal(shared, exact)


def test_arithmetic_with_numbers():
    x = (normal(2, 5, scale=3) / ULP).round().long()
    results, _ = together(lambda x: (1 - x, -x, x / 3, x / 4, 2.5 - x * -0.5), (x, 13))
    x = x.double() * ULP
    for pair, exact in zip(zip(*results, strict=True), (1 - x, -x, x / 3, x / 4, 2.5 + x / 2), strict=True):
        assert (opened(pair) - exact).abs().max() <= 2 * ULP


@pytest.mark.parametrize("step, zero", [(2.0**-4, 100), (0.0371, 77), (1.7, 0)])
def test_a_lookup_is_one_of_two_points_and_right_on_average(step, zero):
    """At either point beside x, as often as x is near to it; beyond the grid at its end."""
    module = Lookup("identity", 8, step, zero)
    x = torch.linspace(-zero - 60, 255 - zero + 60, 1500, dtype=torch.float64) * step
    shared, _, parties = privately(module, *[x], fine=9)
    place = x / step + zero
    below, above = (module.points(place.floor()), module.points(place.ceil()))
    whole = (place - place.round()).abs() < 0.01  # the factor to the grid is rounded
    assert ((shared - below).abs().minimum((shared - above).abs())[~whole] <= ULP).all()
    inside = (x > -zero * step) & (x < (255 - zero) * step)
    error = (shared - x)[inside] / step
    assert error.mean().abs() < 5 * error.std() / inside.sum() ** 0.5 and error.abs().max() < 1.01
    assert [party.rounds for party in parties] == [1, 1]


@pytest.mark.parametrize("bits, spare", [(4, 0), (8, 1), (9, 2), (12, 1)])
def test_what_a_lookup_costs(bits, spare):
    count, session = 1000, shares.session
    size = bits + spare
    session.begin(SERVER)
    session.recording = True
    try:
        session.tape.begin()
        x = shares.Share(torch.empty(count, dtype=torch.int64, device="meta"), 13)
        gates.lookup.lookup(Lookup("hardswish", bits, 2.0**-4, spare=spare), {}, x)
        cost = session.tape.costs[0]
    finally:
        session.begin(SERVER)
    assert (cost.rounds, cost.words, cost.offline) == (1, -(-count // (64 // size)), count << size)


def test_numbers_of_few_bits_are_packed():
    for bits in (1, 3, 9, 16):
        x = torch.randint(1 << bits, (101,), generator=torch.Generator().manual_seed(bits))
        words = gates.lookup.packed(x, bits)
        assert len(words) == -(-101 // (64 // bits)) and torch.equal(gates.lookup.unpacked(words, bits, 101), x)


def test_a_grid_without_a_place_in_the_ring_is_refused():
    for step in (1e-15, 1e9):
        with pytest.raises(ValueError, match="is too far from 2"):
            privately(Lookup("relu", 8, step), ONES)
    for options, said in [(("cube", 8, 0.1), "function 'cube' is unknown"), (("relu", 16, 0.1), "a table of 16 and 1")]:
        with pytest.raises(ValueError, match=said):
            Lookup(*options)
    with pytest.raises(ValueError, match="step is 0.0: give a positive number"):
        Lookup("relu", 8, 0.0)


def test_a_shift_is_within_a_root_of_two():
    b = torch.logspace(-6, 9, 999, 2, dtype=torch.float64)
    ratio = ShiftDivide(eps=0.0)(b, b)
    assert ratio.max() <= 2**0.5 + 1e-9 and ratio.min() >= 0.5**0.5 - 1e-9 and ratio.max() > 1.41


ONES = torch.ones(4, 4)
# Module, inputs within its range, inputs beyond it, and whether the shares' own check sees that.
RANGES = {
    "divide": (Divide(), (ONES, ONES * 500), (ONES, ONES * 520), True),
    "divide, of size 16": (Divide(16.0), (ONES, ONES * 8000), (ONES, ONES * 8200), True),
    "divide by little": (Divide(4.0, eps=0.0), (ONES / 64, ONES / 512), (ONES / 64, ONES / 8192), False),
    "divide by too little": (Divide(), (ONES, ONES / 128), (ONES, ONES / 512), False),
    "divide nothing": (Divide(), (0 * ONES, 0 * ONES), (ONES, 0 * ONES), False),
    "shift divide": (ShiftDivide(), (ONES, ONES * 2000), (ONES, ONES * 2100), False),
    "lookup": (Lookup("relu", 6, 2.0**-3, 30), (-ONES * 7,), (-ONES * 8,), True),
    "lookup, above": (Lookup("relu", 6, 2.0**-3, 30), (ONES * 8,), (ONES * 8.3,), True),
    "exponential": (Exponential(0), (-ONES * 117,), (ONES,), False),
    "exponential, far below": (Exponential(0), (-ONES * 117,), (-ONES * 150,), True),
    "exponential of a matrix": (Exponential(2), (torch.eye(4) * 117,), (torch.eye(4) * 140,), True),
    "newton inverse": (NewtonInverse(), (torch.eye(4),), (torch.eye(4) * 9,), True),
    "newton inverse of nothing": (NewtonInverse(ridge=0.01), (torch.eye(4),), (torch.eye(4) * 0,), True),
    "pseudo inverse": (PseudoInverse(), (ONES / 4,), (ONES * 3,), True),
}


@pytest.mark.parametrize("name", RANGES)
def test_every_range_is_watched(name):
    module, inside, outside, seen = RANGES[name]
    watch = tuned.DOMAINS[type(module)]
    assert not any(span.outside for span in watch(module, *inside))
    assert any(span.outside for span in watch(module, *outside))
    for inputs, found in ((inside, False), (outside, seen)):
        _, _, parties = privately(module, *inputs, check=True)
        assert [bool(party.violations) for party in parties] == [found, found]


@pytest.mark.parametrize("name", ["newton", "pseudo", "divide", "shift", "lookup", "exponential", "heads", "taps"])
def test_messages_look_random(name):
    module, inputs = {
        "newton": (NewtonInverse(), (gaussian_kernel(16, 0.2),)),
        "pseudo": (PseudoInverse(), (stochastic(16, 1.0),)),
        "divide": (Divide(), (ONES.repeat(20, 20), ONES.repeat(20, 20))),
        "shift": (ShiftDivide(), (ONES.repeat(20, 20), ONES.repeat(20, 20))),
        "lookup": (Lookup("gelu", 7, 2.0**-4, 60), (ONES.repeat(100, 60),)),
        "exponential": (Exponential(2), (ONES.repeat(20, 20),)),
        "heads": (HeadLinear(2, 64, 4), (torch.ones(1, 2, 64, 64),)),
        "taps": (TokenConv(2, 5), (torch.ones(1, 2, 64, 64),)),
    }[name]
    _, _, parties = privately(module, *inputs)
    # A product with a weight is one message, of the client: the server's weights are sent once per session.
    for party in parties[:1] if name in ("heads", "taps") else parties:
        assert looks_random(party.audit)


# Between real parties


class Pair(nn.Module):
    """An operation of two inputs on one: the first four of the last dimension and what follows."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return self.operation(x[..., :4], x[..., 4:])


# Operation, shape of its input, which lies in shift +- scale, and the bound: where CrypTen's functions are right.
STOCK = {
    "multiply": (Pair(Multiply()), (2, 3, 5), 4.0, 0.0, 1e-3),
    "divide": (Pair(Divide()), (2, 3, 8), 1.0, 2.0, 1e-2),
    "shift divide": (Pair(ShiftDivide()), (2, 3, 8), 1.0, 2.0, 1e-2),
    **{f"lookup {name}": (Lookup(name, 9, 2.0**-7, 256), (2, 3, 5), 0.75, 0.0, 2.0**-7) for name in operations.TABLES},
    "exponential": (Exponential(0), (2, 5), 2.0, -2.0, 1e-2),
    "exponential of a row": (Exponential(1), (2, 3, 5), 2.0, 0.0, 1e-2),
    "exponential of a matrix": (Exponential(2), (2, 4, 5), 2.0, 0.0, 1e-2),
    "squared norm": (SquaredNorm(), (2, 3, 8), 4.0, 0.0, 2e-3),
    "head linear": (HeadLinear(3, 9, 4), (3, 9, 5), 4.0, 0.0, 2e-3),
    "token conv": (TokenConv(3, 5), (3, 9, 4), 4.0, 0.0, 2e-3),
    "gain": (Gain((3, 1, 1), 0.7), (3, 5, 4), 4.0, 0.0, 1e-3),
    "block linear": (BlockLinear((3, 3), (4, 4)), (3, 9, 6), 4.0, 0.0, 2e-3),
    "block linear, not alike": (BlockLinear((4, 1, 0), (3, 2, 1)), (3, 9, 5), 4.0, 0.0, 2e-3),
    "lstm": (LSTM([(3, 0), (1, 2)]), (4, 24), 3.0, 0.0, 1e-2),
    "linear scan": (Pair(LinearScan(3, 1)), (2, 5, 8), 1.0, 0.0, 2e-3),
    "take": (Take([3, 3, 0, 8]), (3, 9, 5), 4.0, 0.0, 1e-3),
    "token sum": (TokenSum(), (3, 9, 5), 4.0, 0.0, 1e-3),
    "sum": (Sum((-2, -1), True), (3, 9, 5), 4.0, 0.0, 2e-3),
    "repeat": (repeated(), (3, 2), 4.0, 0.0, 1e-3),
    "resample": (Resample(means(7, 3), means(5, 4)), (3, 7, 5), 4.0, 0.0, 1e-3),
    "means": (SegmentMeans(16, 4), (3, 16, 5), 4.0, 0.0, 1e-3),
    "reweight": (Reweight(16), (3, 16, 5), 4.0, 0.0, 1e-3),
    # Entries of about 0.5 -+ 0.02: singular but for the ridge; its inverse errs by |Z|^2 = 100 steps of the input's.
    "newton inverse": (NewtonInverse(8, 1.0), (3, 3), 0.02, 0.5, 1e-2),
    "pseudo inverse": (PseudoInverse(2), (3, 3), 0.02, 0.33, 1e-2),
}


@pytest.fixture(scope="module")
def zoo():
    torch.manual_seed(0)
    operations, shapes, scales, shifts, _ = zip(*STOCK.values())
    zoo = Zoo(operations, shapes, scales, shifts).eval()
    images = zoo.images()
    result = private.infer(zoo, images, "stock")
    with torch.no_grad():
        clear = [part[0] for part in zoo.results(images)]
    shared = result.logits[0].split([part.numel() for part in clear])
    return result, {name: (x, y.view_as(x)) for name, x, y in zip(STOCK, clear, shared)}


@pytest.mark.processes
@pytest.mark.parametrize("name", STOCK)
def test_stock_where_it_is_right(zoo, name):
    clear, shared = zoo[1][name]
    bound = STOCK[name][-1]
    assert (shared - clear).abs().max() <= bound
    assert clear.abs().max() > 30 * bound


@pytest.mark.processes
def test_stock_stays_in_its_domains(zoo):
    assert zoo[0].violations == []


MECHANISMS = [name for name in ATTENTION if name not in ("self", "external", "scaling")]


@pytest.mark.processes
def test_every_mechanism_is_faithful(tmp_path):
    """All mechanisms, layer upon layer, in two networks side by side; every message of both looks random."""
    networks = {}
    for seed, names in enumerate((MECHANISMS[::2], MECHANISMS[1::2])):
        torch.manual_seed(seed)
        network = CCT(preset("cct_2_3x1", layers=len(names), attention=tuple(names)))
        networks[str(seed)] = random_like_trained(network, seed).eval()
    torch.manual_seed(3)
    result = private.infer(Several(networks), torch.randn(1, 1, 8, 8), "tuned", audit=tmp_path)
    assert result.violations == []
    assert result.error < 0.01 and result.logits.abs().max() > 0.5
    for role in ("server", "client"):
        assert looks_random(torch.load(tmp_path / f"{role}.pt", weights_only=True))
