"""Training runs as records: trained once, found again, their weights beside them, a search's first phase shared."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch

from salvit_core import CCT, cost, preset, workspace
from salvit_core.experiments import execute, latency, profiles, store
from salvit_core.experiments.runs import (
    ClearRun,
    EvaluationRun,
    LearnedRun,
    PrivateRun,
    QuantizationRun,
    SearchRun,
    TrainRun,
    network,
    of_network,
    run_of,
)
from salvit_core.quantization import Quantization
from salvit_core.search import sas
from salvit_core.training import Recipe, evaluate

RECIPE = Recipe(epochs=2, batch=64, lr=2e-3, augment="none")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    execute.dataset.cache_clear()
    yield tmp_path
    execute.dataset.cache_clear()


def run(**changes):
    return TrainRun("digits", preset("cct_2_3x1", "SA L2Q"), RECIPE, images=128, **changes)


def test_trained_once_and_its_weights_are_its_own(root):
    record = execute.ensure(run())
    assert execute.ensure(run()) == record
    assert len(record["history"]) == 2 and record["seed"] == 0
    assert not list(root.rglob("*.unfinished"))
    model, data = execute.trained(run()), execute.dataset("digits", 128)
    again = evaluate(model, data.test)["accuracy"]
    assert again == pytest.approx(record["metrics"]["test_accuracy"])


def test_a_data_set_can_be_cut_and_is_the_same_for_all():
    cut, whole = execute.dataset("digits", 100), execute.dataset("digits")
    assert len(cut.train.labels) == 100 < len(whole.train.labels)
    assert torch.equal(cut.test.images, whole.test.images)
    assert len(set(cut.train.labels.tolist())) == 10  # a random part, not the first


def test_a_teacher_is_trained_first(root):
    distil = dataclasses.replace(run(), recipe=dataclasses.replace(RECIPE, distill_logits=1.0), teacher=run())
    record = execute.ensure(distil)
    assert len(list((root / "data" / "runs" / "training").glob("*.json"))) == 2
    assert record["history"][0]["distill_logits"] > 0
    assert record["config"]["teacher"]["data"] == "digits"


def search(finetune=RECIPE, **changes):
    first = dataclasses.replace(RECIPE, epochs=1)
    config = preset("cct_2_3x1", "SA L2Q", layers=3)
    return SearchRun("digits", sas.Search(config, first, finetune, **{"budget": 1, **changes}), images=128)


@pytest.mark.processes
def test_two_processes_train_a_first_phase_once(root):
    """Of two that begin together one waits, and takes what the other wrote."""
    code = (
        "import dataclasses, sys; from salvit_core import preset; from salvit_core.experiments import execute\n"
        "from salvit_core.experiments.runs import SearchRun; from salvit_core.search import sas\n"
        "from salvit_core.training import Recipe\n"
        "recipe = Recipe(epochs=6, batch=64, lr=2e-3, augment='none')\n"
        "tuned = dataclasses.replace(recipe, epochs=1)\n"
        "search = sas.Search(preset('cct_2_3x1', 'SA L2Q', layers=3), recipe, tuned, 0)\n"
        "execute.ensure(SearchRun('digits', dataclasses.replace(search, budget=int(sys.argv[1])), images=512))\n"
    )
    environment = {**os.environ, "SALVIT_ROOT": str(root)}
    both = [subprocess.Popen([sys.executable, "-c", code, str(b)], env=environment) for b in (1, 2)]
    assert [each.wait(120) for each in both] == [0, 0]
    one, other = (record["metrics"]["nas"] for record in store.load("search"))
    assert len(one) == 6 and one == other  # to the seconds that it took


def test_a_search_that_is_stopped_goes_on_from_both_its_phases(root, monkeypatch):
    """What was fine-tuned too, wherever it goes on; nothing of it stays once the search is on record."""
    with monkeypatch.context() as stopped:
        stopped.setattr(execute, "_save_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            execute.ensure(search())
    first, second = execute.checkpoints(search())
    assert first.name == "nas.pt" and second.name.startswith("finetune_") and first.parent != second.parent
    execute.ensure(search())
    assert execute.checkpoints(search()) == [first] and not list(root.rglob("finetune_*"))


def test_layers_that_are_given_share_the_first_phase_too():
    assert search(rule=(0, 1), budget=2).first_phase() == search().first_phase()


def test_searches_share_their_first_phase(monkeypatch):
    monkeypatch.setattr(execute, "MOST_TOGETHER", 1)  # in this process, where what is replaced below is
    phases = []
    fit = sas.fit
    monkeypatch.setattr(sas, "fit", lambda net, *a, **k: phases.append(a[-1].exists()) or fit(net, *a, **k))
    found = list(execute.collect([search(), search(budget=2), search(rule="bottom")]).values())
    assert phases == [False, True, True]
    first, second, bottom = (record["metrics"] for record in found)
    assert first["alphas"] == second["alphas"] == bottom["alphas"]
    assert first["architecture"].count("self") == 1 and second["architecture"].count("self") == 2
    assert first["architecture"] != bottom["architecture"]
    model = execute.trained(search())
    assert list(model.config.attention) == first["architecture"]
    data = execute.dataset("digits", 128)
    assert evaluate(model, data.test)["accuracy"] == pytest.approx(first["test_accuracy"])


@pytest.mark.processes
def test_two_ways_to_fine_tune_one_choice_do_not_meet():
    """The same search, the same layers, another recipe: each has a checkpoint of its own."""
    first, second = execute.collect([search(), search(dataclasses.replace(RECIPE, lr=1e-4))]).values()
    assert first["metrics"]["architecture"] == second["metrics"]["architecture"]
    assert first["history"] != second["history"]


def test_the_same_search_asked_for_in_two_ways_is_one_record():
    """What a search ignores: the attention that its network names, and the seeds of its recipes."""
    one, first = search(), dataclasses.replace(RECIPE, epochs=1, seed=5, keep="best")
    config = preset("cct_2_3x1", "EA L2Q", layers=3)
    other = SearchRun("digits", sas.Search(config, first, dataclasses.replace(RECIPE, seed=7), budget=1), images=128)
    assert one == other and store.name(one) == store.name(other)
    assert store.name(search(seed=1)) != store.name(one)
    softmax = preset("cct_2_3x1", "SA softmax", l2q_granularity="head", memory=3)
    assert store.key(dataclasses.replace(run(), network=softmax)) == store.key(
        dataclasses.replace(run(), network=preset("cct_2_3x1", "SA softmax"))
    )


def test_reference_gives_what_there_is(root, capsys):
    found = execute.collect([run()], "reference")
    assert found == {} and found.absent == [run()]
    assert "1 runs (digits cct_2_3x1 SA L2Q 2 epochs seed 0)" in found.said()
    assert capsys.readouterr().out == f"{found.said()}\n"  # whoever made it: tables and figures are partial
    with pytest.raises(FileNotFoundError, match="no reference record .*digits-cct-2-3x1-sa-l2q"):
        execute.ensure(run(), "reference")
    execute.ensure(run())
    store.path(run(), ending=".pt").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        execute.trained(run())


def test_looking_at_reference_records_touches_nothing(root):
    """A training that was stopped keeps its checkpoint while somebody looks at the same run's reference record."""
    execute.ensure(run())
    reference = store.path(run(), "reference")
    reference.parent.mkdir(parents=True)
    for ending in (".json", ".pt"):
        store.path(run(), ending=ending).rename(reference.with_suffix(ending))
    unfinished = store.path(run(), ending=".unfinished") / "checkpoint.pt"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"two of three epochs")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    execute.ensure(run(), "reference")
    execute.trained(run(), "reference")
    assert execute.collect([run()], "reference").absent == []
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize("name", ["smoke", "quick", "reference"])
def test_profiles_make_runs(name):
    size = profiles.profile(name)
    config = preset(size.trained, "SA L2Q", **size.changes)
    assert config.layers >= 4
    one = size.training("digits", config, seed=3, lr=0.5)
    assert one.seed == 3 and one.recipe.lr == 0.5 and one.images == size.images
    two = size.search("digits", config, 2, 1, rule="bottom", distill_logits=1.0, teacher=one)
    assert (two.seed, two.search.rule, two.teacher, two.search.finetune.distill_logits) == (1, "bottom", one, 1.0)
    assert two.search.first.epochs == size.search_epochs and two.search.first.distill_logits == 0


