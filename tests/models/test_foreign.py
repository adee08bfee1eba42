"""Networks that others wrote, adopted: the same function, in operations of ours, or a refusal by name and place."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from salvit_core import adopt, cost
from salvit_core.models import foreign, operations
from salvit_core.models.activations import Quad, TanhGELU
from salvit_core.models.graph import trace
from salvit_core.models.normalizers import L2Q, Softmax, TwoQuad
from salvit_core.models.operations import KINDS, Divide, MatMul, Resample


class Does(nn.Module):
    """A function of the images, and modules that it may use."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, images):
        return self.function(self, images)


def settled(module, seed=0):
    """Weights, and statistics of BatchNorm, none of which is what it begins as."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if name == "running_var":
                tensor.data.uniform_(0.5, 2.0, generator=generator)
            elif tensor.is_floating_point():
                tensor.data.add_(torch.empty_like(tensor).uniform_(-0.3, 0.3, generator=generator))
    return module.double().eval()


def pictures(batch=3, channels=4, side=8):
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(x):
    return x.flatten(2).transpose(1, 2)  # (B, 64, 4)


def windows(x):
    """Swin's: rolled, cut into windows of 4 x 4, put together again."""
    x = torch.roll(x.permute(0, 2, 3, 1), (-2, -2), (1, 2))
    b, h, w, c = x.shape
    x = x.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
    return x, (b, h, w, c)


def windowed(net, x):
    x, (b, h, w, c) = windows(x)
    x = net.linear(x).softmax(-1).view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
    return torch.roll(x, (2, 2), (1, 2))


def class_token(net, x):
    x = tokens(x)
    return (torch.cat([net.token.expand(x.shape[0], -1, -1), x], 1) + net.position)[:, 0]


def excited(net, x):
    """Squeeze and excite: a product of two activations that broadcasts."""
    return x * net.up(F.silu(net.down(x.mean((2, 3), keepdim=True)))).sigmoid()


def linear_attention(net, x):
    query, key, value = F.relu(net.qkv(tokens(x))).chunk(3, -1)
    value = F.pad(value, (0, 1), value=1.0)
    mixed = query @ (key.transpose(-1, -2) @ value)
    return mixed[..., :-1] / (mixed[..., -1:] + 1e-5)


def masked(net, x):
    x = tokens(x).reshape(x.shape[0], 64, 2, 2).transpose(1, 2)
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=0.7)


def in_place(net, x):
    """What is written to is read by its old name."""
    y = net.conv(x)
    F.relu_(y)
    y += 1
    return y * 2


def biased(net, x):
    """A table of biases, looked up by place, as Swin has."""
    places = torch.arange(64 * 64).reshape(64, 64) % 7
    scores = tokens(x) @ tokens(x).transpose(1, 2) / 2 + net.table[places]
    return scores.softmax(-1) @ tokens(x)


