"""EfficientViT: the published parameters and multiply-adds, timm's outputs with its weights, graphs, and a step."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from salvit_core import EfficientViT, EfficientViTConfig, build, cli, compat, config_of, cost, preset
from salvit_core import datasets as data
from salvit_core.models.config import EFFICIENTVITS
from salvit_core.models.efficientvit import LiteMSA, load_published
from salvit_core.models.graph import trace
from salvit_core.models.operations import TokenSum
from salvit_core.training import Recipe, train
from salvit_core.training.__main__ import main

# Published: parameters, and billions of multiply-adds at 224, 256 and 288 pixels.
PUBLISHED = {
    "efficientvit_b1": (9_102_024, (0.519, 0.677, 0.856)),
    "efficientvit_b2": (24_330_712, (1.585, 2.068, 2.614)),
    "efficientvit_b3": (48_646_056, (3.954, 5.162, 6.530)),
}


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return build(preset("efficientvit_test", **changes))


def multiply_adds(model):
    """Of what has weights, of products of activations, and of the keys with a column of ones."""
    ones = []
    for module in model.modules():
        if isinstance(module, TokenSum):
            module.register_forward_hook(lambda module, inputs, result: ones.append(inputs[0].numel()))
    counted = cost.flops(model, "torch") // 2  # runs a copy, which has the hooks too
    return counted + sum(ones)


@pytest.mark.parametrize("name, published", PUBLISHED.items())
def test_parameters_and_multiply_adds_are_the_published(name, published):
    parameters, giga = published
    for image, expected in zip((224, 256, 288), giga, strict=True):
        with torch.device("meta"):
            model = build(preset(name, image=image))
        assert cost.parameters(model) == parameters
        assert round(multiply_adds(model) / 1e9, 3) == expected


@pytest.mark.parametrize("name", ["efficientvit_b0", "efficientvit_b1", "efficientvit_b2", "efficientvit_b3"])
def test_outputs_are_timms_with_its_weights(name):
    """At 96 pixels, so that a stage has an odd side. timm's eps is 1e-5 of the sums, ours is of the means."""
    compat.repair()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    for module in theirs.modules():  # its batch norms must show
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.2)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.05, 0.2)
    ours = build(preset(name, image=96)).eval()
    load_published(ours, theirs.state_dict())
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected = theirs(images)
        near = (ours(images) - expected).abs().max() / expected.std()
        for module in ours.modules():
            if isinstance(module, LiteMSA):
                module.normalizer.eps = 1e-5 * module.side**-2
        exact = (ours(images) - expected).abs().max() / expected.std()
    assert exact < 1e-5 and near < 1e-2, (exact, near)


def test_attention_is_the_published_formula():
    """In float64, head by head, token by token: queries, keys and values of a head stand side by side."""
    torch.manual_seed(0)
    module = LiteMSA(8, 4, 3).double().eval()
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    made = []
    module.projection.register_forward_hook(lambda module, inputs, result: made.append(inputs[0]))
    module(x)
    first = module.qkv(x)
    both = torch.cat([first, module.aggregate(first)], 1).flatten(2)  # (B, 6 M, N)
    for head in range(4):
        query, key, value = both[:, 12 * head : 12 * head + 12].split(4, 1)  # (B, D, N)
        weights = query.relu().mT @ key.relu()  # (B, N, N)
        expected = (weights @ value.mT) / (weights.sum(-1, keepdim=True) + 9 * module.normalizer.eps)
        got = made[0].flatten(2)[:, 4 * head : 4 * head + 4].mT
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["efficientvit_test", "efficientvit_micro_32", "efficientvit_micro_64"])
def test_a_graph_computes_the_network_and_its_costs_count(name):
    torch.manual_seed(0)
    model = build(preset(name)).eval()
    assert isinstance(model, EfficientViT)
    config = model.config
    images = torch.randn(2, config.channels, config.image, config.image)
    graph = trace(model)
    with torch.inference_mode():
        assert torch.equal(graph(images), model(images))
        assert model.features(images).shape == (2, config.head_widths[0])
    layers = {node.meta["layer"] for node in graph.graph.nodes}
    places = {"tokenizer", *(f"block {i + 1}" for i in range(len(model.blocks))), "pool", "head"}
    assert places <= layers
    # Products of activations are free in the paper's convention; all else is 2 per multiply-add.
    assert 0 < cost.flops(model) <= 2.2 * multiply_adds(model)
    assert cost.breakdown(model, images, 1)["flops"].sum() == 2 * cost.flops(model)


