"""`glsim quickstart`: the whole main job in one command, on images that come with the package."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glsim.cli.options import Lines, Settings, setting
from glsim.types import ConfigError, GlsimError

PURPOSE = "Start"
# Small enough for two cores, large enough to see a wing bar; easy enough for so few epochs.
BIRDS: dict[str, Any] = dict(classes=5, size=96, part_scale=1.4, clutter=0.5)
PLAIN, GLSIM = METHODS = ("plain", "glsim")
EPOCHS, EPOCHS_ON_WEIGHTS = 13, 2
# On pre-trained weights: the rates of benchmarks/start.yaml, the box of docs/results/selection.md.
ON_WEIGHTS: dict[str, Any] = {"lr": 1e-4, "layer_decay": 0.75, "warmup_steps": 20}
BOX_ON_WEIGHTS: dict[str, Any] = {"metric": "gls_border", "box": "moments"}
ALPHA = 0.05  # a difference is said to be one below this p
ROUNDS = 5  # in which both models answer in turn, for the time that they take


class Options(Settings):
    """Train plain ViT and GLSim on the embedded synthetic birds, evaluate, compare and explain them, write a report."""

    out: str = setting("quickstart", "folder for data, runs and report", path="folder")
    epochs: int | None = setting(
        None,
        f"passes over train, for each model; default: {EPOCHS}, from weights {EPOCHS_ON_WEIGHTS}",
        least=1,
    )
    train: int = setting(120, "training images a species", least=1)
    test: int = setting(40, "test images a species", least=1)
    workers: int = setting(2, "processes that load images", least=0)
    init_from: str | None = setting(
        None, "start both models from a file of weights (glsim weights FILE), on the backbone it fits", path="reads"
    )


@dataclass(frozen=True)
class Pretrained:
    """What both models started from."""

    file: str
    convention: str  # of its names
    backbone: str


@dataclass(frozen=True)
class Difference:
    """GLSim's test accuracy less plain's, in points, over the same images."""

    points: float
    low: float | None  # its 95 % interval, by the bootstrap; None for a single image
    high: float | None
    images: int
    only_glsim: int  # images that GLSim alone gets right
    only_plain: int
    p: float  # McNemar's exact test, two-sided

    @property
    def verdict(self) -> str:
        """What interval and test, both of them, allow to say."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high or self.p >= ALPHA:
            return "these images do not tell which one is better"
        return f"{'GLSim' if self.points > 0 else 'plain'} is the better one here"


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

    pretrained: Pretrained | None  # None: random weights
    test_top1: dict[str, float]  # of each method
    difference: Difference
    moved_top1: dict[str, float]  # of the same GLSim, its box moved by each control when it answers
    milliseconds: dict[str, float]  # to answer an image, of each method: median of rounds taken in turn
    crops: CropShares
    environment: dict[str, Any]  # machine and versions, as `run.json` holds them
    seconds: dict[str, float]  # of training each method, and of all together
    report: str
    pictures: str


def run(options: Options, progress: bool) -> Quickstart:
    """Draw the birds, train `plain` and `glsim`, compare both, draw heat-maps, write `OUT/report/report.html`."""
    from glsim.data import synthetic
    from glsim.data.pages import render
    from glsim.evaluation.evaluate import evaluate_bundle
    from glsim.files import document, make_folder, read_json, write_json, write_text
    from glsim.interpret.pictures import explain_images
    from glsim.training.config import Train, read_recipe
    from glsim.training.runs import CURVE, RUN
    from glsim.training.train import train

    out, start = Path(options.out), time.perf_counter()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder; remove it or name another --out")
    pretrained, changes = (None, {}) if options.init_from is None else on_weights(options.init_from)
    epochs = options.epochs or (EPOCHS if pretrained is None else EPOCHS_ON_WEIGHTS)
    make_folder(out)
    data, report = out / "birds", out / "report"
    synthetic.write(data, train=options.train, test=options.test, **BIRDS)
    accuracy, seconds = {}, {}
    for method in METHODS:
        folder, began = out / method, time.perf_counter()
        own = {"epochs": epochs, "workers": options.workers, "cache": "ram", "data": str(data), "out": str(folder)}
        recipe = read_recipe(f"synthetic_{method}") | changes | own
        if pretrained is not None and method == GLSIM:
            recipe["options"] = BOX_ON_WEIGHTS
        train(Train(**recipe), progress)
        seconds[method] = round(time.perf_counter() - began, 1)
        accuracy[method] = evaluate_bundle(folder, data, out=report / method, workers=options.workers).top1
        (report / method / CURVE).write_bytes((folder / CURVE).read_bytes())
    difference, moved = compare(out), move_box(out / GLSIM, data, options.workers)
    milliseconds, crops = measure_time(out, data, options), measure_crops(out / GLSIM, data)
    shown = [str(min(folder.iterdir())) for folder in sorted((data / "test").iterdir())]
    explain_images(out / GLSIM, shown, report / "pictures")
    result = Quickstart(
        pretrained=pretrained,
        test_top1=accuracy,
        difference=difference,
        moved_top1=moved,
        milliseconds=milliseconds,
        crops=crops,
        environment=read_json(out / GLSIM / RUN)["starts"][-1],
        seconds={**seconds, "all": round(time.perf_counter() - start, 1)},
        report=str(report / "report.html"),
        pictures=str(report / "pictures"),
    )
    page = render(
        Path(__file__).with_suffix(".html"),
        errors=[math.sqrt(p * (1 - p) / difference.images) for p in accuracy.values()],
        difference=told(difference),
        epochs=epochs,
        options=options,
        result=result,
        species=BIRDS["classes"],
    )
    write_json(report / "report.json", document(result))
    write_text(report / "report.html", page)
    return result


