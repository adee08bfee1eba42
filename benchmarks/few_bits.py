"""Encrypted evaluations of notebook 07 on record, and its products timed: for a quiet machine.

python benchmarks/few_bits.py [NAME ...]    # names of `bits_on_shares.evaluations`, such as "W8, log2"

Needs the micro network's training in data/runs/training, record and weights; quantizes where that is missing.
"""

import sys

from salvit_core.experiments import bits_on_shares, execute, profiles


def main(names: list[str]) -> None:
    """Make the records that are named, or all, and print what the notebook's table has of them."""
    size = profiles.profile("reference")
    plan = bits_on_shares.trainings(size, "cifar10")
    runs = bits_on_shares.quantizations(size, plan[bits_on_shares.LINEAR])
    every = bits_on_shares.evaluations(size, plan, runs)
    if unknown := set(names) - set(every):
        sys.exit(f"error: {', '.join(sorted(unknown))}: choose from {'; '.join(every)}")
    wanted = {name: run for name, run in every.items() if name in names or not names}
    found = execute.collect(wanted.values(), label="evaluations")
    print(bits_on_shares.answers(wanted, found).round(3).to_string())
    print(bits_on_shares.products().round(3).to_string())


if __name__ == "__main__":
    main(sys.argv[1:])
