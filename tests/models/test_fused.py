"""The fused attention against the plain form: values, gradients, dropout, and where it stays out of the way."""

import pytest
import torch
from sizes import Sizes
from torch import nn

from salvit_core import CCT, preset
from salvit_core.models.attention import fused
from salvit_core.models.attention.external import ExternalAttention
from salvit_core.models.attention.headwise import ExternalHeads, SelfHeads
from salvit_core.models.attention.self_attention import SelfAttention
from salvit_core.models.graph import trace

B, N, M, H, S = 7, 5, 12, 3, 6
D = M // H


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fuse even here, in pieces of 2 images, the last one smaller."""
    monkeypatch.setattr(fused, "TOKENS", 1)
    monkeypatch.setattr(fused, "PIECE", 2 * N * N)


def module(name, dropout=0.0, dtype=torch.double, **options):
    """An attention in training, no two of its parameters alike, and its tokens."""
    torch.manual_seed(0)
    learnt = {f"l2q_{option}": value for option, value in options.items()}
    name, normalizer = (name.removesuffix(" softmax"), "softmax") if name.endswith(" softmax") else (name, "l2q")
    sizes = Sizes(M, H, N, normalizer, dropout, S, **learnt)
    made = {
        "self": lambda: SelfAttention(sizes),
        "self heads": lambda: SelfHeads(sizes, H),
        "external": lambda: ExternalAttention(sizes),
        "external heads": lambda: ExternalHeads(sizes, H),
    }[name]().to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.train(), torch.randn(B, N, M, dtype=dtype, requires_grad=True)


FUSED = ("self", "self heads", "external", "external heads")
SOFTMAX = ("self softmax", "self heads softmax")


def gradients(net, x, values, seed=3):
    given = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return torch.autograd.grad(values, [x, *net.parameters()], given.to(values.dtype))


def plain(net, x, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fused, "ENABLED", False)
        return net(x)


@pytest.mark.parametrize("learn_c, learn_d", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("granularity", ["element", "head", "global"])
@pytest.mark.parametrize("name", FUSED)
def test_values_and_gradients_are_the_plain_forms(name, granularity, learn_c, learn_d, monkeypatch):
    options = dict(granularity=granularity, learn_c=learn_c, learn_d=learn_d, initial_c=0.7, initial_d=1.3)
    net, x = module(name, **options)
    ours, theirs = net(x), plain(net, x, monkeypatch)
    assert "Attention" in str(fused_node(ours))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients(net, x, ours), gradients(net, x, theirs), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", SOFTMAX)
def test_softmaxs_values_and_gradients_are_the_plain_forms(name, monkeypatch):
    net, x = module(name)
    with torch.no_grad():
        x *= 3  # scores far from each other
    ours, theirs = net(x), plain(net, x, monkeypatch)
    wanted = {"self softmax": "ScaledDotProductFlash", "self heads softmax": "_SoftmaxAttentionBackward"}[name]
    assert fused_node(ours).startswith(wanted) and fused_node(theirs) is None
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients(net, x, ours), gradients(net, x, theirs), rtol=1e-10, atol=1e-11)


def fused_node(values):
    """The fused function in the graph of `values`, or None."""
    seen, rest = set(), [values.grad_fn]
    while rest:
        node = rest.pop()
        if node is None or node in seen:
            continue
        if node.name().startswith(("_SelfAtt", "_SoftmaxAtt", "_ExternalAtt", "ScaledDotProduct")):
            return node.name()
        seen.add(node)
        rest += [before for before, _ in node.next_functions]
    return None


@pytest.mark.parametrize("name", FUSED + SOFTMAX)
def test_gradcheck(name):
    net, x = module(name)
    names, parameters = zip(*net.named_parameters())

    def values(x, *given):
        return torch.func.functional_call(net, dict(zip(names, given)), (x,))

    assert torch.autograd.gradcheck(values, (x, *parameters), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("name", FUSED + SOFTMAX)
def test_dropout_is_the_plain_forms_with_the_same_mask(name, monkeypatch):
    net, x = module(name, dropout=0.25)
    masks, draw = [], fused.mask
    with monkeypatch.context() as patch:
        patch.setattr(fused, "mask", lambda *arguments: masks.append(draw(*arguments)) or masks[-1])
        ours = net(x)
    if name.startswith("external"):
        kept = -torch.cat(masks).double().transpose(1, 2)  # (B, H, N, S)
    else:
        kept = -torch.cat(masks).double().unflatten(0, (H, B)).transpose(0, 1)  # (B, H, N, N)
    assert 0.6 < kept.mean() < 0.9

    class SameMask(nn.Module):
        def forward(self, weights):
            return weights * kept / (1 - 0.25)

    net.dropout = SameMask()
    theirs = plain(net, x, monkeypatch)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients(net, x, ours), gradients(net, x, theirs), rtol=1e-10, atol=1e-11)


def test_eps_is_in_it(monkeypatch):
    """With weights this small eps = 2^-14 is most of the sum."""
    net, x = module("self", learn_c=False, learn_d=False, initial_c=1e-3, initial_d=1e-3)
    ours = net(x)
    torch.testing.assert_close(ours, plain(net, x, monkeypatch), rtol=1e-11, atol=1e-13)
    net.normalizer.eps = 0.0
    assert (net(x) - ours).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", fused._INTEGER)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_every_place_of_a_mask_is_dropped_with_the_same_probability(dtype, p):
    torch.manual_seed(0)
    mask = fused.mask((100_000, 4), p, dtype)
    assert set(mask.unique().tolist()) == {0, -1}
    shares = (mask == 0).double().mean(0)  # four draws share 64 bits: also those with the sign
    assert (shares - p).abs().max() < 5 * (p * (1 - p) / 100_000) ** 0.5


def test_masks_of_any_size_and_a_probability_near_one():
    assert fused.mask((3, 5, 7), 0.1, torch.bfloat16).shape == (3, 5, 7)
    assert fused.mask((64, 64), 0.999999, torch.bfloat16).float().mean() > -0.01


@pytest.mark.parametrize("dtype", fused._INTEGER)
def test_dropout_drops_and_scales_as_torchs_does(dtype):
    drop, x = fused.Dropout(0.25), torch.rand(50, 40, dtype=dtype).add(1).mT.requires_grad_()
    y = drop(x)
    kept = y != 0
    assert 0.65 < kept.double().mean() < 0.85
    torch.testing.assert_close(y, kept * x / 0.75, rtol=0.01, atol=0)
    (grad,) = torch.autograd.grad(y, x, 3 * torch.ones_like(y))
    torch.testing.assert_close(grad, kept.to(dtype) * 4, rtol=0.01, atol=0)
    assert torch.equal(drop.eval()(x), x)


def test_dropout_follows_the_global_seed_and_the_switch(monkeypatch):
    drop, x = fused.Dropout(0.5), torch.ones(100)

    def drawn(module, seed=0):
        torch.manual_seed(seed)
        return module(x)

    assert torch.equal(drawn(drop), drawn(drop)) and not torch.equal(drawn(drop), drawn(drop, seed=1))
    assert not torch.equal(drawn(drop), drawn(nn.Dropout(0.5)))
    assert (drawn(fused.Dropout(1.0)) == 0).all() and torch.equal(drawn(fused.Dropout(0.0)), x)
    monkeypatch.setattr(fused, "ENABLED", False)
    assert torch.equal(drawn(drop), drawn(nn.Dropout(0.5)))


@pytest.mark.parametrize("name", FUSED + SOFTMAX)
def test_dropout_follows_the_global_seed(name):
    net, x = module(name, dropout=0.5)
    torch.manual_seed(1)
    first = net(x)
    again = net(x)
    torch.manual_seed(1)
    assert torch.equal(net(x), first)
    assert not torch.equal(again, first)


@pytest.mark.parametrize("name", FUSED + SOFTMAX)
def test_bfloat16_is_as_near_to_float64_as_the_plain_form(name, monkeypatch):
    net, x = module(name)
    exact = plain(net, x, monkeypatch)
    wanted = [exact, *gradients(net, x, exact)]
    net, x = module(name, dtype=torch.float32)
    with torch.no_grad():
        for parameter, given in zip([x, *net.parameters()], [*(t.detach() for t in inputs(name))]):
            parameter.copy_(given)
    errors = []
    for enabled in (True, False):
        monkeypatch.setattr(fused, "ENABLED", enabled)
        with torch.autocast("cpu", torch.bfloat16):
            values = net(x)
        assert values.dtype == torch.bfloat16
        found = [values, *gradients(net, x, values)]
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted)])
    for ours, theirs in zip(*errors):
        assert ours < max(3 * theirs, 0.02)


def inputs(name):
    net, x = module(name)
    return [x, *net.parameters()]


def test_it_stays_out_of_evaluation_other_normalisers_and_short_rows(monkeypatch):
    net, x = module("self")
    assert fused_node(net(x)) == "_SelfAttentionBackward"
    assert fused_node(net.eval()(x)) is None
    monkeypatch.setattr(fused, "TOKENS", N + 1)
    assert fused_node(net.train()(x)) is None
    for name in SOFTMAX:
        other, tokens = module(name)
        assert fused_node(other(tokens)) is None
    monkeypatch.setattr(fused, "TOKENS", 1)
    net.dropout.p = 1.0  # 1 / (1 - p)
    assert net(x).isfinite().all()
    for normalizer in ("2relu", "2quad"):
        model = CCT(preset("cct_2_3x1", normalizer=normalizer)).train()
        assert fused_node(model(torch.randn(2, 1, 8, 8))) is None
    model = CCT(preset("cct_2_3x1", normalizer="softmax")).train()
    assert fused_node(model(torch.randn(2, 1, 8, 8))) == "_SoftmaxAttentionBackward"
    assert fused_node(model.eval()(torch.randn(2, 1, 8, 8))) is None


def test_the_graph_of_a_network_in_training_is_the_plain_one():
    model = CCT(preset("cct_2_3x1", normalizer="l2q")).train()
    assert not any("fused" in str(node.target) or "apply" in str(node.target) for node in trace(model).graph.nodes)


# On a GPU


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Its forms, on the CPU: no kernels are generated, but what they would compute is traced as it is there."""
    monkeypatch.setattr(fused, "on_gpu", lambda attention, x: attention.training and fused.ENABLED)
    monkeypatch.setattr(fused, "TOKENS", 10**9)  # not the form for a CPU
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="aot_eager", **options))
    fused._compiled.cache_clear()
    yield
    fused._compiled.cache_clear()


