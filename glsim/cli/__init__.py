"""The command line: verbs, options, exit codes. torch is imported only once the options are valid."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import sys
import traceback
import typing
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from difflib import get_close_matches
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

from glsim import __version__, config
from glsim.files import check_writable, expand, one_line, printable, shown, to_json
from glsim.training.recipes import find_recipe
from glsim.types import ConfigError, DataWarning, GlsimError, bounded

FLAGS = ("--json", "--traceback")  # of every verb


class Verb(NamedTuple):
    """A row of the command line."""

    settings: type  # its options
    run: str  # module:function that takes them and returns a JSON-able dict
    show: Callable[[dict[str, Any], Any], str]  # the same result for people
    progress: bool = False  # the function draws a progress bar unless told not to
    shows_raw: bool = False  # `show` writes for programs too: it gets the texts as they are, and escapes them itself


def show_skipped(r: dict[str, Any], what: str = "unreadable images") -> list[str]:
    """What was left out, counted and listed."""
    return [f"skipped {len(r['skipped'])} {what}:", *(f"  {bad}" for bad in r["skipped"])] * bool(r["skipped"])


def show_train(r: dict[str, Any], s: config.Train) -> str:
    """Accuracies and where the bundle is."""
    lines = [f"trained {r['epoch']} epochs: loss {r['train_loss']:.3f}, {r['images_per_second']} images/s"]
    if r["batch_size"] < s.batch_size:
        lines.append(f"batch_size {s.batch_size} was cut to {r['batch_size']}: train has no more images for a step")
    for name in ("val", "test"):
        if name in r:
            lines.append(f"{name}: top-1 {r[name]['top1']:.2%} ({r[name]['correct']} of {r[name]['count']})")
    lines += show_skipped(r)
    lines.append(f"bundle: {r['out']} (curve.png, log.jsonl, metrics.json beside it)")
    named = f" --dataset {s.dataset}" if s.dataset is not None else ""
    return "\n".join(
        lines + [f"next: glsim eval {r['out']} --data {s.data}{named}"] * ("test" in r["splits"] and "test" not in r)
    )


def show_reproduce(r: dict[str, Any], _: Any) -> str:
    """Which lr was chosen by what, every seed's accuracy, mean and std."""
    lines = []
    for run in r["runs"].values():
        if "val" in run:
            chosen = " (chosen)" * (run["lr"] == r["lr"])
            lines.append(f"lr {run['lr']}: val top-1 {run['val']['top1']:.2%}{chosen}")
        elif run["state"] == "diverged":
            lines.append(f"lr {run['lr']}: {run['why']}")
        else:
            test = run["test"]
            lines.append(f"seed {run['seed']}: test top-1 {test['top1']:.2%} ({test['correct']} of {test['count']})")
    mean, std = r["test"]["top1"]["mean"], r["test"]["top1"]["std"]
    spread = f" +- {100 * std:.2f}" if std is not None else ""
    lines.append(f"test top-1 {100 * mean:.2f}{spread} % over {r['test']['runs']} seeds, last epoch, lr {r['lr']}")
    return "\n".join([*lines, f"runs: {r['out']}; tables: glsim report {r['out']}"])


def show_report(r: dict[str, Any], s: config.Report) -> str:
    """The tables as Markdown."""
    from glsim.training.report import as_markdown

    return as_markdown(r).rstrip("\n") + (f"\n\nwritten: {s.out}" if s.out else "")


