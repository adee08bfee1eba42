"""Attention replaced: what is inherited, what each stage trains, that it learns, and that it goes on after a kill."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from others import timm

from salvit_core import CCT, ViT, datasets, preset
from salvit_core.models.config import DeiTConfig
from salvit_core.models.vit import load_deit
from salvit_core.replacement.distillation import Distillation, distil, replaced, trained
from salvit_core.replacement.pruning import shaped
from salvit_core.training import Recipe, evaluate, fit, train
from salvit_core.training.distillation import Watched, places, unlike

RECIPE = Recipe(epochs=3, batch=64, lr=4e-3, augment="none", keep="last")
RUN = Distillation("linformer", attention=RECIPE, blocks=RECIPE, head=RECIPE, drop_path=0.0)
TIMES = ("seconds", "images_per_second")


def network(backbone="cct_2_3x1", seed=0, **changes):
    torch.manual_seed(seed)
    return (ViT if backbone.startswith("vit") else CCT)(preset(backbone, **changes))


@pytest.fixture(scope="module")
def teacher(digits):
    model = network()
    train(model, digits, dataclasses.replace(RECIPE, epochs=8))
    return model.eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("backbone", ["cct_2_3x1", "vit_2"])
def test_all_but_the_attention_is_the_teachers(backbone):
    teacher = network(backbone)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.normal_()
    model = replaced(teacher, "external")
    assert model.config.attention == ("external", "external")
    theirs = teacher.state_dict()
    outside = {name for name in model.state_dict() if ".attention." not in name}
    assert outside == {name for name in theirs if ".attention." not in name}
    assert all(torch.equal(model.state_dict()[name], theirs[name]) for name in outside)
    one = replaced(teacher, "external", layers=1)  # the last
    assert one.config.attention == ("self", "external")
    assert torch.equal(one.blocks[0].attention.qkv.weight, teacher.blocks[0].attention.qkv.weight)


def test_a_replacement_may_have_another_normalizer():
    model = replaced(network(), "standard", normalizer="l2q")
    assert (model.config.normalizer, model.config.attention) == ("l2q", ("standard", "standard"))
    assert {name.split(".")[-1] for name in state(model) if "normalizer" in name} == {"c", "d"}
    assert replaced(network(), "standard").config.normalizer == "softmax"


def test_replaced_by_the_same_function_it_computes_the_same():
    """ "standard" is self-attention with three matrices: with the teacher's in them nothing may have changed."""
    teacher = network("vit_2", qkv_bias=True, norm_eps=1e-6).eval()
    model = replaced(teacher, "standard").eval()
    images = torch.randn(3, 1, 8, 8)
    assert (model(images) - teacher(images)).abs().max() > 1e-4
    for ours, theirs in zip(model.blocks, teacher.blocks):
        parts = zip(theirs.attention.qkv.weight.chunk(3), theirs.attention.qkv.bias.chunk(3))
        for name, (weight, bias) in zip(("query", "key", "value"), parts):
            getattr(ours.attention, name).load_state_dict({"weight": weight, "bias": bias})
    torch.testing.assert_close(model(images), teacher(images), rtol=0, atol=1e-5)


def test_the_cosine_losses_are_as_in_the_equations(few_digits):
    """At a learning rate of nothing the losses of an epoch are those of the networks, written out."""
    teacher = network("vit_2").eval()
    model = replaced(teacher, "linformer", drop_path=0.0)
    for attention in (block.attention for block in model.blocks):
        attention.dropout.p = 0.0
    images, labels = next(datasets.batches(few_digits.train, 5000))
    recipe = dataclasses.replace(
        RECIPE, epochs=1, lr=1e-12, weight_decay=0.0, distill_blocks=2.0, distill_attention=3.0
    )
    (facts,) = fit(model, few_digits, recipe, teacher)
    x, y, blocks, attentions = (teacher.tokenizer(images) + teacher.position,) * 2 + (0.0, 0.0)
    y = model.tokenizer(images) + model.position
    with torch.no_grad():
        for ours, theirs in zip(model.blocks, teacher.blocks):
            given = []
            for block, tokens in ((ours, y), (theirs, x)):
                hook = block.attention.projection.register_forward_pre_hook(
                    lambda _, args, to=given: to.append(args[0])
                )
                block.attention(block.norm1(tokens))
                hook.remove()
            x, y = theirs(x), ours(y)
            attentions += (1 - F.cosine_similarity(*given, dim=-1)).mean()
            blocks += (1 - F.cosine_similarity(y, x, dim=-1)).mean()
    assert facts["distill_blocks"] == pytest.approx(2 * blocks.item(), rel=1e-4)
    assert facts["distill_attention"] == pytest.approx(3 * attentions.item(), rel=1e-4)
    assert facts["loss"] == pytest.approx(sum(facts[n] for n in facts if n.startswith(("cross", "distill"))))


