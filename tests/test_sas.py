import dataclasses
import itertools
import json

import pytest
import torch

from salvit_core import CCT, CCTConfig, data, preset, sas, training
from salvit_core.attention.headwise import ExternalHeads, SelfHeads
from salvit_core.graph import trace
from salvit_core.training import Recipe, fit

RECIPE = Recipe(epochs=2, batch=128, lr=4e-3, augment="none")
GRANULARITIES = ("layer", "head")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small only lose by sharing their work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def supernet(granularity="layer", seed=0, normalizer="l2q", **changes):
    torch.manual_seed(seed)
    return sas.mixed(preset("cct_2_3x1", normalizer=normalizer, **changes), granularity)


def stirred(net):
    """Every parameter moved by chance, so that no two are alike where their initial values are."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def untimed(history):
    return [{k: v for k, v in facts.items() if k not in ("seconds", "images_per_second")} for facts in history]


# The mixture


@pytest.mark.parametrize("granularity, parameters, shape", [("layer", 8_204_754, (7,)), ("head", 7_773_351, (7, 4))])
def test_parameters_and_alphas_of_the_papers_network(granularity, parameters, shape):
    net = sas.mixed(preset("cct_7_3x1", normalizer="l2q"), granularity)
    assert count(net) == parameters
    assert net.alphas().shape == shape
    assert torch.equal(net.alphas(), torch.full(shape, 0.1))


@pytest.mark.parametrize("budget, parameters", [(3, 4_726_027), (2, 4_049_995), (1, 3_373_963)])
def test_parameters_of_what_is_extracted(budget, parameters):
    net = sas.mixed(preset("cct_7_3x1", normalizer="l2q"))
    assert count(sas.extract(net, sas.select(net.alphas(), budget, "random"))) == parameters


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_mixed_layer_computes_equation_3(granularity):
    layer = stirred(supernet(granularity)).blocks[0].attention
    x = torch.randn(3, 16, 32)
    one, other = layer.self_attention(x), layer.external_attention(x)
    if granularity == "head":
        heads = [layer.alpha[h] * one[:, h] + (1 - layer.alpha[h]) * other[:, h] for h in range(2)]
        wanted = torch.cat(heads, -1)
    else:
        wanted = layer.alpha * one + (1 - layer.alpha) * other
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("kind", [SelfHeads, ExternalHeads])
def test_heads_do_not_mix(kind):
    """A head of a branch depends on nothing of another head but the shared projections and memories."""
    layer = stirred(supernet("head")).blocks[0].attention
    branch = layer.self_attention if kind is SelfHeads else layer.external_attention
    x = torch.randn(2, 16, 32)
    before = branch(x)
    weight = branch.qkv.weight if kind is SelfHeads else branch.query.weight
    with torch.no_grad():
        weight.unflatten(0, (-1, 2, 16))[:, 1] += 1.0  # head 1's queries (, keys and values)
    after = branch(x)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_external_heads_are_external_attention():
    """All heads external: nothing else than the layer-wise external attention."""
    net = stirred(supernet("head"))
    model = sas.extract(net, (("external",) * 2,) * 2)
    plain = CCT(dataclasses.replace(net.config, attention="external")).eval()
    plain.load_state_dict({name.replace(".external_attention.", "."): t for name, t in model.state_dict().items()})
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(plain(images), model(images))


# Extraction

VARIANTS = [
    {"normalizer": "softmax"},
    {"normalizer": "2quad"},
    {"normalizer": "2relu"},
    {"normalizer": "scaling"},
    *({"normalizer": "l2q", "l2q_granularity": kind} for kind in ("element", "head", "global")),
    {"normalizer": "l2q", "l2q_learn_c": False},
]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_extraction_computes_what_the_frozen_mixture_computes(granularity, changes):
    net = stirred(supernet(granularity, layers=4, width=48, heads=3, **changes))
    images = torch.randn(5, 1, 8, 8)
    total = net.alphas().numel()
    for budget in (0, 1, total // 2, total):
        chosen = sas.select(net.alphas(), budget, "random", seed=budget)
        model = sas.extract(net, chosen)
        sas.freeze(net, chosen)
        assert net.alphas().sum() == budget
        with torch.no_grad():
            torch.testing.assert_close(model(images), net(images), rtol=1e-5, atol=1e-5)


def test_extraction_holds_and_runs_only_the_chosen_branches():
    net = supernet("head")
    model = sas.extract(net, (("self", "self"), ("external", "self")))
    assert not hasattr(model.blocks[0].attention, "external_attention")
    assert model.blocks[1].attention.self_attention.heads == 1
    layer = sas.extract(supernet(), ("external", "self"))
    assert type(layer.blocks[0].attention).__name__ == "ExternalAttention"
    assert type(layer.blocks[1].attention).__name__ == "SelfAttention"
    assert not any("alpha" in name for name in {**layer.state_dict(), **model.state_dict()})


def test_global_l2q_stays_shared_after_extraction():
    net = stirred(supernet("head", l2q_granularity="global"))
    model = sas.extract(net, (("self", "external"), ("external", "external")))
    pairs = {id(module.c) for module in model.modules() if type(module).__name__ == "L2Q"}
    assert len(pairs) == 1
    c = net.blocks[0].attention.self_attention.normalizer.c
    assert torch.equal(model.blocks[1].attention.external_attention.normalizer.c, c)


def test_what_is_extracted_is_plain_data_and_can_be_traced():
    model = sas.extract(supernet("head"), (("self", "external"), ("external", "external"))).eval()
    again = CCTConfig(**json.loads(json.dumps(dataclasses.asdict(model.config))))
    assert again == model.config
    rebuilt = CCT(again).eval()
    rebuilt.load_state_dict(model.state_dict())
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(trace(rebuilt)(images), model(images))


@pytest.mark.parametrize(
    "granularity, chosen",
    [
        ("layer", ("self",)),
        ("layer", ("self", "scaling")),
        ("layer", (("self", "self"), ("self", "self"))),
        ("head", ("self", "self")),
        ("head", (("self", "external"), ("self",))),
        ("head", ("self", ("self", "external"))),
    ],
)
def test_architectures_of_another_shape_are_refused(granularity, chosen):
    for function in (sas.extract, sas.freeze):
        with pytest.raises(ValueError, match="does not fit: name self or external for 2 layers"):
            function(supernet(granularity), chosen)


def test_unknown_granularity_is_refused():
    with pytest.raises(ValueError, match="granularity 'token' is unknown: choose from layer, head"):
        sas.mixed(preset("cct_2_3x1"), "token")
    with pytest.raises(ValueError, match="must name self or external for each of 2 heads"):
        preset("cct_2_3x1", attention=(("self",), "self"))


# Selection

ALPHAS = torch.tensor([0.3, -0.9, 0.5, 0.1])


def layers(chosen):
    return [layer for layer, name in enumerate(chosen) if name == "self"]


def test_top_and_bottom():
    assert layers(sas.select(ALPHAS, 2, "top")) == [0, 2]
    assert layers(sas.select(ALPHAS, 2, "bottom")) == [1, 3]  # the value, not its size (Eq. 4)
    assert sas.select(ALPHAS, 0) == ("external",) * 4
    assert sas.select(ALPHAS, 4) == ("self",) * 4
    assert layers(sas.select(torch.full((4,), 0.1), 1)) == [0]


def test_heads_compete_across_layers():
    alphas = torch.tensor([[0.1, 0.2], [0.9, 0.8]])
    assert sas.select(alphas, 2) == (("external", "external"), ("self", "self"))
    assert sas.select(alphas, 2, "bottom") == (("self", "self"), ("external", "external"))
    assert sas.select(alphas, 1, [(0, 1)]) == (("external", "self"), ("external", "external"))


def test_random_draws_without_replacement():
    drawn = {sas.select(ALPHAS, 2, "random", seed) for seed in range(60)}
    assert len(drawn) == 6  # every pair out of four
    assert all(len(layers(chosen)) == 2 for chosen in drawn)
    assert sas.select(ALPHAS, 2, "random", 3) == sas.select(ALPHAS * -5, 2, "random", 3)


def test_a_given_list():
    assert layers(sas.select(ALPHAS, 2, [3, 1])) == [1, 3]
    for wrong in ([1], [1, 1], [0, 4], [0, 1, 2]):
        with pytest.raises(ValueError, match="does not name 2 different layers out of 4"):
            sas.select(ALPHAS, 2, wrong)


@pytest.mark.parametrize("budget", [-1, 5, 2.5, True, None])
def test_impossible_budgets_are_refused(budget):
    for rule in ("top", "bottom", "random", [0]):
        with pytest.raises(ValueError, match="cannot be met: the network has 4 layers"):
            sas.select(ALPHAS, budget, rule)


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule 'best' is unknown: choose from top, bottom, random"):
        sas.select(ALPHAS, 1, "best")


# The L1 term


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_l1_term_and_its_gradient(granularity):
    net = supernet(granularity)
    with torch.no_grad():
        net.blocks[1].attention.alpha.fill_(-0.4)
    per_layer = 1 if granularity == "layer" else 2
    for released in (False, True):
        term = sas.penalty(net, weight=0.3, released=released)()
        assert term.item() == pytest.approx(0.3 * per_layer * (0.1 + 0.4))
    grads = torch.autograd.grad(sas.penalty(net, weight=0.3)(), [block.attention.alpha for block in net.blocks])
    assert [grad.unique().tolist() for grad in grads] == [[pytest.approx(0.3)], [pytest.approx(-0.3)]]
    assert not sas.penalty(net, weight=0.3, released=True)().requires_grad


def test_the_weight_moves_alpha_unless_released(digits):
    def searched(weight, released):
        net = supernet()
        history = list(fit(net, digits, RECIPE, penalty=sas.penalty(net, weight, released)))
        assert history[-1]["alphas"] == net.alphas().tolist()
        return history

    small, large = (searched(weight, False)[-1]["alphas"] for weight in (0.0, 100.0))
    assert small != large
    assert sum(map(abs, large)) < sum(map(abs, small))
    small, large = searched(0.1, True), searched(100.0, True)
    assert small[-1]["alphas"] == large[-1]["alphas"]  # bit for bit, as in the published code
    assert small[0]["penalty"] < large[0]["penalty"]  # though the loss that it reports differs


# The search


def searched(digits, folder=None, budget=1, rule="top", **changes):
    recipes = dataclasses.replace(RECIPE, epochs=3), RECIPE
    return sas.search(
        preset("cct_2_3x1", normalizer="l2q"), digits, *recipes, budget, rule=rule, folder=folder, **changes
    )


@pytest.mark.parametrize("normalizer", ["softmax", "2quad", "2relu", "l2q"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_search_end_to_end(digits, normalizer, granularity):
    config = preset("cct_2_3x1", normalizer=normalizer)
    result = sas.search(config, digits, RECIPE, dataclasses.replace(RECIPE, epochs=4), 1, granularity)
    network = result.pop("network")
    assert json.loads(json.dumps(result))["architecture"]
    assert network.config.attention == result["architecture"] == sas.select(result["alphas"], 1)
    assert result["trajectory"][-1] == result["alphas"] != result["trajectory"][0]
    assert [facts["alphas"] for facts in result["nas"]] == result["trajectory"]
    assert result["finetune"]["parameters"] == count(network)
    assert result["test_accuracy"] == result["finetune"]["test_accuracy"] > 45  # chance: 10


def test_fine_tuning_starts_from_the_searched_weights(digits, tmp_path):
    result = searched(digits, tmp_path)
    nas, tuned = result["nas"][-1], result["finetune"]["history"][0]
    assert tuned["cross_entropy"] < nas["cross_entropy"] < result["nas"][0]["cross_entropy"]


def test_the_alphas_are_those_of_the_last_epoch(digits, monkeypatch):
    accuracies = iter(range(90, 0, -1))  # though by validation the first epoch is always best
    monkeypatch.setattr(training, "evaluate", lambda *_: {"loss": 1.0, "accuracy": next(accuracies), "top5": 99.0})
    result = searched(digits)
    assert result["alphas"] == result["trajectory"][-1] != result["trajectory"][0]
    assert result["finetune"]["best_epoch"] == 0


def test_one_search_serves_all_budgets_and_rules(digits, tmp_path):
    first = searched(digits, tmp_path)
    stamp = (tmp_path / "nas.pt").stat().st_mtime_ns
    worst = searched(digits, tmp_path, rule="bottom")
    both = searched(digits, tmp_path, budget=2)
    given = searched(digits, tmp_path, rule=[0])
    assert (tmp_path / "nas.pt").stat().st_mtime_ns == stamp
    assert first["nas"] == worst["nas"] == both["nas"] == given["nas"]  # seconds included
    assert set(first["architecture"]) == set(worst["architecture"]) == {"self", "external"}
    assert first["architecture"] != worst["architecture"]
    assert both["architecture"] == ("self", "self")
    assert given["architecture"] == ("self", "external")
    with pytest.raises(
        ValueError, match="its penalty is 'Penalty.weight=0.1, released=False.', here 'Penalty.weight=0.5"
    ):
        searched(digits, tmp_path, weight=0.5)


@pytest.mark.parametrize("stops", [[2, 3], [4, 1]], ids=["inside the search", "inside fine-tuning"])
def test_a_stopped_search_goes_on_to_the_same_end(digits, tmp_path, monkeypatch, stops):
    whole = searched(digits)
    evaluate = training.evaluate
    for stop in stops:  # the nth measurement of a run never returns
        calls = iter(range(stop))

        def stopping(*arguments, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return evaluate(*arguments)

        monkeypatch.setattr(training, "evaluate", stopping)
        with pytest.raises(KeyboardInterrupt):
            searched(digits, tmp_path)
    monkeypatch.setattr(training, "evaluate", evaluate)
    resumed = searched(digits, tmp_path)
    assert resumed["trajectory"] == whole["trajectory"]
    for part in (lambda result: result["nas"], lambda result: result["finetune"]["history"]):
        assert untimed(part(resumed)) == untimed(part(whole))
    one, other = whole["network"].state_dict(), resumed["network"].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_impossible_budgets_are_refused_before_the_search(digits):
    with pytest.raises(ValueError, match="budget 3 cannot be met"):
        searched(digits, budget=3)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_released_search(digits, granularity, monkeypatch):
    models = []
    train = sas.train

    def spy(model, *arguments, **options):
        models.append(model)
        return train(model, *arguments, **options)

    monkeypatch.setattr(sas, "train", spy)
    small, large = (searched(digits, weight=w, released=True, granularity=granularity) for w in (0.1, 100.0))
    assert small["trajectory"] == large["trajectory"]
    assert small["finetune"]["recipe"]["decay_all"]
    (net, _), network = models, small["network"]
    assert isinstance(net, sas.MixedCCT)  # both branches ran to the end
    assert sorted(net.alphas().flatten().unique().tolist()) == [0.0, 1.0]
    images, _ = next(data.batches(digits.test, 50, digits.mean, digits.std))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), net.eval()(images), rtol=1e-5, atol=1e-5)


# More than two choices, each with a price

CHOICES, PRICES = ("self", "external", "scaling"), (3.0, 2.0, 1.0)


def test_a_layer_of_choices_is_their_weighted_sum():
    torch.manual_seed(0)
    net = stirred(sas.mixed(preset("cct_2_3x1", normalizer="l2q"), choices=CHOICES))
    layer, x = net.blocks[0].attention, torch.randn(3, 16, 32)
    parts = [layer.self_attention(x), layer.external_attention(x), layer.scaling_attention(x)]
    torch.testing.assert_close(layer(x), sum(a * part for a, part in zip(layer.alpha, parts)))
    assert net.alphas().shape == (2, 3)


@pytest.mark.parametrize("chosen", [("scaling", "self"), ("external", "scaling")])
def test_extraction_from_choices_computes_what_the_frozen_mixture_computes(chosen):
    torch.manual_seed(0)
    net = stirred(sas.mixed(preset("cct_2_3x1", normalizer="l2q"), choices=CHOICES))
    final = sas.extract(net, chosen)
    sas.freeze(net, chosen)
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(final.eval()(images), net(images), rtol=0, atol=1e-5)
    assert final.config.attention == chosen
    assert count(final) == count(CCT(final.config))


def test_the_l1_term_is_weighted_by_prices():
    net = sas.mixed(preset("cct_2_3x1"), choices=CHOICES)
    term = sas.penalty(net, 0.5, prices=PRICES)()
    assert term.item() == pytest.approx(0.5 * 2 * (3 + 2 + 1) / 3 / 2)  # alpha 1/3, mean price 2, two layers
    term.backward()
    for block in net.blocks:
        torch.testing.assert_close(block.attention.alpha.grad, 0.5 * torch.tensor(PRICES) / 2)


def test_the_best_affordable_architecture_is_found():
    """Against all architectures, one by one."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        alphas, prices = torch.randn(4, 3, generator=generator), torch.rand(3, generator=generator).add(0.1).tolist()
        budget = 4 * min(prices) + torch.rand((), generator=generator).item()
        found = sas.afford(alphas, CHOICES, prices, budget)
        best = -1.0
        for picks in itertools.product(range(3), repeat=4):
            if sum(prices[i] for i in picks) <= budget:
                best = max(best, sum(alphas[layer, i].abs().item() for layer, i in enumerate(picks)))
        picks = [CHOICES.index(name) for name in found]
        assert sum(prices[i] for i in picks) <= budget * (1 + 1e-9)
        assert sum(alphas[layer, i].abs().item() for layer, i in enumerate(picks)) == pytest.approx(best)