def show_eval(r: dict[str, Any], s: config.Eval) -> str:
    """Accuracies, class by class where there are few."""
    lines = [
        f"{r['split']}: {r['count']} images, {r['images_per_second']} images/s",
        f"top-1 {r['top1']:.2%} ({r['correct']})   top-5 {r['top5']:.2%} ({r['correct_top5']})   "
        f"mean over classes {r['per_class_mean']:.2%}, standard deviation {r['per_class_std']:.2%}",
    ]
    lines.append(show_confidence(r["ece"], r["aurc"], r["risk_coverage"]))
    if a := r["answered"]:
        lines.append(show_answered(a["threshold"], a["coverage"], a["count"], a["correct"]))
    width = max((len(x["level"]) for x in r["levels"] or ()), default=0)
    for i, level in enumerate(r["levels"] or ()):
        lines.append(f"  {level['level']:{width}}  {level['groups']:5d} groups, top-1 {level['top1']:.2%}")
        if a:
            said = a["levels"][i]
            error = f", {said['error']:.2%} of that wrong" if said["count"] else ""
            lines[-1] += f"; answered {said['coverage']:.1%}{error}"
    if r["second_pass_share"] is not None:
        lines.append(f"second pass for {r['second_pass_share']:.1%} of the images")
    if r["split_drawn"]:
        lines.append(f"({r['data']} has no splits of its own: these images were drawn; --split all measures every one)")
    if len(r["per_class"]) <= 30:
        width = max(len(name) for name in r["per_class"])
        lines += [f"  {name:{width}}  {right:4d} of {count}" for name, (right, count) in r["per_class"].items()]
    if r["confused"]:
        lines.append("most often confused:")
        lines += [f"  {x['label']} taken for {x['prediction']}: {x['count']} of {x['of']}" for x in r["confused"][:5]]
    lines += show_skipped(r)
    lines += [f"mistakes: {r['errors']}"] * bool(r["errors"])
    if s.out is not None:
        lines.append(f"written: {s.out}")
        if "confusion.png" not in r["written"]:
            lines[-1] += f" (confusion.csv, but no confusion.png: {len(r['per_class'])} classes cannot be read in it)"
    return "\n".join(lines)


def show_confidence(ece: float, aurc: float, curve: list[dict[str, float]]) -> str:
    """Calibration error, and the error at some coverages."""
    points = [next((p for p in curve if p["coverage"] >= share - 1e-9), curve[-1]) for share in (0.5, 0.8, 0.9)]
    shown = ", ".join(f"{p['error']:.2%} of the surest {p['coverage']:.0%}" for p in points)
    return f"confidence: calibration error {ece:.2%}; wrong: {shown}; AURC {aurc:.4f}"


def show_answered(threshold: float, coverage: float, count: int, correct: int) -> str:
    """How much is answered at a threshold, and how wrongly."""
    wrong = f", {(count - correct) / count:.2%} of that wrong ({count - correct})" if count else ""
    return f"threshold {threshold:.4f}: {coverage:.1%} answered ({count}){wrong}, the rest unknown"


def show_calibrate(r: dict[str, Any], _: Any) -> str:
    """What the fit changed."""
    lines = [f"{r['count']} images of {r['split']}: temperature {r['temperature']:.3f}"]
    if r["temperature_kept"] is not None:
        lines[0] += f", kept at 1: {r['temperature_kept']}; calibrate on more images"
    else:
        lines[0] += " ({:.3f} to {:.3f}, 95 %)".format(*r["temperature_interval"])
    lines.append(
        "expected calibration error {:.2%} -> {:.2%}, mean log-loss {:.4f} -> {:.4f}".format(*r["ece"], *r["nll"])
    )
    if "margin" in r:
        first, second, correct, count = r["correct_first"], r["correct_second"], r["correct"], r["count"]
        lines += [
            f"first pass alone {first / count:.2%} ({first}), always both {second / count:.2%} ({second}), "
            f"as calibrated {correct / count:.2%} ({correct})",
            f"second pass for {r['second_pass_share']:.1%} of the images, margin {r['margin']}",
        ]
    if "max_error" in r and r["threshold"] is None:
        lines.append(f"no threshold keeps the error at {r['max_error']:g} points: --reject will not work")
    elif "max_error" in r:
        lines.append(show_answered(r["threshold"], r["coverage"], r["answered"], r["answered_correct"]))
        lines.append(
            f"that rests on {r['count']} images: up to {r['error_at_most']:.1%} of such answers may be wrong (95 %)"
        )
    return "\n".join([*lines, f"written: {r['bundle']}"])


