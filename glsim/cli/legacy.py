"""Verbs that still have their options in `glsim.config`: one file each is to come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from glsim import config
from glsim.cli.eval import show_answered


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
    "explain": Verb(config.Explain, "glsim.interpret.heatmaps:run", show_explain),
    "localize": Verb(config.Localize, "glsim.evaluation.localization:run", show_localize, progress=True),
    "bench": Verb(config.Bench, "glsim.evaluation.speed:run", show_bench, progress=True),
    "flops": Verb(config.Flops, "glsim.evaluation.flops:run", show_flops),
    "convert": Verb(config.Convert, "glsim.checkpoints.convert:run", show_convert),
    "export": Verb(config.Export, "glsim.checkpoints.export:run", show_export),
    "push": Verb(config.Push, "glsim.checkpoints.push:run", show_push),
    "doctor": Verb(config.Doctor, "glsim.data.audit:run", show_doctor, progress=True),
    "datasets": Verb(config.Datasets, "glsim.data.prepare:run", show_datasets),
}