parameter = nn.Parameter
NETS = {
    "attention of torch.nn": lambda: Does(lambda n, x: n.a(tokens(x), tokens(x), tokens(x))[0], a=mha()),
    "an encoder layer": lambda: Does(lambda n, x: n.a(tokens(x)), a=encoder()),
    "scaled dot product": lambda: Does(lambda n, x: F.scaled_dot_product_attention(*[tokens(x)] * 3)),
    "causal attention": lambda: Does(lambda n, x: F.scaled_dot_product_attention(*[tokens(x)] * 3, is_causal=True)),
    "masked attention": lambda: Does(masked),
    "linear attention": lambda: Does(linear_attention, qkv=nn.Linear(4, 12)),
    "products by name": lambda: Does(
        lambda n, x: torch.einsum("bchw,bcvw->bvhc", x, torch.einsum("bchw, bkhw -> bckh", x, x.relu()))
    ),
    "affine": lambda: Does(
        lambda n, x: torch.addcmul(n.b, n.a, x) + x.addcmul(x, x, value=0.5), a=param(8), b=param(8)
    ),
    "a table of biases": lambda: Does(biased, table=parameter(torch.zeros(7))),
    "windows": lambda: Does(windowed, linear=nn.Linear(4, 4)),
    "a class token": lambda: Does(class_token, token=param(1, 1, 4), position=param(1, 65, 4)),
    "squeeze and excite": lambda: Does(excited, down=nn.Conv2d(4, 2, 1), up=nn.Conv2d(2, 4, 1)),
    "in place": lambda: Does(in_place, conv=nn.Conv2d(4, 4, 3)),
    "linear without bias": lambda: Does(lambda n, x: n.a(tokens(x)), a=nn.Linear(4, 5, bias=False)),
    "a matrix of one's own": lambda: Does(lambda n, x: tokens(x) @ n.a, a=param(4, 5)),
    "a matrix from the left": lambda: Does(lambda n, x: n.a @ tokens(x), a=param(5, 64)),
    "convolution in groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "convolution of a channel each": lambda: nn.Conv2d(4, 8, (3, 2), (2, 1), (1, 0), groups=4),
    "convolution, dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same", bias=False),
    "convolution, even and same": lambda: nn.Conv2d(4, 6, 2, padding="same"),
    "batch norm folded": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
    "batch norm first": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 6, 3)),
    "batch norm of what is read twice": lambda: Does(
        lambda n, x: n.norm(n.conv(x)) + n.conv(x), conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)
    ),
    "batch norm beside": lambda: Does(lambda n, x: twice(n.norm, n.conv(x)), conv=nn.Conv2d(4, 4, 1), norm=bn(4)),
    "batch norm of features": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 6), nn.BatchNorm1d(6)),
    "layer norm": lambda: Does(lambda n, x: n.a(tokens(x)), a=nn.LayerNorm(4)),
    "layer norm of pictures": lambda: nn.LayerNorm((4, 8, 8)),
    "layer norm without bias": lambda: Does(lambda n, x: n.a(tokens(x)), a=nn.LayerNorm(4, bias=False)),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "pooling": lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "max pool of windows that are not full": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "average pool with pads": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "average pool that counts pads": lambda: nn.AvgPool2d((3, 2), (2, 1), (1, 0)),
    "adaptive pool to a grid": lambda: nn.AdaptiveAvgPool2d((3, 5)),
    "adaptive pool to more": lambda: nn.AdaptiveAvgPool2d(11),
    "upsampling": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "upsampling to the nearest": lambda: nn.Upsample(size=(11, 13)),
    "activations": lambda: nn.Sequential(
        *(nn.LeakyReLU(0.5), nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Conv2d(4, 4, 1)),
        *(nn.Hardtanh(-0.5, 0.7), nn.Tanh(), nn.Sigmoid(), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.Hardsigmoid()),
    ),
    "clamps": lambda: Does(lambda n, x: x.clamp(-1, 2).clamp(min=0)),
    "cat, split and stack": lambda: Does(
        lambda n, x: torch.cat([*x.split([1, 3], 1)[::-1], torch.stack(x.chunk(4, 1), 1).squeeze(2)], 1)
    ),
    "layer scale": lambda: Does(lambda n, x: x + x * n.a, a=param(4, 1, 1)),
    "places": lambda: Does(lambda n, x: x[:, [3, 0, 0]][..., 2:-1, ::2].select(1, -1).unbind(1)[2]),
    "numbers": lambda: Does(lambda n, x: 3 - 2 * x / 5 - (x - 1) ** 2 + (-x).square()),
    "sums": lambda: Does(lambda n, x: x.sum(1) + x.mean(1) - x.mean((1, 3))[:, None]),
    "constants": lambda: Does(lambda n, x: x * torch.linspace(0, 1, 8, dtype=x.dtype) + x.new_ones(1, 4, 1, 1)),
    "what grows": lambda: Does(lambda n, x: x[:, :1] + n.a, a=param(4, 1, 1)),
}


def mha():
    return nn.MultiheadAttention(4, 2, batch_first=True)


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 8, activation="gelu", batch_first=True, norm_first=True)


def bn(channels):
    return nn.BatchNorm2d(channels)


def twice(norm, x):
    """Something else reads what goes into the norm."""
    return norm(x) * 0.5 + x


