"""`glsim quickstart`: the whole main job in one command, on images that come with the package."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glsim.cli.options import Lines, Settings, setting
from glsim.types import ConfigError

PURPOSE = "Start"
# Small enough for two cores, large enough to see a wing bar; easy enough for so few epochs.
BIRDS: dict[str, Any] = dict(classes=5, size=96, part_scale=1.4, clutter=0.5)


class Options(Settings):
    """Train plain ViT and GLSim on the embedded synthetic birds, evaluate and explain them, write a report."""

    out: str = setting("quickstart", "folder for data, runs and report", path="folder")
    epochs: int = setting(13, "passes over train, for each of the two models", least=1)
    train: int = setting(120, "training images a species", least=1)
    test: int = setting(40, "test images a species", least=1)
    workers: int = setting(2, "processes that load images")


@dataclass(frozen=True)
class CropShares:
    """Shares of the test images whose crop holds the part that tells the species, beside boxes of the same area."""

    glsim: float  # the model's own box
    random: float  # a box at a random place, mean of several
    centre: float  # a box in the middle
    threshold: float  # a box holds a part when at least this share of the part's pixels lies inside
    area: float  # mean share of the image that the boxes cover
    coverage: float  # mean share of the part inside the model's own box


@dataclass(frozen=True)
class Quickstart:
    """What was measured, and where the report is."""

    test_top1: dict[str, float]  # of each method
    crops: CropShares
    environment: dict[str, Any]  # machine and versions, as `run.json` holds them
    seconds: dict[str, float]  # of training each method, and of all together
    report: str
    pictures: str


def run(options: Options, progress: bool) -> Quickstart:
    """Draw the birds, train `plain` and `glsim`, measure both, draw heat-maps, write `OUT/report/report.html`."""
    from glsim.data import synthetic
    from glsim.data.pages import render
    from glsim.evaluation.evaluate import evaluate_bundle
    from glsim.files import document, make_folder, read_json, write_json, write_text
    from glsim.interpret.pictures import explain_images
    from glsim.training.config import change_recipe
    from glsim.training.runs import CURVE, RUN
    from glsim.training.train import train

    out, start = Path(options.out), time.perf_counter()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder; remove it or name another --out")
    make_folder(out)
    data, report = out / "birds", out / "report"
    synthetic.write(data, train=options.train, test=options.test, **BIRDS)
    accuracy, seconds = {}, {}
    for method in ("plain", "glsim"):
        folder, began = out / method, time.perf_counter()
        own = {"epochs": options.epochs, "workers": options.workers, "cache": "ram"}
        train(change_recipe(f"synthetic_{method}", own, data=str(data), out=str(folder)), progress)
        seconds[method] = round(time.perf_counter() - began, 1)
        accuracy[method] = evaluate_bundle(folder, data, out=report / method, workers=options.workers).top1
        (report / method / CURVE).write_bytes((folder / CURVE).read_bytes())
    crops = measure_crops(out / "glsim", data)
    shown = [str(min(folder.iterdir())) for folder in sorted((data / "test").iterdir())]
    explain_images(out / "glsim", shown, report / "pictures")
    result = Quickstart(
        test_top1=accuracy,
        crops=crops,
        environment=read_json(out / "glsim" / RUN)["starts"][-1],
        seconds={**seconds, "all": round(time.perf_counter() - start, 1)},
        report=str(report / "report.html"),
        pictures=str(report / "pictures"),
    )
    images = options.test * BIRDS["classes"]
    page = render(
        Path(__file__).with_suffix(".html"),
        errors=[math.sqrt(p * (1 - p) / images) for p in accuracy.values()],
        images=images,
        options=options,
        result=result,
        species=BIRDS["classes"],
    )
    write_json(report / "report.json", document(result))
    write_text(report / "report.html", page)
    return result


def measure_crops(source: str | Path, data: Path) -> CropShares:
    """Measure the crops that a model takes of the test images against the masks of the parts."""
    from glsim.checkpoints.bundle import load
    from glsim.data.masks import find_masks
    from glsim.evaluation.localization import measure
    from glsim.evaluation.localization_metrics import HOLDS

    rows = measure(load(source), find_masks(data / "test", data / "masks"), [None], controls=True).targets["part"]
    (own,) = {name.removesuffix("/random") for name in rows if name.endswith("/random")}
    means = {row: {name: float(v.double().nanmean()) for name, v in columns.items()} for row, columns in rows.items()}
    return CropShares(
        glsim=means[own]["holds"],
        random=means[f"{own}/random"]["holds"],
        centre=means[f"{own}/centre"]["holds"],
        threshold=HOLDS,
        area=means[own]["area"],
        coverage=means[own]["box_recall"],
    )


def show(r: Quickstart, options: Options) -> Lines:
    """Both accuracies, what the crops hold, where the report is."""
    c = r.crops
    yield f"{'':8}  test top-1"
    yield from (f"{name:8}  {value:8.1%}" for name, value in r.test_top1.items())
    yield f"\ncrops that hold the part that tells the species ({c.threshold:.0%} of its pixels or more):"
    shares = {"GLSim": c.glsim, "random box of the same area": c.random, "centre box of the same area": c.centre}
    said = "   ".join(f"{name} {share:.1%}" for name, share in shares.items())
    yield f"  {said}   (mean area {c.area:.0%} of the image)"
    yield f"\nreport:   {r.report}"
    yield f"pictures: {r.pictures}"
