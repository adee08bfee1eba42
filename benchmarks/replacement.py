"""Milliseconds per image in the clear: attention, what replaces it, that masked, and that with the units removed.

    python benchmarks/replacement.py                       # a DeiT-Tiny at 224 pixels, and the study's small CCT
    python benchmarks/replacement.py --quick               # seconds: does it run at all?

Weights are random: what a forward pass takes depends on shapes alone. Of the hidden units the weakest go, as in
`salvit replace prune`; the numbers of the masked network show that zeros by themselves save nothing. The networks of a
row take turns, so that a machine that slows down slows all of them.
"""

import argparse
import statistics
from pathlib import Path

import pandas as pd
import torch

from salvit_core import build, cost, preset, workspace
from salvit_core.experiments import store
from salvit_core.replacement.pruning import mask, remove, strong

NETWORKS = {
    "deit_tiny": dict(),
    "cct_4_3x2": dict(image=32, channels=3, convolutions=1, stride=2),  # of the reference records
}


def variants(name: str, changes: dict, share: float) -> dict[str, torch.nn.Module]:
    """The networks that are compared, in evaluation mode."""
    torch.manual_seed(0)
    made = {
        "attention": build(preset(name, **changes)),
        "multi-head BiLSTM": build(preset(name, attention="multi_lstm", **changes)),
    }
    masked = build(made["multi-head BiLSTM"].config)
    masked.load_state_dict(made["multi-head BiLSTM"].state_dict())
    kept = strong(masked, 0.0, share)
    mask(masked, kept)
    made |= {f"{share:.0%} masked": masked, f"{share:.0%} removed": remove(masked, kept)}
    return {which: model.eval() for which, model in made.items()}


def measured(models: dict[str, torch.nn.Module], batch: int, turns: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds per image of each network, the median of each turn."""
    config = next(iter(models.values())).config
    images = torch.randn(batch, config.channels, config.image, config.image)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(turns):
        for name, model in models.items():
            times[name].append(1e3 * statistics.median(cost.latency(model, images, repeats, 1)) / batch)
    return times


def main() -> None:
    """Measure, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small network, two turns")
    parser.add_argument("--share", type=float, default=0.5, help="of the hidden units that are removed")
    parser.add_argument(
        "--out", type=Path, default=workspace.ROOT / "data" / "runs" / "benchmarks" / "replacement.json"
    )
    options = parser.parse_args()
    rows = []
    for name, changes in list(NETWORKS.items())[1 if options.quick else 0 :]:
        models = variants(name, changes, options.share)
        for batch in (1, 8) if options.quick else (1, 32):
            times = measured(models, batch, 2 if options.quick else 7, 3)
            for which, found in times.items():
                row = {"network": name, "batch": batch, "variant": which, "parameters": cost.parameters(models[which])}
                rows.append({**row, "ms": statistics.median(found), "least": min(found), "most": max(found)})
    table = pd.DataFrame(rows)
    report = {**store.circumstances(), "threads": torch.get_num_threads(), "share": options.share, "rows": rows}
    lines = [[*table.columns], ["---"] * table.shape[1], *table.round(3).to_numpy().tolist()]
    store.save_report(report, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), options.out)


if __name__ == "__main__":
    main()
