"""The plain vision transformer: parameters counted by hand, its forward written out, and all that a CCT can do too."""

import dataclasses
import json

import pytest
import torch
from others import timm
from torch import nn
from torch.nn import functional as F

from salvit_core import CCT, METHODS, CCTConfig, ViT, ViTConfig, build, config_of, cost, preset, private, training
from salvit_core import datasets as data
from salvit_core.models.attention import ATTENTION
from salvit_core.models.graph import trace
from salvit_core.models.vit import load_deit
from salvit_core.private.parties.party import read_architecture
from salvit_core.training.preparation import optimizer

VITS = ["vit_2", "vit_tiny"]  # the others are of these shapes, larger


def network(method="SA softmax", seed=0, **changes):
    torch.manual_seed(seed)
    return ViT(preset("vit_2", method, **changes))


def images(config, batch=2):
    return torch.randn(batch, config.channels, config.image, config.image)


# Parameters by hand: patches and their bias, class token, positions, blocks (norms, merged projection, projection and
# bias, MLP), norm, head.
COUNTS = {
    "vit_tiny": (3 * 16 * 48 + 48)
    + 48
    + 65 * 48
    + 4 * (4 * 48 + 48 * 144 + 48 * 48 + 48 + 48 * 192 + 192 + 192 * 48 + 48)
    + 2 * 48
    + (48 * 10 + 10),
    "vit_2": (4 * 32 + 32)
    + 32
    + 17 * 32
    + 2 * (4 * 32 + 32 * 96 + 32 * 32 + 32 + 32 * 64 + 64 + 64 * 32 + 32)
    + 2 * 32
    + (32 * 10 + 10),
    "vit_7_4_32": (3 * 16 * 256 + 256)
    + 256
    + 65 * 256
    + 7 * (4 * 256 + 256 * 768 + 256 * 256 + 256 + 256 * 512 + 512 + 512 * 256 + 256)
    + 2 * 256
    + (256 * 10 + 10),
    # DeiT-Tiny's published 5,717,416 with 1000 classes: less the biases of Q, K and V, and 800 classes.
    "vit_tiny_224": 5_717_416 - 12 * 3 * 192 - 800 * 193,
}


@pytest.mark.parametrize("name, tokens", [("vit_tiny", 65), ("vit_2", 17), ("vit_7_4_32", 65), ("vit_tiny_224", 197)])
def test_presets(name, tokens):
    config = preset(name)
    assert isinstance(config, ViTConfig) and config.tokens == tokens
    model = ViT(config)
    assert model.config is config
    assert cost.parameters(model) == COUNTS[name]
    batch = images(config)
    assert model.tokenizer(batch).shape == (2, tokens, config.width)
    assert model.features(batch).shape == (2, config.width)
    assert model(batch).shape == (2, config.classes)


def test_vit_tiny_has_118618_parameters():
    assert COUNTS["vit_tiny"] == 118_618


def test_forward_is_the_published_network():
    """Eq. 1 to 4 written out: class token first, both norms before their branch, the last norm on the class token."""
    model = network().eval()
    batch = images(model.config, 3)
    for parameter in model.parameters():  # biases, scales and the class token too must show
        nn.init.normal_(parameter, std=0.2)
    weight, bias = model.tokenizer.embed.weight, model.tokenizer.embed.bias
    patches = batch.unfold(2, 2, 2).unfold(3, 2, 2).reshape(3, 16, 4)  # row by row, four pixels each
    x = patches @ weight.flatten(1).T + bias
    x = torch.cat([model.tokenizer.class_token.expand(3, 1, 32), x], 1) + model.position
    for block in model.blocks:
        attention = block.attention
        y = F.layer_norm(x, (32,), block.norm1.weight, block.norm1.bias)
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in (y @ attention.qkv.weight.T).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + y @ attention.projection.weight.T + attention.projection.bias
        y = F.layer_norm(x, (32,), block.norm2.weight, block.norm2.bias)
        y = F.gelu(y @ block.mlp.expand.weight.T + block.mlp.expand.bias)
        x = x + y @ block.mlp.contract.weight.T + block.mlp.contract.bias
    features = F.layer_norm(x, (32,), model.norm.weight, model.norm.bias)[:, 0]
    torch.testing.assert_close(model.features(batch), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(batch), features @ model.head.weight.T + model.head.bias, rtol=1e-4, atol=1e-4)