def show_predict(r: dict[str, Any], s: config.Predict) -> str:
    """The answers in the format asked for; of a bulk job, how many there are."""
    if r.get("engine") == "ray":
        before = f", {r['parts_before']} of {r['parts']} parts were there" * bool(r["parts_before"])
        steady = f" ({r['steady_images_per_second']} once started)" if r["steady_images_per_second"] else ""
        for name, why in r["parts_again"].items():
            put(printable(f"{name} was made again: {why}"), sys.stderr)
        counts = f"{r['answered']} answered, {r['errors']} could not be read"
        speed = f"{r['seconds']} s, {r['images_per_second']} images/s{steady}{before}"
        return printable(f"{r['out']}: {r['images']} images in {r['parts']} parts; {counts}; {speed}")
    from glsim.inference.predictor import FORMATS, Prediction, Verdict

    answers = [
        Prediction(
            a["path"],
            tuple(x["label"] for x in a["answers"]),
            tuple(x["probability"] for x in a["answers"]),
            tuple(a["box"]) if a["box"] else None,
            a["second_pass"],
            a.get("embedding"),
            Verdict(**a["verdict"]) if "verdict" in a else None,
        )
        for a in r["predictions"]
    ]
    share = r["second_pass_share"]
    told = [] if share is None else [f"second pass for {share:.1%} of the images"]
    for line in show_skipped(r) + told:
        put(printable(line), sys.stderr)
    return printable(f"written: {s.out}") if s.out else FORMATS[str(s.format)](answers).rstrip("\n")


def show_index(r: dict[str, Any], _: Any) -> str:
    """What the index holds now, and what was added."""
    lines = [f"{r['index']}: {r['images']} images of {r['classes']} classes, {r['embedding']} embedding"]
    if "added" in r:
        before = f" ({r['there_before']} were there already)" * bool(r["there_before"])
        lines.append(f"added {r['added']} images{before}")
        new = set(r["new_classes"])
        lines += [f"  {name}{' (new)' * (name in new)}: {n} images" for name, n in r["images_of"].items()]
    return "\n".join(lines + show_skipped(r))


def show_query(r: dict[str, Any], _: Any) -> str:
    """An image's answer, the classes by similarity, and what the neighbours and the head say."""
    lines = []
    for a in r["answers"]:
        classes = ", ".join(f"{c['label']} {c['similarity']:.3f}" for c in a["classes"])
        lines.append(f"{a['path']}: {a['label'] or 'unknown'} ({classes})")
        lines.append(
            f"  neighbours: {a['vote']['label']} {a['vote']['share']:.0%}"
            f"   head: {a['head']['label']} {a['head']['probability']:.1%}"
        )
        lines += [f"    {n['similarity']:.3f}  {n['label']}  {n['path']}" for n in a["neighbours"]]
    return "\n".join(lines + show_skipped(r))


def show_index_eval(r: dict[str, Any], _: Any) -> str:
    """Recall, accuracies beside the head, the unknown, and a line for every step."""
    ways = ("prototypes", "neighbours", "head")
    lines = [
        f"{r['split']}: {r['count']} images of the {r['classes']} classes of the index, {r['embedding']} embedding",
        "recall: " + "   ".join(f"@{k} {x:.2%}" for k, x in r["recall"].items()),
        "top-1:  " + "   ".join(f"{way} {r[way]['top1']:.2%}" for way in ways),
    ]
    if u := r["unknown"]:
        lines += [
            f"unknown: {u['count']} images; AUROC " + "   ".join(f"{way} {x:.3f}" for way, x in u["auroc"].items()),
            f"  --below {u['threshold']:.3f} keeps 95 % of the known images and {u['passed']:.1%} of the unknown",
        ]
    if r["added"]:
        lines.append("classes added, images of each: top-1 of all classes (old, added)")
    for row in r["added"]:
        parts = [
            f"{way} {row[way]['top1']:.1%} ({_percent(row[way], 'old')}, {_percent(row[way], 'added')})" for way in ways
        ]
        lines.append(f"  {row['added']:4d} x {row['shots']:2d}: " + "   ".join(parts))
    return "\n".join(lines + show_skipped(r))


def _percent(row: dict[str, Any], which: str) -> str:
    value = row[f"top1_{which}"]
    return "-" if value is None else f"{value:.1%}"


def show_explain(r: dict[str, Any], _: Any) -> str:
    """A line a picture."""
    if "contrast" in r:
        a, b = r["contrast"]
        lines = [
            f"{p['path']}: {a} {p['probabilities'][0]:.1%}, {b} {p['probabilities'][1]:.1%}, {p['picture']}"
            for p in r["pictures"]
        ]
        return "\n".join([*lines, *show_skipped(r), f"pictures: {r['out']}"])
    lines = [f"{p['path']}: {p['label']} {p['probability']:.1%}, {p['picture']}" for p in r["pictures"]]
    if layers := r.get("layers"):
        lines.append(f"layers, over {layers['images']} images: {layers['picture']}, {layers['table']}")
    lines += show_skipped(r)
    return "\n".join([*lines, f"pictures: {r['out']}"])


