"""The engine on a network trained on digits: what is exact, what is learnt, what goes on after a kill, and each flag.

The released code's bugs (other-systems.md) have a test each: scaled and shifted layers left out of the regulariser
and left in soft rounding, a shifted layer without its activation quantizer, a step that is not learnt, flags without
effect.
"""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from salvit_core import CCT, build, preset
from salvit_core.models.efficientvit import LiteMSA
from salvit_core.quantization import Quantization, engine, layers, load, quantize, save
from salvit_core.quantization.layers import QuantizedLayer, ShiftDivide
from salvit_core.quantization.quantizers import Quantizer
from salvit_core.training import Recipe, evaluate, train

FEW = dict(images=64, iterations=30, lr=2e-2, iterations_activations=20, lr_activations=4e-3)


@pytest.fixture(scope="module")
def trained(few_digits):
    torch.manual_seed(0)
    model = build(preset("efficientvit_test"))
    train(model, few_digits, Recipe(epochs=8, batch=32, lr=4e-3, augment="none"))
    return model.eval()


@pytest.fixture(scope="module")
def images(few_digits):
    return engine.drawn(few_digits.train, 64, 0)


def everything(network):
    """All that a quantized network is, in one place to compare."""
    state = network.state_dict()
    return {name: state[name].clone() for name in state}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def evened(network):
    """The layers whose inputs are evened out, of both kinds."""
    found = [layer for layer in layers.layers_of(network) if layer.factor is not None or layer.offset is not None]
    assert any(layer.factor is not None for layer in found) and any(layer.offset is not None for layer in found)
    return found


# Exact in float


def test_folding_migration_and_shift_are_exact(trained, images):
    plain, network = engine.prepared(trained, images, Quantization(bits_weights=4))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    layers.switch(network, weights=False, activations=False)
    evened(network)
    with torch.inference_mode():
        wanted = trained(images)
        for made in (plain(images), network(images)):
            assert (made - wanted).abs().max() <= 1.5e-5 * wanted.abs().max()
        layers.switch(network, weights=True, activations=False)
        assert (network(images) - wanted).abs().max() > 1e-2 * wanted.abs().max()  # and then they are in 4 bits


def test_a_trained_batch_norm_elsewhere_is_refused():
    with pytest.raises(ValueError, match="0 is a batch norm that follows no layer: adopt the network first"):
        layers.folded(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))


