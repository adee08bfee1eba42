"""How a local truncation fails, down to the last share; and that an exact one never does.

A failure is a number that is off by more than one unit. It happens where the two shares, as signed numbers, do not add
up to the value but to that and 2^64: so it is looked for among the shares themselves, and counted among random ones.
"""

import contextlib
import math
import re

import pytest
import torch
from test_functionality import failure, numbers
from test_private_tuned import raw, together, whole

from salvit_core import CCT, preset
from salvit_core.private import tuned as room
from salvit_core.private.protocol import CLIENT, SERVER
from salvit_core.private.tuned import gates, protocol
from salvit_core.private.tuned.arithmetic import share as shares
from salvit_core.private.tuned.arithmetic.share import Share, Waiting

MANY = 100_000


@pytest.fixture
def locally(monkeypatch):
    """What becomes of y, shared as (s, y - s), when both parties drop t bits."""

    def truncated(y, s, t):
        total = torch.zeros_like(s)
        for rank, part in ((SERVER, s), (CLIENT, y - s)):
            monkeypatch.setattr(shares.session, "rank", rank)
            total += Share(part, t).to(0).data
        return total

    return truncated


def wrong(found, y, t):
    """Off by more than a unit; what there is then is a multiple of 2^(64-t), mod 2^64, or one unit beside it."""
    off = found - (y >> t)
    failed = (off < 0) | (off > 1)
    assert all(each % 2 ** (64 - t) in (0, 1) for each in off[failed][:100].tolist())
    return failed


# Sizes of what networks truncate, and beyond: from the exponentials' 2^14 to products with a public factor, 2^46.
SIZES = [2**14, 2**26, 2**30 + 12345, 2**34 - 1, 2**38, 2**46]


