"""Verbs that still have their options in `glsim.config`: one file each is to come."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from glsim import config
from glsim.cli.eval import show_answered
from glsim.cli.output import put
from glsim.files import printable


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
    "doctor": Verb(config.Doctor, "glsim.data.audit:run", show_doctor, progress=True),
}