def test_migration_and_shift_are_their_formulas():
    torch.manual_seed(0)
    x = torch.randn(50, 6, 5, 5) * torch.tensor([0.001, 0.1, 1, 1, 5, 300]).view(-1, 1, 1) + 2
    most = x.double().abs().amax((0, 2, 3))
    scale = max(torch.quantile(x.double().flatten(), 0.99), most.mean())
    wanted = (most / scale).clamp(0.1, 64)
    torch.testing.assert_close(layers.migration(x).double(), wanted, rtol=1e-5, atol=0)
    assert wanted.min() == 0.1 and wanted.max() > 1
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    torch.testing.assert_close(layers.shift(x), (low + high) / 2)
    moved = x - layers.shift(x).view(-1, 1, 1)
    torch.testing.assert_close(moved.amax((0, 2, 3)), -moved.amin((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_which_layers_are_evened_out(trained, images):
    """All depth-wise convolutions; the point-wise ones of MBConv and of the stem that read one, not attention's."""
    _, network = engine.prepared(trained, images, Quantization())
    named = {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantizedLayer)}
    factors = {name for name, layer in named.items() if layer.factor is not None}
    offsets = {name for name, layer in named.items() if layer.offset is not None}
    assert {name for name in named if "depthwise" in name} == factors
    assert {name for name in named if "contract" in name or "separable.0.branch.pointwise" in name} == offsets


def test_a_shift_of_what_pads_a_picture_is_refused():
    with pytest.raises(ValueError, match="filter-wise shift is of point-wise convolutions"):
        QuantizedLayer(nn.Conv2d(2, 2, 3, padding=1), 8, 8, offset=torch.ones(2))


# What is learnt


def test_learnt_rounding_beats_the_nearest_on_every_block(trained, images, few_digits):
    """At 3 bits, where it matters; on images that it has not seen, too."""
    options = Quantization(bits_weights=3, activations=False, **FEW | dict(iterations=300))
    plain, network = engine.prepared(trained, images, options)
    nearest = evaluate(network, few_digits.test)["loss"]
    history = engine.learn_weights(plain, network, images, options)
    assert [block["block"] for block in history] == engine.blocks_of(network) and len(history) == 8
    assert all(block["after"] < block["before"] for block in history if block["block"] != "head"), history
    assert evaluate(network, few_digits.test)["loss"] < nearest


def test_evened_layers_are_regularised_and_end_in_hard_rounding(trained, images, monkeypatch):
    """The first of the released code's bugs."""
    undecided = {}

    def harden(layer):
        soft = layer.rounding.soft()
        undecided[layer] = torch.minimum(soft, 1 - soft).mean().item()
        hard(layer)

    hard = QuantizedLayer.harden
    monkeypatch.setattr(QuantizedLayer, "harden", harden)
    found = {}
    for weight in (0.0, 10.0):
        undecided.clear()
        options = Quantization(bits_weights=4, activations=False, **FEW | dict(regulariser=weight, iterations=200))
        network = quantize(trained, images, options)["network"]
        found[weight] = [undecided[layer] for layer in evened(network)]
        for layer in layers.layers_of(network):
            assert layer.rounding is None and not layer.codes.is_floating_point()
            points = layer.quantized() / layer.step + layer.zero
            assert (points - points.round()).abs().max() < 1e-3
            away = (layer.weight / layer.step + layer.zero).clamp(0, 2**layer.bits - 1) - layer.codes
            assert away.abs().max() < 1 + 1e-3  # a neighbour, up or down
    assert max(found[10.0]) < 0.03 < 0.06 < min(found[0.0]), found


def test_every_activation_quantizer_works_the_shifted_layers_too(trained, images):
    """The second bug: what a shifted layer reads is on a grid."""
    options = Quantization(bits_activations=3, same_ends=True, reconstruction=False, **FEW)
    network = quantize(trained, images, options)["network"]
    seen = {}
    for name, module in network.named_modules():
        if isinstance(module, Quantizer):
            module.register_forward_hook(lambda module, inputs, made, name=name: seen.update({name: made}))
    with torch.inference_mode():
        network(images)
    wanted = {name for name, module in network.named_modules() if isinstance(module, Quantizer)}
    assert set(seen) == wanted and all(len(made.unique()) <= 8 for made in seen.values())
    layer = next(layer for layer in layers.layers_of(network) if layer.offset is not None)
    read = []
    layer.activation.register_forward_hook(lambda module, inputs, made: read.append(inputs[0]))
    x = torch.randn(2, layer.weight.shape[1], 4, 4)
    layer(x)
    torch.testing.assert_close(read[0], x - layer.offset)  # it is moved first


def test_all_steps_are_learnt_that_of_the_sum_of_keys_too(trained, images, monkeypatch):
    """The third bug. Whatever is learnt is taken here, for better or worse."""
    errors = itertools.cycle((2.0, 1.0))
    monkeypatch.setattr(engine, "_error", lambda *arguments: next(errors))
    searched = {}
    on_grid = Quantizer.forward

    def forward(quantizer, x):
        made = on_grid(quantizer, x)
        if quantizer.on:
            searched.setdefault(quantizer, quantizer.step.item())
        return made

    monkeypatch.setattr(Quantizer, "forward", forward)
    network = quantize(trained, images, Quantization(bits_activations=4, **FEW))["network"]
    quantizers = list(layers.quantizers_of(network))
    names = {module: name for name, module in network.named_modules()}
    assert len(quantizers) == len(list(layers.layers_of(network))) + 6
    assert not [names[each] for each in quantizers if each.step.item() == searched[each]]
    (attention,) = (module for module in network.modules() if isinstance(module, LiteMSA))
    query, total = attention.denominator.operands
    assert any(each is total for each in quantizers)
    assert query is attention.values.operands[0] and attention.sum.operands[0] is attention.scores.operands[0]


def test_learnt_steps_are_no_worse_than_the_searched(trained, images):
    options = Quantization(bits_activations=3, **FEW)
    history = quantize(trained, images, options)["history"]
    of_activations = [block for block in history if "undecided" not in block]
    assert len(of_activations) == 8 and all(block["after"] <= block["before"] for block in of_activations)
    assert sum(block["after"] < block["before"] for block in of_activations) >= 3


def test_the_divisor_is_a_power_of_two_once_activations_are_quantized(trained, images):
    network = quantize(trained, images, Quantization(reconstruction=False, **FEW))["network"]
    (divide,) = (module for module in network.modules() if isinstance(module, ShiftDivide))
    numerator, denominator = torch.rand(1, 4, 16, 8), torch.rand(1, 4, 16, 1) + 0.1
    quotient = divide.numerator(numerator) / divide(numerator, denominator)
    exponents = quotient[divide.numerator(numerator) > 0].log2()
    torch.testing.assert_close(exponents, exponents.round())
    layers.switch(network, weights=True, activations=False)
    torch.testing.assert_close(divide(numerator, denominator), numerator / (denominator + divide.divide.eps))


# Every flag

BASE = Quantization(bits_weights=4, bits_activations=4, **FEW)
CHANGES = dict(
    bits_weights=3,
    bits_activations=5,
    activations=False,
    per_channel=False,
    same_ends=True,
    regulariser=5.0,
    migration=False,
    shift=False,
    log2=False,
    reconstruction=False,
    images=48,
    batch=16,
    iterations=31,
    lr=4e-2,
    iterations_activations=21,
    lr_activations=1e-3,
    seed=1006,
)


@pytest.fixture(scope="module")
def base(trained, few_digits):
    drawn = engine.drawn(few_digits.train, BASE.images, BASE.seed)
    return quantize(trained, drawn, BASE)["network"]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Quantization)])
