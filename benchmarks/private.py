"""Latency, bytes, rounds and correctness of `tuned` against `stock`, alternating in one run on one machine.

    python benchmarks/private.py            # CCT-7/3x1 complete, batch 1, loopback: about 10 minutes on 2 cores
    python benchmarks/private.py --quick    # a tiny network, one turn: does it run at all?

Every inference is complete (nothing is left out) and starts its own parties; starting them and masking or sharing the
weights is not in the seconds, the making of correlated randomness is. The first turn warms up and is not counted.
Accuracy is measured on the test images of the network that profile `quick` trains.
"""

import argparse
import json
import statistics
from datetime import datetime, timezone
from pathlib import Path

import torch

from salvit_core import CCT, preset, private, profiles, records, runs
from salvit_core.private import LINKS
from salvit_core.private.evaluation import EvaluationRun, ensure

METHODS = ("SAL-ViT B=3", "SA softmax")
PROTOCOLS = ("stock", "tuned")
WAN = "WAN (Cheetah)"


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
    """Both protocols of both methods, turn and turn about."""
    found = {}
    for turn in range(turns + 1):
        for method in METHODS:
            if name == "cct_2_3x1":
                method = method.replace("B=3", "B=1")
            torch.manual_seed(0)
            model = CCT(preset(name, method))
            images = torch.randn(1, model.config.channels, model.config.image, model.config.image)
            for protocol in PROTOCOLS:
                result = private.infer(model, images, protocol, timeout=1800)
                if turn > 0:
                    found.setdefault((method, protocol), []).append(result)
    rows = []
    for (method, protocol), results in found.items():
        seconds, first = [result.seconds for result in results], results[0]
        kinds = first.operations.groupby("kind", observed=True)["serial_bytes"].sum() / 8
        words = floors(preset(name, method))
        rows.append(
            {
                "method": method,
                "protocol": protocol,
                "seconds": statistics.median(seconds),
                "lowest": min(seconds),
                "highest": max(seconds),
                "offline_seconds": statistics.median(result.offline for result in results),
                "rounds": first.rounds,
                "bytes": first.bytes,
                "faithful": all(result.faithful for result in results),
                "largest_error": max(result.error for result in results),
                "words_to_floor": {kind: float(kinds[kind]) / count for kind, count in words.items() if count},
            }
        )
    return rows


def batching(name: str) -> dict:
    """Seconds per image of one query of 1 and of 8 images over an emulated WAN, `tuned`."""
    torch.manual_seed(0)
    model = CCT(preset(name, METHODS[0].replace("B=3", "B=1") if name == "cct_2_3x1" else METHODS[0]))
    images = torch.randn(8, model.config.channels, model.config.image, model.config.image)
    found = {}
    for batch in (1, 8):
        result = private.infer(model, images[:batch], "tuned", link=LINKS[WAN], timeout=1800)
        found[batch] = result.seconds / batch
    return {"link": WAN, "seconds_per_image": found, "ratio": found[8] / found[1]}


def accuracy(n: int) -> dict:
    """`private.evaluate` on trained networks of profile quick: SA with L2Q, the one that has most to normalise."""
    size = profiles.profile("quick" if n > 32 else "smoke")
    data = runs.resolve(size.data[0])
    run = EvaluationRun(size.training(data, size.config(data, "SA L2Q")), n=n)
    record = ensure(run)
    return {"data": data, "network": size.trained, "method": "SA L2Q", **record["metrics"]}


def markdown(report: dict) -> str:
    """The report as tables."""
    lines = [
        f"{report['network']}, batch 1, loopback, {report['device_name']}, {report['date'][:10]}",
        "",
        "| network | protocol | seconds (median, range) | of which offline | rounds | MB one way | error of logits |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        seconds = f"{row['seconds']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        error = f"{row['largest_error']:.2g}" + ("" if row["faithful"] else ", not faithful")
        cells = (row["method"], row["protocol"], seconds, f"{row['offline_seconds']:.2f}", row["rounds"])
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row['bytes'] / 1e6:.0f} | {error} |")
    lines += ["", "| target | wanted | measured |", "|---|---|---|"]
    lines += [f"| {name} | {wanted} | {measured} |" for name, wanted, measured in report["targets"]]
    return "\n".join(lines)


def targets(report: dict) -> list[tuple[str, str, str]]:
    """What part 3 asked for, beside what was measured."""
    rows = {(row["method"].split(" B=")[0], row["protocol"]): row for row in report["rows"]}
    sal = {protocol: rows["SAL-ViT", protocol] for protocol in PROTOCOLS}
    soft = {protocol: rows["SA softmax", protocol] for protocol in PROTOCOLS}

    def times(left: dict, right: dict, key: str = "seconds") -> str:
        return f"{left[key] / right[key]:.1f}x"

    factors = [f"{kind} {value:.2f}" for kind, value in sal["tuned"]["words_to_floor"].items()]
    factors += [f"{kind} {value:.2f} (SA softmax)" for kind, value in soft["tuned"]["words_to_floor"].items()]
    right, batch = report["accuracy"], report["batching"]
    left = sorted({violation.split(":")[0] for violation in right["violations"]})
    return [
        ("SAL-ViT, seconds, stock / tuned", "5x, stretch 10x", times(sal["stock"], sal["tuned"])),
        ("SAL-ViT, bytes", "4x", times(sal["stock"], sal["tuned"], "bytes")),
        ("SAL-ViT, rounds", "3x", times(sal["stock"], sal["tuned"], "rounds")),
        ("SA softmax stock / SAL-ViT tuned, seconds", "12x, stretch 25x", times(soft["stock"], sal["tuned"])),
        ("SA softmax, seconds, stock / tuned", "4x", times(soft["stock"], soft["tuned"])),
        ("words opened, of the scheme's floors", "at most 1.3", ", ".join(factors)),
        (
            f"logits of {right['images']} {right['data']} test images",
            "within 0.05",
            f"{right['largest_error']:.4f} (mean {right['mean_error']:.5f})",
        ),
        ("top-1 agreement", "99 %", f"{right['agreement']:.1f} % (accuracy {right['clear_accuracy']:.1f} %)"),
        ("operations that left their range", "none", ", ".join(left) or "none"),
        (f"batch of 8 per query, {batch['link']} emulated", "at most 0.5x", f"{batch['ratio']:.2f}x"),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, write them and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny network, a single turn: a smoke test")
    parser.add_argument("--turns", type=int, default=3, help="turns of each network and protocol, after one to warm up")
    parser.add_argument("--out", type=Path, default=records.ROOT / "data/runs/benchmarks/private.json")
    options = parser.parse_args(arguments)
    name = "cct_2_3x1" if options.quick else "cct_7_3x1"
    machine = records.machine()
    report = {
        "network": name,
        "turns": 1 if options.quick else options.turns,
        "rows": measure(name, 1 if options.quick else options.turns),
        "batching": batching(name),
        "accuracy": {k: v for k, v in accuracy(16 if options.quick else 256).items() if k != "history"},
        "device_name": f"{machine['processor']}, {machine['cores']} cores",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": records.versions(),
        "machine": machine,
        "commit": records.commit(),
        "source": "measured",
    }
    report["targets"] = targets(report)
    records.write(options.out, json.dumps(report, indent=1, allow_nan=False))
    records.write(options.out.with_suffix(".md"), markdown(report) + "\n")
    print(markdown(report))
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
