"""Images per second of a training step, and accuracy: ours against the recipe of the released code and its own loop.

    python benchmarks/training.py            # CCT-7/3x1, batch 64 on a CPU, 256 on a GPU
    python benchmarks/training.py --quick    # seconds: does it run at all?

The recipe is a plain loop of PyTorch's: images augmented one by one with PIL in 2 worker processes, float32, AdamW that
decays everything, both attentions computed in every layer, and every step of the attention on its own. Ours is
`salvit_core.training.fit` as the study calls it: images on the device, augmented in batches, bfloat16 where the machine
multiplies faster in it, the fused attention, and after the search only the branches that were chosen. The images are
random, of CIFAR-10's size. Each variant is a process of its own, so that its memory is its own; the two of a row take
turns.

Then the same two loops train small networks on the digits, for as many epochs with the same rates: what is faster must
not learn less.
"""

import argparse
import dataclasses
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from salvit_core import CCT, compat, datasets, preset, workspace
from salvit_core.experiments import store
from salvit_core.models.attention import fused
from salvit_core.search import released, sas
from salvit_core.training import Recipe, evaluate, fit, learning_rate, multiplies_bf16, train

ROWS = ("search phase", "fine-tuning, B = 3", "plain self-attention")
VARIANTS = ("recipe", "ours")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's
WORKERS, PREFETCH = 2, 2  # DataLoader's processes, and batches that each has ready
SEEDS, EPOCHS = 5, 20  # of the comparison of accuracies


@dataclasses.dataclass(frozen=True)
class Run:
    """What is measured, and how long."""

    device: str
    preset: str
    batch: int
    steps: int  # in a turn
    turns: int  # after one that warms up
    bf16: bool  # in ours
    compile: bool  # torch.compile in ours


def config(run: Run, row: str):
    """The network of a row; the same for both variants but that the recipe mixes where ours has chosen."""
    method = {"fine-tuning, B = 3": "SAL-ViT B=3", "plain self-attention": "SA softmax"}.get(row, "SA L2Q")
    changes = {}
    if run.preset == "cct_2_3x1":  # --quick: two layers cannot have three of self-attention
        method, changes = method.replace("B=3", "B=1"), dict(image=32, channels=3)
    return preset(run.preset, method, **changes)


# The recipe


class _Images(Dataset):
    """A split's images, `count` of them, through PIL one by one."""

    def __init__(self, split: datasets.Split, count: int):
        compat.repair()
        from torchvision import transforms

        self.images = split.images.permute(0, 2, 3, 1).squeeze(-1).numpy()  # (n, H, W, 3), or grey (n, H, W)
        self.labels = split.labels.tolist()
        self.count = count
        side = split.images.shape[-1]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(side, padding=max(1, min(4, side // 8))),  # 4 at 32 pixels
                *([transforms.RandomHorizontalFlip()] if split.flip else []),
                transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
                transforms.ToTensor(),
                transforms.Normalize(split.mean, split.std),
            ]
        )

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        index %= len(self.labels)
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def loader_of(split: datasets.Split, count: int, batch: int, drop_last: bool, pinned: bool) -> DataLoader:
    """Batches of `count` images, shuffled."""
    options = dict(num_workers=WORKERS, prefetch_factor=PREFETCH, multiprocessing_context="fork", pin_memory=pinned)
    return DataLoader(_Images(split, count), batch, shuffle=True, drop_last=drop_last, **options)


def loop(net: torch.nn.Module, loader, recipe: Recipe, term=None):
    """The recipe's own loop, visible; yields the loss of every step."""
    device = next(net.parameters()).device
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, epoch)
        net.train()
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            loss = F.cross_entropy(net(images), labels, label_smoothing=recipe.label_smoothing)
            if term is not None:
                loss = loss + term()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss


def frozen_mixture(config) -> torch.nn.Module:
    """What the released code fine-tunes: both attentions in every layer, alphas of 1 and 0."""
    net = sas.mixed(config)
    sas.freeze(net, config.attention)
    for block in net.blocks:
        block.attention.alpha.requires_grad_(False)
    return net


