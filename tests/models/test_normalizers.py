"""Every normaliser against its formula in float64 NumPy, and the invariants that its formula implies."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from salvit_core.models.normalizers import EPS, L1, L2Q, NORMALIZERS

SHAPE = (2, 3, 5, 4)  # B, H, N, K


def formula(name, a, axis, c=1.0, d=1.0):
    """The paper's Table 1 and Eq. 2, written out once more."""
    n = a.shape[axis]
    raised = {
        "softmax": lambda: np.exp(a - a.max(axis, keepdims=True)),
        "2quad": lambda: (a + 5.0) ** 2,
        "2relu": lambda: np.where(a > 0, a, 0.0),
        "l2q": lambda: (d * a + c) ** 2,
        "scaling": lambda: a,
    }[name]()
    if name == "scaling":
        return a / n
    return raised / (raised.sum(axis, keepdims=True) + {"2relu": EPS, "l2q": EPS}.get(name, 0.0))


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_matches_the_formula(name, dim):
    scores = np.random.default_rng(0).normal(0, 3, SHAPE)
    ours = NORMALIZERS[name](dim=dim, heads=3, shape=(3, 5, 4))(torch.from_numpy(scores))
    np.testing.assert_allclose(ours.detach().numpy(), formula(name, scores, dim), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "granularity, size", [("global", (1, 1, 1, 1)), ("head", (1, 3, 1, 1)), ("element", (1, 3, 5, 4))]
)
def test_l2q_granularities(granularity, size):
    rng = np.random.default_rng(1)
    scores, c, d = rng.normal(size=SHAPE), rng.normal(size=size), rng.normal(size=size)
    module = L2Q(dim=-1, heads=3, shape=(3, 5, 4), granularity=granularity).double()
    assert module.c.shape == module.d.shape == size
    module.c.data, module.d.data = torch.from_numpy(c), torch.from_numpy(d)
    ours = module(torch.from_numpy(scores)).detach().numpy()
    np.testing.assert_allclose(ours, formula("l2q", scores, -1, c, d), rtol=1e-12)


@pytest.mark.parametrize("learn_c, learn_d", [(True, False), (False, True), (False, False)])
def test_l2q_learns_only_what_it_is_told(learn_c, learn_d):
    module = L2Q(learn_c=learn_c, learn_d=learn_d, initial_c=2.0, initial_d=0.5)
    assert {name for name, _ in module.named_parameters()} == {n for n, on in [("c", learn_c), ("d", learn_d)] if on}
    scores = torch.linspace(-1, 1, 4).reshape(1, 1, 1, 4)
    np.testing.assert_allclose(module(scores).detach(), formula("l2q", scores.numpy(), -1, 2.0, 0.5), rtol=1e-6)


def test_l2q_refuses_an_unknown_granularity():
    with pytest.raises(ValueError, match="'layer' is unknown: choose one of global, head, element"):
        L2Q(granularity="layer")


rows = hnp.arrays(np.float64, (1, 1, 2, 6), elements=st.floats(-4, 4))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows, st.sampled_from(["softmax", "2quad", "l2q", "2relu"]))
def test_rows_are_weights(scores, name):
    weights = NORMALIZERS[name]()(torch.from_numpy(scores)).detach()
    assert (weights >= 0).all()
    total = weights.sum(-1)
    assert (total <= 1 + 1e-9).all()
    raised = torch.from_numpy(formula(name, scores, -1)).sum(-1)
    torch.testing.assert_close(total, raised)
    if name in ("softmax", "2quad"):
        torch.testing.assert_close(total, torch.ones_like(total))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows, st.permutations(range(6)), st.sampled_from(list(NORMALIZERS)))
def test_permuting_the_keys_permutes_the_weights(scores, order, name):
    module, scores = NORMALIZERS[name](), torch.from_numpy(scores)
    torch.testing.assert_close(module(scores)[..., list(order)], module(scores[..., list(order)]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows, st.floats(-3, 3))
def test_softmax_ignores_a_shift(scores, shift):
    module, scores = NORMALIZERS["softmax"](), torch.from_numpy(scores)
    torch.testing.assert_close(module(scores + shift), module(scores))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows, st.floats(0.5, 3))
def test_l2q_ignores_a_common_scale_of_c_and_d(scores, scale):
    scores = torch.from_numpy(scores) + 6  # keeps sums far above eps
    one, other = L2Q(initial_c=1.0, initial_d=1.0), L2Q(initial_c=scale, initial_d=scale)
    torch.testing.assert_close(one(scores), other(scores), rtol=1e-4, atol=1e-6)


def test_eps_survives_fixed_point_and_an_empty_row():
    assert EPS * 2**16 == 4
    weights = NORMALIZERS["2relu"]()(torch.full((1, 1, 1, 4), -1.0))
    assert (weights == 0).all()


def test_l1_sums_to_one_over_the_slots():
    weights = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(L1(dim=-1)(weights).sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