def test_every_flag_has_an_effect(trained, few_digits, base, name):
    """The fourth bug."""
    options = dataclasses.replace(BASE, **{name: CHANGES[name]})
    drawn = engine.drawn(few_digits.train, options.images, options.seed)
    network = quantize(trained, drawn, options)["network"]
    with torch.inference_mode():
        made, wanted = (each(few_digits.test.normalised(few_digits.test.images[:64])) for each in (network, base))
    assert (made - wanted).abs().max() > 1e-3


def test_what_is_left_out_has_no_say(trained, images):
    """Fields that a quantization ignores do not change it, so that one record is of all of them."""
    for changes in (dict(activations=False), dict(reconstruction=False)):
        one = dataclasses.replace(BASE, **changes)
        ignored = {name: CHANGES[name] for name in one.ignored()}
        other = dataclasses.replace(one, **ignored)
        assert len(ignored) >= 4
        first, second = (quantize(trained, images, options)["network"] for options in (one, other))
        wanted = everything(first)
        made = everything(second)
        shared = [name for name in wanted if "numerator" not in name]
        assert all(torch.equal(wanted[name], made[name]) for name in shared)
        with torch.inference_mode():
            assert torch.equal(first(images), second(images))


# Stages, files, kills


def test_stages_are_measured_in_order(trained, images, few_digits):
    said = []
    found = quantize(
        trained,
        images,
        Quantization(bits_weights=8, bits_activations=8, **FEW),
        measure=lambda network: evaluate(network, few_digits.test)["accuracy"],
        say=lambda stage, value: said.append((stage, value)),
    )
    assert [stage for stage, _ in said] == list(engine.STAGES) and all(found[stage] == value for stage, value in said)
    assert found["float"] == evaluate(trained, few_digits.test)["accuracy"] > 60
    assert found["activations"] > found["float"] - 2  # 8 bits cost little
    some = quantize(trained, images, BASE, measure=lambda network: 1, stages=("weights",))
    assert "weights" in some and "float" not in some and "activations" not in some


@pytest.mark.parametrize("killed", [1, 5, 11])
def test_killed_between_blocks_it_goes_on_and_ends_the_same(trained, images, base, tmp_path, monkeypatch, killed):
    """Eight blocks for weights, eight for activations; nothing that was done is done again."""
    whole = quantize(trained, images, BASE)
    done = []

    def counted(work):
        def reconstruct(*arguments):
            if len(done) == killed:
                raise KeyboardInterrupt
            done.append(work.__name__)
            return work(*arguments)

        reconstruct.__name__ = work.__name__
        return reconstruct

    for name in ("reconstruct_weights", "reconstruct_activations"):
        monkeypatch.setattr(engine, name, counted(getattr(engine, name)))
    with pytest.raises(KeyboardInterrupt):
        quantize(trained, images, BASE, folder=tmp_path)
    killed = None
    again = quantize(trained, images, BASE, folder=tmp_path)
    assert len(done) == 16
    assert same(everything(again["network"]), everything(whole["network"]))
    assert again["history"] == whole["history"]