def show_localize(r: dict[str, Any], s: config.Localize) -> str:
    """The tables, and what was left out."""
    from glsim.evaluation.localization import as_text

    return "\n".join([as_text(r), *show_skipped(r, "images"), *[f"written: {s.out}"] * bool(s.out)])


def show_convert(r: dict[str, Any], _: Any) -> str:
    """What became of every key."""
    lines = [f"{len(r['used'])} keys used, {len(r['ignored'])} ignored, {len(r['missing'])} missing"]
    lines += [f"  used     {published} -> {ours}" for published, ours in r["used"].items()]
    lines += [f"  ignored  {key}: {why}" for key, why in r["ignored"].items()]
    lines += [f"  missing  {key}" for key in r["missing"]]
    return "\n".join([*lines, f"options: {r['options']}", f"bundle: {r['bundle']}"])


def show_export(r: dict[str, Any], _: Any) -> str:
    """How near the export is to the model at every batch size, and where it is."""
    lines = []
    for c in r["checks"]:
        n, boxes = c["batch"], c["same_boxes"]
        lines.append(
            f"batch {n}: logits differ by at most {c['difference']:.1e}, same answer {c['same_answers']} of {n}"
            + (f", same box {boxes} of {n}" if boxes is not None else "")
        )
    if r["exit_code"]:
        return "\n".join([*lines, f"more than {r['tolerance']}: nothing was written to {r['out']}"])
    return "\n".join([*lines, f"written: {', '.join(r['files'])} ({r['bytes'] / 2**20:.1f} MiB, {r['precision']})"])


def show_push(r: dict[str, Any], _: Any) -> str:
    """Where it went, and how to load it."""
    return f"pushed: {r['commit']} (licence {r['licence']['model']})\nload it: hf-hub:{r['repository']}"


def show_doctor(r: dict[str, Any], _: Any) -> str:
    """What was found, every problem by name; the memory of the planned run; where the page is."""
    from glsim.training.memory import as_gib

    images = ", ".join(f"{count} {split}" for split, count in r["counts"].items())
    lines = [f"{r['data']}: {images} images of {r['classes']['count']} classes, {r['seconds']} s"]
    for f in r["findings"]:
        lines.append(f"{f['severity']}: {f['title']}: {f['count']}. {f['advice']}")
        most = 5 if f["severity"] == "warning" else f["count"]
        for item in f["items"][:most]:
            paths = " = ".join(image["path"] for image in item["images"])
            lines.append("  " + ": ".join(part for part in (paths, item["note"]) if part))
        if f["count"] > most:
            lines.append(f"  .. and {f['count'] - most} more (--json lists all)")
    m = r["memory"]
    lines.append(
        f"memory of a step: about {as_gib(m['total'])}, free on {m['device']}: {as_gib(m['free'])}; "
        + (f"batches up to {m['largest_batch_size']} fit" if m["fits"] else "it will not fit; what helps:")
    )
    lines += [f"  {advice}" for advice in m["advice"]]
    return "\n".join([*lines, *["nothing found"] * (not r["findings"]), f"page: {r['out']}"])


def show_datasets(r: dict[str, Any], _: Any) -> str:
    """The names, or what was made."""
    if "root" in r:
        counts = ", ".join(f"{n} {split}" for split, n in r["counts"].items())
        lines = [f"{r['name']}: {r['classes']} classes, {counts} images in {r['root']}"]
        if "csv" in r:
            lines += [f"list: {r['csv']}, split {r['split_hash']}", f"licence: {r['licence']}"]
            lines.append(f"next: glsim train --dataset {r['name']} --data {r['root']} --out RUN")
        return "\n".join(lines)
    lines = []
    for d in r["datasets"]:
        lines.append(f"{d['name']:10} {d['about']}")
        if "counts" in d:
            counts = ", ".join(f"{n} {split}" for split, n in d["counts"].items()) or "counts not stated"
            lines[-1] += f": {d['classes']} classes, {counts}"
            how = "downloaded by prepare" if d["download"] else "download it yourself, then prepare --source"
            lines += [f"{'':10} {d['protocol']}", f"{'':10} licence: {d['licence']}; {d['homepage']} ({how})"]
    return "\n".join(lines)