@pytest.mark.parametrize("t", [2, 8, 13, 20])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_shares_that_fail_are_as_many_as_the_value_is_large(locally, t, size, sign):
    """At the sizes that occur: |y| of the server's 2^64 shares, the lowest for y > 0, the highest below; no other."""
    y, first = sign * size, -(2**63) if sign > 0 else 2**63 - 1
    within = (torch.arange(MANY) * (size // MANY) if size > MANY else torch.arange(size)).tolist()
    inside = torch.tensor([first + sign * i for i in [*within, size - 1]])
    outside = torch.tensor([first + sign * i for i in [*range(size, size + 1000), 2**62, 2**63 - 1, 2**63]])
    random = whole((MANY,), seed=size % 1000)
    random = random[random > first + size] if sign > 0 else random[random < first - size]
    assert len(random) > MANY - 100
    assert wrong(locally(y, inside, t), torch.tensor(y), t).all()
    assert not wrong(locally(y, torch.cat([outside, random]), t), torch.tensor(y), t).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_failures_among_random_shares_are_as_many_as_stated(locally, sign):
    """Twice as many for a value twice as large, over nine octaves: 10^5 uniform shares each."""
    found = {}
    for size in range(52, 62):
        y, seed = sign * 2**size, 100 * size + sign
        found[size] = int(wrong(locally(y, whole((MANY,), seed=seed), 13), torch.tensor(y), 13).sum())
        expected = MANY * 2.0 ** (size - 64)
        assert abs(found[size] - expected) <= 4 * math.sqrt(expected), (size, found[size], expected)
    logs = [(size, math.log2(found[size])) for size in range(56, 62)]
    slope = sum((x - 58.5) * (y - sum(v for _, v in logs) / 6) for x, y in logs) / 17.5
    assert slope == pytest.approx(1, abs=0.05)


def test_a_hundred_thousand_inferences(locally, monkeypatch):
    """As many as the gates' numbers say fail, of those of CCT-7/3x1 with SAL-ViT B=3.

    Numbers fail independently, each with a probability that is its size over 2^64: so the numbers of one kind of gate
    fail as one does that is as large as they are together, where one failure is enough to lose the inference.
    """
    counts = numbers(CCT(preset("cct_7_3x1", "SAL-ViT B=3")), monkeypatch)
    lost = torch.zeros(MANY, dtype=torch.bool)
    for i, (kind, count) in enumerate(sorted(counts.items())):
        y = round(count * failure(kind) * 2.0**64)
        lost |= wrong(locally(y, whole((MANY,), seed=i), 13), torch.tensor(y), 13)
    expected = MANY * float(re.search(r"add up to ([\d.e-]+) per inference", room.__doc__)[1])
    assert expected > 20  # so that a bound means something
    assert abs(int(lost.sum()) - expected) <= 4 * math.sqrt(expected)


def exactly(x, t, few, monkeypatch):
    """What `truncate` makes of x, in one round or in two."""
    monkeypatch.setattr(gates.truncate, "FEW", len(x) if few else 0)
    results, parties = together(lambda x: gates.truncate.truncate(x, 0), (x, t))
    assert parties[0].rounds == (1 if few else 2)
    return raw(results)


@pytest.mark.parametrize("t", [1, 13, 40])
@pytest.mark.parametrize("few", [True, False])
def test_exact_truncations_never_fail(few, t, monkeypatch):
    """Of 10^5 numbers, up to 2^62, where a local truncation loses one in four."""
    x = whole((MANY,), -(2**62) + 1, 2**62 - 1, t)
    assert not wrong(exactly(x, t, few, monkeypatch), x, t).any()


@pytest.mark.parametrize("few", [True, False])
def test_as_local_ones_they_are_right_on_average(few, locally, monkeypatch):
    """Rounded up with the probability of what is cut off, whichever way; where there are many, 2^-t oftener."""
    for part in (0, 1, 300, 4096, 8191):
        y = torch.full((MANY,), (5 << 13) + part)
        local, exact = locally(y, whole((MANY,), seed=part), 13), exactly(y, 13, few, monkeypatch)
        for found, chance in ((local, part / 8192), (exact, (part + (not few)) / 8192)):
            up = int((found - 5).sum())
            assert abs(up - MANY * chance) <= 5 * math.sqrt(MANY * chance * (1 - chance)) + 1e-9, part


@pytest.mark.parametrize("t", [1, 20, 45])
def test_factors_of_rows_never_fail(t):
    """10^5 products with a factor that is truncated on the way: the factor is off by less than one unit."""
    x, factor = whole((MANY, 1), 1, 2**10, 1), whole((MANY, 1), -(2**62) + 1, 2**62 - 1, t)

    def times(x, factor):
        return gates.truncate.times_rows(x, Waiting(factor, 0, gates.truncate.times_rows))

    results, _ = together(times, (x, 0), (factor, t))
    off = raw(results) - x * (factor >> t)
    assert ((off == 0) | (off == x)).all()
    assert 0 < int((off == x).sum()) < MANY


def test_what_exactness_costs(monkeypatch):
    """As gates/truncate.py says: rounds, MB one way and the dealer's MB of CCT-7/3x1 with SAL-ViT B=3, in turn."""
    monkeypatch.setattr(protocol.Tuned, "schedule", lambda self, charge: contextlib.nullcontext())
    spent, tape = {"truncate": [0, 0.0, 0], "times_rows": [0, 0.0, 0]}, lambda: shares.session.tape.costs[-1]

    def counted(name, before):
        def gate(*given, **more):
            cost = tape()
            start = cost.rounds, cost.words, cost.offline
            result = before(*given, **more)
            for i, (was, now) in enumerate(zip(start, (cost.rounds, cost.words, cost.offline))):
                spent[name][i] += now - was
            return result

        return gate

    for name in spent:
        gate = counted(name, getattr(gates.truncate, name))
        for module in (gates.product, gates.curve, gates.exponential, gates.normalise, gates.answer):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, gate)
    numbers(CCT(preset("cct_7_3x1", "SAL-ViT B=3")), monkeypatch)
    rounds, words, dealt = spent["truncate"]
    said = " ".join(gates.truncate.__doc__.split())
    assert f"takes {rounds} rounds, {8e-6 * words:.1f} MB one way and {8e-6 * dealt:.1f} MB of the dealer's" in said
    # A product deals one word for each of its numbers; here the factor's rows, and its cut, come on top.
    more = 8e-6 * spent["times_rows"][2] / 2
    assert f"and {more:.1f} MB of the dealer's" in said


@pytest.mark.parametrize("count", [gates.truncate.FEW, gates.truncate.FEW + 1])
def test_logits_in_any_number_are_rounded_exactly(count):
    """Beyond `FEW` numbers a truncation has another form, which rounds a multiple up once in 2^t."""
    torch.manual_seed(count)
    integers = torch.randint(-(2**20), 2**20, (count,))
    results, _ = together(lambda x: gates.answer.exactly_rounded(x, 12), (integers, 15))
    assert torch.equal(raw(results), integers + 4 >> 3)


@pytest.mark.parametrize("factor", [1 / 12, 3**-0.5, -0.3, 1 / 300])
def test_a_product_times_a_public_factor_keeps_its_room(monkeypatch, factor):
    """What has the bits of two factors is cut to one's before a third comes: else 2^45 would be truncated."""
    cut, to = [], Share.to

    def noted(self, bits):
        cut.extend(self.data.abs().log2().tolist() if self.bits > bits else [])
        return to(self, bits)

    monkeypatch.setattr(Share, "to", noted)
    values = torch.linspace(1, 8, 100)
    found = shares.scaled(Share((values * 2.0**26).long(), 26), factor)
    assert cut and max(cut) < 30
    torch.testing.assert_close(found.data / 2.0**found.bits, values * factor, atol=2e-4, rtol=2e-4)