def param(*shape):
    return nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("name", NETS)
def test_an_adopted_network_computes_what_the_network_does(name):
    """In float64, for another number of images than it was read with."""
    torch.manual_seed(0)
    network = settled(NETS[name]())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    graph = adopt(network, pictures(2))
    with torch.no_grad():
        exact = network(pictures())
        for found in (graph(pictures()), trace(graph)(pictures()), graph(pictures(1))):
            assert found.shape[1:] == exact.shape[1:]
            assert (found - exact[: len(found)]).abs().max() <= 1e-12 * exact.abs().max()
    assert exact.std() > 0.01
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    kinds = {type(graph.get_submodule(node.target)) for node in graph.graph.nodes if node.op == "call_module"}
    assert kinds <= set(operations.known())


def test_every_node_knows_its_place_and_a_copy_keeps_it():
    graph = adopt(settled(NETS["an encoder layer"]()), pictures())
    places = [(node.meta["layer"], node.meta["kind"]) for node in graph.graph.nodes]
    assert [(node.meta["layer"], node.meta["kind"]) for node in trace(graph).graph.nodes] == places
    assert {kind for _, kind in places} <= set(KINDS)
    found = {name: getattr(module, "kind", None) for name, module in graph.named_modules()}
    assert found["a.self_attn.in_proj"] == found["a.self_attn.out_proj"] == "projection"
    assert found["a.linear1"] == "MLP" and found["a.norm1"] == "LayerNorm"
    kinds = [module.kind for module in graph.modules() if isinstance(module, MatMul)]
    assert kinds == ["scores", "values"]


@pytest.mark.parametrize(
    "module, path",
    [
        (nn.Softplus(), "softplus (1): relu could stand in for it"),
        (nn.Mish(), "mish (1): silu or hardswish could stand in for it"),
        (nn.ELU(), "elu (1): relu or silu could stand in for it"),
        (nn.ConvTranspose2d(4, 4, 2), "conv_transpose2d (1): interpolation and a convolution could stand in for it"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "pad, circular (1): write it with other operations"),
        (nn.InstanceNorm2d(4), "instance_norm (1): batch_norm with running statistics could stand in for it"),
        (nn.BatchNorm2d(4, track_running_stats=False), "batch_norm with the batch's own statistics (1): "),
        (nn.MaxPool2d(2, dilation=2), "max_pool2d, dilated (1): "),
        (Does(lambda n, x: x.max(1)[0]), "max (1): max_pool2d, or a mean could stand in for it"),
        (nn.LogSoftmax(1), "log_softmax (1): the logits before it"),
        (Does(lambda n, x: x.abs().sqrt()), "sqrt (1): layer_norm, which divides by a root could stand in for it"),
        (Does(lambda n, x: x - x.mean(0)), "sum over the batch (1): "),
        (Does(lambda n, x: x[:2]), "slice of the batch (1): "),
        (
            Does(lambda n, x: torch.einsum("bchw->bc", x)),
            "einsum but of two activations, each dimension named once (1): ",
        ),
        (
            Does(lambda n, x: torch.einsum("bchw,bcv->bhv", x, x[..., 0])),
            "einsum that sums a dimension of one activation",
        ),
        (Does(lambda n, x: x**3), "pow but for the square (1): "),
    ],
)
def test_what_cannot_be_run_is_refused_by_name_and_place(module, path):
    network = nn.Sequential(nn.Conv2d(4, 4, 1), module, nn.Softsign()).eval()
    with pytest.raises(ValueError) as refused:
        adopt(network, torch.randn(2, 4, 8, 8))
    lines = str(refused.value).split(";\n")
    assert any(line.startswith(f"no private protocol for {path}") for line in lines), lines
    assert any("abs (2)" in line for line in lines), "all of them at once"


def written_part(net, x):
    y = net.conv(x)
    y[:, 0].mul_(2)
    return y


def written_under_a_view(net, x):
    y = net.conv(x)
    part = y[:, 0]
    y.mul_(2)
    return part