def forms(name, normalizer, monkeypatch):
    """Values and gradients of both forms of one attention, without dropout."""
    torch.manual_seed(0)
    sizes = Sizes(M, H, N, normalizer, 0.0, S)
    made = {"self": SelfAttention, "external": ExternalAttention}.get(name)
    net = (made(sizes) if made else {"self heads": SelfHeads, "external heads": ExternalHeads}[name](sizes, H)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(B, N, M, dtype=torch.double, requires_grad=True)
    ours, theirs = net(x), plain(net, x, monkeypatch)
    return net, [ours, *gradients(net, x, ours)], [theirs, *gradients(net, x, theirs)]


@pytest.mark.parametrize("normalizer", ["softmax", "l2q", "2quad"])
@pytest.mark.parametrize("name", FUSED)
def test_a_gpus_values_and_gradients_are_the_plain_forms(name, normalizer, as_on_a_gpu, monkeypatch):
    called = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or attend(*a, **k)
    )
    _, ours, theirs = forms(name, normalizer, monkeypatch)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if name == "self" and normalizer == "softmax":
        assert called
    else:
        assert not called and fused._compiled.cache_info().currsize == 1


def test_on_a_gpu_all_layers_are_compiled_at_once(as_on_a_gpu):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = CCT(preset("cct_2_3x1", normalizer="l2q", layers=5)).train()
    for count in (4, 3, 4):
        model(torch.randn(count, 1, 8, 8)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # a whole batch, and a smaller one
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("normalizer", ["softmax", "l2q", "2quad"])
def test_a_gpu_agrees_with_itself(normalizer):
    torch.manual_seed(0)
    net = SelfAttention(Sizes(M, H, N, normalizer, 0.0, S)).cuda().train()
    x = torch.randn(B, N, M, device="cuda")
    torch.testing.assert_close(net(x), net.eval()(x), rtol=1e-4, atol=1e-4)