def test_a_budget_for_everything_takes_the_largest_alphas():
    alphas = torch.tensor([[0.1, -0.9, 0.2], [0.5, 0.1, 0.2]])
    assert sas.afford(alphas, CHOICES, PRICES, 6.0) == ("external", "self")
    assert sas.afford(alphas, CHOICES, PRICES, 2.0) == ("scaling", "scaling")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sas.afford(torch.ones(2, 3), CHOICES, PRICES, 1.9), "budget 1.9 cannot be met: 2 layers cost"),
        (lambda: sas.afford(torch.ones(2, 3), CHOICES, (1.0, 2.0), 9), "do not fit 3 choices"),
        (lambda: sas.afford(torch.ones(2, 3), CHOICES, (1.0, 2.0, -1.0), 9), "one positive number for each"),
        (lambda: sas.afford(torch.ones(2, 2), CHOICES, PRICES, 9), r"alphas have shape \(2, 2\): give \(layers, 3\)"),
        (lambda: sas.mixed(preset("cct_2_3x1"), "head", choices=CHOICES), "granularity 'layer'"),
        (lambda: sas.mixed(preset("cct_2_3x1"), choices=("self", "self")), "two or more different mechanisms"),
        (lambda: sas.mixed(preset("cct_2_3x1"), choices=("self", "sand")), "attention 'sand' is unknown"),
        (lambda: sas.mixed(preset("vit_2")), "ViTConfig is of another network"),
        (lambda: sas.penalty(sas.mixed(preset("cct_2_3x1")), prices=(1.0, 2.0)), "one alpha per choice"),
    ],
)
def test_choices_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_search_among_three_within_a_budget(digits, tmp_path):
    config = preset("cct_2_3x1", normalizer="l2q")
    options = dict(choices=CHOICES, prices=PRICES, folder=tmp_path)
    found = sas.search(config, digits, RECIPE, RECIPE, 4.0, **options)
    assert found["architecture"] == sas.afford(found["alphas"], CHOICES, PRICES, 4.0)
    assert sum(PRICES[CHOICES.index(name)] for name in found["architecture"]) <= 4.0
    assert found["network"].config.attention == found["architecture"]
    assert found["test_accuracy"] > 20
    assert sas.search(config, digits, RECIPE, RECIPE, 4.0, **options)["test_accuracy"] == found["test_accuracy"]
    with pytest.raises(ValueError, match="give prices with choices"):
        sas.search(config, digits, RECIPE, RECIPE, 4.0, choices=CHOICES)
    with pytest.raises(ValueError, match="cannot be met"):
        sas.search(config, digits, RECIPE, RECIPE, 1.0, **options)
