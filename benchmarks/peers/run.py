"""SPU's SEMI2K and ours on the same network and weights, in turn, one thread a party on loopback: `make bench-peers`.

    python benchmarks/peers/run.py            # CCT-7/3x1, batch 1: about 10 minutes on 2 cores
    python benchmarks/peers/run.py --quick    # a tiny network, one turn: does it run at all?

SPU runs in an environment of its own (requirements.txt beside this file), once with its default truncation and once
with the local one. Its seconds are those of the slower party's `Runtime.run`: sharing images and weights, compiling and
starting processes are not in them. Ours are `Result.seconds`: images are shared within them, and the dealer's work is
done. SPU's trusted first party expands seeds where our dealer would send `offline_bytes`. SPU opens masked weights in
every query, ours once per session. Messages are what SPU's party 0 sent, mostly while the other sent as well, and our
rounds. SPU's MLP has GELU by polynomials: its error is in that of the logits.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from salvit_core import CCT, preset, private, workspace
from salvit_core.experiments import store

METHODS = ("SA softmax", "SA 2Quad", "SAL-ViT B=3")
SPU = {"SPU SEMI2K": [], "SPU SEMI2K, local truncation": ["--local"]}
OURS = "ours, tuned"
HERE = Path(__file__).resolve().parent


def network(name: str, method: str) -> tuple[CCT, torch.Tensor]:
    """The seeded network of a method and one image for it."""
    torch.manual_seed(0)
    model = CCT(preset(name, method)).eval()
    return model, torch.randn(1, model.config.channels, model.config.image, model.config.image)


def export(model: CCT, images: torch.Tensor, path: Path) -> None:
    """What the other environment needs: every weight by its name, `images`, and `config` as JSON text."""
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    np.savez(path, config=json.dumps(dataclasses.asdict(model.config)), images=images.numpy(), **weights)


def spu(python: Path, model: CCT, images: torch.Tensor, options: list[str]) -> dict:
    """One inference under SPU."""
    with tempfile.TemporaryDirectory(prefix="salvit-") as folder:
        archive, result = Path(folder, "network.npz"), Path(folder, "result.json")
        export(model, images, archive)
        subprocess.run([python, HERE / "spu_vit.py", archive, result, *options], check=True, timeout=1800)
        found = json.loads(result.read_text())
    with torch.no_grad():
        clear = model(images)
    errors = {key: (torch.tensor(found[key]) - clear).abs().max().item() for key in ("logits", "clear_logits")}
    return {**found, "error": errors["logits"], "clear_error": errors["clear_logits"]}


def ours(model: CCT, images: torch.Tensor) -> dict:
    """One inference of `tuned`, with as many threads a party as SPU has."""
    with mock.patch.object(os, "cpu_count", return_value=1):
        result = private.infer(model, images, "tuned", timeout=1800)
    return {
        "seconds": result.seconds,
        "offline_seconds": result.offline,
        "offline_bytes": int(result.operations["offline_bytes"].sum()),
        "bytes": result.bytes,
        "messages": result.rounds,
        "error": result.error,
    }


def measure(python: Path, name: str, turns: int, warm: int) -> tuple[list[dict], dict]:
    """All systems on all methods, turn and turn about; and what SPU's side says of itself."""
    found: dict[tuple[str, str], list[dict]] = {}
    methods = [method.replace("B=3", "B=1") if name == "cct_2_3x1" else method for method in METHODS]  # of two layers
    for turn in range(warm + turns):
        for method in methods:
            model, images = network(name, method)
            for system in (*SPU, OURS):
                result = ours(model, images) if system == OURS else spu(python, model, images, SPU[system])
                print(f"turn {turn}, {method}, {system}: {result['seconds']:.2f} s", flush=True)
                if turn >= warm:
                    found.setdefault((method, system), []).append(result)
    rows = []
    for (method, system), results in found.items():
        seconds, first = [result["seconds"] for result in results], results[0]
        row = {"method": method, "system": system, "seconds": statistics.median(seconds)}
        row |= {"lowest": min(seconds), "highest": max(seconds), "bytes": first["bytes"], "messages": first["messages"]}
        row |= {"largest_error": max(result["error"] for result in results)}
        if system != OURS:
            row["clear_error"] = first["clear_error"]  # without shares, so GELU's part of it
        else:
            row["offline_seconds"] = statistics.median(result["offline_seconds"] for result in results)
            row["offline_bytes"] = first["offline_bytes"]
        rows.append(row)
    theirs = found[methods[0], next(iter(SPU))][0]
    return rows, {key: theirs[key] for key in ("gelu_error", "versions")}


def markdown(report: dict) -> str:
    """The report as a table."""
    lines = [
        f"{report['network']}, batch 1, loopback, one thread a party, {report['device_name']}, {report['date'][:10]}; "
        f"SPU {report['peer']['versions']['spu']}, GELU by polynomials within {report['peer']['gelu_error']:.1g}",
        "",
        "| network | system | seconds (median, range) | of which offline | MB one way | messages | error of logits "
        "| MB of a dealer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        seconds = f"{row['seconds']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        offline, dealer = "", "seeds only"
        if row["system"] == OURS:
            offline, dealer = f"{row['offline_seconds']:.2f}", f"{row['offline_bytes'] / 1e6:.0f}"
        cells = (row["method"], row["system"], seconds, offline, f"{row['bytes'] / 1e6:.3g}", row["messages"])
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row['largest_error']:.2g} | {dealer} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write it and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny network, a single turn: a smoke test")
    parser.add_argument("--turns", type=int, default=3, help="turns of each network and system, after one to warm up")
    parser.add_argument("--python", type=Path, default=workspace.ROOT / ".venv-peers/bin/python", help="that has SPU")
    parser.add_argument("--out", type=Path, default=workspace.ROOT / "data/runs/benchmarks/peers.json")
    options = parser.parse_args(arguments)
    if not options.python.exists():
        parser.error(f"{options.python} does not exist: `make bench-peers` makes it")
    name, turns, warm = ("cct_2_3x1", 1, 0) if options.quick else ("cct_7_3x1", options.turns, 1)
    machine = store.machine()
    rows, peer = measure(options.python, name, turns, warm)
    report = {
        "network": name,
        "turns": turns,
        "rows": rows,
        "peer": peer,
        "device_name": f"{machine['processor']}, {machine['cores']} cores",
        **store.circumstances(),
    }
    store.save_report(report, markdown(report), options.out)


if __name__ == "__main__":
    main()