def test_attentions_without_a_projection_of_all_features_are_compared_where_they_end():
    teacher, recipe = network("vit_2"), dataclasses.replace(RECIPE, distill_attention=1.0)
    wanted = {"linformer": ("blocks.1.attention.projection", "input"), "external": ("blocks.1.attention", "output")}
    for by, place in wanted.items():
        model = replaced(teacher, by)
        found = places(model, recipe, teacher)
        assert found[1] == place and len(found) == 2
        sizes = [tensor.shape for tensor in Watched(model, found)(torch.randn(3, 1, 8, 8))[2:]]
        assert (
            sizes
            == [tensor.shape for tensor in Watched(teacher, found)(torch.randn(3, 1, 8, 8))[2:]]
            == [(3, 17, 32)] * 2
        )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_cosine_loss_of_equal_and_of_opposite_tokens():
    x = torch.randn(2, 5, 7)
    assert unlike(x, 3 * x).item() == pytest.approx(0, abs=1e-5)
    assert unlike(x, -x).item() == pytest.approx(4)  # 2 for each of two images


# What each stage trains


@pytest.mark.parametrize("loss", ["combine", "similarity"])
@pytest.mark.parametrize("by", ["linformer", "external"])
def test_every_stage_trains_its_part_and_nothing_else(few_digits, teacher, loss, by):
    run = dataclasses.replace(
        RUN, by=by, loss=loss, attention=dataclasses.replace(RECIPE, epochs=1), blocks=None, head=None
    )
    torch.manual_seed(run.seed)
    before = state(replaced(teacher, by, drop_path=0.0))
    model = distil(run, teacher, few_digits)["network"]
    moved = changed(before, model)
    assert moved == set(trained(model, teacher, "attention", loss))
    assert all(".attention." in name for name in moved)
    for stage in ("blocks", "head"):
        one = dataclasses.replace(run, attention=None, **{stage: dataclasses.replace(RECIPE, epochs=1)})
        torch.manual_seed(run.seed)
        before = state(replaced(teacher, by, drop_path=0.0))
        moved = changed(before, distil(one, teacher, few_digits)["network"])
        assert moved == {name for name in before if name.startswith(f"{stage}.")}


def test_released_bug_no_fresh_projection_is_frozen_in_the_first_stage(few_digits, teacher):
    """There it was drawn anew and held: whatever the replacement learnt went through a random matrix."""
    model = replaced(teacher, "linformer")
    for ours, theirs in zip(model.blocks, teacher.blocks):  # not fresh
        assert torch.equal(ours.attention.projection.weight, theirs.attention.projection.weight)
        assert torch.equal(ours.attention.projection.bias, theirs.attention.projection.bias)
    model_by = {by: replaced(teacher, by) for by in ("linformer", "external")}
    held = {
        (by, loss): [name for name, _ in replaced(teacher, by).named_parameters()
                     if ".attention." in name and name not in trained(model_by[by], teacher, "attention", loss)]
        for by in ("linformer", "external")
        for loss in ("combine", "similarity")
    }  # fmt: skip
    assert not held["linformer", "combine"] and not held["external", "combine"]
    assert not held["external", "similarity"]  # its projections are fresh
    assert {name.split(".")[-2] for name in held["linformer", "similarity"]} == {"projection"}  # the teacher's own


def test_it_learns_what_attention_did(digits, teacher):
    """The first stage alone: nothing but the replacements is trained, so all that is gained is theirs."""
    before = evaluate(replaced(teacher, "linformer"), digits.test)["accuracy"]
    gained = {}
    for loss in ("combine", "similarity"):
        recipe = dataclasses.replace(RECIPE, epochs=8)
        run = Distillation("linformer", loss, recipe, None, None, drop_path=0.0)
        result = distil(run, teacher, digits)
        history = result["stages"]["attention"]["history"]
        part = "distill_blocks" if loss == "combine" else "distill_attention"
        assert history[-1][part] < 0.6 * history[0][part]
        assert ("cross_entropy" in history[0]) == (loss == "combine")
        gained[loss] = result["test_accuracy"]
    assert min(gained.values()) > max(before, 60)
    assert evaluate(teacher, digits.test)["accuracy"] > 70