def show_recipes(r: dict[str, Any], _: Any) -> str:
    """A paragraph a recipe: name, method, data, what its header claims, and on what hardware."""
    lines = []
    for recipe in r["recipes"]:
        lines += [f"{recipe['name']}: {recipe['method']} on {recipe['data']}. {recipe['title']}"]
        lines += [f"    {key}: {recipe[key]}" for key in ("claim", "hardware")]
    return "\n".join([*lines, "", "next: glsim train --recipe NAME --data DATA --out RUN (path and source: --json)"])


def show_quickstart(r: dict[str, Any], _: Any) -> str:
    """Both accuracies, what the crops hold, where the report is."""
    lines = [f"{'':8}  test top-1"]
    lines += [f"{name:8}  {value:8.1%}" for name, value in r["test_top1"].items()]
    inside = r["crops"]
    lines += [
        "",
        f"crops that hold the part that tells the species ({inside['threshold']:.0%} of its pixels or more):",
        f"  GLSim {inside['glsim']:.1%}   random box of the same area {inside['random']:.1%}   "
        f"centre box of the same area {inside['centre']:.1%}   (mean area {inside['area']:.0%} of the image)",
        "",
        f"report:   {r['report']}",
        f"pictures: {r['pictures']}",
    ]
    return "\n".join(lines)


def show_serve(r: dict[str, Any], _: Any) -> str:
    """What was done until it was stopped."""
    mean = f", {r['answered'] / r['batches']:.1f} at a time" if r["batches"] else ""
    other = "".join(f", {r[name]} {name}" for name in ("refused", "failed") if r[name])
    return f"stopped: {r['answered']} images answered{mean}{other}"


def show_bench(r: dict[str, Any], s: config.Bench) -> str:
    """A line a row, ratios beside; with --loader the three rates."""
    from glsim.evaluation import speed
    from glsim.training import throughput

    return (speed if s.loader is None else throughput).as_text(r) + (f"\nwritten: {s.out}" if s.out else "")


def show_flops(r: dict[str, Any], s: config.Flops) -> str:
    """The table, under a head that says how it counts."""
    from glsim.evaluation.flops import as_text

    return as_text(r, s.convention)


