"""The best seed of each row of `glsim report`, chosen by the test split itself: no result to compare methods by.

    python benchmarks/best_seed.py RUN [RUN ..]      # run folders, folders of glsim reproduce, or globs of them

Tables of other people may hold such a number; beside it stands the mean over the seeds, which is the one to quote.
"""

from __future__ import annotations

import argparse
import sys

from glsim import GlsimError
from glsim.training.report import FinishedRun, as_row, differing, find_runs, group, table


def best_seed_table(runs: list[FinishedRun]) -> list[str]:
    """The lines of a Markdown table, one row for runs that differ in the seed alone."""
    rows = []
    for data in dict.fromkeys(run.data for run in runs):
        groups = [g for g in group(runs) if g[0].data == data]
        names = differing(groups)
        for same in groups:
            row, best = as_row(same, names), max(same, key=lambda run: run.test.correct)
            settings = ", ".join(f"{name}={value}" for name, value in row.settings.items())
            words = [data, row.method, row.backbone, row.lr, settings, f"{100 * row.top1.mean:.2f}"]
            rows.append([*words, f"{100 * best.test.top1:.2f} (seed {best.seed})"])
    return table(["data", "method", "backbone", "lr", "settings", "mean", "best on test"], rows)


def main(words: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    try:
        runs, left_out = find_runs(parser.parse_args(words).runs)
        lines = best_seed_table(runs)
    except GlsimError as error:
        print(f"best_seed: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines))
    for what in left_out:
        print(f"left out: {what}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
