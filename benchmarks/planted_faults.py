"""Plant one fault at a time in a copy of the package, and see whether its tests find it.

    python benchmarks/planted_faults.py --out new.jsonl                    # the tree this file is in
    python benchmarks/planted_faults.py --out old.jsonl --commit 4f54875   # package and tests of a commit
    python benchmarks/planted_faults.py --table old.jsonl new.jsonl        # found and not found, side by side

What is measured is the tests, not the package: two suites are alike where they find the same faults. The tests nearest
to a fault run first and stop at the first failure; only where they find nothing does the whole suite run, with --whole.
A failure counts where the same test passes without the fault. A fault whose text is no longer there is named `stale`:
it has to be written anew. The out file holds a line of JSON for each fault, and what stands there is not run
again, so that the same command goes on. Needs a system that can fork.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "glsim"
LIBRARIES = ("torch", "torchvision.transforms.v2", "timm", "accelerate", "torchmetrics", "matplotlib.pyplot", "onnx")


class Fault(NamedTuple):
    """A text that is replaced by another one, and the tests that are nearest: files by their names, of which one that
    is not there is passed over, and words of pytest."""

    kind: str
    old: str  # in one file of the package, once
    new: str
    tests: str


FAULTS = (
    Fault(
        "off by one in a box",
        "return grid_line(start, count, side), grid_line(end + 1, count, side)",
        "return grid_line(start, count, side), grid_line(end, count, side)",
        "selection_crop scores_boxes",
    ),
    Fault(
        "left and top swapped",
        "    left, right = bounds(cols.amin(1), cols.amax(1), grid[1], image_size[1])\n"
        "    return torch.stack((left, top, right, bottom), dim=1)",
        "    left, right = bounds(cols.amin(1), cols.amax(1), grid[1], image_size[1])\n"
        "    return torch.stack((top, left, bottom, right), dim=1)",
        "selection_crop scores_boxes",
    ),
    Fault(
        "missing clamp",
        "sides.append(((start - margin).clamp(min=0), (end + margin).clamp(max=side)))",
        "sides.append(((start - margin).clamp(min=0), end + margin))",
        "selection_crop scores_boxes",
    ),
    Fault(
        "wrong index dtype",
        "return scores, scores.topk(k, dim=-1).indices",
        "return scores, scores.topk(k, dim=-1).indices.int()",
        "selection_crop scores_boxes models -k 'dtype or pick or glsim'",
    ),
    Fault(
        "softmax along the wrong axis",
        "taken = logits[..., 0].softmax(dim=-1) if f.num_prefix",
        "taken = logits[..., 0].softmax(dim=-2) if f.num_prefix",
        "selection_crop scores_boxes golden",
    ),
    Fault(
        "missing normalisation",
        "one = F.normalize(f.cls.to(f.patches.dtype), dim=-1, eps=EPS)",
        "one = f.cls.to(f.patches.dtype)",
        "selection_crop scores_boxes golden",
    ),
    Fault(
        "wrong sign",
        "return -(f.cls[:, None] - f.patches).square().mean(dim=-1)[:, None]",
        "return (f.cls[:, None] - f.patches).square().mean(dim=-1)[:, None]",
        "selection_crop scores_boxes golden",
    ),
    Fault(
        "missing detach",
        "@torch.no_grad()\ndef score(",
        "def score(",
        "models -k 'scores_that_only_choose'",
    ),
    Fault(
        "no other image in the pair",
        "x.roll(1, dims=0)",
        "x.roll(0, dims=0)",
        "models -k 'paired_attention or dcal'",
    ),
    Fault(
        "positions of other tokens",
        "torch.cat((still, places))[index][:, None]",
        "torch.cat((still, places))[index.flip(1)][:, None]",
        "backbone models -k 'rotary or dinov3 or eva02'",
    ),
    Fault(
        "parameter without a gradient",
        "(torch.stack((whole, local, pair)), self.uncertainty)",
        "(torch.stack((whole, local, pair)), self.uncertainty.detach())",
        "models -k dcal",
    ),
    Fault(
        "wrong epsilon",
        "                module.eps = norm_eps",
        "                module.eps = 1e-3",
        "models golden -k 'shape or glsim or aggregator'",
    ),
    Fault(
        "wrong reduction",
        "return torch.where(same, 1 - cos, (cos - margin).clamp(min=0)).mean()",
        "return torch.where(same, 1 - cos, (cos - margin).clamp(min=0)).sum()",
        "losses",
    ),
    Fault(
        "weight decay on norms and biases",
        "groups = param_groups_weight_decay(model, **common)",
        'groups = [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": s.weight_decay}]',
        "train -k decay",
    ),
    Fault(
        "no warm-up",
        "warmup = min(s.warmup_steps, steps // 2)",
        "warmup = 0",
        "train -k 'schedule or warm'",
    ),
    Fault(
        "wrong text of a licence",
        'start, licence = "nothing", "none, trained from nothing"',
        'start, licence = "nothing", "apache-2.0"',
        "hub -k 'licence or origin or says'",
    ),
    Fault(
        "seed ignored",
        "return np.random.default_rng([self.seed, epoch]).permutation(self.images)",
        "return np.random.default_rng([epoch]).permutation(self.images)",
        "train -k 'seed or epoch_holds'",
    ),
    Fault(
        "stale cache",
        "return _members(shard, stat.st_mtime_ns, stat.st_size)",
        "return _members(shard)",
        "sources -k anew",
    ),
    Fault(
        "wrong split",
        "return images.only(key not in held for key in keys), images.only(key in held for key in keys)",
        "return images.only(key in held for key in keys), images.only(key not in held for key in keys)",
        "data readers -k 'hold_out or split'",
    ),
    Fault(
        "order of the labels",
        "sorted({(row.class_id, row.label) for row in basis})",
        "sorted({(row.class_id, row.label) for row in basis}, reverse=True)",
        "data readers",
    ),
    Fault(
        "model left in training mode",
        "    model.config = replace(model.config, **kept)\n    return model.eval()",
        "    model.config = replace(model.config, **kept)\n    return model.train()",
        "bundle -k 'copied or same or overrides'",
    ),
    Fault(
        "wrong preprocessing at load",
        "    if stored is not None:\n",
        "    if stored is None:\n",
        "bundle predict predictor train -k 'preprocessing or pixels or travels or goes_with or wrong or split'",
    ),
    Fault(
        "rename left out",
        "                final.rename(old)\n",
        "                shutil.rmtree(final)\n",
        "train -k 'rename or crash or every_moment'",
    ),
    Fault(
        "exception swallowed",
        "        else:\n            raise answer\n    return found, skipped",
        "    return found, skipped",
        "index -k bad",
    ),
    Fault(
        "wrong exit code",
        "    exit_code = 3\n",
        "    exit_code = 1\n",
        "cli data readers -k 'exit or bad_data'",
    ),
    Fault(
        "bad files left out without a word",
        "[str(b) for b in bad],",
        "[],",
        "evaluate cli train -k 'skip or corrupt or left_out'",
    ),
    Fault(
        "row written twice",
        'return csv_text([("path", "label", "prediction", "confidence"), *rows])',
        'return csv_text([("path", "label", "prediction", "confidence"), *rows, *rows])',
        "train evaluate -k 'every_answer_on_test'",
    ),
    Fault(
        "box in pixels of the wrong image",
        "scale = (size[0] / width, size[1] / height)",
        "scale = (size[1] / height, size[0] / width)",
        "predict predictor",
    ),
    Fault(
        "wrong tolerance",
        "TOLERANCE = 1e-4  #",
        "TOLERANCE = 1e-1  #",
        "export -k 'otherwise or program'",
    ),
    Fault(
        "wrong level of an interval",
        "RESAMPLES, LEVEL = 1000, 0.95",
        "RESAMPLES, LEVEL = 1000, 0.90",
        "where statistics",
    ),
    Fault(
        "best taken for worst",
        "return -max(finished)[1]",
        "return -min(finished)[1]",
        "reproduce -k 'chosen_on_val'",
    ),
    Fault(
        "duplicates found by half of their hash",
        "            near = distance <= most\n",
        "            near = distance <= 2 * most\n",
        "doctor audit -k near",
    ),
    Fault(
        "threshold not strict",
        "good = (curve.wrong <= allowed)[:end].nonzero()",
        "good = (curve.wrong <= allowed).nonzero()",
        "confidence -k threshold",
    ),
)


def main() -> int:
    """Parse, plant and run, or print the table; returns 4 where the two suites of a table differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines, one a fault")
    parser.add_argument("--commit", help="package and tests of this commit instead of those here")
    parser.add_argument("--whole", action="store_true", help="the whole suite where the nearest tests find nothing")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="these faults alone")
    parser.add_argument("--limit", type=float, default=1800, help="seconds of one run of tests; more is a hang: found")
    parser.add_argument("--table", nargs="+", type=Path, metavar="OUT", help="print what was found, in columns")
    arguments = parser.parse_args()
    if arguments.table:
        return print_table([read_lines(file) for file in arguments.table], [file.stem for file in arguments.table])
    if arguments.out is None:
        parser.error("--out or --table is needed")
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # one thread: it forks
    for library in LIBRARIES:
        import_module(library)
    done = read_lines(arguments.out)
    chosen = [fault for fault in FAULTS if fault.kind in (arguments.only or [fault.kind])]
    with copied(arguments.commit) as tree:
        for fault in chosen:
            before = done.get(fault.kind)
            if before and (before["result"] != "missed" or before["where"] != "nearest" or not arguments.whole):
                continue
            began = time.perf_counter()
            found = try_fault(fault, tree, arguments.whole, arguments.limit)
            line = {"kind": fault.kind, **found, "seconds": round(time.perf_counter() - began)}
            with arguments.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
            print(f"{fault.kind}: {found['result']} {found.get('by', '')}", flush=True)
    return 0