VERBS = {
    "quickstart": Verb(config.Quickstart, "glsim.cli.quickstart:run", show_quickstart, progress=True),
    "train": Verb(config.Train, "glsim.training.train:run", show_train, progress=True),
    "reproduce": Verb(config.Reproduce, "glsim.training.reproduce:run", show_reproduce, progress=True),
    "recipes": Verb(config.Recipes, "glsim.training.recipes:run", show_recipes),
    "report": Verb(config.Report, "glsim.training.report:run", show_report),
    "eval": Verb(config.Eval, "glsim.evaluation.evaluate:run", show_eval),
    "calibrate": Verb(config.Calibrate, "glsim.evaluation.calibration:run", show_calibrate, progress=True),
    "predict": Verb(config.Predict, "glsim.inference.predictor:run", show_predict, progress=True, shows_raw=True),
    "index build": Verb(config.IndexBuild, "glsim.inference.index:build", show_index, progress=True),
    "index add": Verb(config.IndexAdd, "glsim.inference.index:add", show_index, progress=True),
    "index query": Verb(config.IndexQuery, "glsim.inference.index:query", show_query, progress=True),
    "index eval": Verb(config.IndexEval, "glsim.inference.index:evaluate", show_index_eval, progress=True),
    "explain": Verb(config.Explain, "glsim.interpret.heatmaps:run", show_explain),
    "localize": Verb(config.Localize, "glsim.evaluation.localization:run", show_localize, progress=True),
    "serve": Verb(config.Serve, "glsim.inference.server:run", show_serve),
    "bench": Verb(config.Bench, "glsim.evaluation.speed:run", show_bench, progress=True),
    "flops": Verb(config.Flops, "glsim.evaluation.flops:run", show_flops),
    "convert": Verb(config.Convert, "glsim.checkpoints.convert:run", show_convert),
    "export": Verb(config.Export, "glsim.checkpoints.export:run", show_export),
    "push": Verb(config.Push, "glsim.checkpoints.push:run", show_push),
    "doctor": Verb(config.Doctor, "glsim.data.audit:run", show_doctor, progress=True),
    "datasets": Verb(config.Datasets, "glsim.data.prepare:run", show_datasets),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `glsim VERB ..`; returns the status: 0 ok, 1 failure, 2 usage, 3 data, 4 failed check, 130 interrupted.

    Whatever happens, with --json one document is printed, and without it the answer or one sentence.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    own = words[: words.index("--")] if "--" in words else words
    as_json, traced = (flag in own for flag in FLAGS)
    words = [word for word in own if word not in FLAGS] + words[len(own) :]
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who called us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")  # what the encoding cannot say is escaped
    call = Call(as_json, os.environ.get("RANK", "0") == "0")  # of several processes one speaks
    try:
        code, text = call.answer(words)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if traced or os.environ.get("GLSIM_TRACEBACK"):
            with suppress(OSError):
                put("".join(traceback.format_exception(error)), sys.stderr)
        code, text = call.fail(error)
    finally:
        part_processes()
    try:
        put(text, sys.stdout)
    except BrokenPipeError:  # the reader of our output left: head, less
        return code or 1
    except OSError as error:
        return call.fail(error)[0]
    return code


class Call:
    """One call of the command line, and what is known of it by the time that something goes wrong."""

    def __init__(self, as_json: bool, speaks: bool) -> None:
        self.as_json, self.speaks = as_json, speaks
        self.name = "glsim"
        self.settings: Any = None
        self.notes: list[str] = []  # what a DataWarning said
        self.told: set[str] = set()

    def answer(self, words: list[str]) -> tuple[int, str]:
        """The status, and what is printed on stdout."""
        if not words and self.as_json:
            raise ConfigError(f"name a verb: {', '.join(VERBS)}")
        if not words or words[0] in ("-h", "--help"):
            return 0 if words else 2, usage()
        if words[0] == "--version":
            return 0, __version__
        name, rest = split_verb(words)
        if name.split()[1:] in (["-h"], ["--help"]):
            return 0, usage(name.split()[0])
        if name not in VERBS:
            raise ConfigError(f"unknown verb {name!r}; choose from: {', '.join(VERBS)}")
        self.name, verb = f"glsim {name}", VERBS[name]
        with redirect_stdout(io.StringIO()) as printed:
            try:
                self.settings = parse(name, verb, rest)
            except SystemExit as stop:  # it printed its help, or a recipe
                return int(stop.code or 0), printed.getvalue().rstrip("\n")
        for option, (path, role) in config.outputs(self.settings).items():
            try:
                check_writable(path, role == "folder")
            except GlsimError as error:
                raise type(error)(f"{option}={error}") from error
        module, _, function = verb.run.partition(":")
        extra = {"progress": sys.stderr.isatty() or not self.as_json} if verb.progress else {}
        with libraries_apart(), warnings.catch_warnings():
            warnings.simplefilter("always", DataWarning)
            warnings.showwarning = self.note
            result = getattr(import_module(module), function)(self.settings, **extra)
        code = int(result.get("exit_code", 0))  # of a verb that looked and found something wrong
        if not self.speaks:
            return code, ""
        if self.as_json:
            return code, self.document(result | {"notes": self.notes} if self.notes else result)
        if verb.shows_raw:
            return code, verb.show(result, self.settings)
        return code, verb.show(shown(result), SimpleNamespace(**shown(vars(self.settings))))

    def document(self, value: dict[str, Any]) -> str:
        """The JSON document; of ASCII where stdout cannot say everything."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return to_json(value, ascii=encoding.lower().replace("-", "") != "utf8")

    def note(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        """Show a warning as one line, once; what is said of the data also goes into the document."""
        if str(message) in self.told:
            return
        self.told.add(str(message))
        if issubclass(category, DataWarning):
            self.notes.append(str(message))
            self.tell(f"note: {message}")
        else:
            self.tell(f"note: {one_line(Warning(message))} ({category.__name__} of a library)")

    def tell(self, *lines: str) -> None:
        """Print lines for people, the first with the name of the verb."""
        with suppress(OSError):
            first, *more = [printable(bounded(line)) for line in lines]
            put("\n  ".join([f"{self.name}: {first}", *more]), sys.stderr)

    def fail(self, error: BaseException) -> tuple[int, str]:
        """Say on stderr what went wrong; returns the status, and with --json the document for stdout."""
        lines, code = explain_error(error, self.settings)
        self.tell(*lines)
        document = {"error": "\n  ".join(map(bounded, lines)), "exit_code": code}
        return code, self.document(document) if self.as_json and self.speaks else ""


def put(text: str, stream: Any) -> None:
    """Print `text`, if there is any. Raises OSError where it does not arrive; nor does Python try again as it ends."""
    if not text:
        return
    try:
        print(text, file=stream, flush=True)
    except OSError:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        raise


@contextmanager
def libraries_apart() -> Iterator[None]:
    """Inside, what is printed on stdout goes to stderr, past Python too: stdout is for the answer."""
    own, saved = sys.stdout, None
    with suppress(OSError, ValueError, AttributeError):
        if own.fileno() == 1 and sys.stderr.fileno() == 2:
            own.flush()
            saved = os.dup(1)
            os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            with suppress(OSError):
                own.flush()  # what those said who hold the stream from before
            os.dup2(saved, 1)
            os.close(saved)


# What libraries say when memory has run out, whatever class their error has.
MEMORY = (
    *("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "unable to mmap"),
    *("insufficient shared memory", "alloc_failed", "bad_alloc"),
)
COSTLY = ("batch_size", "batch_sizes", "workers", "image_size", "sizes")  # settings that memory depends on


def explain_error(error: BaseException, settings: Any) -> tuple[list[str], int]:
    """What happened and what to change, in a sentence (and lines of details), and the status."""
    if isinstance(error, GlsimError):
        details = "".join(f"\n  {line}" for line in error.details)
        return [said(error).removesuffix(details), *error.details], error.exit_code
    for cause in causes(error):
        kind, text = type(cause), str(cause).lower()
        if kind is KeyboardInterrupt:  # while it imports, NumPy makes an ImportError of it
            return ["interrupted"], 130
        if "dataloader worker" in text and ("killed" in text or "exited unexpectedly" in text):
            advice = lower(settings, "workers", "batch_size")
            return [f"a process that loads images has died, mostly for want of memory: {said(cause)}; {advice}"], 1
        if (
            kind.__name__ == "OutOfMemoryError"
            or isinstance(cause, MemoryError)
            or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
            or (isinstance(cause, RuntimeError) and any(sign in text for sign in MEMORY))
        ):
            return [f"memory has run out: {said(cause)}; {lower(settings, *COSTLY)}"], 1
        if kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
            return [f"torch.compile does not work here: {said(cause)}; leave out --compile"], 1
        if "more than 1 value per channel" in text:
            advice = "a larger --batch-size or --image-size helps, or a backbone without batch norm"
            return [f"batch norm has only one value a channel: {said(cause)}; {advice}"], 1
        if kind.__name__ == "AcceleratorError":
            return [f"the device failed: {said(cause)}; see whether it works with --device cpu"], 1
    if isinstance(error, UnicodeError):
        return [f"a text is in another encoding than UTF-8: {said(error)}"], 3
    if isinstance(error, OSError):  # a full disk, a folder that cannot be written
        return [said(error)], 1
    if isinstance(error, RecursionError):
        return [f"something is nested too deeply: {said(error)}"], 1
    if isinstance(error, ImportError):
        return [f"a library is missing or broken: {said(error)}"], 1
    if isinstance(error, SystemExit):
        return [f"a library ended the program, with {said(error)}"], 1
    advice = "please report it, with what --traceback (or GLSIM_TRACEBACK=1) shows"
    return [f"internal error: {type(error).__name__}: {said(error)}; {advice}"], 1


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the one that led to it, and so on."""
    known: list[BaseException] = []
    while error is not None and error not in known:
        known.append(error)
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def said(error: BaseException) -> str:
    """The text of an error: of our own all of it, of a library's the first line."""
    whole = isinstance(error, GlsimError) and "Traceback (most recent call last)" not in str(error)
    return str(error) if whole else one_line(error)


def lower(settings: Any, *names: str) -> str:
    """Advice to lower those of the settings `names` that this verb has."""
    had = {name: getattr(settings, name) for name in names if getattr(settings, name, 0) != 0}
    options = [f"--{n.replace('_', '-')}" + (f" (now {v})" if v is not None else "") for n, v in had.items()]
    return f"lower {' or '.join(options)}" if options else "a smaller model helps, or a machine with more memory"


def split_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb, of one word or of two (`index build`), and the words after it."""
    count = 2 if any(name.startswith(f"{words[0]} ") for name in VERBS) else 1
    return " ".join(words[:count]), list(words[count:])


def part_processes() -> None:
    """Leave the process group of a run of several: threads of it that outlive Python abort the process now and then."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def usage(first: str = "") -> str:
    """What `glsim --help` prints, or `glsim FIRST --help` for the first word of a family of verbs."""
    shown = {name: verb for name, verb in VERBS.items() if not first or name.startswith(f"{first} ")}
    width = max(map(len, shown))
    rows = [f"  {name:{width}}  {(verb.settings.__doc__ or '').splitlines()[0]}" for name, verb in shown.items()]
    lines = ["usage: glsim VERB [options]", "", "Fine-grained image recognition.", "", *rows, ""]
    return "\n".join(
        [
            *lines,
            "glsim VERB --help tells the options of a verb; --json prints one JSON document,",
            "--traceback where an error arose.",
        ]
    )


def parse(name: str, verb: Verb, words: list[str]) -> Any:
    """Command line words (and a recipe) to a checked settings object; exits with 2 on what does not fit."""
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    class ReadRecipe(ActionConfigFile):
        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            path = str(find_recipe(expand(values)))
            config.read_recipe(path)
            super().__call__(parser, cfg, path, option_string)

    fields = dataclasses.fields(verb.settings)
    positionals = [f.name.upper() for f in fields if f.metadata.get("positional")]
    parser = ArgumentParser(
        prog=f"glsim {name}",
        usage=" ".join(["glsim", name, *positionals, "[options]"]),
        description=verb.settings.__doc__,
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print-recipe",
    )
    recipes = verb.settings is config.Train
    if recipes:
        parser.add_argument(
            "--recipe", action=ReadRecipe, help="YAML file with options below, or a name: glsim recipes"
        )
    hints = typing.get_type_hints(verb.settings)
    for f in fields:
        add_option(parser, f, hints[f.name], recipes)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    numbers = {f"--{f.name.replace('_', '-')}" for f in fields if hints[f.name] in (list[int], list[float])}
    try:
        values = parser.parse_args(split_commas(words, numbers)).as_dict()
    except ArgumentError as error:
        options = [option for action in parser._actions for option in action.option_strings]
        given = [word.partition("=")[0] for word in words if word.startswith("--")]
        wrong = [word for word in given if word.partition(".")[0] not in options]
        close = [f"did you mean {match}?" for word in wrong for match in get_close_matches(word, options, n=1)]
        raise ConfigError(
            "; ".join([" ".join(str(error).split()), *close, f"glsim {name} --help lists the options"])
        ) from None
    return verb.settings(**{f.name: values[f.name] for f in fields})


def split_commas(words: list[str], options: set[str]) -> list[str]:
    """`--sizes 224,448` or `--sizes=224,448` as `--sizes 224 448`, for `options` that take several numbers."""
    result, option = [], ""
    for word in words:
        if word.startswith("--"):
            option, _, value = word.partition("=")
            result += [option, *filter(None, value.split(","))] if option in options else [word]
        else:
            result += filter(None, word.split(",")) if option in options else [word]
    return result


def add_option(parser: Any, f: dataclasses.Field, hint: Any, recipes: bool) -> None:
    """One field of a settings class as an option, or as a word without a name.

    What is on already, by default or where `recipes` may say so, has an option that turns it off.
    """
    text = f.metadata["help"]
    needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    hint = str if hint == str | None else hint  # a text is never YAML: `null` is a name
    if f.metadata.get("positional"):
        if hint == list[str]:
            parser.add_argument(f.name, nargs="+", type=str, help=text)
        elif needed:
            parser.add_argument(f.name, type=hint, help=text)
        else:
            parser.add_argument(f.name, type=hint, nargs="?", default=default, help=text)
        return
    option = f"--{f.name.replace('_', '-')}"
    if hint is bool:
        parser.add_argument(option, action="store_true", default=default, help=text)
        if default or recipes:
            off = f"--no-{option[2:]}"
            parser.add_argument(off, dest=f.name, action="store_false", default=SUPPRESS, help=f"not {option}")
    elif hint == list[str] | None:
        parser.add_argument(option, nargs="+", type=str, default=default, help=text)
    elif hint in (list[int], list[float], list[str]):
        parser.add_argument(option, nargs="+", type=typing.get_args(hint)[0], default=default, help=text)
    elif needed:
        parser.add_argument(option, type=hint, required=True, help=text)
    else:
        parser.add_argument(option, type=hint, default=default, help=text)


if __name__ == "__main__":
    sys.exit(main())
