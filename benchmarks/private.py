"""Latency, bytes, rounds and correctness of `tuned` against `stock`, alternating in one run on one machine.

    python benchmarks/private.py            # CCT-7/3x1 complete, batch 1, loopback: about 12 minutes on 2 cores
    python benchmarks/private.py --quick    # a tiny network, one turn: does it run at all?

Every inference is complete (nothing is left out) and starts its own parties; starting them and masking or sharing the
weights is not in the seconds, the making of correlated randomness is, unless it was dealt ahead. With TTP a third
process deals. The first turn warms up and is not counted.
Accuracy is measured on the test images of the network that profile `quick` trains.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from salvit_core import CCT, preset, private, workspace
from salvit_core.experiments import execute, profiles, store
from salvit_core.experiments.runs import EvaluationRun
from salvit_core.private import LINKS
from salvit_core.private.parties import forks

METHODS = ("SAL-ViT B=3", "SA softmax")
VARIANTS: dict[str, dict[str, str]] = {
    "stock": {"protocol": "stock"},
    "tuned": {"protocol": "tuned"},
    "tuned, dealt ahead": {"protocol": "tuned", "dealt": "ahead"},
    "tuned, TTP": {"protocol": "tuned", "provider": "TTP"},
}
WAN = "WAN (Cheetah)"

# What stock would be with one thing changed: run in each of its parties before it begins.
ABLATIONS = {
    "stock, tuned's ring products": """
from salvit_core.private.tuned.arithmetic import ring

def matmul(a, b, before=torch.matmul):
    return ring.product(a, b) if a.dtype == b.dtype == torch.int64 else before(a, b)

