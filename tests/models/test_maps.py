"""Attention maps against networks whose attention is known: rollout, the last layer's row, pictures."""

import pytest
import torch
from torch import nn

from salvit_core import build, preset
from salvit_core.models import maps
from salvit_core.models.attention import ATTENTION

NETWORKS = ("cct_2_3x1", "vit_2")


def network(name, **changes):
    torch.manual_seed(0)
    model = build(preset(name, **changes))
    for block in model.blocks:  # scores of a new network are all but equal
        for parameter in block.attention.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.3)
    return model


def images(batch=3):
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def heads_of(attention, x):
    """Softmax self-attention's weights, written out."""
    qkv = (x @ attention.qkv.weight.T).unflatten(-1, (3, attention.heads, attention.head))
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)
    return (query @ key.mT / attention.head**0.5).softmax(-1)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_those_of_each_layer(name):
    model = network(name)
    found = maps.weights(model, images())
    assert model.training and len(found) == 2  # in evaluation mode and back
    model.eval()
    x = model.tokenizer(images()) + model.position
    for block, layer in zip(model.blocks, found, strict=True):
        torch.testing.assert_close(layer, heads_of(block.attention, block.norm1(x)))
        x = block(x)
    assert not any(block.attention._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_mechanism_has_maps(name, attention):
    model = network(name, attention=attention)
    n, heads = model.config.tokens, model.config.heads
    found = maps.weights(model, images())
    columns = model.config.memory if attention == "external" else n
    heads = 1 if attention in ("hamburger", "lstm", "parallel_scan") else heads  # they have none
    assert [tuple(layer.shape) for layer in found] == [(3, heads, n, columns)] * 2
    rolled = maps.rollout(model, images())
    assert rolled.shape == (3, n, n) and (rolled >= 0).all()
    torch.testing.assert_close(rolled.sum(-1), torch.ones(3, n))
    assert maps.last(model, images()).shape == (3, heads, n)
    if attention == "external":
        torch.testing.assert_close(rolled, torch.eye(n).expand(3, n, n))


def test_rollout_is_the_published_recursion():
    model = network("vit_2")
    first, second = (layer.mean(1) for layer in maps.weights(model, images()))
    one = torch.eye(17)
    expected = (0.5 * second + 0.5 * one) @ (0.5 * first + 0.5 * one)
    torch.testing.assert_close(maps.rollout(model, images()), expected)


def test_external_attention_leaves_rollout_to_the_others():
    """S = N here: external attention must be told by its kind, not by its shape."""
    model = network("cct_2_3x1", attention=("self", "external"), memory=16)
    first = maps.weights(model, images())[0].mean(1)
    torch.testing.assert_close(maps.rollout(model, images()), 0.5 * first + 0.5 * torch.eye(16))


class Signed(nn.Module):
    """Attends with given weights of both signs."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def weights(self, x):
        return self.matrix.expand(len(x), 1, -1, -1)

    def forward(self, x):
        return self.matrix @ x


def test_negative_weights_count_with_their_size():
    model = network("vit_2", layers=1)
    matrix = torch.randn(17, 17)
    model.blocks[0].attention = Signed(matrix)
    expected = matrix.abs() + torch.eye(17)
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(maps.rollout(model, images(1))[0], expected)
    torch.testing.assert_close(maps.last(model, images(1))[0, 0], matrix[0])  # with their signs


def test_last_layer_of_a_vit_is_the_class_tokens_row():
    model = network("vit_2")
    assert torch.equal(maps.last(model, images()), maps.weights(model, images())[-1][:, :, 0])


def test_last_layer_of_a_cct_is_seen_through_its_pooling():
    model = network("cct_2_3x1").eval()
    nn.init.normal_(model.pool.scores.weight)
    x = model.norm(model.blocks(model.tokenizer(images()) + model.position))
    pooled = model.pool.scores(x).squeeze(-1).softmax(-1)  # (B, N)
    layer = maps.weights(model, images())[-1]
    expected = torch.stack([(pooled[:, None] @ layer[:, head]).squeeze(1) for head in range(2)], 1)
    found = maps.last(model, images())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2))


def test_external_last_layer_of_a_cct_shows_the_pooling_alone():
    model = network("cct_2_3x1", attention="external")
    found = maps.last(model, images())
    assert torch.equal(found[:, 0], found[:, 1])
    torch.testing.assert_close(found[:, 0].sum(-1), torch.ones(3))


def test_pictures():
    assert torch.equal(maps.grid(torch.arange(9)), torch.arange(9).reshape(3, 3))
    assert torch.equal(maps.grid(torch.arange(17)), torch.arange(1, 17).reshape(4, 4))  # without the class token
    assert maps.grid(torch.zeros(2, 3, 65)).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="7 tokens make no square picture"):
        maps.grid(torch.zeros(7))


def test_attention_without_a_map_is_named():
    model = network("vit_2")
    model.blocks[1].attention = nn.Identity()
    with pytest.raises(ValueError, match="Identity of block 2 has no attention map"):
        maps.weights(model, images())


# Token importance


@pytest.mark.parametrize("name, attention", [("vit_2", "self"), ("cct_2_3x1", "multi_lstm"), ("vit_2", "multi_lstm")])
def test_token_importance_is_the_gradient_of_one_token_by_another(name, attention):
    """Against differences in float64, feature by feature, on one image."""
    torch.manual_seed(0)
    model = build(preset(name, attention=attention)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    found = maps.importance(model, images)
    size = model.config.tokens
    assert [moved.shape for moved in found] == [(2, size, size)] * 2 and model.training
    (last,) = maps.importance(model, images, last=1)
    torch.testing.assert_close(last, found[1])
    model.eval()
    with torch.no_grad():
        x = model.blocks[0](model.tokenizer(images) + model.position)
        i, j, wanted = 3, 5, 0.0
        for c in range(32):
            step = torch.zeros_like(x)
            step[:, j, c] = 1e-5
            change = (model.blocks[1](x + step) - model.blocks[1](x - step))[:, i].sum(-1) / 2e-5  # (B)
            wanted += change.abs()
    torch.testing.assert_close(found[1][:, i, j], wanted, rtol=1e-4, atol=0)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_what_the_answer_reads_is_the_class_tokens_row():
    moved = torch.arange(9.0).view(3, 3)
    assert torch.equal(maps.read(build(preset("vit_2")), moved), moved[0])
    assert torch.equal(maps.read(build(preset("cct_2_3x1")), moved), moved.mean(0))