def test_paper_has_the_epochs_of_each_data_set():
    """Section 4: E_NAS and E_FT are 600 on CIFAR, 50 and 600 on Tiny-ImageNet, 50 and 100 on ImageNet."""
    size = profiles.profile("paper")
    found = {}
    for data in ("cifar10", "tiny_imagenet", "imagenet"):
        search = size.search(data, size.config(data, "SA L2Q"), 2, released=True).search
        found[data] = search.first.epochs, search.finetune.epochs, search.finetune.lr, search.finetune.batch
        assert size.training(data, search.network).recipe.epochs == search.finetune.epochs
    assert found == {
        "cifar10": (600, 600, 6e-4, 256),
        "tiny_imagenet": (50, 600, 6e-4, 256),
        "imagenet": (50, 100, 5e-4, 168),
    }


def test_unknown_profile():
    with pytest.raises(
        ValueError, match="profile 'huge' is unknown: choose from smoke, quick, reference, short, paper"
    ):
        profiles.profile("huge")


def test_a_search_among_choices_is_a_record(root):
    choices = {"self": 3.0, "external": 2.0, "scaling": 1.0}
    size = profiles.profile("smoke")
    search = size.choice("digits", size.config("digits", "SA L2Q"), choices, 7.0)
    record = execute.ensure(search)
    assert execute.ensure(search) == record and record["study"] == "search"
    chosen = record["metrics"]["architecture"]
    assert sum(choices[name] for name in chosen) <= 7.0
    assert list(execute.trained(search).config.attention) == list(chosen)
    assert not list(root.rglob("*.unfinished"))


