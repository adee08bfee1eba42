"""The compared mechanisms against their papers' formulas in float64 NumPy, and what their theory promises of them."""

import math
import operator

import numpy as np
import pytest
import torch
from sizes import mechanism
from test_normalizers import formula
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from salvit_core.models.attention import ATTENTION, SIZED
from salvit_core.models.attention.dilated import windows
from salvit_core.models.config import PRESETS, preset
from salvit_core.models.graph import trace
from salvit_core.models.normalizers import Normalizer
from salvit_core.models.operations import Divide, Operation, PseudoInverse, Reweight
from salvit_core.models.vit import build as build_network

B, M, H = 2, 16, 2
D = M // H
WITH_NORMALIZER = ("standard", "linformer", "linformer_heads", "nystromformer", "dilated")
NEW = (*WITH_NORMALIZER, "cosformer", "performer", "performer_relu", "relu_linear", "soft", "hamburger")
MEMORY = 4
EPS = 2.0**-14


def build(name, tokens=16, normalizer="softmax", size=1.0, **extra):
    """A module in float64 with weights of standard deviation `size` / sqrt(M), tokens, and its state as arrays."""
    torch.manual_seed(0)
    if name in SIZED:
        extra = {"memory": MEMORY, **extra}
    module = mechanism(name, M, H, tokens, normalizer=normalizer, **extra).double().eval()
    for child_name, child in module.named_modules():
        if isinstance(child, nn.Linear) and child_name != "features":
            nn.init.normal_(child.weight, std=size * child.in_features**-0.5)
        elif isinstance(child, Normalizer):
            for parameter in child.parameters():
                nn.init.normal_(parameter, 1.0, 0.3)
    x = torch.randn(B, tokens, M, dtype=torch.float64)
    return module, x, {key: value.detach().numpy() for key, value in module.state_dict().items()}


def heads(x):
    """(B, N, M) -> (B, H, N, D)."""
    return x.reshape(B, -1, H, D).transpose(0, 2, 1, 3)


def qkv(x, w):
    if "qkv.weight" in w:
        return [heads(x.numpy() @ part.T) for part in np.split(w["qkv.weight"], 3)]
    names = [name if f"{name}.weight" in w else "query" for name in ("query", "key", "value")]
    return [heads(x.numpy() @ w[f"{name}.weight"].T) for name in names]


def t(x):
    return x.swapaxes(-1, -2)


def normalise(normalizer, scores, w, which=""):
    own = {letter: w.get(f"normalizer{which}.{letter}", 1.0) for letter in "cd"}
    return formula(normalizer, scores, -1, **own)