@contextmanager
def copied(commit: str | None) -> Iterator[Path]:
    """A folder with a copy of the tree, or of `commit`; reference material that lies beside the tree lies there too."""
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place, "tree")
        tree.mkdir()
        git = ["git", "-C", str(ROOT)]
        if commit is None:
            words = [*git, "ls-files", "-co", "-z", "--exclude-standard"]
            listed = subprocess.run(words, check=True, capture_output=True)
            for name in filter(None, listed.stdout.decode().split("\0")):
                if (ROOT / name).is_file():
                    (tree / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / name, tree / name)
        else:
            archive = subprocess.run([*git, "archive", commit], check=True, capture_output=True)
            subprocess.run(["tar", "x", "-C", str(tree)], input=archive.stdout, check=True)
        if (ROOT.parent / "shared").is_dir():
            Path(place, "shared").symlink_to(ROOT.parent / "shared")
        yield tree


def try_fault(fault: Fault, tree: Path, whole: bool, limit: float) -> dict[str, str]:
    """Plant `fault` in `tree`, run its tests, take it out again; `result`: found, missed or stale."""
    texts = {file: file.read_text(encoding="utf-8") for file in (tree / PACKAGE).rglob("*.py")}
    places = [file for file, text in texts.items() if fault.old in text]
    if len(places) != 1 or texts[places[0]].count(fault.old) != 1:
        return {"result": "stale", "where": "nowhere"}
    file, before = places[0], texts[places[0]]
    files, _, words = fault.tests.partition(" -")
    found = [file for name in files.split() for file in sorted((tree / "tests").rglob(f"test_{name}.py"))]
    nearest = [str(file.relative_to(tree)) for file in found] + shlex.split(words and f"-{words}")
    anyway: list[str] = []  # tests that fail without it too
    for where, tests in {"nearest": nearest, "whole suite": ["tests"]}.items():
        if where == "whole suite" and not whole:
            break
        while True:
            file.write_text(before.replace(fault.old, fault.new), encoding="utf-8")
            failed = first_failure(tree, [*tests, *(f"--deselect={name}" for name in anyway)], limit)
            file.write_text(before, encoding="utf-8")
            if failed is None:
                break
            if failed == "no end" or first_failure(tree, [failed], limit) is None:
                return {"result": "found", "by": failed, "where": where}
            if failed in anyway:
                raise SystemExit(f"{failed} fails without a fault too, and cannot be left out")
            anyway.append(failed)
    return {"result": "missed", "where": "whole suite" if whole else "nearest"}


