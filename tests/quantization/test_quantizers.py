"""Grids, learnt rounding and divisors against formulas in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salvit_core.quantization import layers, quantizers
from salvit_core.quantization.quantizers import Quantizer, Rounding, log2_divisor, on_grid, searched


def reference(x, bits):
    """The range search as its definition says it, one row of NumPy float64 at a time."""
    top, found = 2**bits - 1, []
    for row in x:
        low, high = min(row.min(), 0), max(row.max(), 0)
        best = (np.inf, None, None)
        for shrink in range(80):
            part = 1 - shrink / 100
            step = (high - low) * part / top
            zero = np.round(-low * part / step)
            points = np.clip(np.round(row / step) + zero, 0, top)
            error = np.mean(np.abs((points - zero) * step - row) ** 2.4)
            if error < best[0]:
                best = (error, step, zero)
        found.append(best)
    return found


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("centre", [0.0, 3.0, -3.0])
def test_the_range_search_is_its_definition(bits, centre):
    rng = np.random.default_rng(bits)
    x = rng.standard_t(3, (5, 400)) + centre  # outliers, so that a smaller range is better
    step, zero = searched(torch.from_numpy(x), bits)
    made = on_grid(torch.from_numpy(x), step, zero, 2**bits - 1)
    for row, (error, wanted, middle) in enumerate(reference(x, bits)):
        assert step[row].item() == pytest.approx(wanted) and zero[row].item() == middle
        assert ((made[row] - torch.from_numpy(x[row])).abs() ** 2.4).mean().item() == pytest.approx(error)
        assert len(made[row].unique()) <= 2**bits
    if bits == 2:  # it did narrow
        assert (step * 3 < torch.from_numpy(np.maximum(x.max(1), 0) - np.minimum(x.min(1), 0))[:, None] * 0.95).any()


@given(st.integers(2, 10), st.floats(-20, 20), st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_zero_is_on_every_grid_and_what_is_on_a_grid_stays(bits, centre, scale):
    x = scale * (torch.randn(1, 200, generator=torch.Generator().manual_seed(bits)) + centre)
    step, zero = searched(x, bits)
    top = 2**bits - 1
    assert on_grid(torch.zeros(1), step, zero, top).item() == 0
    made = on_grid(x, step, zero, top)
    torch.testing.assert_close(on_grid(made, step, zero, top), made)
    assert 0 <= zero.item() <= top and zero == zero.round()


def test_a_constant_row_is_no_division_by_zero():
    step, zero = searched(torch.zeros(2, 9), 4)
    assert torch.equal(on_grid(torch.zeros(2, 9), step, zero, 15), torch.zeros(2, 9)) and step.isfinite().all()


def test_the_sample_of_a_picture_is_not_its_border(monkeypatch):
    """64 columns, of which a stride of 64 would see the first alone: it is zero and says nothing of the rest."""
    x = torch.randn(8, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 0
    whole, _ = searched(x.reshape(1, -1), 3)
    monkeypatch.setattr(quantizers, "SAMPLE", 2**11)
    step, _ = searched(x.reshape(1, -1), 3)
    assert abs(step / whole - 1) < 0.1
    monkeypatch.setattr(layers, "ENTRIES", 2**11)
    x = torch.tensor([1.0, 1.0, 0.2, 0.2]).view(-1, 1, 1).repeat(8, 1, 64, 64)
    x[..., 0] = 0
    # The quantile is 1, above the mean of the largest; of the border it would be 0.
    torch.testing.assert_close(layers.migration(x), torch.tensor([1.0, 1.0, 0.2, 0.2]))


def test_a_quantizer_takes_its_range_from_the_first_it_sees_and_learns_its_step():
    quantizer = Quantizer(4)
    x = torch.linspace(-1, 2, 100)
    assert torch.equal(quantizer(x), x)  # it is off
    quantizer.on = True
    made = quantizer(x)
    step = quantizer.step.item()
    assert len(made.unique()) == 16 and quantizer.fitted
    quantizer(1000 * x)
    assert quantizer.step.item() == step
    # d/ds of s (round(x / s) + z clamped - z): round(x / s) - x / s inside, the end of the range beyond it.
    inside, beyond = torch.tensor(0.7), torch.tensor(1e3)
    (gradient,) = torch.autograd.grad(quantizer(inside), quantizer.step)
    assert gradient.item() == pytest.approx(round(0.7 / step) - 0.7 / step, abs=1e-5)
    (gradient,) = torch.autograd.grad(quantizer(beyond), quantizer.step)
    assert gradient.item() == pytest.approx(15 - quantizer.zero.item(), abs=1e-5)


def test_rounding_begins_at_the_weights_and_ends_beside_them():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    step, zero = searched(weight, 4)
    rounding = Rounding(weight, step, zero, 15)
    inside = (weight / step + zero > 0) & (weight / step + zero < 15)
    torch.testing.assert_close(rounding()[inside], weight[inside], atol=1e-5, rtol=0)
    near = torch.clamp((weight / step).round() + zero, 0, 15)
    assert torch.equal(rounding.codes(), near)  # before it has learnt anything
    with torch.no_grad():
        rounding.v.copy_(torch.where(weight > 0, 9.0, -9.0))
    assert torch.equal(rounding.codes(), torch.clamp((weight / step).floor() + (weight > 0) + zero, 0, 15))
    assert rounding.regulariser(2.0).item() == pytest.approx(0, abs=1e-3)
    with torch.no_grad():
        rounding.v.zero_()  # half a step
    assert rounding.regulariser(20.0).item() == pytest.approx(24)


@given(st.floats(2**-6.4, 2**9.4))
@settings(max_examples=300, deadline=None)
def test_a_divisor_is_the_nearest_power_of_two(x):
    made = log2_divisor(torch.tensor(x, dtype=torch.float64)).item()
    assert np.log2(made) == round(np.log2(made))
    assert abs(made - x) / x <= np.sqrt(2) - 1 + 1e-12  # 0.414
    assert max(made / x, x / made) <= np.sqrt(2) + 1e-12


def test_a_divisor_has_sixteen_values():
    made = log2_divisor(torch.logspace(-30, 30, 999, base=2.0))
    assert made.unique().log2().tolist() == list(range(-6, 10))
    x = torch.tensor([3.0, 2.8], requires_grad=True)  # on both sides of 2 sqrt 2
    made = log2_divisor(x)
    assert made.tolist() == [4, 2]
    (gradient,) = torch.autograd.grad(made.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([4 / 3, 2 / 2.8]))