def recipe(run: Run, row: str):
    """Yields images per second, turn by turn."""
    fused.ENABLED = False
    device = torch.device(run.device)
    makes = {"search phase": sas.mixed, "fine-tuning, B = 3": frozen_mixture, "plain self-attention": CCT}
    net = makes[row](config(run, row)).to(device)
    term = released.ReleasedPenalty(net) if row == "search phase" else None
    count = (run.turns + 1) * (run.steps + WORKERS * PREFETCH) * run.batch
    # The loader forks its workers: this process is spawned, and has no threads yet.
    batches = iter(loader_of(random_images(1024), count, run.batch, True, device.type == "cuda"))
    steps = loop(net, batches, Recipe(epochs=1), term)
    while True:
        if device.type == "cuda":  # what the workers made ready before the turn is no speed; a CPU never waits for them
            for _ in range(WORKERS * PREFETCH):
                next(batches)
        start = time.perf_counter()
        for _ in range(run.steps):
            loss = next(steps)
        loss.item()  # waits for the device
        speed = run.steps * run.batch / (time.perf_counter() - start)
        time.sleep(1)  # the workers fill their queues again, and do not disturb the other variant's turn
        yield speed


def random_images(count: int, device: str = "cpu") -> datasets.Split:
    """Of CIFAR-10's size."""
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return datasets.Split(images.to(device), torch.randint(10, (count,)).to(device), MEAN, STD)


# Ours


def ours(run: Run, row: str):
    """Yields images per second, turn by turn."""
    net = sas.mixed(config(run, row)) if row == "search phase" else CCT(config(run, row))
    term = sas.Penalty(net) if row == "search phase" else None
    splits = [random_images(count, run.device) for count in (run.steps * run.batch, 8, 8)]
    images = datasets.Data("random", 10, *splits, chosen="")
    options = dict(bf16=run.bf16, channels_last=True, compile=run.compile, keep="last")
    for facts in fit(net, images, Recipe(epochs=run.turns + 1, batch=run.batch, **options), penalty=term):
        yield facts["images_per_second"]


def _child(connection, run: Run, row: str, variant: str) -> None:
    """A variant's process: a turn for each message, its peak memory (MiB) at the end."""
    torch.manual_seed(0)
    turns = (recipe if variant == "recipe" else ours)(run, row)
    while connection.recv():
        connection.send(next(turns))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    workers = sum(child.memory_full_info().uss for child in psutil.Process().children(recursive=True)) / 2**20
    device = torch.cuda.max_memory_allocated() / 2**20 if run.device == "cuda" else None
    connection.send({"process_mib": peak, "workers_mib": workers, "device_mib": device})


def measure(run: Run, row: str) -> list[dict]:
    """Both variants of a row, turn and turn about."""
    spawn, children = multiprocessing.get_context("spawn"), {}
    for variant in VARIANTS:
        here, there = spawn.Pipe()
        process = spawn.Process(target=_child, args=(there, run, row, variant))
        process.start()
        there.close()  # so that a child that dies ends the wait for it
        children[variant] = here, process
    speeds = {variant: [] for variant in VARIANTS}
    try:
        for _ in range(run.turns + 1):
            for variant, (connection, _) in children.items():
                connection.send(True)
                speeds[variant].append(connection.recv())
        rows = []
        for variant, (connection, _) in children.items():
            connection.send(False)
            some = speeds[variant][1:]
            facts = dict(images_per_second=statistics.median(some), lowest=min(some), highest=max(some), turns=some)
            rows.append({"row": row, "variant": variant, **facts, **connection.recv()})
        for _, process in children.values():
            process.join()
    finally:
        for _, process in children.values():
            process.terminate()
    for facts in rows:
        facts["speedup"] = facts["images_per_second"] / rows[0]["images_per_second"]
    return rows


# What bounds it


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square product, the best of some."""
    x = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def flops(run: Run, row: str) -> float:
    """FLOPs of the products in one image's training step, scores computed once."""
    net = sas.mixed(config(run, row)) if row == "search phase" else CCT(config(run, row))
    before, fused.ENABLED = fused.ENABLED, False
    try:
        with FlopCounterMode(display=False) as counter:
            net.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    finally:
        fused.ENABLED = before
    return counter.get_total_flops() / 2


# Does it learn as well?


def accuracy(seeds: int, epochs: int, bf16: bool):
    """Yields a network's test accuracies (%) by both loops on the digits at 16 pixels, with the last epoch's weights.

    The recipe's in float32, every step on its own; ours fused, in bfloat16 where the rows above are.
    """
    digits = datasets.load("digits", image=16)
    recipe = Recipe(epochs=epochs, batch=64, lr=2e-3, augment="autoaugment", keep="last")
    networks = {
        "SAL-ViT B = 1, fine-tuning": preset("cct_2_3x1", attention=("self", "external"), normalizer="l2q", image=16),
        "plain self-attention": preset("cct_2_3x1", "SA softmax", image=16),
    }
    for name, network in networks.items():
        found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for seed in range(seeds):
            for variant, some in found.items():
                fused.ENABLED = variant == "ours"
                torch.manual_seed(seed)
                if variant == "ours":
                    changed = dataclasses.replace(recipe, seed=seed, bf16=bf16)
                    some.append(train(CCT(network), digits, changed)["test_accuracy"])
                    continue
                net = CCT(network) if "self-attention" in name else frozen_mixture(network)
                loader = loader_of(digits.train, len(digits.train.labels), recipe.batch, False, False)
                for _ in loop(net, loader, recipe):
                    pass
                some.append(evaluate(net, digits.test)["accuracy"])
        fused.ENABLED = True
        noise = sum(statistics.variance(some) / seeds for some in found.values()) ** 0.5 if seeds > 1 else None
        means = {variant: statistics.mean(some) for variant, some in found.items()}
        yield {"network": name, **found, "difference": means["ours"] - means["recipe"], "standard_error": noise}