def first_failure(tree: Path, words: list[str], limit: float) -> str | None:
    """The first test that fails in `tree`, a file that cannot be imported, "no end" after `limit` s; None: all pass.

    Runs in a fork of this process, which has the libraries in memory already and nothing of the package.
    """
    log = tree.parent / "log"
    child = os.fork()
    if not child:
        os.setpgrp()
        with log.open("wb") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.chdir(tree)
        os.environ |= {"PYTHONPATH": str(tree), "COLUMNS": "1000"}
        sys.path.insert(0, str(tree))
        code = 70
        try:
            quiet = ["-q", "--color=no", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
            code = pytest.main(["-x", "-rfE", *quiet, *words])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + limit
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.2)
    if not ended[0]:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "no end"
    if os.waitstatus_to_exitcode(ended[1]) in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        return None
    said = log.read_text(encoding="utf-8", errors="replace")
    names = re.findall(r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::.+?)?)(?: - .*)?$", said, re.M)
    if not names:
        raise SystemExit(f"the tests ended with {os.waitstatus_to_exitcode(ended[1])}:\n{said[-3000:]}")
    return names[0]


def read_lines(file: Path) -> dict[str, dict[str, str]]:
    """What an out file holds, by kind of fault; nothing where it is not there yet."""
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {line["kind"]: line for line in lines}


def print_table(suites: list[dict[str, dict[str, str]]], names: list[str]) -> int:
    """Which suite found which fault, as a table of markdown; 4 where they differ."""
    print(f"| fault | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    differ = False
    for fault in FAULTS:
        rows = [suite.get(fault.kind, {"result": "not run"}) for suite in suites]
        differ |= len({row["result"] for row in rows}) > 1
        cells = [
            f"{row['result']}: `{row['by'].rpartition('::')[2]}`" if "by" in row else row["result"] for row in rows
        ]
        print(f"| {fault.kind} | {' | '.join(cells)} |")
    counts = [sum(suite.get(f.kind, {}).get("result") == "found" for f in FAULTS) for suite in suites]
    print(f"| found of {len(FAULTS)} | {' | '.join(map(str, counts))} |")
    return 4 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