def on_weights(file: str) -> tuple[Pretrained, dict[str, Any]]:
    """What a file of weights is, and what it changes in the recipes of both methods: backbone, image size, rates.

    Raises ConfigError where no network of timm takes it, DataError where it cannot be read.
    """
    from glsim.checkpoints.examine import examine_weights

    found = examine_weights(file)
    if not found.backbones:
        raise ConfigError(f"init_from={file}: no network of timm is known to take it; glsim weights tells what it is")
    patch = found.sizes.patch or 1
    size = patch * math.ceil(BIRDS["size"] / patch)
    network = {"backbone": found.backbones[0], "backbone_args": {}, "image_size": size, "init_from": file}
    return Pretrained(Path(file).name, found.convention, found.backbones[0]), network | ON_WEIGHTS


def compare(out: Path) -> Difference:
    """Pair the answers of the two runs in `out` for every test image."""
    import torch

    from glsim.evaluation.statistics import as_numbers
    from glsim.training import report

    by_method = {run.folder.name: run for run in report.find_runs([str(out / method) for method in METHODS])[0]}
    (pair,) = report.compare([by_method[PLAIN]], [by_method[GLSIM]])
    gains = torch.zeros(pair.images, dtype=torch.double)
    gains[: pair.only_other], gains[len(gains) - pair.only_baseline :] = 100, -100
    mean, low, high = as_numbers({"points": gains})["points"] or (0.0, None, None)
    assert mean is not None
    return Difference(mean, low, high, pair.images, pair.only_other, pair.only_baseline, pair.p)


def move_box(source: Path, data: Path, workers: int) -> dict[str, float]:
    """Test accuracy of a model whose box is moved to a random place, and to the middle, its size as it is."""
    from glsim.checkpoints.bundle import read_config
    from glsim.evaluation.evaluate import evaluate_bundle

    rule = read_config(source).options["box"]
    return {
        control: evaluate_bundle(source, data, options={"box": f"{control}:{rule}"}, workers=workers).top1
        for control in ("random", "centre")
    }


def measure_time(out: Path, data: Path, options: Options) -> dict[str, float]:
    """Milliseconds that each method takes to answer a test image, in batches of 32 or as many as there are."""
    from glsim.evaluation.speed import compare_speed
    from glsim.evaluation.speed_settings import SpeedSettings

    count = options.test * BIRDS["classes"]
    batch = min(32, count)
    speed = compare_speed(
        SpeedSettings(
            sources=[str(out / method) for method in METHODS],
            batch_sizes=[batch],
            data=str(data),
            images=min(3, count // batch) * batch,
            repeats=ROUNDS,
            memory=False,
            training=False,
            workers=options.workers,
        )
    )
    for row in speed.rows:
        if row.error is not None:
            raise GlsimError(f"{row.method} cannot be timed: {row.error}")
    return {Path(row.method).name: round((row.latency_ms or 0) / batch, 3) for row in speed.rows}


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


def told(d: Difference) -> str:
    """The difference in points, with its interval, for people."""
    from glsim.evaluation.statistics import signed

    return signed(d.points, d.low, d.high)


def show(r: Quickstart, options: Options) -> Lines:
    """Both accuracies and their difference, what the crops hold, where the report is."""
    c, d, moved = r.crops, r.difference, r.moved_top1
    if r.pretrained is not None:
        yield f"both start from {r.pretrained.file} ({r.pretrained.convention}): {r.pretrained.backbone}\n"
    yield f"{'':8}  test top-1  ms an image"
    yield from (f"{name:8}  {value:10.1%}  {r.milliseconds[name]:11.1f}" for name, value in r.test_top1.items())
    yield f"\nGLSim - plain: {told(d)} points, 95 % interval, {d.images} test images; {d.verdict}"
    yield f"  GLSim alone is right {d.only_glsim} times, plain alone {d.only_plain} times (McNemar's exact p {d.p:.2g})"
    yield f"  GLSim, its crop moved: to a random place {moved['random']:.1%}, to the centre {moved['centre']:.1%}"
    yield f"\ncrops that hold the part that tells the species ({c.threshold:.0%} of its pixels or more):"
    shares = {"GLSim": c.glsim, "random box of the same area": c.random, "centre box of the same area": c.centre}
    said = "   ".join(f"{name} {share:.1%}" for name, share in shares.items())
    yield f"  {said}   (mean area {c.area:.0%} of the image)"
    yield f"\nreport:   {r.report}"
    yield f"pictures: {r.pictures}"
