"""The backbone: exact parameter counts of the paper, its forward pass written out, its configuration's refusals."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from salvit_core import CCT, METHODS, PRESETS, CCTConfig, build, cost, preset, training
from salvit_core import datasets as data
from salvit_core.models.attention.self_attention import SelfAttention
from salvit_core.models.blocks import StochasticDepth

PARAMETERS = {
    "SA softmax": 3_760_139,
    "SA 2Quad": 3_760_139,
    "EA softmax": 2_468_555,
    "SAL-ViT B=3": 4_726_027,
    "SAL-ViT B=2": 4_049_995,
    "SAL-ViT B=1": 3_373_963,
}


@pytest.mark.parametrize("method, count", PARAMETERS.items())
def test_parameters_of_the_paper(method, count):
    with torch.device("meta"):
        assert cost.parameters(CCT(preset("cct_7_3x1", method))) == count


@pytest.mark.parametrize(
    "name, tokens", [("cct_7_3x1", 256), ("cct_9_7x2", 196), ("cct_14_7x2", 196), ("cct_4_3x2", 49)]
)
def test_tokens(name, tokens):
    config = preset(name)
    assert config.tokens == tokens
    with torch.device("meta"):
        model = CCT(config)
        images = torch.zeros(2, config.channels, config.image, config.image)
        assert model.tokenizer(images).shape == (2, tokens, config.width)
        assert model(images).shape == (2, config.classes)


def test_published_shapes():
    tiny, imagenet = preset("cct_9_7x2"), preset("cct_14_7x2")
    assert (tiny.heads, tiny.layers, tiny.width, tiny.classes) == (12, 9, 192, 200)
    assert (imagenet.heads, imagenet.layers, imagenet.width, imagenet.mlp_ratio) == (6, 14, 384, 3)


def test_forward_is_the_published_block():
    """Second norm replaces the residual stream; the whole network written out from its parts."""
    torch.manual_seed(0)
    config = preset("cct_2_3x1", attention=("self", "external"), normalizer="l2q")
    model = CCT(config).eval()
    images = torch.randn(3, 1, 8, 8)
    x = F.max_pool2d(F.relu(F.conv2d(images, model.tokenizer[0].weight, padding=1)), 3, 2, 1)
    x = x.flatten(2).transpose(1, 2) + model.position
    for block in model.blocks:
        x = x + block.attention(F.layer_norm(x, (32,)))
        x = F.layer_norm(x, (32,))
        x = x + block.mlp.contract(F.gelu(block.mlp.expand(x)))
    x = F.layer_norm(x, (32,))
    weights = F.softmax(model.pool.scores(x).squeeze(-1), -1)
    expected = model.head(torch.einsum("bn,bnm->bm", weights, x))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-6)


def test_initial_values():
    torch.manual_seed(0)
    model = CCT(preset("cct_7_3x1", "SA L2Q"))
    assert abs(model.position.std().item() - 0.2) < 0.01
    assert abs(model.blocks[0].mlp.expand.weight.std().item() - 0.02) < 0.001
    assert (model.blocks[0].attention.normalizer.c == 1).all()
    assert [block.drop.p for block in model.blocks][::6] == pytest.approx([0.0, 0.1])
    assert model.blocks[0].attention.dropout.p == 0.1


def test_global_l2q_is_one_pair_for_all_layers():
    config = preset("cct_2_3x1", attention=("self", "external"), normalizer="l2q", l2q_granularity="global")
    model = CCT(config)
    assert model.blocks[0].attention.normalizer.c is model.blocks[1].attention.normalizer.c
    plain = cost.parameters(CCT(dataclasses.replace(config, normalizer="softmax")))
    assert cost.parameters(model) == plain + 2


def test_config_survives_json():
    config = preset("cct_7_3x1", "SAL-ViT B=2")
    assert config.attention == ("self",) * 2 + ("external",) * 5
    assert CCTConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_every_preset(name, method):
    budget = METHODS[method]["attention"]
    if isinstance(budget, int) and budget > PRESETS[name].get("layers", 7):
        with pytest.raises(ValueError, match="budget of 3"):
            preset(name, method)
        return
    with torch.device("meta"):
        config = preset(name, method)
        images = torch.zeros(1, config.channels, config.image, config.image)
        assert build(config)(images).shape == (1, config.classes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("cct_8",), "preset 'cct_8' is unknown: choose from cct_2_3x1"),
        (("cct_7_3x1", "SA cubic"), "method 'SA cubic' is unknown"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        preset(*arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(attention="linear"), "attention 'linear' is unknown: choose from cosformer, .*self"),
        (dict(attention=("self", "external")), "names 2 layers, the network has 7"),
        (dict(normalizer="cubic"), "normalizer 'cubic' is unknown"),
        (dict(width=250), "width 250 is not a multiple of 4 heads"),
        (dict(depth=3), "no field depth"),
        (dict(attention=8), "a budget of 8"),
    ],
)
def test_refused_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        preset("cct_7_3x1", **changes)


def test_stochastic_depth():
    drop = StochasticDepth(0.25)
    x = torch.ones(4000, 2, 3, dtype=torch.float64)
    torch.manual_seed(0)
    y = drop(x)
    kept = (y[:, 0, 0] != 0).float().mean().item()
    assert abs(kept - 0.75) < 0.03 and set(y.unique().tolist()) <= {0.0, 1 / 0.75}
    assert (y == y[:, :1, :1]).all()  # whole images
    assert drop.eval()(x) is x


def test_trains_a_step():
    torch.manual_seed(0)
    model = CCT(preset("cct_2_3x1", attention=("self", "external"), normalizer="l2q"))
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[-1] < losses[0] - 0.5


class RandomFeatures(SelfAttention):
    """Draws as Performer does: a matrix beside the weights, not learnt, and anew in every epoch."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.features = torch.nn.Linear(self.head, 8, bias=False)
        self.drawn = 0

    def redraw(self):
        self.drawn += 1
        torch.nn.init.normal_(self.features.weight)  # from torch's global generator

    def forward(self, x):
        return super().forward(x) + self.features.weight.mean()


