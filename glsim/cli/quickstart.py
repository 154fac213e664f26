"""`glsim quickstart`: the whole main job in one command, on images that come with the package."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from glsim.cli.options import Settings, dataclass, setting
from glsim.types import ConfigError

PURPOSE = "Start"
SIZE = 96  # pixels; small enough for two cores, large enough to see a wing bar
BIRDS: dict[str, Any] = dict(classes=5, size=SIZE, part_scale=1.4, clutter=0.5)  # easy enough for so few epochs
RECIPE: dict[str, Any] = dict(  # as recipes/synthetic_glsim.yaml and recipes/synthetic_plain.yaml
    backbone="vit_tiny_r_s16_p8_224",
    pretrained=False,
    backbone_args={
        "depth": 4,
        "embed_dim": 128,
        "num_heads": 4,
        "patch_size": 3,
        "class_token": False,
        "global_pool": "avg",
    },
    image_size=SIZE,
    resize_ratio=1.0,
    augment="weak",
    crop="resized",
    crop_scale=0.6,
    batch_size=16,
    optimizer="adamw",
    lr=5e-4,
    weight_decay=0.05,
    warmup_steps=50,
    test=True,
)


@dataclass(frozen=True, kw_only=True)
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
    from glsim.training.config import Train
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
        settings = Train(
            data=str(data),
            out=str(folder),
            method=method,
            epochs=options.epochs,
            workers=options.workers,
            cache="ram",
            **RECIPE,
        )
        train(settings, progress)
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
    return CropShares(
        glsim=float(rows[own]["holds"].double().nanmean()),
        random=float(rows[f"{own}/random"]["holds"].double().nanmean()),
        centre=float(rows[f"{own}/centre"]["holds"].double().nanmean()),
        threshold=HOLDS,
        area=float(rows[own]["area"].double().nanmean()),
        coverage=float(rows[own]["box_recall"].double().nanmean()),
    )


def show(r: Quickstart, options: Options) -> str:
    """Both accuracies, what the crops hold, where the report is."""
    c = r.crops
    return "\n".join(
        [
            f"{'':8}  test top-1",
            *(f"{name:8}  {value:8.1%}" for name, value in r.test_top1.items()),
            "",
            f"crops that hold the part that tells the species ({c.threshold:.0%} of its pixels or more):",
            f"  GLSim {c.glsim:.1%}   random box of the same area {c.random:.1%}   "
            f"centre box of the same area {c.centre:.1%}   (mean area {c.area:.0%} of the image)",
            "",
            f"report:   {r.report}",
            f"pictures: {r.pictures}",
        ]
    )
