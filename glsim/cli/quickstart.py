"""The quickstart: the whole main job in one command, on images that come with the package."""

from __future__ import annotations

import html
import math
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from glsim.checkpoints.bundle import load, preprocessing_of
from glsim.config import Explain, Quickstart, Train
from glsim.data.loaders import ImageDataset
from glsim.data.prepare import prepare_dataset
from glsim.data.readers import read_data
from glsim.data.transforms import eval_transform, mask_transform
from glsim.evaluation.evaluate import evaluate_bundle
from glsim.files import make_folder, read_json, write_json, write_text
from glsim.interpret import heatmaps
from glsim.training import train
from glsim.types import ConfigError

SIZE = 96  # pixels; small enough for two cores, large enough to see a wing bar
BIRDS: dict[str, Any] = dict(classes=5, size=SIZE, part_scale=1.4, clutter=0.5)  # easy enough for twenty epochs
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
HOLDS = 0.9  # a crop holds a part when at least this share of the part's pixels lies inside


def run(s: Quickstart, progress: bool = True) -> dict[str, Any]:
    """The verb: draw the birds, train `plain` and `glsim`, measure both, draw why, write `OUT/report/report.html`."""
    out, start = Path(s.out), time.perf_counter()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder; remove it or name another --out")
    make_folder(out)
    data, report = out / "birds", out / "report"
    prepare_dataset("synthetic", data, train=s.train, test=s.test, **BIRDS)
    accuracy, seconds = {}, {}
    for method in ("plain", "glsim"):
        folder, began = out / method, time.perf_counter()
        settings = Train(data=str(data), out=str(folder), method=method, epochs=s.epochs, workers=s.workers, **RECIPE)
        train.run(settings, progress)
        seconds[method] = round(time.perf_counter() - began, 1)
        accuracy[method] = evaluate_bundle(folder, data, out=report / method, workers=s.workers).top1
    crops = measure_crops(str(out / "glsim"), data)
    shown = [str(sorted(folder.iterdir())[0]) for folder in sorted((data / "test").iterdir())]
    heatmaps.run(Explain(source=str(out / "glsim"), images=shown, out=str(report / "pictures")))
    result = {
        "test_top1": accuracy,
        "crops": crops,
        "environment": read_json(out / "glsim" / train.RUN)["starts"][-1],
        "seconds": {**seconds, "all": round(time.perf_counter() - start, 1)},
        "report": str(report / "report.html"),
        "pictures": str(report / "pictures"),
    }
    for method in accuracy:
        (report / method / "curve.png").write_bytes((out / method / "curve.png").read_bytes())
    write_json(report / "report.json", result)
    write_text(report / "report.html", as_html(result, s))
    return result


@torch.inference_mode()
def measure_crops(source: str, data: Path) -> dict[str, float]:
    """Share of test crops that hold the part that tells the species, beside two boxes of the same area per image.

    `glsim` is the model's own box, `random` a box of the same size at a uniformly random place (seeded), `centre` one
    in the middle. `area` is the mean share of the image they cover, `coverage` the mean share of the part inside.
    """
    model = load(source)
    p = preprocessing_of(model)
    images = read_data(data, classes=model.config["label_names"])["test"]
    dataset: Any = ImageDataset(images, eval_transform(p))
    to_mask = mask_transform(p)
    generator = torch.Generator().manual_seed(0)
    height, width = p.image_size
    inside: dict[str, list[float]] = {"glsim": [], "random": [], "centre": []}
    areas = []
    for i, path in enumerate(images.paths):
        (box,) = model(dataset[i][0][None]).selection.boxes.tolist()
        w, h = box[2] - box[0], box[3] - box[1]
        x = int(torch.randint(0, width - w + 1, (1,), generator=generator))
        y = int(torch.randint(0, height - h + 1, (1,), generator=generator))
        cx, cy = (width - w) // 2, (height - h) // 2
        mask_path = data / "masks" / "part" / path.relative_to(data).with_suffix(".png")
        with Image.open(mask_path) as mask:
            part = to_mask(mask.convert("L"))
        boxes = {"glsim": box, "random": [x, y, x + w, y + h], "centre": [cx, cy, cx + w, cy + h]}
        for name, b in boxes.items():
            inside[name].append(_share(part, b))
        areas.append(w * h / (width * height))
    share = {name: sum(v >= HOLDS for v in values) / len(values) for name, values in inside.items()}
    coverage = math.fsum(inside["glsim"]) / len(areas)
    return {**share, "threshold": HOLDS, "area": math.fsum(areas) / len(areas), "coverage": coverage}


def _share(mask: Tensor, box: list[int]) -> float:
    left, top, right, bottom = box
    return float(mask[top:bottom, left:right].sum() / mask.sum().clamp(min=1))


def as_html(r: dict[str, Any], s: Quickstart) -> str:
    """The report page; pictures stand beside it."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{value:.1%}</td><td>{r['seconds'][name]:.0f} s</td></tr>"
        for name, value in r["test_top1"].items()
    )
    c, about, images = r["crops"], r["environment"], s.test * BIRDS["classes"]
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "torchvision", "timm"))
    errors = ", ".join(f"{math.sqrt(p * (1 - p) / images):.1%}" for p in r["test_top1"].values())
    curves = "".join(
        f'<figure><img src="{m}/curve.png" alt="learning curve of {m}"><figcaption>{m}</figcaption></figure>'
        for m in r["test_top1"]
    )
    tables = "".join(
        f'<figure><img src="{m}/confusion.png" alt="confusion matrix of {m}"><figcaption>{m}</figcaption></figure>'
        for m in r["test_top1"]
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>glsim quickstart</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1e }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .3rem 1rem; border-bottom: 1px solid #ddd }}
th {{ text-align: left }} img {{ max-width: 100% }} figure {{ margin: 1rem 0 }} figcaption {{ color: #666 }}
.two {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem }}
</style></head><body>
<h1>Which bird, and why</h1>
<p>{BIRDS["classes"]} species of drawn birds that differ in one small part each. Both models were trained from scratch,
{s.epochs} epochs on {s.train} images a species, and tested on {s.test} images a species.</p>
<table><tr><th>method</th><th>test top-1</th><th>training</th></tr>{rows}</table>
<p>Trained on {html.escape(about["device"])} with {html.escape(versions)}. Another processor,
number of threads or release adds the same sums in another order, and training lets the difference grow: expect other
accuracies there, by about one standard error ({errors} on {images} images), now and then by two.</p>
<p>The crop GLSim chose holds the part that tells the species (at least {c["threshold"]:.0%} of its pixels) in
<b>{c["glsim"]:.1%}</b> of the test images; a box of the same area at a random place in {c["random"]:.1%}, in the
centre in {c["centre"]:.1%}. The crops cover {c["area"]:.0%} of the image on average.</p>
<h2>Where it looked</h2>
<p>The image with GLSim's box, the similarity of each patch to the whole, and the crop it encodes in a
second pass (pictures are drawn in finer pixels than the network gets).</p>
<img src="pictures/sheet.png" alt="image, similarity and crop for one test bird of each species">
<h2>Learning curves</h2>{curves}
<h2>Confusion</h2><div class="two">{tables}</div>
</body></html>
"""