def written_by_another_name(net, x):
    y = net.conv(x)
    F.dropout(y, training=False).mul_(2)
    return y


@pytest.mark.parametrize("forward", [written_part, written_under_a_view, written_by_another_name])
def test_a_view_that_is_written_to_is_refused(forward):
    """Else the graph would give another answer than the network: it knows no memory that two names share."""
    with pytest.raises(ValueError, match=r"mul_ of a view \(the network itself\)"):
        adopt(Does(forward, conv=nn.Conv2d(4, 4, 1)), torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize(
    "network, message",
    [
        (Does(lambda n, x: x if x.sum() > 0 else -x), "Does cannot be traced by torch.fx, nor by torch.export"),
        (Does(lambda n, x: {"logits": x}), "does not return one tensor"),
        (Does(lambda n, x: (x, x)), "does not return one tensor"),
        (Does(lambda n, x: x.reshape(len(x), -1)), "is written for one size of batch, or gives no answer for each"),
        (Does(lambda n, x: x[:, 0].transpose(0, 1)), "is written for one size of batch, or gives no answer for each"),
        (nn.Linear(5, 2), "Linear cannot be traced by torch.fx, nor by torch.export for images of shape"),
    ],
)
def test_what_is_no_map_of_images_to_logits_is_refused(network, message):
    with pytest.raises(ValueError, match=message):
        adopt(network, torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize("option", ["softmax", "gelu"])
def test_an_unknown_stand_in_is_refused(option):
    with pytest.raises(ValueError, match=f"{option} 'cube' is unknown: choose from "):
        adopt(nn.Identity(), torch.randn(2, 4, 8, 8), **{option: "cube"})


def test_swaps_are_by_rule_and_can_be_trained():
    network = NETS["an encoder layer"]()
    graph = adopt(network, torch.randn(2, 4, 8, 8), softmax="2quad", gelu="quad")
    kinds = [type(module) for module in graph.modules()]
    assert kinds.count(TwoQuad) == kinds.count(Quad) == 1 and Softmax not in kinds and nn.GELU not in kinds
    assert cost.parameters(graph) == cost.parameters(network)
    plain = adopt(network, torch.randn(2, 4, 8, 8))
    images = torch.randn(2, 4, 8, 8)
    assert (graph(images) - plain(images)).abs().max() > 1e-3
    graph.train()
    graph(images).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in graph.parameters())
    learnt = adopt(network, images, softmax="l2q", gelu="learned_quad")
    (normalizer,) = [module for module in learnt.modules() if isinstance(module, L2Q)]
    assert normalizer.d.shape == (1, 2, 64, 64)
    learnt(images).sum().backward()
    assert normalizer.d.grad.abs().max() > 0


def test_weights_keep_their_names_and_what_is_shared_stays_shared():
    shared = nn.Linear(4, 4)
    network = Does(lambda n, x: n.a(n.a(tokens(x))) + n.b(tokens(x)), a=shared, b=nn.Linear(4, 4))
    network.b.weight = shared.weight
    graph = adopt(network, torch.randn(2, 4, 8, 8))
    assert cost.parameters(graph) == cost.parameters(network) == 16 + 4 + 4
    assert dict(graph.named_parameters()).keys() == {"a.weight", "a.bias", "b.bias"}
    assert [name for name, _ in graph.named_children()] == ["a", "b"]  # what is called twice is one module
    encoder = adopt(NETS["an encoder layer"](), torch.randn(2, 4, 8, 8))
    assert {"a.linear1.weight", "a.norm2.bias", "a.self_attn.out_proj.weight"} <= dict(
        encoder.named_parameters()
    ).keys()


def test_costs_take_a_network_as_it_is():
    network = settled(NETS["batch norm folded"]()).float()
    assert cost.flops(network, images=torch.zeros(2, 4, 8, 8)) == 2 * 4 * 9 * 6 * 36 + 6 * 36  # convolution and ReLU
    table = cost.breakdown(network, torch.zeros(1, 4, 8, 8), repeats=1)
    assert set(table["kind"]) >= {"convolution", "activation"}


def test_a_division_takes_the_small_number_that_keeps_it_from_zero():
    """So that a protocol knows how near to zero a sum can come; what else reads the sum still gets it."""

    class Ratio(nn.Module):
        def forward(self, x):
            total = x.square().sum(-1, keepdim=True) + 2.0**-14
            return torch.cat([x / total, total], -1)

    example = torch.randn(2, 5)
    graph = adopt(Ratio(), example)
    (division,) = [module for module in graph.modules() if isinstance(module, Divide)]
    assert division.eps == 2.0**-14
    torch.testing.assert_close(graph(example), Ratio()(example))
    alone = adopt(Does(lambda n, x: x / (x.square().sum(-1, keepdim=True) + 2.0**-14)), example)
    assert [node.target for node in alone.graph.nodes if node.op == "call_function"] == []


def test_what_is_added_to_numbers_of_any_sign_is_no_eps():
    """A division reaches down to its eps only if nothing below zero is added to it."""
    example = -torch.rand(2, 5)
    graph = adopt(Does(lambda n, x: x / (2.0 - torch.tanh(x))), example)
    (division,) = [module for module in graph.modules() if isinstance(module, Divide)]
    assert division.eps == 0 and division.scale == 1
    torch.testing.assert_close(graph(example), example / (2.0 - torch.tanh(example)))


def test_a_denominator_is_sized_with_its_eps():
    """Sums that are next to nothing: it is the eps that is divided by, and it must not be beyond what is covered."""
    example = 1e-6 * torch.randn(2, 5)
    graph = adopt(Does(lambda n, x: x / (x.square().sum(-1, keepdim=True) + 2.0**-14)), example)
    (division,) = [module for module in graph.modules() if isinstance(module, Divide)]
    assert (division.eps, division.scale) == (2.0**-14, 2.0**-15)


def test_divisions_that_differ_in_their_eps_are_not_the_same_to_two_parties():
    assert repr(Divide()) == "Divide(scale=1)"  # as it was, so that what is on record keeps its fingerprint
    sized = Divide()
    sized.sized = True
    assert len({repr(sized), *(repr(Divide(eps=eps)) for eps in (None, 0.0, 1e-5))}) == 4


def test_a_division_is_told_the_size_of_its_denominators():
    network = settled(NETS["linear attention"]())
    scales = []
    for factor in (1, 100):
        graph = adopt(network, pictures() * factor)
        (division,) = [module for module in graph.modules() if isinstance(module, Divide)]
        scales.append(division.scale)
        assert math.log2(division.scale).is_integer()
    assert scales[1] > 1000 * scales[0]


def test_only_parameters_are_learnt():
    graph = adopt(Does(lambda n, x: x * torch.linspace(0, 1, 8) + torch.ones(8)), torch.randn(2, 4, 8, 8))
    assert not [weight for weight in graph.parameters() if weight.requires_grad]


def test_a_pool_is_a_matrix_on_either_side():
    module = Resample([[0.5, 0.5]], [[1.0, 0.0], [0.25, 0.75]])
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert torch.equal(module(x), torch.tensor([[[2.0, 2.75]]]))
    assert repr(module) != repr(Resample([[0.5, 0.5]], [[1.0, 0.0], [0.75, 0.25]]))


def test_the_exact_and_the_other_gelu_are_told_apart():
    graph = adopt(nn.Sequential(nn.GELU(), nn.GELU("tanh")), torch.randn(2, 4, 8, 8))
    assert [type(module) for module in graph.children()] == [nn.GELU, TanhGELU]


def test_what_is_traced_is_not_read_again(monkeypatch):
    monkeypatch.setattr(foreign, "adopt", lambda *a, **k: pytest.fail("adopted"))
    network = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    assert isinstance(foreign.read(network, torch.zeros(1, 1, 8, 8), foreign.unknown), fx.GraphModule)


def test_a_graph_that_others_traced_is_a_network_like_any():
    network = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    graph = foreign.read(fx.symbolic_trace(network), pictures(), foreign.unknown)
    assert foreign.unknown(graph) == [] and torch.allclose(graph(pictures()), network(pictures()))