def test_config_survives_json():
    for name in EFFICIENTVITS:
        config = preset(name, classes=7)
        assert isinstance(config, EfficientViTConfig) and config.classes == 7
        assert config_of(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(widths=(8, 16)), "2 widths and 3 depths: give as many of both"),
        (dict(widths=(8,), depths=(1,)), "1 widths and 1 depths"),
        (dict(attention_stages=3), "attention_stages is 3: of 2 stages give at most 2"),
        (dict(head=5), "a stage of width 16 is not a multiple of heads of 5: change one"),
        (dict(head_widths=(8,)), r"head_widths is \(8,\): give two numbers"),
        (dict(stem_stride=3), "stem_stride is 3: give 1 to 2"),
        (dict(depths=(1, 0, 1)), r"depths is \(1, 0, 1\): give 1 or more"),
        (dict(patch=4), "EfficientViTConfig has no field patch"),
    ],
)
def test_refused_configurations(changes, said):
    with pytest.raises(ValueError, match=said):
        preset("efficientvit_test", **changes)


def test_what_has_no_row_in_the_tables_is_refused():
    with pytest.raises(ValueError, match="efficientvit_b1 is an EfficientViT, whose attention is its own"):
        preset("efficientvit_b1", "SA softmax")
    with pytest.raises(ValueError, match=r"give \(B, 1, 8, 8\)"):
        tiny()(torch.zeros(2, 1, 9, 9))


@pytest.mark.parametrize("name", ["efficientvit_micro_32", "efficientvit_micro_64"])
def test_micro_networks_take_a_step(name):
    torch.manual_seed(0)
    model = build(preset(name))
    images, labels = torch.randn(8, 3, model.config.image, model.config.image), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_it_learns_the_digits():
    facts = train(tiny(), data.load("digits"), Recipe(epochs=3, batch=64, lr=4e-3, augment="none"))
    assert facts["test_accuracy"] > 60


def test_the_command_line_trains_it_without_a_method(tmp_path, capsys):
    words = [
        "--preset",
        "efficientvit_test",
        "--data",
        "digits",
        "--epochs",
        "1",
        "--batch",
        "256",
        "--augment",
        "none",
    ]
    main([*words, "--device", "cpu", "--out", str(tmp_path)])
    said = json.loads((tmp_path / "result.json").read_text())
    assert said["method"] is None and config_of(said["config"]) == preset("efficientvit_test")
    build(config_of(said["config"])).load_state_dict(torch.load(tmp_path / "weights.pt"))
    with pytest.raises(SystemExit, match="error: efficientvit_test is an EfficientViT"):
        main([*words, "--method", "SA L2Q"])


@pytest.mark.processes
def test_the_command_line_runs_it_on_shares(tmp_path, capsys):
    out = tmp_path / "run"
    trained = ["train", "--preset", "efficientvit_test", "--data", "digits", "--epochs", "1", "--augment", "none"]
    cli.main([*trained, "--device", "cpu", "--batch", "256", "--out", str(out)])
    cli.main(["estimate", "--preset", "efficientvit_test"])
    counted = capsys.readouterr().out
    cli.main(["infer", "--preset", "efficientvit_test"])
    said = capsys.readouterr().out
    total = [line.split() for text in (counted, said) for line in text.splitlines() if line.startswith("total")]
    assert total[0][1:3] == total[1][2:4]  # rounds and bytes, in front of which infer has seconds
    cli.main(["evaluate", "--run", str(out), "--n", "8"])
    assert "agreement: 100\n" in capsys.readouterr().out
    for command in ("infer", "estimate"):
        with pytest.raises(SystemExit, match="error: efficientvit_test is an EfficientViT, whose attention is its own"):
            cli.main([command, "--preset", "efficientvit_test", "--method", "SA L2Q"])