def test_initial_values():
    torch.manual_seed(0)
    model = ViT(preset("vit_tiny", "SA L2Q", l2q_granularity="global"))
    assert abs(model.position.std().item() - 0.02) < 0.001
    assert not model.tokenizer.class_token.any() and not model.tokenizer.embed.bias.any()
    assert [block.drop.p for block in model.blocks] == pytest.approx([0.0, 0.1 / 3, 0.2 / 3, 0.1])
    assert len({id(block.attention.normalizer.c) for block in model.blocks}) == 1


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", VITS)
def test_every_mechanism(name, attention):
    """N = 17 and 65 are odd and no squares: every mechanism runs, is traced and counted all the same."""
    torch.manual_seed(0)
    model = ViT(preset(name, attention=attention)).eval()
    batch = images(model.config)
    logits = model(batch)
    assert logits.shape == (2, 10) and logits.isfinite().all()
    graph = trace(model)
    torch.testing.assert_close(graph(batch), logits)
    blocks = [f"block {i + 1}" for i in range(model.config.layers)]
    assert {node.meta["layer"] for node in graph.graph.nodes} == {"tokenizer", *blocks, "pool", "norm", "head"}
    torch.testing.assert_close(graph(batch[:1]), logits[:1])  # any batch
    assert cost.flops(model) > 0 and cost.flops(model, "torch") > 0


def test_flops_by_hand():
    """vit_tiny with self-attention: 65 tokens through four blocks, one token through norm and head."""
    model = ViT(preset("vit_tiny"))
    n, m, hidden = 65, 48, 192
    linear = 2 * n * (3 * m * m + m * m + 2 * m * hidden)
    rest = 2 * 2 * n * m + 2 * n * m + n * hidden + 4 * n * n * (1 + 3)  # norms, residuals, GELU; scale and softmax
    tokenizer = 2 * 64 * 48 * m
    assert cost.flops(model) == tokenizer + 4 * (linear + rest) + 2 * m + 2 * m * 10
    assert cost.flops(model, "torch") == tokenizer + 4 * (linear + 2 * 2 * n * n * m) + 2 * m * 10
    table = cost.breakdown(model, images(model.config, 1), repeats=1)
    assert table["flops"].sum() == cost.flops(model)
    kinds = {"tokenizer", "LayerNorm", "projection", "scores", "normaliser", "values", "MLP", "activation"}
    assert set(table["kind"]) == kinds | {"pooling", "head"}


@pytest.mark.parametrize("method", METHODS)
def test_methods_and_json(method):
    if METHODS[method]["attention"] == 3:
        with pytest.raises(ValueError, match="a budget of 3 self-attention layers: vit_2 has 2"):
            preset("vit_2", method)
        return
    config = preset("vit_2", method, classes=7)
    assert config.classes == 7
    again = config_of(json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and type(again) is ViTConfig


def test_build_and_config_of_tell_the_networks_apart():
    for config, kind in ((preset("vit_2"), ViT), (preset("cct_2_3x1"), CCT)):
        assert type(build(config)) is kind
        assert type(config_of(dataclasses.asdict(config))) is type(config)
    assert preset("cct_2_3x1") != preset("vit_2") and isinstance(config_of({}), CCTConfig)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("vit_2", dict(patch=3), "an image of 8 pixels is not a multiple of patches of 3"),
        ("vit_2", dict(patch=16), "an image of 8 pixels is not a multiple of patches of 16"),
        ("vit_2", dict(patch=0), "is not a multiple of patches of 0"),
        ("vit_2", dict(kernel=3), "ViTConfig has no field kernel: choose from activation"),
        ("vit_2", dict(attention="cubic"), "attention 'cubic' is unknown"),
        ("vit_2", dict(width=33), "width 33 is not a multiple of 2 heads"),
        ("cct_2_3x1", dict(patch=2), "cct_2_3x1 is a CCT, which has no field patch"),
    ],
)
def test_refused_configurations(name, changes, message):
    with pytest.raises(ValueError, match=message):
        preset(name, **changes)


