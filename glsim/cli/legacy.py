"""Verbs that still have their options in `glsim.config`: one file each is to come."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from glsim import config
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


def show_serve(r: dict[str, Any], _: Any) -> str:
    """What was done until it was stopped."""
    mean = f", {r['answered'] / r['batches']:.1f} at a time" if r["batches"] else ""
    other = "".join(f", {r[name]} {name}" for name in ("refused", "failed") if r[name])
    return f"stopped: {r['answered']} images answered{mean}{other}"


VERBS = {
    "predict": Verb(config.Predict, "glsim.inference.predictor:run", show_predict, progress=True, shows_raw=True),
    "index build": Verb(config.IndexBuild, "glsim.inference.index:build", show_index, progress=True),
    "index add": Verb(config.IndexAdd, "glsim.inference.index:add", show_index, progress=True),
    "index query": Verb(config.IndexQuery, "glsim.inference.index:query", show_query, progress=True),
    "index eval": Verb(config.IndexEval, "glsim.inference.index:evaluate", show_index_eval, progress=True),
    "serve": Verb(config.Serve, "glsim.inference.server:run", show_serve),
    "convert": Verb(config.Convert, "glsim.checkpoints.convert:run", show_convert),
    "export": Verb(config.Export, "glsim.checkpoints.export:run", show_export),
    "push": Verb(config.Push, "glsim.checkpoints.push:run", show_push),
    "datasets": Verb(config.Datasets, "glsim.data.prepare:run", show_datasets),
}