def markdown(report: dict) -> str:
    """The report as tables."""
    device = report["device_name"]
    lines = [
        f"{report['run']['preset']}, batch {report['run']['batch']}, {device}, {report['date'][:10]}; random images",
        "",
        "| step | variant | images/s (median, range) | speed-up | bound by products | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        memory = f"{row['process_mib']:.0f}"
        memory += f" + {row['workers_mib']:.0f} in workers" if row["workers_mib"] else ""
        memory += f"; device {row['device_mib']:.0f}" if row["device_mib"] else ""
        speed = f"{row['images_per_second']:.1f} ({row['lowest']:.1f} to {row['highest']:.1f})"
        bound = f"{row['bound']:.0f} images/s" if "bound" in row else ""
        lines.append(f"| {row['row']} | {row['variant']} | {speed} | {row['speedup']:.1f} | {bound} | {memory} |")
    checked = report["accuracy"]
    if not checked["rows"]:
        return "\n".join(lines)
    lines += [
        "",
        f"Test accuracy (%) of the last of {checked['epochs']} epochs, {checked['data']}: mean of seeds (range)",
        "",
        "| network | recipe | ours | difference |",
        "|---|---|---|---|",
    ]
    for row in checked["rows"]:
        cells = [f"{statistics.mean(row[v]):.2f} ({min(row[v]):.2f} to {max(row[v]):.2f})" for v in VARIANTS]
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.2f}"
        lines.append(f"| {row['network']} | {' | '.join(cells)} | {row['difference']:+.2f}{error} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, write them and the JSON: after every row, so that one that is stopped leaves some."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny network, two rows, a single turn: a smoke test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="images in a step (default: 64 on a CPU, 256 on a GPU)")
    parser.add_argument("--steps", type=int, help="steps in a turn (default: 1 on a CPU, 40 on a GPU)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each variant, after one that warms up")
    parser.add_argument("--compile", action="store_true", help="torch.compile in ours")
    parser.add_argument("--out", type=Path, default=workspace.ROOT / "data/runs/benchmarks/training.json")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    size = 256 if options.quick else 8192 if cuda else 2048
    rates = {dtype: matmul_rate(options.device, getattr(torch, dtype), size) for dtype in ("float32", "bfloat16")}
    fast = multiplies_bf16(torch.device(options.device))
    bf16 = fast and rates["bfloat16"] > 1.2 * rates["float32"]
    if options.quick:
        run = Run(options.device, "cct_2_3x1", 4, 1, 1, bf16, options.compile)
    else:
        batch, steps = (256, 40) if cuda else (64, 1)
        batch, steps = options.batch or batch, options.steps or steps
        run = Run(options.device, "cct_7_3x1", batch, steps, options.turns, bf16, options.compile)
    machine = store.machine()
    seeds, epochs = (1, 1) if options.quick else (SEEDS, EPOCHS)
    report = {
        "run": dataclasses.asdict(run),
        "images": "random, uint8, 3x32x32",
        "device_name": torch.cuda.get_device_name() if cuda else f"{machine['processor']}, {machine['cores']} cores",
        "threads": torch.get_num_threads(),
        "matmul_flop_per_second": rates,
        "rows": [],
        "accuracy": {"data": "digits, 16 pixels", "epochs": epochs, "rows": []},
    }

    def keep() -> None:
        report.update(store.circumstances())
        workspace.write_json(options.out, report)
        workspace.write(options.out.with_suffix(".md"), markdown(report) + "\n")

    for row in ROWS[: 2 if options.quick else None]:
        plain, changed = measure(run, row)
        changed["flops_per_image"] = flops(run, row)
        changed["bound"] = rates["bfloat16" if bf16 else "float32"] / changed["flops_per_image"]
        report["rows"] += [plain, changed]
        keep()
    for found in accuracy(seeds, epochs, bf16):
        report["accuracy"]["rows"].append(found)
        keep()
    store.save_report(report, markdown(report), options.out)


if __name__ == "__main__":
    main()
