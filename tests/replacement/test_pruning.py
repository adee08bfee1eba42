"""Structured pruning: what a group is, what is masked, and that the network without it computes the same."""

import copy
import dataclasses
import json

import pytest
import torch

from salvit_core import preset
from salvit_core.models import cost
from salvit_core.models.vit import build
from salvit_core.replacement.pruning import (
    REGULARISERS,
    GroupPenalty,
    Pruning,
    cells,
    channels,
    hidden,
    mask,
    masks,
    norms,
    prune,
    recurrent,
    remove,
    scores,
    shaped,
    sparsity,
    strong,
)
from salvit_core.training import Recipe, evaluate, fit

RECIPE = Recipe(epochs=2, batch=64, lr=4e-3, augment="none", keep="last")


def network(by="multi_lstm", backbone="cct_2_3x1", seed=0):
    torch.manual_seed(seed)
    model = build(preset(backbone, attention=by, stochastic_depth=0.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def some(model, share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        None if layer is None else torch.rand(sum(layer.lstm.recurrence.cells), generator=generator) > share
        for layer in recurrent(model)
    )


def images(count=5):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


# Groups


@pytest.mark.parametrize("by", ["multi_lstm", "lstm"])
def test_released_bug_a_group_is_the_units_own_whatever_the_layout(by):
    """There slices assumed rows head by head where they lie gate by gate: half of what was cut was alive.

    Written out here by place in torch's own LSTM of each head: rows j, k + j, 2 k + j and 3 k + j.
    """
    attention = network(by).blocks[0].attention
    found = norms(attention)
    u, place = attention.lstm.recurrence.matrices(), 0
    for head, (w, p) in enumerate(zip(attention.lstm.gates.matrices(), attention.merge.matrices())):
        forward, backward = attention.lstm.recurrence.hidden[head]
        for way, k in enumerate((forward, backward)):
            for j in range(k):
                rows = [gate * k + j for gate in range(4)]
                own = [w[rows if not way else [4 * forward + r for r in rows]], u[2 * head + way][rows]]
                own += [u[2 * head + way][:, j], p[:, way * forward + j]]
                wanted = torch.cat([part.flatten() for part in own]).norm()
                torch.testing.assert_close(found[place], wanted)
                place += 1
    assert place == len(found)


@pytest.mark.parametrize("by", ["multi_lstm", "lstm"])
def test_nothing_of_a_group_moves_another_unit(by):
    """A unit's own weights drawn anew, its outgoing ones zero: the layer gives what it gave, so all of it is in."""
    model = network(by)
    attention = model.blocks[1].attention
    kept = list(some(model))
    mask(model, tuple(kept))
    x = torch.randn(3, 16, 32)
    with torch.no_grad():
        before = attention(x)
        for (w, c, u, b, _), gone in zip(cells(attention), (~kept[1]).split(attention.lstm.recurrence.cells)):
            for part in (w, c, b):
                part[:, gone] = torch.randn_like(part[:, gone])
            rows = u[:, gone]
            rows[:, :, ~gone] = torch.randn_like(rows[:, :, ~gone])
            u[:, gone] = rows
        torch.testing.assert_close(attention(x), before, rtol=0, atol=1e-5)
        w[:, ~gone] += 0.1  # what stays does move it
        assert (attention(x) - before).abs().max() > 1e-3


def test_released_bug_the_projection_is_part_of_the_regulariser():
    """There the multi-head class lacked the matrix that the regulariser read."""
    for regulariser in REGULARISERS:
        model = network()
        GroupPenalty(model, regulariser, 1.0)().backward()
        for layer in recurrent(model):
            for weight in (layer.merge.weight, layer.lstm.gates.weight, layer.lstm.recurrence.weight):
                assert (weight.grad != 0).double().mean() > 0.99
            assert layer.projection.weight.grad is None and layer.lower.weight.grad is None


def test_released_bug_the_score_does_not_cancel():
    """There it was a signed sum: a unit of large weights of both signs was the first to go."""
    model = network()
    attention = model.blocks[0].attention
    with torch.no_grad():
        for w, _, u, _, column in cells(attention):
            for part in (w, u, column):
                part.fill_(0.01)
        w, _, _, _, _ = next(cells(attention))
        signs = torch.ones(w.shape[2])
        signs[::2] = -1
        w[:, 3] = 100 * signs  # sums to nothing
    kept = strong(model, threshold=0.05)[0]
    assert kept.sum() == 1 and kept[3]
    assert (scores(attention) >= 0).all()


def test_released_bug_the_mask_of_the_recurrence_is_its_own():
    """There W_hh had the mask of W_ih: its rows, and not its columns."""
    model = network()
    attention, stays = model.blocks[0].attention, some(model)[0]
    named = dict(zip((name for name, _ in attention.named_parameters()), masks(attention, stays)))
    ones = copy.deepcopy(attention)
    ones.load_state_dict(named)
    for (w, c, u, b, column), kept in zip(cells(ones), stays.split(attention.lstm.recurrence.cells)):
        both = (kept[:, None] & kept[None, :]).float()
        assert all(torch.equal(gate, both) for gate in u)
        assert torch.equal(w, kept.float()[None, :, None].expand_as(w))
        assert torch.equal(column, kept.float().expand_as(column))
        assert torch.equal(c, kept.float().expand_as(c)) and torch.equal(b, c)
    assert not torch.equal(named["lstm.recurrence.weight"], named["lstm.gates.weight"])
    assert named["projection.weight"].all() and named["lower.weight"].all()


def test_the_regularisers_are_as_in_the_equations():
    g = torch.tensor([3.0, 4.0, 0.0])
    assert REGULARISERS["group"](g) == 7
    assert REGULARISERS["hoyer"](g).item() == pytest.approx(7 / 5)
    assert REGULARISERS["hoyer_square"](g).item() == pytest.approx(49 / 25)
    model = network()
    terms = [REGULARISERS["hoyer"](norms(layer)) for layer in recurrent(model)]
    assert GroupPenalty(model, "hoyer", 0.5)().item() == pytest.approx(0.5 * sum(terms).item())
    for name in ("hoyer", "hoyer_square"):  # neither shrinks by shrinking all
        assert REGULARISERS[name](100 * g).item() == pytest.approx(REGULARISERS[name](g).item())


def test_a_regulariser_drives_groups_apart(few_digits):
    spread = {}
    for coefficient in (0.0, 0.5):
        torch.manual_seed(0)
        model = build(preset("cct_2_3x1", attention="multi_lstm"))
        penalty = GroupPenalty(model, "hoyer_square", coefficient)
        before = REGULARISERS["hoyer_square"](norms(model.blocks[0].attention)).item()
        history = list(fit(model, few_digits, dataclasses.replace(RECIPE, epochs=6, lr=2e-2), penalty=penalty))
        spread[coefficient] = REGULARISERS["hoyer_square"](norms(model.blocks[0].attention)).item() / before
        least, middle, most = history[-1]["groups"]
        assert 0 <= least <= middle <= most
    assert spread[0.5] < 0.8 * spread[0.0]


# Mask and removal


@pytest.mark.parametrize("backbone", ["cct_2_3x1", "vit_2"])
@pytest.mark.parametrize("by", ["multi_lstm", "lstm", ("self", "multi_lstm")])
def test_the_smaller_network_computes_what_the_masked_one_does(backbone, by):
    model = network(by, backbone)
    kept = some(model)
    before = model(images())
    mask(model, kept)
    small = remove(model, kept)
    with torch.no_grad():
        masked = model(images())
        torch.testing.assert_close(small(images()), masked, rtol=0, atol=1e-5)
    assert (masked - before).abs().max() > 1e-2
    assert cost.parameters(small) < cost.parameters(model)
    assert all(min(pair) < 16 for layer in hidden(small) if layer for pair in layer)


def test_units_heads_and_layers_may_vanish_altogether():
    model = network()
    kept = [torch.ones(64, dtype=torch.bool) for _ in range(2)]
    kept[0][:32] = False  # a head
    kept[1][:] = False
    mask(model, tuple(kept))
    small = remove(model, tuple(kept))
    assert hidden(small) == (((0, 0), (16, 16)), ((0, 0), (0, 0)))
    torch.testing.assert_close(small(images()), model(images()), rtol=0, atol=1e-5)
    again = remove(small, strong(small, 0.0))  # of what is gone nothing more can go
    torch.testing.assert_close(again(images()), small(images()), rtol=0, atol=1e-6)


def test_what_is_pruned_stays_zero_while_the_rest_is_trained(few_digits):
    model = network()
    kept = some(model)
    handles = mask(model, kept)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    list(fit(model, few_digits, RECIPE))
    for handle in handles:
        handle.remove()
    for i, (attention, stays) in enumerate(zip(recurrent(model), kept)):
        for (name, parameter), ones in zip(attention.named_parameters(), masks(attention, stays)):
            assert (parameter[ones == 0] == 0).all(), name
            moved = parameter != before[f"blocks.{i}.attention.{name}"]
            assert moved[ones == 1].double().mean() > 0.9, name
    small = remove(model, kept)
    torch.testing.assert_close(small.eval()(images()), model.eval()(images()), rtol=0, atol=1e-5)


def test_sparsity_and_channels_are_counted():
    model = network()
    kept = [torch.ones(64, dtype=torch.bool) for _ in range(2)]
    kept[0][:8] = False  # half of the forward units of the first of two heads
    mask(model, tuple(kept))
    rows = {(row["layer"], row["matrix"]): row for row in sparsity(model)}
    assert rows[1, "input"] == {"layer": 1, "matrix": "input", "element": 12.5, "input": 0.0, "output": 12.5}
    own = rows[1, "recurrent"]
    assert own["element"] == pytest.approx(100 * (1 - 0.25) / 4)
    assert (own["input"], own["output"]) == (12.5, 12.5)
    assert rows[1, "projection"]["element"] == rows[1, "projection"]["input"] == 12.5
    assert all(rows[2, name][part] == 0 for name in ("input", "recurrent") for part in ("element", "input", "output"))
    lost = channels(model, tuple(kept))
    assert lost[0] == {"layer": 1, "head": 1, "direction": "forward", "hidden": 16, "pruned": 8}
    assert len(lost) == 8 and sum(row["pruned"] for row in lost) == 8


def test_threshold_and_share():
    model = network()
    every = torch.cat([scores(layer) for layer in recurrent(model)])
    middle = every.median().item()
    assert torch.equal(torch.cat(strong(model, middle)), every > middle)
    assert sum(part.sum().item() for part in strong(model, 0.0, 0.25)) == 96  # of 128
    assert torch.cat(strong(model, 0.0)).all()


def test_pruned_from_end_to_end(few_digits, tmp_path):
    run = Pruning(share=0.5, sparsify=RECIPE, finetune=RECIPE, coefficient=1e-3)
    model = network()
    result = prune(run, model, few_digits, tmp_path)
    assert list(result["stages"]) == ["sparsify", "finetune"]
    small = result["network"]
    torch.testing.assert_close(small(images()), model.eval()(images()), rtol=0, atol=1e-5)
    assert result["test_accuracy"] == evaluate(small, few_digits.test)["accuracy"]
    assert result["parameters"] == cost.parameters(small) < result["parameters_before"] == cost.parameters(network())
    assert sum(row["pruned"] for row in result["channels"]) == 64
    # From JSON back to the network.
    sizes = json.loads(json.dumps(result["hidden"]))
    again = shaped(small.config, sizes)
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again.eval()(images()), small(images()))
    # Once more from the checkpoints: the same end.
    other = prune(run, network(), few_digits, tmp_path)
    assert all(torch.equal(other["network"].state_dict()[name], tensor) for name, tensor in small.state_dict().items())


def test_a_network_with_an_emptied_layer_is_pruned_again(few_digits):
    emptied = shaped(network().config, [[(0, 0), (0, 0)], [(16, 16), (16, 16)]])
    for regulariser in REGULARISERS:
        result = prune(
            Pruning(regulariser, share=0.25, sparsify=RECIPE, finetune=None), copy.deepcopy(emptied), few_digits
        )
        assert result["hidden"][0] == ((0, 0), (0, 0)) and sum(map(sum, result["hidden"][1])) == 48
        history = result["stages"]["sparsify"]["history"]
        json.dumps([result["sparsity"], history], allow_nan=False)
    with pytest.raises(ValueError, match="no hidden unit is left"):
        prune(Pruning(), shaped(emptied.config, [[(0, 0), (0, 0)]] * 2), few_digits)


def test_an_error_while_masked_leaves_no_hooks(few_digits, monkeypatch):
    model = network()

    def broken(*arguments):
        raise RuntimeError("no room")

    monkeypatch.setattr("salvit_core.replacement.pruning.evaluate", broken)
    with pytest.raises(RuntimeError, match="no room"):
        prune(Pruning(share=0.5, sparsify=None, finetune=None), model, few_digits)
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda data: prune(Pruning(), network("self"), data),
            "attention is self: hidden units are pruned of multi_lstm",
        ),
        (lambda data: prune(Pruning(), torch.nn.Linear(2, 2), data), "attention is nothing known"),
        (lambda data: Pruning("l1"), "'l1' is unknown: choose from hoyer_square, hoyer, group"),
        (lambda data: Pruning(threshold=-1.0), "threshold is -1.0: give 0.0 or more"),
        (lambda data: shaped(preset("cct_2_3x1"), [None]), "hidden sizes of 1 layers: the network has 2"),
        (lambda data: shaped(preset("cct_2_3x1", attention="multi_lstm"), [[[1, 1]], None]), "hidden sizes of 1 heads"),
    ],
)
def test_what_cannot_be_pruned_is_refused(few_digits, call, message):
    with pytest.raises(ValueError, match=message):
        call(few_digits)