def with_random_features():
    def attention(config, layer):
        made = RandomFeatures if layer else SelfAttention
        return made(config)

    torch.manual_seed(0)
    return CCT(preset("cct_2_3x1"), attention)


def test_random_features_keep_their_distribution():
    model = with_random_features()
    assert model.blocks[1].attention.drawn == 1
    assert 0.8 < model.blocks[1].attention.features.weight.std() < 1.2  # not the 0.02 of other Linear weights
    performer = CCT(preset("cct_2_3x1", attention="performer"))
    assert 0.8 < performer.blocks[0].attention.features.weight.std() < 1.2


def test_random_features_are_drawn_anew_and_resumed(tmp_path):
    digits = data.load("digits")
    few = dataclasses.replace(digits.train, images=digits.train.images[:64], labels=digits.train.labels[:64])
    digits = dataclasses.replace(digits, train=few)
    recipe = training.Recipe(epochs=3, batch=32, augment="none", keep="last")
    whole = with_random_features()
    drawn = []
    for _ in training.fit(whole, digits, recipe):
        drawn.append(whole.blocks[1].attention.features.weight.clone())
        assert 0.8 < drawn[-1].std() < 1.2 and not whole.blocks[1].attention.features.weight.requires_grad
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    stopped, resumed = with_random_features(), with_random_features()
    next(training.fit(stopped, digits, recipe, checkpoint=tmp_path / "run.pt"))
    list(training.fit(resumed, digits, recipe, checkpoint=tmp_path / "run.pt"))
    assert resumed.blocks[1].attention.drawn == 3  # when built, and before each of two epochs
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