def test_what_a_network_costs_in_the_clear_is_a_record(root):
    clear = ClearRun(preset("cct_2_3x1"), batches=(1, 4), repeats=3)
    found = execute.ensure(clear)["metrics"]
    assert [len(found["seconds"][batch]) for batch in ("1", "4")] == [3, 3]
    assert found["parameters"] == cost.parameters(CCT(clear.network))
    alone = execute.ensure(dataclasses.replace(clear, alone=True))["metrics"]
    assert 0 < alone["flops"] < found["flops"] and 0 < alone["memory"] <= found["memory"]


def efficient(recipe=RECIPE):
    return TrainRun("digits", network("efficientvit_test", "digits"), recipe, images=128)


def test_a_network_of_convolutions_is_trained_and_found_again(root):
    record = execute.ensure(efficient())
    assert store.path(efficient()).name.startswith("digits-efficientvit-test-2-epochs-seed-0_")
    assert run_of(record) == efficient()
    found = evaluate(execute.trained(efficient()), execute.dataset("digits", 128).test)["accuracy"]
    assert found == pytest.approx(record["metrics"]["test_accuracy"])
    clear = execute.ensure(ClearRun(efficient().network, (1,), 1))
    assert clear["metrics"]["parameters"] == cost.parameters(execute.trained(efficient()))


def test_networks_of_convolutions_have_keys_and_names():
    micro = network("efficientvit_micro_32", "cifar10")
    assert of_network(micro) == "efficientvit_micro_32" and store.key(PrivateRun(micro)) == "461c5a3dd952964f"
    assert of_network(network("efficientvit_b1", "imagenette")) == "efficientvit 16-32-64-128-256 64px"
    assert len({store.key(PrivateRun(network("efficientvit_b1", data))) for data in ("cifar10", "cifar100")}) == 2
    for make in (PrivateRun, ClearRun):
        with pytest.raises(ValueError, match="alone is True: efficientvit_micro_32 has no layers of tokens"):
            make(micro, alone=True)
    with pytest.raises(ValueError, match="trained is of efficientvit_test, which has no L2Q: give a CCT or a ViT"):
        LearnedRun(efficient())


@pytest.mark.processes
@pytest.mark.processes
def test_a_network_of_convolutions_on_shares_is_on_record(root):
    run = PrivateRun(preset("efficientvit_test"))
    record = execute.ensure(run)
    table = latency.operations({run: record})
    assert set(table["method"]) == {"EfficientViT"}
    counted = latency.estimated({"ours": run.network})
    assert table["rounds"].sum() == counted["rounds"].sum() and table["bytes"].sum() == counted["bytes"].sum()
    # Long enough that its best class leads by more (0.25) than shares err (0.05): what they agree on is no chance.
    trained = EvaluationRun(efficient(dataclasses.replace(RECIPE, epochs=20, lr=1e-2)), n=8)
    record = execute.ensure(trained)
    metrics, leads = record["metrics"], [sorted(each["clear"])[-2:] for each in record["history"]]
    assert metrics["images"] == 8 and metrics["largest_error"] < 0.1 < min(best - next_ for next_, best in leads)
    assert metrics["agreement"] == 100
    assert run_of(store.find(trained)) == trained