def test_trains_and_distils():
    digits = data.load("digits")
    recipe = training.Recipe(epochs=6, batch=64, lr=4e-3, augment="none")
    result = training.train(teacher := network(), digits, recipe)
    assert result["test_accuracy"] > 40 and json.dumps(result)  # chance: 10
    assert result["config"]["patch"] == 2 and result["parameters"] == COUNTS["vit_2"]
    recipe = dataclasses.replace(recipe, epochs=1, distill_logits=0.5, distill_features=0.1)
    for student in (network(), CCT(preset("cct_2_3x1"))):
        (facts,) = training.fit(student, digits, recipe, teacher)
        assert facts["distill_logits"] > 0 and facts["distill_features"] > 0


def test_decay_spares_the_class_token_and_the_positions():
    decayed, spared = optimizer(network(), training.Recipe()).param_groups
    token, position = (1, 1, 32), (1, 17, 32)
    assert {token, position} <= {tuple(p.shape) for p in spared["params"]}
    assert not {token, position} & {tuple(p.shape) for p in decayed["params"]}


@pytest.mark.processes
@pytest.mark.parametrize("protocol", ["tuned", "stock"])
def test_private_inference(protocol):
    model = network()
    if protocol == "stock":  # CrypTen's inverse root needs variances above 0.1; those of a new class token are 0.0003
        for parameter in (model.tokenizer.class_token, model.position):
            nn.init.normal_(parameter)
    result = private.infer(model, images(model.config), protocol)
    # Not `faithful`: logits of an untrained network may lie nearer to each other than four errors.
    assert result.violations == [] and result.error < 0.01, (result.error, result.violations)
    layers = ["tokenizer", "block 1", "block 2", "pool", "norm", "head"]
    assert [layer for layer in result.operations["layer"].unique() if layer in layers] == layers
    selecting = result.operations.query("layer == 'pool'")
    assert not selecting["rounds"].any() and not selecting["bytes"].any()


def test_two_hosts_read_its_configuration(tmp_path):
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps(dataclasses.asdict(preset("vit_2"))))
    graph, _ = read_architecture(path)
    assert graph.get_parameter("tokenizer.class_token").is_meta
    assert {name for name, _ in graph.named_parameters()} == {name for name, _ in network().named_parameters()}


# Weights of others

DEIT = {"deit_tiny": 5_717_416, "deit_small": 22_050_664, "deit_base": 86_567_656}


@pytest.mark.parametrize("name", DEIT)
def test_deit_has_the_published_parameters(name):
    with torch.device("meta"):
        assert cost.parameters(ViT(preset(name))) == DEIT[name]


def test_deit_is_timm_s_with_its_weights():
    theirs = timm().create_model("deit_tiny_patch16_224", depth=2).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in theirs.parameters():  # biases, scales and the class token too must show
        weight.data += torch.empty_like(weight).normal_(0, 0.05, generator=generator)
    ours = ViT(preset("deit_tiny", layers=2)).eval()
    load_deit(ours, {"model": theirs.state_dict()})
    batch = torch.randn(2, 3, 224, 224, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs(batch), rtol=1e-4, atol=1e-5)
    load_deit(ours, theirs.state_dict())


def test_weights_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"not those of this ViT: .*dist_token"):
        load_deit(network(), {**network().state_dict(), "dist_token": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"not those of this ViT: .*size mismatch for position"):
        load_deit(network(), {**network().state_dict(), "pos_embed": torch.zeros(1)})


@pytest.mark.parametrize("name", ATTENTION)
def test_biases_of_queries_keys_and_values(name):
    """Where a mechanism makes them; and without the option not a weight is another."""
    plain, biased = (network(attention=name, qkv_bias=bias).state_dict() for bias in (False, True))
    more = set(biased) - set(plain)
    assert set(plain) <= set(biased) and bool(more) == ATTENTION[name].queried
    assert all(key.rsplit(".", 2)[-2] in ("qkv", "query", "key", "value") for key in more)