def segments(tokens, count):
    """Segment of every token: cells of a grid if both are squares, else runs."""
    side, cells = math.isqrt(tokens), math.isqrt(count)
    if side**2 == tokens and cells**2 == count:
        return [(n // side) * cells // side * cells + (n % side) * cells // side for n in range(tokens)]
    return [n * count // tokens for n in range(tokens)]


def means(x, count):
    of = np.array(segments(x.shape[-2], count))
    return np.stack([x[..., of == segment, :].mean(-2) for segment in range(count)], -2)


# The mechanisms' weights (B, H, N, N), each written from its paper


def standard(q, k, w, normalizer):
    return normalise(normalizer, q @ t(k) / np.sqrt(D), w)


def linformer(q, k, w, normalizer):
    e = w["reduction.weight"]
    return normalise(normalizer, q @ t(e @ k) / np.sqrt(D), w) @ e


def linformer_heads(q, k, w, normalizer):
    e, f = w["reduction.0.weight"], w["reduction.1.weight"]
    return normalise(normalizer, np.einsum("bhnd,hkj,bhjd->bhnk", q, e, k) / np.sqrt(D), w) @ f


def cosformer(q, k, w, normalizer):
    tokens = q.shape[2]
    side = math.isqrt(tokens)
    weights = np.maximum(q, 0) @ t(np.maximum(k, 0)) / (np.sqrt(D) * tokens)
    for i in range(tokens):
        for j in range(tokens):
            if side**2 == tokens:
                rows, columns = i // side - j // side, i % side - j % side
                weights[..., i, j] *= np.cos(np.pi / 2 * rows / side) * np.cos(np.pi / 2 * columns / side)
            else:
                weights[..., i, j] *= np.cos(np.pi / 2 * (i - j) / tokens)
    return weights / (weights.sum(-1, keepdims=True) + EPS)


def performer(q, k, w, normalizer):
    features = w["features.weight"]
    exponent_q, exponent_k = ((x := part / D**0.25) @ features.T - (x**2).sum(-1, keepdims=True) / 2 for part in (q, k))
    f_q = np.exp(exponent_q - exponent_q.max(-1, keepdims=True)) + 2.0**-12
    f_k = np.exp(exponent_k - exponent_k.max((-2, -1), keepdims=True)) + 2.0**-12
    weights = f_q @ t(f_k) / len(features)
    return weights / (weights.sum(-1, keepdims=True) + EPS)


def performer_relu(q, k, w, normalizer):
    features = w["features.weight"]
    f_q, f_k = (np.maximum(part @ features.T / D**0.25, 0) + 2.0**-12 for part in (q, k))
    weights = f_q @ t(f_k) / len(features) / q.shape[2]
    return weights / (weights.sum(-1, keepdims=True) + EPS)


def relu_linear(q, k, w, normalizer):
    weights = np.maximum(q, 0) @ t(np.maximum(k, 0)) / (np.sqrt(D) * q.shape[2])
    return weights / (weights.sum(-1, keepdims=True) + EPS)


def gaussian(q, k):
    return np.exp(-((q[..., :, None, :] - k[..., None, :, :]) ** 2).sum(-1) / (2 * np.sqrt(D)))


def soft(q, k, w, normalizer):
    landmarks = means(q, min(MEMORY, q.shape[2]))
    p, a = gaussian(landmarks, q), gaussian(landmarks, landmarks)
    return t(p) @ np.linalg.inv(a + 0.1 * np.eye(len(a[0, 0]))) @ p / q.shape[2]


def nystromformer(q, k, w, normalizer):
    tokens, kernel = q.shape[2], w["conv.weight"].shape[1]
    q = q / np.sqrt(D)
    few_q, few_k = means(q, min(MEMORY, tokens)), means(k, min(MEMORY, tokens))
    left, middle, right = (
        normalise(normalizer, rows @ t(columns), w, f".{i}")
        for i, (rows, columns) in enumerate([(q, few_k), (few_q, few_k), (few_q, k)])
    )
    weights = left @ np.linalg.pinv(middle) @ right
    for head in range(H):
        for i in range(tokens):
            for tap in range(kernel):
                if 0 <= (j := i + tap - kernel // 2) < tokens:
                    weights[:, head, i, j] += w["conv.weight"][head, tap]
    return weights


def dilated(q, k, w, normalizer):
    tokens = q.shape[2]
    grid = math.ceil(math.sqrt(tokens))
    weights = w["gate.3.weight"] * (q @ t(k)) / tokens
    for branch, d in enumerate((1, 2, 4)):
        members, places = windows(tokens, d, 4)
        gate = w[f"gate.{branch}.weight"][:, 0, 0]
        for n in range(tokens):
            row, column = (4 * d * (i // (4 * d)) + i % d for i in divmod(n, grid))  # the window's first
            keys = [
                ((row + i * d) % grid * grid + (column + j * d) % grid) % tokens for i in range(4) for j in range(4)
            ]
            own = dict.fromkeys("cd", 1.0)
            if normalizer == "l2q":
                own = {x: w[f"normalizer.{branch}.{x}"][:, :, places[n]] for x in "cd"}
            scores = np.einsum("bhd,bhkd->bhk", q[:, :, n], k[:, :, keys]) / np.sqrt(D)
            values = formula(normalizer, scores, -1, **own)
            for i, key in enumerate(keys):
                weights[:, :, n, key] += gate * values[:, :, i]
    return weights


REFERENCES = {name: globals()[name] for name in NEW if name != "hamburger"}
NORMALIZED = [(name, normalizer) for name in WITH_NORMALIZER for normalizer in ("2quad", "2relu", "l2q")]


@pytest.mark.parametrize("tokens", [16, 17])
@pytest.mark.parametrize("name, normalizer", [(name, "softmax") for name in REFERENCES] + NORMALIZED)
def test_output_and_weights_are_the_formulas(name, normalizer, tokens):
    extra = {"iterations": 40} if name == "nystromformer" else {}  # the reference has the exact pseudo-inverse
    module, x, w = build(name, tokens, normalizer, **extra)
    q, k, v = qkv(x, w)
    weights = REFERENCES[name](q, k, w, normalizer)
    values = (weights @ v).transpose(0, 2, 1, 3).reshape(B, tokens, M)
    expected = values @ w["projection.weight"].T + w["projection.bias"]
    # The exact inverses are ill-conditioned here, and `SegmentMeans` holds its means' weights in float32.
    near = {"rtol": 1e-6, "atol": 1e-6} if name in ("nystromformer", "soft") else {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(module.weights(x).detach().numpy(), weights, **near)
    np.testing.assert_allclose(module(x).detach().numpy(), expected, **near)


@pytest.mark.parametrize("tokens", [1, 2, 9, 65])
@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "external" and ATTENTION[name].queried])
def test_weights_applied_to_the_values_are_the_output_for_any_number_of_tokens(name, tokens):
    module, x, w = build(name, tokens)
    values = module.weights(x) @ torch.from_numpy(qkv(x, w)[2])
    torch.testing.assert_close(module.projection(values.transpose(1, 2).flatten(2)), module(x), rtol=1e-9, atol=1e-10)
    assert module.weights(x).shape == (B, H, tokens, tokens)


def test_weights_of_external_attention_are_over_slots():
    module, x, _ = build("external")
    query = module.query(x).unflatten(-1, (H, D))
    weights = module.weights(x)
    assert weights.shape == (B, H, 16, MEMORY)
    values = module.values(weights).transpose(1, 2)
    torch.testing.assert_close((module.projection(values) + query).flatten(2), module(x))


def test_standard_attention_is_self_attention_with_the_projection_cut_in_three():
    merged, x, _ = build("self", normalizer="l2q")
    module, _, _ = build("standard", normalizer="l2q", size=2.0)
    assert not torch.allclose(module(x), merged(x))
    state = merged.state_dict()
    parts = zip(("query.weight", "key.weight", "value.weight"), state.pop("qkv.weight").chunk(3), strict=True)
    module.load_state_dict({**state, **dict(parts)})
    torch.testing.assert_close(module(x), merged(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.weights(x), merged.weights(x), rtol=1e-12, atol=1e-12)


# What the approximations converge to


def softmax_weights(module, x):
    q, k, _ = module.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
    return (q @ k.mT * D**-0.5).softmax(-1)


def smooth(tokens, side=7):
    """Tokens of a side x side image that change slowly from place to place, as landmarks are made for."""
    coarse = torch.randn(B, M, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    image = nn.functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=True)
    return image.flatten(2).mT + 0.1 * tokens


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", ["linformer", "linformer_heads"])
def test_linformer_with_the_identity_is_softmax_attention(name):
    module, x, _ = build(name, memory=64)
    for reduction in module.reduction if name == "linformer_heads" else [module.reduction]:
        reduction.weight.data.copy_(torch.eye(16))
    torch.testing.assert_close(module.weights(x), softmax_weights(module, x))


@pytest.mark.parametrize("name", ["linformer", "linformer_heads"])
def test_linformer_comes_closer_to_softmax_attention_as_k_grows(name):
    """With rows of E that are means of segments, on tokens that change slowly: 1, 7 and 24 of 49, and one per token."""
    errors = []
    for rows in (1, 7, 24, 49):
        module, x, _ = build(name, 49, memory=rows)
        x = smooth(x)
        segment = torch.arange(49) * rows // 49
        means = nn.functional.one_hot(segment, rows).T.double()
        means = means / means.sum(1, keepdim=True)
        for reduction in module.reduction if name == "linformer_heads" else [module.reduction]:
            reduction.weight.data.copy_(means)
        errors.append(distance(module.weights(x), softmax_weights(module, x)))
    assert errors == sorted(errors, reverse=True), errors
    assert errors[2] < 0.7 * errors[0] and errors[3] < 1e-12, errors


def test_performer_comes_closer_to_softmax_attention_with_the_root_of_its_features():
    errors = []
    for memory in (16, 128, 1024):
        module, x, _ = build("performer", size=0.5, memory=memory, eps=0.0)
        module.normalizer.eps = 0.0
        draws = []
        for _ in range(8):
            module.redraw()
            draws.append(distance(module.weights(x), softmax_weights(module, x)))
        errors.append(np.mean(draws))
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors
    assert errors[2] < 0.1, errors


def test_performer_draws_orthogonal_rows_of_the_lengths_of_gaussian_ones():
    module, _, _ = build("performer", memory=2 * D + 3)
    before = module.features.weight.clone()
    torch.manual_seed(1)
    module.redraw()
    rows = module.features.weight.clone()
    assert not torch.equal(rows, before) and not module.features.weight.requires_grad
    for block in (rows[:D], rows[D : 2 * D], rows[2 * D :]):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-4)
    torch.manual_seed(1)
    module.redraw()
    assert torch.equal(module.features.weight, rows)
    many, _, _ = build("performer", memory=4096)
    squares = many.features.weight.square().sum(1)  # chi-squared: mean D, variance 2 D
    assert abs(squares.mean() / D - 1) < 0.05 and abs(squares.var() / (2 * D) - 1) < 0.2
    assert abs(many.features.weight.mean()) < 0.03


def test_nystromformer_comes_closer_to_softmax_attention_and_reaches_it_at_a_landmark_per_token():
    errors = []
    # Six iterations leave directions that landmarks hardly span small, which an exact inverse blows up; at a landmark
    # for each token it is exact.
    for memory, iterations in ((1, 6), (4, 6), (16, 6), (49, 6), (49, 20)):
        module, x, _ = build("nystromformer", 49, memory=memory, iterations=iterations)
        x = smooth(x)
        module.conv.weight.data.zero_()
        errors.append(distance(module.weights(x), softmax_weights(module, x)))
    assert errors == sorted(errors, reverse=True), errors
    assert errors[3] < 0.1 and errors[4] < 1e-4, errors


def test_nystromformers_six_iterations_are_the_papers():
    module, _, _ = build("nystromformer")
    assert isinstance(module.inverse, PseudoInverse) and module.inverse.iterations == 6
    assert [build("nystromformer", n)[0].conv.weight.shape[1] for n in (16, 33, 64)] == [15, 33, 33]


def test_soft_approximates_the_gaussian_kernel_up_to_the_ridge():
    errors = []
    for memory in (1, 4, 16, 49):
        module, x, w = build("soft", 49, memory=memory, ridge=1e-3, iterations=40)
        x = smooth(x)
        query = qkv(x, w)[0]
        full = gaussian(query, query)
        ours = module.weights(x).detach().numpy() * 49
        errors.append(np.linalg.norm(ours - full) / np.linalg.norm(full))
    assert errors[0] > errors[1] > errors[2] > 10 * errors[3], errors
    assert np.linalg.norm(ours - full, 2, (-2, -1)).max() <= 1e-3


def test_reweighting_is_the_cosine_of_the_distance():
    factors = Reweight(17).factors()
    places = torch.arange(17)
    torch.testing.assert_close(factors.T @ factors, torch.cos(math.pi / 2 * (places[:, None] - places) / 17).double())
    factors = Reweight(16).factors()
    assert factors.shape == (4, 16)
    rows, columns = places[:16] // 4, places[:16] % 4
    cosines = [torch.cos(math.pi / 2 * (x[:, None] - x) / 4) for x in (rows, columns)]
    torch.testing.assert_close(factors.T @ factors, (cosines[0] * cosines[1]).double())


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 49, 64, 65, 196, 256])
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_windows_hold_every_token_at_its_place(tokens, dilation):
    members, places = windows(tokens, dilation, 4)
    assert len(members) % 16 == 0 and set(members) == set(range(tokens))
    assert len(set(places)) == tokens
    assert [members[place] for place in places] == list(range(tokens))
    if tokens == 256:
        assert sorted(members) == list(range(256))  # windows tile the grid: nothing is held twice


# Hamburger


def factorise(x, bases, steps):
    """NMF of features (N, M) by multiplicative updates of codes (N, R) and bases (M, R) of norm one."""
    bases = bases / np.sqrt(len(bases))
    codes = np.exp(x @ bases)
    codes /= codes.sum(1, keepdims=True)
    for _ in range(steps):
        codes = codes * (x @ bases) / (codes @ bases.T @ bases)
        bases = bases * (x.T @ codes) / (bases @ codes.T @ codes)
    return codes, bases


@pytest.mark.parametrize("tokens", [9, 16, 17])
def test_hamburger_is_nmf_by_multiplicative_updates(tokens, monkeypatch):
    monkeypatch.setattr(Divide, "eps", 0.0)
    module, x, w = build("hamburger", tokens)
    np.testing.assert_allclose((w["bases"] ** 2).sum(1), M, rtol=1e-6)
    for image, ours, weights in zip(x.numpy(), module(x).detach().numpy(), module.weights(x).detach().numpy()):
        features = np.maximum(image @ w["lower.weight"].T, 0)
        codes, bases = factorise(features, w["bases"][0], 6)
        codes = codes * (features @ bases) / (codes @ bases.T @ bases)
        expected = codes @ bases.T @ w["projection.weight"].T + w["projection.bias"]
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)
        per_feature = np.einsum("ir,mr,jr->mij", codes, bases / (bases @ codes.T @ codes), codes)
        np.testing.assert_allclose(weights[0], per_feature.mean(0), rtol=1e-9, atol=1e-12)
        # Applied to its feature, each matrix of which that is the mean is one more update of the bases.
        updated = bases * (features.T @ codes) / (bases @ codes.T @ codes)
        np.testing.assert_allclose(np.einsum("mij,jm->im", per_feature, features), codes @ updated.T, rtol=1e-9)


def test_hamburger_finds_a_factorisation_and_more_steps_a_better_one():
    errors = []
    for steps in (1, 6, 100):
        module, x, _ = build("hamburger", steps=steps, memory=8)
        features = torch.rand(B, 16, 8).double() @ torch.rand(B, 8, M).double()  # of rank 8
        codes, bases = module.factors(features)
        errors.append(distance(codes @ bases.mT / 8, features))
    assert errors[0] > errors[1] > errors[2] and errors[1] < 0.2 and errors[2] < 0.05, errors


def test_hamburgers_gradient_is_that_of_the_last_update_in_training():
    module, x, w = build("hamburger")
    codes, bases = module.decompose(module.activation(module.lower(x)))
    codes, bases = codes.detach(), bases.detach()
    x.requires_grad_()
    features = (x @ module.lower.weight.T).relu()
    size, rank = M, MEMORY
    denominator = codes @ bases.mT @ bases / (size * rank) + EPS
    last = codes * (features @ bases / size) / denominator
    expected_out = last @ bases.mT / rank @ module.projection.weight.T + module.projection.bias
    weights = torch.randn_like(expected_out)
    expected = torch.autograd.grad((weights * expected_out).sum(), (x, module.lower.weight))
    module.train()
    out = module(x)
    torch.testing.assert_close(out, expected_out)
    ours = torch.autograd.grad((weights * out).sum(), (x, module.lower.weight))
    torch.testing.assert_close(ours, expected)
    full = torch.autograd.grad((weights * module.eval()(x)).sum(), x)[0]
    assert not torch.allclose(full, expected[0], rtol=1e-2)


def test_hamburgers_bases_are_fixed_and_kept():
    module, x, w = build("hamburger")
    assert w["bases"].shape == (1, M, MEMORY) and not module.bases.requires_grad
    assert build("hamburger", 3)[0].bases.shape == (1, M, 3)
    other, _, _ = build("hamburger", size=2.0)
    with torch.no_grad():
        other.bases.copy_(torch.rand_like(other.bases))
    assert not torch.allclose(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


# All mechanisms


@pytest.mark.parametrize("name", [name for name in NEW if name != "hamburger"])
def test_gradients(name, monkeypatch):
    extra = {}
    if name == "performer":  # the largest exponents count as constants, since they cancel: exactly if there is no eps
        monkeypatch.setattr(Divide, "eps", 0.0)
        extra = {"eps": 0.0}
    module, x, _ = build(name, 5, "l2q", **extra)
    assert torch.autograd.gradcheck(module, x[:1].requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("name", WITH_NORMALIZER)
def test_dropout_only_in_training(name):
    module, x, _ = build(name, attention_dropout=0.5)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))
    assert torch.isfinite(module(x)).all()


@pytest.mark.parametrize("name", ATTENTION)
def test_cost_grows_with_the_tokens_as_promised(name):
    """From 256 to 1024 tokens, two doublings; what the projections cost, always linear, does not count."""
    flops = []
    for tokens in (256, 1024):
        with torch.device("meta"):
            extra = {"memory": 16} if name in SIZED else {}
            module = mechanism(name, 64, 4, tokens, **extra).eval()
            with FlopCounterMode(display=False) as counter:
                module(torch.empty(1, tokens, 64))
        linears = [child for child_name, child in module.named_children() if child_name in PROJECTIONS]
        flops.append(counter.get_total_flops() - sum(2 * tokens * linear.weight.numel() for linear in linears))
    ratio = flops[1] / flops[0]
    if name in ("self", "standard"):
        assert ratio == 16
    else:
        assert 2.5 < ratio <= 2.2**2, ratio


PROJECTIONS = ("qkv", "query", "key", "value", "projection", "lower")


METHODS = {"flatten", "unflatten", "transpose", "permute", "unbind", "squeeze", "unsqueeze", "reshape"}
FUNCTIONS = {operator.add, operator.sub, operator.mul, operator.getitem, torch.cat}


@pytest.mark.parametrize("network", PRESETS)
@pytest.mark.parametrize("name", NEW)
def test_graph_has_nothing_but_known_operations(name, network):
    config = preset(network, attention=name, layers=1)
    with torch.device("meta"):
        model = build_network(config)
    graph = trace(model)
    modules, called = (Operation, nn.Linear, nn.ReLU), []
    for node in graph.graph.nodes:
        if node.op == "call_module" and ".attention." in node.target:
            assert isinstance(graph.get_submodule(node.target), modules), node.target
            called.append(node.target)
        elif node.op == "call_method":
            assert node.target in METHODS
        elif node.op == "call_function":
            assert node.target in FUNCTIONS
        elif node.op == "get_attr":
            assert node.target in dict(model.named_parameters())
    assert len(called) == len(set(called)) >= 5  # a module per use
    x = torch.empty(2, config.channels, config.image, config.image, device="meta")
    assert graph(x).shape == (2, config.classes)


@pytest.mark.parametrize("name", NEW)
def test_graph_computes_what_the_network_does(name):
    torch.manual_seed(0)
    model = build_network(preset("cct_2_3x1", attention=name)).eval()
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(trace(model)(images), model(images))


def test_normaliser_options_reach_every_normaliser():
    for name in ("nystromformer", "dilated"):
        module = mechanism(name, M, H, 16, normalizer="l2q", l2q_granularity="head")
        assert [normalizer.c.shape for normalizer in module.normalizer] == [(1, H, 1, 1)] * 3


@pytest.mark.parametrize("name", ["cosformer", "soft", "nystromformer", "dilated"])
def test_constants_made_in_inference_serve_training(name):
    module = mechanism(name, M, H, 36)
    with torch.inference_mode():
        module.eval()(torch.randn(1, 36, M))
    module.train()(torch.randn(1, 36, M)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