def test_trainings_side_by_side_are_those_one_after_the_other(root, monkeypatch, tmp_path_factory):
    """A teacher, its pupil and two searches of one first phase, in processes of their own; nothing is trained twice."""
    plain = run()
    pupil = dataclasses.replace(run(), recipe=dataclasses.replace(RECIPE, distill_logits=1.0), teacher=plain)
    wanted = [pupil, search(), plain, search(budget=2)]
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    together = execute.collect(wanted)
    assert [store.key(one) for one in wanted] == [record["key"] for record in together.values()]
    assert len(list(root.rglob("nas.pt"))) == 1
    one, other = (together[each]["metrics"]["nas"] for each in wanted if isinstance(each, SearchRun))
    assert one == other  # to the seconds that it took
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*.json")}
    assert len(stamps) == 4 and execute.collect(wanted) == together
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.json")} == stamps
    monkeypatch.setattr(workspace, "ROOT", tmp_path_factory.mktemp("alone"))
    monkeypatch.setattr(execute, "MOST_TOGETHER", 1)
    for one, other in zip(execute.collect(wanted).values(), together.values()):
        assert one["metrics"]["test_accuracy"] == pytest.approx(other["metrics"]["test_accuracy"], abs=1.0)


@pytest.mark.processes
def test_what_stops_a_training_side_by_side_is_said(root, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    broken = dataclasses.replace(run(), recipe=dataclasses.replace(RECIPE, lr=1e30))
    with pytest.raises(FloatingPointError, match="epoch"):
        execute.collect([run(), broken])


@pytest.mark.processes
def test_workers_end_with_the_process_that_asked(tmp_path):
    """Killed in the middle of two trainings, it leaves no worker behind."""
    code = (
        "from salvit_core import preset\n"
        "from salvit_core.experiments import execute, runs\n"
        "from salvit_core.training import Recipe\n"
        "recipes = [Recipe(epochs=500, batch=64, augment='none', seed=seed) for seed in (0, 1)]\n"
        "execute.collect([runs.TrainRun('digits', preset('cct_2_3x1'), recipe) for recipe in recipes])\n"
    )
    environment = {**os.environ, "SALVIT_ROOT": str(tmp_path), "LOKY_MAX_CPU_COUNT": "2"}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=log, stderr=log)
    workers, deadline = [], time.monotonic() + 120
    while not list(tmp_path.rglob("checkpoint.pt")) and time.monotonic() < deadline:
        assert process.poll() is None, (tmp_path / "log").read_text()
        with contextlib.suppress(psutil.NoSuchProcess):  # some other child, ended between the two questions
            children = psutil.Process(process.pid).children(recursive=True)
            workers = [child for child in children if "loky" in str(child.cmdline())]
        time.sleep(0.2)
    process.kill()
    process.wait()
    assert workers
    assert not psutil.wait_procs(workers, 30)[1]
    assert list(tmp_path.rglob("checkpoint.pt"))


@pytest.mark.processes
def test_a_quantized_network_is_evaluated_on_shares(root):
    run = QuantizationRun(efficient(), Quantization(bits_weights=8, images=64, reconstruction=False))
    encrypted = EvaluationRun(run, n=4, batch=4)
    metrics = execute.ensure(encrypted)["metrics"]
    assert metrics["agreement"] >= 50 and metrics["weights"] == store.find(efficient())["metrics"]["weights"]
    assert run_of(store.find(encrypted)) == encrypted and encrypted.label().startswith("digits efficientvit_test w8a8")
    tabled = EvaluationRun(run, n=4, batch=4, tables=6, most=300)
    fewer = execute.ensure(tabled)["metrics"]
    assert fewer["rounds"] < metrics["rounds"] and run_of(store.find(tabled)) == tabled
    gridded = EvaluationRun(run, n=4, batch=4, quantizers=True)
    more = execute.ensure(gridded)["metrics"]
    assert more["rounds"] > metrics["rounds"] and run_of(store.find(gridded)) == gridded
    assert more["largest_error"] < 0.1 and gridded.label().endswith("quantizers 4 images")
    assert store.key(EvaluationRun(efficient(), most=5, quantizers=True)) == store.key(EvaluationRun(efficient()))