def test_progress_of_another_quantization_is_refused(trained, images, tmp_path):
    quantize(trained, images, BASE, folder=tmp_path)
    with pytest.raises(ValueError, match="checkpoint .*weights.pt is of another run: its bits_weights is 4, here 3"):
        quantize(trained, images, dataclasses.replace(BASE, bits_weights=3), folder=tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint of this program"):
        quantize(trained, images, BASE, folder=tmp_path)


def test_weights_are_shared_by_what_differs_in_activations(trained, images, tmp_path):
    first = quantize(trained, images, BASE, folder=tmp_path / "a", shared=tmp_path / "w")
    stamp = (tmp_path / "w" / "weights.pt").stat().st_mtime_ns
    other = dataclasses.replace(BASE, bits_activations=6, log2=False)
    second = quantize(trained, images, other, folder=tmp_path / "b", shared=tmp_path / "w")
    assert (tmp_path / "w" / "weights.pt").stat().st_mtime_ns == stamp
    alone = quantize(trained, images, other)
    assert same(everything(second["network"]), everything(alone["network"]))
    codes = [[layer.codes for layer in layers.layers_of(found["network"])] for found in (first, second)]
    assert all(torch.equal(one, two) for one, two in zip(*codes, strict=True))


def test_saved_and_loaded_it_answers_the_same(base, images, tmp_path):
    save(base, BASE, tmp_path / "quantized.pt")
    network, options = load(tmp_path / "quantized.pt")
    assert options == BASE
    with torch.inference_mode():
        assert torch.equal(network(images), base(images))
    codes = [tensor for name, tensor in base.state_dict().items() if name.endswith("codes")]
    assert all(tensor.dtype == torch.uint8 for tensor in codes)
    weights = sum(tensor.numel() for tensor in codes)
    assert not any(name.endswith(".weight") for name in base.state_dict() if "norm" not in name)
    assert weights > 0.8 * sum(parameter.numel() for parameter in build(base.config).parameters())
    (tmp_path / "other.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="other.pt is not a quantized network"):
        load(tmp_path / "other.pt")
    torch.save({"config": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is not a quantized network"):
        load(tmp_path / "other.pt")


# Other networks


def test_the_error_of_a_linear_layer_sums_over_what_is_last():
    """Whatever the shape of what it reads: (B, height, width, C) is not (B, C, height, width)."""
    layer = QuantizedLayer(nn.Linear(4, 7), 8, 8)
    made = torch.ones(2, 3, 5, 7)
    assert engine._distance(layer, made, 0 * made) == 7
    assert engine._distance(QuantizedLayer(nn.Conv2d(4, 3, 1), 8, 8), made, 0 * made) == 3


@pytest.mark.parametrize("name", ["cct_2_3x1", "vit_2"])
def test_our_transformers_are_quantized_layer_by_layer(name, images, tmp_path):
    torch.manual_seed(0)
    model = build(preset(name, "SA softmax")).eval()
    options = Quantization(bits_weights=8, bits_activations=8, **FEW)
    found = quantize(model, images, options)
    names = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(list(layers.layers_of(found["network"]))) == len(names)
    products = [module for module in found["network"].modules() if isinstance(module, layers.QuantizedProduct)]
    operands = [operand for product in products for operand in product.operands]
    assert len(products) >= 4 and all(operand.fitted for operand in operands)  # searched; learnt in layers alone
    with torch.inference_mode():
        wanted, made = model(images), found["network"](images)
    assert 0 < (made - wanted).abs().max() < 0.1 * wanted.abs().max()
    save(found["network"], options, tmp_path / "quantized.pt")
    again, _ = load(tmp_path / "quantized.pt")
    assert again.config == model.config
    with torch.inference_mode():
        assert torch.equal(again(images), made)
    if name.startswith("cct"):
        assert isinstance(model, CCT)


def test_a_network_that_others_wrote_is_adopted():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()
    images = torch.randn(64, 3, 8, 8)
    options = Quantization(bits_weights=8, bits_activations=8, **FEW)
    found = quantize(model, images, options)
    kinds = [(layer.factor is not None, layer.offset is not None) for layer in layers.layers_of(found["network"])]
    assert kinds == [(False, False), (True, False), (False, True), (False, False)]
    with torch.inference_mode():
        wanted, made = model(images), found["network"](images)
    assert 0 < (made - wanted).abs().max() < 0.05 * wanted.abs().max()
    with pytest.raises(ValueError, match="only networks that have a configuration can be saved"):
        save(found["network"], options, "nowhere.pt")


def test_a_configuration_of_others_makes_no_network_ours():
    """Their batch norms are folded all the same."""

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"image": 8}
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

    found = quantize(Other().eval(), torch.randn(4, 3, 8, 8), Quantization(reconstruction=False))
    assert not [each for each in found["network"].modules() if isinstance(each, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(bits_weights=0), "bits_weights is 0: give 1 to 16"),
        (dict(bits_activations=17), "bits_activations is 17: give 1 to 16"),
        (dict(regulariser=-1.0), r"regulariser is -1.0: give 0.0 or more"),
        (dict(iterations=0), "iterations is 0: give 1 or more"),
        (dict(lr=0.0), "lr is 0.0: give a positive number"),
        (dict(shift="no"), "shift is 'no': give True or False"),
    ],
)
def test_refused_options(changes, said):
    with pytest.raises(ValueError, match=said):
        Quantization(**changes)


def test_more_images_than_there_are_is_refused(few_digits):
    with pytest.raises(ValueError, match="images is 100000: there are"):
        engine.drawn(few_digits.train, 100000, 0)
