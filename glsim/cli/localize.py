"""`glsim localize`: scores and boxes of a model against masks, boxes and points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from glsim.cli.options import Device, SkipBad, Source, positional, required, setting, show_skipped
from glsim.data.box_options import BoxFile

if TYPE_CHECKING:
    from glsim.evaluation.localization import Localization, Numbers

PURPOSE = "Measure"
HEADS = {  # columns of the table, in their order
    "pointing": "pointing",
    "pointing_centre": "best centre",
    "energy": "energy",
    "auc": "ROC-AUC",
    "area": "area",
    "coverage": "coverage",
    "holds": "holds",
    "purity": "purity",
    "iou": "IoU",
    "parts": "parts",
    "deletion": "deletion",
    "insertion": "insertion",
}
PART = "parts/"  # before the name of one


class Options(BoxFile, Device, SkipBad, Source):
    """Measure where the model looks against masks, boxes, points: scores and boxes of every mechanism and controls."""

    source: str = positional("bundle, hf-hub:owner/name or official .pth", path="reads")
    images: str = required("folder (or file, or glob) of images", path="reads")
    masks: str | None = setting(
        None, "folder of masks, one an image: PNG, trimap or PASCAL VOC XML; or with body/ and part/", path="reads"
    )
    boxes: str | None = setting(
        None,
        "boxes: CSV (path,left,top,right,bottom), COCO or MegaDetector .json, folder of PASCAL VOC XML or of CUB",
        path="reads",
    )
    points: str | None = setting(
        None, "points: CSV (path,part,x,y), COCO .json, folder of CUB; default: those of --boxes", path="reads"
    )
    metrics: list[str] | None = setting(None, "mechanisms, or all; default: the model's own, gls_cos for plain")
    controls: bool = setting(False, "boxes of the same size too: centre, random place; random patches; whole image")
    faithfulness: bool = setting(False, "deletion and insertion curves too (18 more passes a mechanism)")
    options: dict[str, Any] = setting({}, "options of the method to change, as --options.top_o 16")
    limit: int | None = setting(None, "measure at most this many images, evenly spaced", least=1)
    resamples: int = setting(1000, "bootstrap draws of the images, for the intervals", least=100)
    seed: int = setting(0, "of these draws and of the random boxes", least=0, below=2**32)
    batch_size: int = setting(32, "images at a time", least=1)
    skip_bad: bool = setting(False, "leave unreadable images, and bad masks with theirs, out and list them")
    out: str | None = setting(None, "file for the result as JSON", path="file")


def run(options: Options, progress: bool) -> Localization:
    """Measure it."""
    from glsim.evaluation.localization import evaluate_localization

    return evaluate_localization(**vars(options), progress=progress)


def show(r: Localization, options: Options) -> str:
    """A table for each target: a line a row, means in percent with half the width of the interval."""
    from glsim.evaluation.statistics import signed
    from glsim.interpret.drawing import title_of

    lines = [f"{r.count} images; percent, +- half of the 95 % interval"]
    for target, found in r.targets.items():
        heads = [name for name in HEADS if any(name in row for row in found.rows.values())]
        titles = {row: _title(row) for row in found.rows}
        width = max(map(len, titles.values()))
        lines += ["", target, " " * width + "".join(f"{HEADS[name]:>14}" for name in heads)]
        if found.left_out:
            lines[-2] += f" ({found.left_out} images left out: no pixel of it is left in the network's view)"
        for row, values in found.rows.items():
            cells = "".join(f"{_cell(values[name]) if name in values else '':>14}" for name in heads)
            lines.append(f"{titles[row]:{width}}{cells}".rstrip())
        for row, gains in found.gains.items():
            more = gains["coverage - random"]
            if more is not None:
                lines.append(f"coverage of {title_of(row)} - random box: {signed(*_percent(more))}")
    row, values = next(iter(found.rows.items()))  # of all targets the same
    parts = {name[len(PART) :]: _percent(v)[0] for name, v in values.items() if name.startswith(PART) and v}
    if parts:
        shares = ", ".join(f"{name} {mean:.0f}" for name, mean in sorted(parts.items(), key=lambda part: -part[1]))
        lines += ["", f"parts inside the box of {titles[row]}: {shares}"]
    lines += [*_remarks(r), *show_skipped(r.skipped, "images")]
    if options.out is not None:
        lines.append(f"written: {options.out}")
    return "\n".join(lines)


def _remarks(r: Localization) -> Iterator[str]:
    """What a person should know of the files of boxes and points."""
    for kind, images in (r.without or {}).items():
        file = r.boxes if kind == "boxes" else r.points
        if images:
            what = f"no {kind} in {file}{', and are left out' if kind == 'boxes' else ''}"
            yield f"{len(images):,} images have {what}: {', '.join(images[:3])}{', ..' if images[3:] else ''}"
        if count := (r.unused or {})[kind]:
            yield f"{count:,} images of {file} are not among these"
    if r.scaled:
        yield f"annotations of {r.scaled:,} images were drawn on copies in another size, and are scaled"
    if r.cut:
        yield f"boxes of {r.cut:,} images reach over the edge of the image, and are cut"


def _title(row: str) -> str:
    from glsim.interpret.drawing import title_of

    name, _, control = row.rpartition("/")
    if name:
        return f"  {control}, same size"
    return "whole image" if row == "whole" else title_of(row)


def _cell(value: Numbers) -> str:
    if value is None:
        return "-"
    mean, low, high = _percent(value)
    return f"{mean:.1f}" if low is None else f"{mean:.1f} +-{(high - low) / 2:.1f}"


def _percent(value: list[float | None]) -> list[Any]:
    return [None if v is None else 100 * v for v in value]