def test_three_stages_are_tested_each(few_digits, teacher):
    result = distil(RUN, teacher, few_digits)
    assert list(result["stages"]) == ["attention", "blocks", "head"]
    assert result["test_accuracy"] == result["stages"]["head"]["test_accuracy"]
    assert result["test_accuracy"] == evaluate(result["network"], few_digits.test, 64)["accuracy"]
    assert [len(stage["history"]) for stage in result["stages"].values()] == [3, 3, 3]


def test_a_deit_with_weights_under_timms_names_is_a_teacher():
    config = dict(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    theirs = timm().models.vision_transformer.VisionTransformer(**config).eval()
    ours = ViT(preset("deit_tiny", image=32, width=48, layers=2, classes=10)).eval()
    load_deit(ours, theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-4)
    model = replaced(ours, "linformer")
    assert isinstance(model.config, DeiTConfig) and model.config.qkv_bias
    assert torch.equal(model.blocks[1].mlp.expand.weight, theirs.blocks[1].mlp.fc1.weight)


# Options


def test_the_published_recipe_is_the_default():
    run = Distillation("linformer")
    assert (run.attention.epochs, run.attention.batch, run.attention.lr, run.attention.weight_decay) == (
        200,
        256,
        2.5e-4,
        0.05,
    )
    assert (run.attention.warmup, run.attention.augment, run.attention.erase, run.drop_path) == (
        5,
        "randaugment",
        0.25,
        0.1,
    )
    assert (run.blocks.epochs, run.blocks.lr, run.head.epochs, run.head.lr) == (100, 5e-5, 30, 5e-4)
    assert run.loss == "combine" and run.attention.distill_blocks == run.attention.cross_entropy == 1
    similar = Distillation("linformer", "similarity", seed=3)
    assert similar.attention.distill_attention == 1 and similar.attention.cross_entropy == 0
    assert {recipe.seed for recipe in similar.stages().values()} == {3}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: Distillation("sand"), "'sand' is unknown: choose from"),
        (lambda t: Distillation("linformer", "l2"), "'l2' is unknown: choose from combine, similarity"),
        (lambda t: Distillation("linformer", attention=None, blocks=None, head=None), "at least one stage"),
        (lambda t: Distillation("standard", layers=1, normalizer="l2q"), "leave layers at 0"),
        (lambda t: replaced(t, "self"), "attention is 'self' already"),
        (lambda t: replaced(t, "external", layers=3), "layers is 3: the teacher has 2"),
        (lambda t: replaced(pruned(), "external", layers=1), "is of another size, since it is pruned"),
        (lambda t: replaced(torch.nn.Linear(2, 2), "external"), "the teacher is a Linear"),
        (lambda t: begun(t, model=network(layers=4), distill_blocks=1.0), "blocks is 2, the model's 4"),
        (lambda t: begun(None, cross_entropy=0.0), "no loss is left"),
        (lambda t: begun(t, distill_blocks=1.0, compile=True), "compile is True"),
        (lambda t: begun(None, ("blocks", "head", "tokenizer", "position", "norm", "pool")), "every parameter"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(teacher, call, message):
    with pytest.raises(ValueError, match=message):
        call(teacher)


def pruned():
    return shaped(preset("cct_2_3x1", attention="multi_lstm"), [[(3, 2), (16, 16)]] * 2)


def test_a_pruned_teacher_may_be_replaced_altogether():
    assert replaced(pruned(), "external").config.attention == ("external", "external")


def begun(teacher, frozen=(), model=None, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    return next(fit(model or network(), datasets.load("digits"), recipe, teacher, frozen=frozen))


def test_a_teacher_that_is_not_finite_is_refused(few_digits):
    broken = network()
    with torch.no_grad():
        broken.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weight head.weight of the teacher is not finite"):
        distil(RUN, broken, few_digits)


# Stopping and going on


def test_stopped_between_and_inside_stages_it_goes_on_to_the_same_end(few_digits, teacher, tmp_path, monkeypatch):
    whole = distil(RUN, teacher, few_digits, tmp_path / "whole")
    from salvit_core.training import loop

    calls = iter(range(100))

    def saved(*arguments, real=loop.save):
        real(*arguments)
        if next(calls) in (1, 4, 7):  # after the second epoch of every stage
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", saved)
    stops = 0
    while True:
        try:
            again = distil(RUN, teacher, few_digits, tmp_path / "parts")
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 3
    for name, tensor in again["network"].state_dict().items():
        assert torch.equal(tensor, whole["network"].state_dict()[name]), name
    for name, stage in again["stages"].items():
        theirs = whole["stages"][name]["history"]
        assert [{k: v for k, v in facts.items() if k not in TIMES} for facts in stage["history"]] == [
            {k: v for k, v in facts.items() if k not in TIMES} for facts in theirs
        ]
