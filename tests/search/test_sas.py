import copy
import dataclasses
import itertools
import json

import pytest
import torch

from salvit_core import CCT, CCTConfig, datasets, preset, private
from salvit_core.experiments.runs import SearchRun
from salvit_core.models.attention import ATTENTION
from salvit_core.models.attention.headwise import ExternalHeads, ScalingHeads, SelfHeads
from salvit_core.models.graph import trace
from salvit_core.search import __main__ as command
from salvit_core.search import sas
from salvit_core.search.released import ReleasedPenalty, ReleasedSearch
from salvit_core.training import Recipe, fit, loop

RECIPE = Recipe(epochs=2, batch=128, lr=4e-3, augment="none")
GRANULARITIES = ("layer", "head")


def supernet(granularity="layer", seed=0, normalizer="l2q", cheap="external", **changes):
    torch.manual_seed(seed)
    return sas.MixedCCT(preset("cct_2_3x1", normalizer=normalizer, **changes), granularity, cheap=cheap)


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


@pytest.mark.parametrize("cheap", sas.CHEAP)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_mixed_layer_computes_equation_3(granularity, cheap):
    layer = stirred(supernet(granularity, cheap=cheap)).blocks[0].attention
    x = torch.randn(3, 16, 32)
    one, other = layer.self_attention(x), getattr(layer, f"{cheap}_attention")(x)
    if granularity == "head":
        heads = [layer.alpha[h] * one[:, h] + (1 - layer.alpha[h]) * other[:, h] for h in range(2)]
        wanted = torch.cat(heads, -1)
    else:
        wanted = layer.alpha * one + (1 - layer.alpha) * other
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("kind", [SelfHeads, ExternalHeads, ScalingHeads])
def test_heads_do_not_mix(kind):
    """A head of a branch depends on nothing of another head but the shared projections and memories."""
    branch = stirred(kind(preset("cct_2_3x1", normalizer="l2q"), 2))
    x = torch.randn(2, 16, 32)
    before = branch(x)
    weight = branch.query.weight if kind is ExternalHeads else branch.qkv.weight
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


def test_scaling_heads_are_scaling_attention():
    """With an output projection that mixes no heads, the same for each."""
    heads, layer = ScalingHeads(config := preset("cct_2_3x1"), 2), ATTENTION["scaling"](config)
    with torch.no_grad():
        layer.qkv.weight.copy_(heads.qkv.weight)
        layer.projection.weight.copy_(torch.block_diag(*[heads.projection.weight] * 2))
        layer.projection.bias.copy_(heads.projection.bias.repeat(2))
    x = torch.randn(3, 16, 32)
    torch.testing.assert_close(heads(x).transpose(1, 2).flatten(2), layer(x))


def test_relu_softmax_beside_scaling_runs_on_shares():
    """MPCViT's attention: each head has one of the two, and the answer is the clear network's."""
    torch.manual_seed(0)
    heads = (("self", "scaling"), ("scaling", "scaling"))
    model = CCT(preset("cct_2_3x1", normalizer="2relu", attention=heads)).eval()
    with torch.no_grad():  # of random weights as they are, scores are too small for a division in fixed point
        model.blocks[0].attention.self_attention.qkv.weight.mul_(8)
    found = private.infer(model, torch.randn(1, 1, 8, 8), "tuned")
    assert found.faithful and not found.violations


# Extraction