def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, before=torch.conv2d):
    if x.dtype != torch.int64:
        return before(x, weight, bias, stride, padding, dilation, groups)
    pairs = [p if isinstance(p, tuple) else (p, p) for p in (stride, padding)]
    operation = ("conv", tuple(weight.shape[2:]), *pairs)
    side = [(x.shape[2 + i] + 2 * pairs[1][i] - weight.shape[2 + i]) // pairs[0][i] + 1 for i in (0, 1)]
    return ring.apply(operation, x, ring.prepared(operation, weight)).transpose(1, 2).unflatten(2, side)

torch.matmul, torch.conv2d = matmul, conv2d
""",
    # Newton's starting value 3 exp(1 - 2 x) + 0.003 serves up to 24; row sums reach 256 and are divided first.
    "stock, a reciprocal that holds": """
from crypten.mpc import MPCTensor

def reciprocal(self, *given, before=MPCTensor.reciprocal, **more):
    return before(self / 16, *given, **more) / 16

MPCTensor.reciprocal = reciprocal
""",
}
HOOK = """
import os, sys, threading

def changed():
    if not {{"server", "client"}} & set(sys.argv):
        return
    try:
        import torch
{code}
    except BaseException as error:
        print(f"the change failed: {{error}}", file=sys.stderr, flush=True)
        os._exit(1)  # whoever forked would go on without it

os.register_at_fork(after_in_child=changed)
"""


def floors(config) -> dict[str, float]:
    """Words that the Beaver opening scheme needs for linear maps and products, all layers (facts: floors).

    Linear 3 N d + N m with weight masks reused; Q K^T and A V 3 N d + h N^2, and N d + h N more where the weights are
    normalised after A V. External attention by the same rule: its query N d, and N d, h N S and N d for M_k, M_v and
    the projection.
    """
    n, d, h, s, m = config.tokens, config.width, config.heads, config.memory, int(config.width * config.mlp_ratio)
    words = {"projection": 0, "scores": 0, "values": 0, "MLP": 0}
    for name in config.attention:
        words["projection"] += 2 * n * d
        words["MLP"] += n * d + n * m
        words["scores"] += 2 * n * d if name == "self" else n * d
        words["values"] += n * d + h * n * n if name == "self" else h * n * s
        words["values"] += n * d + h * n
    return words


def measure(name: str, turns: int) -> list[dict]:
    """All variants of both methods, turn and turn about."""
    found = {}
    for turn in range(turns + 1):
        for method in METHODS:
            if name == "cct_2_3x1":
                method = method.replace("B=3", "B=1")
            torch.manual_seed(0)
            model = CCT(preset(name, method))
            images = torch.randn(1, model.config.channels, model.config.image, model.config.image)
            for variant, options in VARIANTS.items():
                result = private.infer(model, images, timeout=1800, **options)
                if turn > 0:
                    found.setdefault((method, variant), []).append(result)
    rows = []
    for (method, variant), results in found.items():
        seconds, first = [result.seconds for result in results], results[0]
        kinds = first.operations.groupby("kind", observed=True)["bytes"].sum() / 8
        words = floors(preset(name, method))
        rows.append(
            {
                "method": method,
                "variant": variant,
                "seconds": statistics.median(seconds),
                "lowest": min(seconds),
                "highest": max(seconds),
                "offline_seconds": statistics.median(result.offline for result in results),
                "online_seconds": statistics.median(result.seconds - result.offline for result in results),
                "dealt_ahead_seconds": statistics.median(result.dealing for result in results),
                "rounds": first.rounds,
                "bytes": first.bytes,
                "dealer_bytes": first.dealer_bytes,
                "faithful": all(result.faithful for result in results),
                "largest_error": max(result.error for result in results),
                "words_to_floor": {kind: float(kinds[kind]) / count for kind, count in words.items() if count},
            }
        )
    return rows


@contextlib.contextmanager
def changed(code: str) -> Iterator[None]:
    """Parties that are started within it run some code first."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(forks, "_here", None):
        Path(folder, "sitecustomize.py").write_text(HOOK.format(code=textwrap.indent(code, " " * 8)))
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        with mock.patch.dict(os.environ, PYTHONPATH=path):
            yield


def ablations(name: str, turns: int) -> list[dict]:
    """Stock as it is and with each change, turn and turn about."""
    torch.manual_seed(0)
    model = CCT(preset(name, METHODS[0].replace("B=3", "B=1") if name == "cct_2_3x1" else METHODS[0]))
    images = torch.randn(1, model.config.channels, model.config.image, model.config.image)
    found = defaultdict(list)
    for _ in range(turns):
        for variant, code in {"stock": "pass", **ABLATIONS}.items():
            with changed(code):
                found[variant].append(private.infer(model, images, "stock", timeout=1800))
    return [
        {
            "variant": variant,
            "seconds": statistics.median(result.seconds for result in results),
            "largest_error": max(result.error for result in results),
        }
        for variant, results in found.items()
    ]


def batching(name: str, turns: int) -> dict:
    """Seconds per image of one query of 1 and of 8 images on loopback and over an emulated WAN, `tuned`."""
    torch.manual_seed(0)
    model = CCT(preset(name, METHODS[0].replace("B=3", "B=1") if name == "cct_2_3x1" else METHODS[0]))
    images = torch.randn(8, model.config.channels, model.config.image, model.config.image)
    found = {}
    for name, link in (("loopback", None), (WAN, LINKS[WAN])):
        several = {
            batch: [
                private.infer(model, images[:batch], "tuned", link=link, timeout=1800).seconds / batch
                for _ in range(1 if link else turns)
            ]
            for batch in (1, 8)
        }
        found[name] = {batch: statistics.median(each) for batch, each in several.items()}
    return found


def accuracy(n: int) -> dict:
    """`private.evaluate` on trained networks of profile quick: SA with L2Q, the one that has most to normalise."""
    size = profiles.profile("quick" if n > 32 else "smoke")
    data = execute.resolve(size.data[0])
    run = EvaluationRun(size.training(data, size.config(data, "SA L2Q")), n=n)
    record = execute.ensure(run)
    return {"data": data, "network": size.trained, "method": "SA L2Q", **record["metrics"]}


def markdown(report: dict) -> str:
    """The report as tables."""
    lines = [
        f"{report['network']}, batch 1, loopback, {report['device_name']}, {report['date'][:10]}",
        "",
        "| network | variant | seconds (range) | offline | rounds | MB one way | dealer's MB | logits' error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        seconds = f"{row['seconds']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        error = f"{row['largest_error']:.2g}" + ("" if row["faithful"] else ", not faithful")
        cells = (row["method"], row["variant"], seconds, f"{row['offline_seconds']:.2f}", row["rounds"])
        megabytes = f"{row['bytes'] / 1e6:.0f} | {row['dealer_bytes'] / 1e6:.0f}"
        lines.append("| " + " | ".join(map(str, cells)) + f" | {megabytes} | {error} |")
    lines += ["", "| SAL-ViT B=3, what stock would be | seconds | logits' error |", "|---|---|---|"]
    for row in report["ablations"]:
        lines.append(f"| {row['variant']} | {row['seconds']:.2f} | {row['largest_error']:.2g} |")
    lines += ["", "| target | wanted | measured |", "|---|---|---|"]
    lines += [f"| {name} | {wanted} | {measured} |" for name, wanted, measured in report["targets"]]
    return "\n".join(lines)


def targets(report: dict) -> list[tuple[str, str, str]]:
    """What was asked for, beside what was measured."""
    rows = {(row["method"].split(" B=")[0], row["variant"]): row for row in report["rows"]}
    sal = {variant: rows["SAL-ViT", variant] for variant in VARIANTS}
    soft = {variant: rows["SA softmax", variant] for variant in VARIANTS}

    def pair(key: str, unit: float) -> str:
        return f"{sal['tuned'][key] / unit:.0f} / {soft['tuned'][key] / unit:.0f}"

    def times(left: dict, right: dict, key: str = "seconds") -> str:
        return f"{left[key] / right[key]:.1f}x"

    factors = [f"{kind} {value:.2f}" for kind, value in sal["tuned"]["words_to_floor"].items()]
    factors += [f"{kind} {value:.2f} (SA softmax)" for kind, value in soft["tuned"]["words_to_floor"].items()]
    right, (near, far) = report["accuracy"], (report["batching"][name] for name in ("loopback", WAN))
    left = sorted({violation.split(":")[0] for violation in right["violations"]})
    return [
        ("SAL-ViT, seconds, all in, stock / tuned", "10x, stretch 14x", times(sal["stock"], sal["tuned"])),
        (
            "SAL-ViT, stock online / tuned dealt ahead",
            "12x, stretch 16x",
            f"{sal['stock']['online_seconds'] / sal['tuned, dealt ahead']['seconds']:.1f}x",
        ),
        ("SA softmax, seconds, all in, stock / tuned", "-", times(soft["stock"], soft["tuned"])),
        ("SA softmax stock / SAL-ViT tuned, seconds", "-", times(soft["stock"], sal["tuned"])),
        ("rounds, SAL-ViT / SA softmax", "200 / 300, stretch 150 / 220", pair("rounds", 1)),
        ("MB one way", "50 / 87, stretch 40 / 70", pair("bytes", 1e6)),
        ("dealer's MB", "150 / 330, stretch 100 / 200", pair("dealer_bytes", 1e6)),
        (
            "TTP / TFP, seconds all in",
            "at most 1.3",
            " / ".join(f"{each['tuned, TTP']['seconds'] / each['tuned']['seconds']:.2f}" for each in (sal, soft)),
        ),
        (f"{WAN} emulated: one query / each of 8", "6 s / 2.5 s", f"{far[1]:.1f} s / {far[8]:.1f} s"),
        ("batch of 8 on loopback, of a single one's seconds", "at most 0.8", f"{near[8] / near[1]:.2f}"),
        ("words opened, of the scheme's floors", "at most 1.3", ", ".join(factors)),
        (
            f"logits of {right['images']} {right['data']} test images",
            "within 0.05",
            f"{right['largest_error']:.4f} (mean {right['mean_error']:.5f})",
        ),
        ("top-1 agreement", "99 %", f"{right['agreement']:.1f} % (accuracy {right['clear_accuracy']:.1f} %)"),
        ("operations that left their range", "none", ", ".join(left) or "none"),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, write them and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny network, a single turn: a smoke test")
    parser.add_argument("--turns", type=int, default=3, help="turns of each network and protocol, after one to warm up")
    parser.add_argument("--out", type=Path, default=workspace.ROOT / "data/runs/benchmarks/private.json")
    options = parser.parse_args(arguments)
    name = "cct_2_3x1" if options.quick else "cct_7_3x1"
    machine = store.machine()
    report = {
        "network": name,
        "turns": 1 if options.quick else options.turns,
        "rows": measure(name, 1 if options.quick else options.turns),
        "ablations": ablations(name, 1 if options.quick else options.turns),
        "batching": batching(name, 1 if options.quick else options.turns),
        "accuracy": {k: v for k, v in accuracy(16 if options.quick else 256).items() if k != "history"},
        "device_name": f"{machine['processor']}, {machine['cores']} cores",
        **store.circumstances(),
    }
    report["targets"] = targets(report)
    store.save_report(report, markdown(report), options.out)


if __name__ == "__main__":
    main()