VARIANTS = [
    {"normalizer": "softmax"},
    {"normalizer": "2quad"},
    {"normalizer": "2relu"},
    {"normalizer": "scaling"},
    *({"normalizer": "l2q", "l2q_granularity": kind} for kind in ("element", "head", "global")),
    {"normalizer": "l2q", "l2q_learn_c": False},
    {"normalizer": "2relu", "cheap": "scaling"},
]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_extraction_computes_what_the_frozen_mixture_computes(granularity, changes):
    net = stirred(supernet(granularity, layers=4, width=48, heads=3, **changes))
    images = torch.randn(5, 1, 8, 8)
    total = net.alphas().numel()
    for budget in (0, 1, total // 2, total):
        chosen = sas.select(net.alphas(), budget, "random", seed=budget, cheap=net.choices[1])
        model = sas.extract(net, chosen)
        sas.freeze(net, chosen)
        assert net.alphas().sum() == budget
        with torch.no_grad():
            torch.testing.assert_close(model(images), net(images), rtol=1e-5, atol=1e-5)


def test_folded_self_attention_is_as_loud_as_it_was():
    net = stirred(supernet(layers=3))
    with torch.no_grad():
        for block, alpha in zip(net.blocks, (0.03, -0.4, 0.2)):
            block.attention.alpha.fill_(alpha)
    chosen, images = ("self", "external", "self"), torch.randn(5, 1, 8, 8)
    model = sas.extract(net, chosen, folded=True)
    for block, name in zip(net.blocks, chosen):
        attention = block.attention
        branch, scale = (attention.self_attention, attention.alpha.item()) if name == "self" else (None, 0)
        block.attention = attention.external_attention if branch is None else Scaled(branch, scale)
    with torch.no_grad():
        torch.testing.assert_close(model(images), net(images), rtol=1e-5, atol=1e-5)


class Scaled(torch.nn.Module):
    def __init__(self, branch, scale):
        super().__init__()
        self.branch, self.scale = branch, scale

    def forward(self, x):
        return self.scale * self.branch(x)


def test_what_is_folded_is_another_run_in_the_same_folder(few_digits, tmp_path):
    """Of one mixture, whose checkpoint both find: the second is no copy of the first."""
    first = dataclasses.replace(RECIPE, epochs=1)
    run = sas.Search(preset("cct_2_3x1", "SA L2Q"), first, first, budget=1)
    plain, folded = (sas.search(dataclasses.replace(run, folded=f), few_digits, folder=tmp_path) for f in (False, True))
    assert plain["alphas"] == folded["alphas"] and plain["architecture"] == folded["architecture"]
    assert plain["finetune"]["history"][0]["loss"] != folded["finetune"]["history"][0]["loss"]
    assert len(list(tmp_path.glob("finetune_*.pt"))) == 2


def test_heads_are_not_folded():
    with pytest.raises(ValueError, match="folded is True with granularity 'head'"):
        sas.Search(preset("cct_2_3x1"), RECIPE, RECIPE, granularity="head", folded=True)
    with pytest.raises(ValueError, match="folded is True for heads"):
        sas.extract(supernet("head"), (("self", "self"), ("external", "self")), folded=True)


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
    with pytest.raises(ValueError, match="must name self or external or scaling for each of 2 heads"):
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


# What a search knows besides alpha


@pytest.mark.parametrize("gate", sas.GATES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scores_are_what_self_attention_changes(few_digits, monkeypatch, granularity, gate):
    """The perturbation: the loss without a layer's self-attention, less the loss with it. The saliency: a slope."""
    net = stirred(sas.MixedCCT(preset("cct_2_3x1", normalizer="l2q", layers=3), granularity, gate=gate)).double()

    def doubled(split, size):
        return [(images.double(), labels) for images, labels in datasets.batches(split, size)]

    monkeypatch.setattr(sas, "batches", doubled)
    ((images, labels),) = doubled(few_digits.validation, 10_000)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def loss(layer, head, factor=1.0, step=0.0):
        changed = copy.deepcopy(net)
        attention = changed.blocks[layer].attention
        alpha = attention.alpha.detach().clone()
        alpha.view(-1)[head] = factor * alpha.view(-1)[head] + step
        sas._set_alpha(attention, alpha)
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(changed(images), labels).item()

    found = sas.scores(net, few_digits, 50)
    assert all(torch.allclose(before[name], tensor, atol=1e-12) for name, tensor in net.state_dict().items())
    for layer, head in itertools.product(range(3), range(1 if granularity == "layer" else 2)):
        place = (layer, head)[: net.alphas().dim()]
        lost, saliency = (torch.tensor(found[name])[place].item() for name in ("perturbation", "saliency"))
        assert lost == pytest.approx(loss(layer, head, 0.0) - loss(layer, head), rel=1e-4, abs=1e-7)
        slope = (loss(layer, head, step=1e-4) - loss(layer, head, step=-1e-4)) / 2e-4
        assert saliency == pytest.approx(-slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_is_chosen_by_is_an_option(few_digits, tmp_path, granularity):
    """Three scores of one mixture, whose training they share, each with its own choice; released has alpha alone."""
    first = dataclasses.replace(RECIPE, epochs=1)
    run = sas.Search(preset("cct_2_3x1", "SA L2Q", layers=3), first, first, 0, 1, granularity)
    trained = []
    for score in sas.SCORES:
        found = sas.search(dataclasses.replace(run, score=score), few_digits, folder=tmp_path)
        trained.append(found["nas"])
        known = {"alpha": found["alphas"], **found["scores"]}
        assert found["architecture"] == sas.select(known[score], 1)
    assert trained == trained[:1] * len(sas.SCORES)  # once, to the seconds that it took
    shared = {SearchRun("digits", dataclasses.replace(run, score=score)).first_phase() for score in sas.SCORES}
    assert len(shared) == 1
    assert "by saliency" in SearchRun("digits", dataclasses.replace(run, score="saliency")).label()
    with pytest.raises(ValueError, match="score is 'saliency': as released, layers are chosen by alpha"):
        ReleasedSearch(preset("cct_2_3x1"), RECIPE, RECIPE, score="saliency")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_gate_keeps_alpha_between_0_and_1(few_digits, tmp_path, granularity):
    run = sas.Search(preset("cct_2_3x1", normalizer="l2q"), RECIPE, RECIPE, 0, 1, granularity, gate="sigmoid")
    net = sas.MixedCCT(run.network, granularity, gate="sigmoid")
    torch.testing.assert_close(net.alphas(), torch.full((2,) if granularity == "layer" else (2, 2), 0.1))
    strong = dataclasses.replace(run, weight=1e3)
    result = sas.search(strong, few_digits, folder=tmp_path)
    assert all(0 < alpha < 0.1 for alpha in torch.tensor(result["alphas"]).flatten().tolist())
    with torch.no_grad():
        for name in ("self", "external"):
            chosen = (name if granularity == "layer" else (name, name),) * 2
            sas.freeze(net, chosen)
            images = torch.randn(3, 1, 8, 8)
            torch.testing.assert_close(sas.extract(net, chosen).eval()(images), net.eval()(images))
    with pytest.raises(ValueError, match="gate=.sigmoid..., here .Penalty.weight=1000.0..;"):
        sas.search(dataclasses.replace(strong, gate="free"), few_digits, folder=tmp_path)
    with pytest.raises(ValueError, match="gate is 'sigmoid': as released, alpha is learnt itself"):
        ReleasedSearch(preset("cct_2_3x1"), RECIPE, RECIPE, gate="sigmoid")


def test_alpha_may_go_down_by_plain_gradient_descent(few_digits):
    """Of a strong term alone: by the sum of the rates times lambda, where Adam's steps do not ask how strong it is."""
    first = dataclasses.replace(RECIPE, epochs=1, sgd=("alpha",))
    run = sas.Search(preset("cct_2_3x1", normalizer="l2q"), first, first, budget=1, weight=1.0)
    assert run.first.sgd == ("alpha",) and run.finetune.sgd == ()  # one recipe may serve both phases
    steps = -(-len(few_digits.train.labels) // first.batch)
    moved = torch.tensor(sas.search(run, few_digits)["alphas"]) - 0.1
    torch.testing.assert_close(moved, torch.full((2,), -steps * first.lr), rtol=0.5, atol=0)


# The L1 term


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_l1_term_and_its_gradient(granularity):
    net = supernet(granularity)
    with torch.no_grad():
        net.blocks[1].attention.alpha.fill_(-0.4)
    per_layer = 1 if granularity == "layer" else 2
    for penalty in (sas.Penalty, ReleasedPenalty):
        assert penalty(net, weight=0.3)().item() == pytest.approx(0.3 * per_layer * (0.1 + 0.4))
    grads = torch.autograd.grad(sas.Penalty(net, weight=0.3)(), [block.attention.alpha for block in net.blocks])
    assert [grad.unique().tolist() for grad in grads] == [[pytest.approx(0.3)], [pytest.approx(-0.3)]]
    assert not ReleasedPenalty(net, weight=0.3)().requires_grad


def test_the_weight_moves_alpha_unless_released(few_digits):
    def searched(weight, penalty):
        net = supernet()
        history = list(fit(net, few_digits, RECIPE, penalty=penalty(net, weight)))
        assert history[-1]["alphas"] == net.alphas().tolist()
        return history

    small, large = (searched(weight, sas.Penalty)[-1]["alphas"] for weight in (0.0, 100.0))
    assert small != large
    assert sum(map(abs, large)) < sum(map(abs, small))
    small, large = searched(0.1, ReleasedPenalty), searched(100.0, ReleasedPenalty)
    assert small[-1]["alphas"] == large[-1]["alphas"]  # bit for bit, as in the published code
    assert small[0]["penalty"] < large[0]["penalty"]  # though the loss that it reports differs


# The search


def searched(few_digits, folder=None, budget=1, **changes):
    recipes = dataclasses.replace(RECIPE, epochs=3), RECIPE
    run = sas.Search(preset("cct_2_3x1", normalizer="l2q"), *recipes, budget=budget, **changes)
    return sas.search(run, few_digits, folder=folder)


@pytest.mark.parametrize("normalizer", ["softmax", "2quad", "2relu", "l2q"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_search_end_to_end(digits, normalizer, granularity):
    config = preset("cct_2_3x1", normalizer=normalizer)
    run = sas.Search(config, RECIPE, dataclasses.replace(RECIPE, epochs=4), budget=1, granularity=granularity)
    result = sas.search(run, digits)
    network = result.pop("network")
    assert json.loads(json.dumps(result))["architecture"]
    assert network.config.attention == result["architecture"] == sas.select(result["alphas"], 1)
    assert result["trajectory"][-1] == result["alphas"] != result["trajectory"][0]
    assert [facts["alphas"] for facts in result["nas"]] == result["trajectory"]
    assert result["finetune"]["parameters"] == count(network)
    assert result["test_accuracy"] == result["finetune"]["test_accuracy"] > 45  # chance: 10


def test_fine_tuning_starts_from_the_searched_weights(few_digits, tmp_path):
    result = searched(few_digits, tmp_path)
    nas, tuned = result["nas"][-1], result["finetune"]["history"][0]
    assert tuned["cross_entropy"] < nas["cross_entropy"] < result["nas"][0]["cross_entropy"]


def test_the_alphas_are_those_of_the_last_epoch(few_digits, monkeypatch):
    accuracies = iter(range(90, 0, -1))  # though by validation the first epoch is always best
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"loss": 1.0, "accuracy": next(accuracies), "top5": 99.0})
    result = searched(few_digits)
    assert result["alphas"] == result["trajectory"][-1] != result["trajectory"][0]
    assert result["finetune"]["best_epoch"] == 0


def test_one_search_serves_all_budgets_and_rules(few_digits, tmp_path):
    first = searched(few_digits, tmp_path)
    stamp = (tmp_path / "nas.pt").stat().st_mtime_ns
    worst = searched(few_digits, tmp_path, rule="bottom")
    both = searched(few_digits, tmp_path, budget=2)
    given = searched(few_digits, tmp_path, rule=[0])
    assert (tmp_path / "nas.pt").stat().st_mtime_ns == stamp
    assert first["nas"] == worst["nas"] == both["nas"] == given["nas"]  # seconds included
    assert set(first["architecture"]) == set(worst["architecture"]) == {"self", "external"}
    assert first["architecture"] != worst["architecture"]
    assert both["architecture"] == ("self", "self")
    assert given["architecture"] == ("self", "external")
    with pytest.raises(ValueError, match="its penalty is 'Penalty.weight=0.1.', here 'Penalty.weight=0.5"):
        searched(few_digits, tmp_path, weight=0.5)


@pytest.mark.parametrize("stops", [[2, 3], [4, 1]], ids=["inside the search", "inside fine-tuning"])
def test_a_stopped_search_goes_on_to_the_same_end(few_digits, tmp_path, monkeypatch, stops):
    whole = searched(few_digits)
    evaluate = loop.evaluate
    for stop in stops:  # the nth measurement of a run never returns
        calls = iter(range(stop))

        def stopping(*arguments, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return evaluate(*arguments)

        monkeypatch.setattr(loop, "evaluate", stopping)
        with pytest.raises(KeyboardInterrupt):
            searched(few_digits, tmp_path)
    monkeypatch.setattr(loop, "evaluate", evaluate)
    resumed = searched(few_digits, tmp_path)
    assert resumed["trajectory"] == whole["trajectory"]
    for part in (lambda result: result["nas"], lambda result: result["finetune"]["history"]):
        assert untimed(part(resumed)) == untimed(part(whole))
    one, other = whole["network"].state_dict(), resumed["network"].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_impossible_budgets_are_refused_before_the_search(few_digits):
    with pytest.raises(ValueError, match="budget 3 cannot be met"):
        searched(few_digits, budget=3)


def test_a_search_is_plain_data_without_what_it_ignores():
    """The attention that its network names, the recipes' seeds, which epoch the first phase would keep."""
    first, second = Recipe(epochs=2, seed=3, keep="best"), Recipe(epochs=4, seed=5)
    one = sas.Search(preset("cct_2_3x1", "EA L2Q"), first, second, seed=1, budget=1)
    other = sas.Search(preset("cct_2_3x1", "SA L2Q"), Recipe(epochs=2, keep="last"), Recipe(epochs=4), seed=1, budget=1)
    assert one == other and hash(one) == hash(other)
    assert (one.first.seed, one.finetune.seed, one.first.keep) == (1, 1, "last")
    with pytest.raises(ValueError, match="ViTConfig is of another network"):
        sas.Search(preset("vit_2"), first, second)
    with pytest.raises(ValueError, match="granularity 'block' is unknown: choose from layer, head"):
        sas.Search(preset("cct_2_3x1"), first, second, granularity="block")


def test_the_command_refuses_a_folder_of_another_search(tmp_path, monkeypatch):
    """Whatever differs: the budget, or what the default folder's name leaves out, such as epochs."""
    done = {"architecture": ("self", "external"), "test_accuracy": 50.0, "alphas": [0.2, 0.1]}
    monkeypatch.setattr(command.sas, "search", lambda *_, **__: {**done, "network": torch.nn.Identity()})
    words = f"--preset cct_2_3x1 --data digits --search-epochs 1 --epochs 2 --out {tmp_path} --budget".split()
    for _ in range(2):  # its own is made again
        command.main([*words, "1"])
    before = (tmp_path / "result.json").read_bytes()
    for other in (["0"], ["1", "--epochs", "3"]):
        with pytest.raises(SystemExit, match="result.json is another result, by its search: give another --out"):
            command.main([*words, *other])
    assert (tmp_path / "result.json").read_bytes() == before
