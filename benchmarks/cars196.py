"""Cars from scratch on an accelerator: one plain network trained in-domain, and every method fine-tuned from it.

    python benchmarks/cars196.py --data cars196 --out runs/cars196 --pretrain-epochs 200 --epochs 30 --minutes 9
    python benchmarks/cars196.py --data cars196 --out runs/cars196 --pretrain-epochs 200 --epochs 30 --minutes 9  # on

`cars196.yaml` beside this file says which network, `--variants` what is fine-tuned: those of `paired.py`, controls
included, and the other methods. All images are decoded once, brought to one size and kept on the device as bytes;
crops, flips, turns, colours and erased boxes are drawn there for whole batches. bf16 on an accelerator.

After `--minutes` it saves where it is and stops; the same command goes on from there and ends as though never stopped
(the device's rounding aside). Runs go seed by seed, and paired.json, paired.md and paired.png are written anew after
each. The pre-trained network (seed 0) is one for all seeds: they differ in what a method adds to it, order and
augmentation. Only `plain` keeps its head. The test split is measured after the last epoch of a run and chooses nothing.
A folder begun with other settings is refused. The whole of it, 20 variants and three seeds, is about 400 PFLOP: more
than half an hour of one accelerator, so where time is short name fewer `--variants`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import paired
import torch
import torch.nn.functional as F
from torch import Tensor

from glsim import save
from glsim.checkpoints.bundle import CONFIG
from glsim.checkpoints.init_from import init_from
from glsim.data.images import open_image
from glsim.data.loaders import TrainBatches, mix
from glsim.data.readers import ImageList, read_data
from glsim.data.transforms import Preprocessing, Resize, batch_mixing
from glsim.environment import pick_device
from glsim.files import write_text
from glsim.inference.predictor import answers
from glsim.models import create_model
from glsim.models.base import Model
from glsim.models.losses import objective
from glsim.training import runs
from glsim.training.components import make_optimizer, make_preprocessing, make_schedule
from glsim.training.config import Train, to_recipe
from glsim.training.runs import LOG, PREDICTIONS
from glsim.training.train import check_out
from glsim.types import ConfigError

RECIPE = Path(__file__).with_suffix(".yaml")
STATE = "state.pt"
VARIANTS = ["published", "plain", "random", "centre", "whole", "none", "inclusive", "far_window", "evidence_loss"]
VARIANTS += ["crop_loss", "two_boxes", "transfg", "ffvt", "rams", "aftrans", "dcal", "ielt"]
VARIANTS += ["no_aggregator", "random_patches", "corner"]
EVERY = 60  # seconds from one saved state to the next


class Stopped(Exception):
    """The time is up; the state is saved."""


def main() -> None:
    """Parse, train as long as there is time, print."""
    a = parse()
    torch.set_float32_matmul_precision("high")
    try:
        follow(a)
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on", file=sys.stderr)
    if (a.out / "paired.md").exists():
        print((a.out / "paired.md").read_text())


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; its names are those that `paired.py` reads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--pretrain-epochs", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=30, help="of the fine-tuning")
    parser.add_argument("--lr", type=float, default=2e-4, help="of the fine-tuning; pre-training: the recipe's")
    parser.add_argument("--mixup", type=float, default=0.2, help="of the pre-training, as CutMix of 1 beside it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 10, 100])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help=f"of: {' '.join(paired.VARIANTS)}")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which it stops, to go on another time")
    parser.add_argument("--compile", action="store_true", help="the pre-training, by torch.compile")
    a = parser.parse_args(words)
    known = [name for name in paired.VARIANTS if name not in paired.SIZED]  # all images are kept at one size
    if wrong := [name for name in a.variants if name not in known]:
        parser.error(f"--variants {' '.join(wrong)}: choose from {' '.join(known)}")
    a.large, a.against, a.workers, a.deadline = None, paired.PUBLISHED, 0, time.monotonic() + 60 * a.minutes
    return a


def follow(a: argparse.Namespace) -> dict[str, Any]:
    """Pre-train, then fine-tune what is not finished; raises Stopped when the time is up."""
    splits = read_data(a.data)
    mixed = {"mixup": a.mixup, "cutmix": 1.0 if a.mixup else 0.0}
    plain = paired.settings(a, a.recipe, paired.VARIANTS["plain"], a.out / "start", 0, a.pretrain_epochs, **mixed)
    claim(plain)
    names, left_out = [], {}
    for name in a.variants:
        try:
            paired.operations(a, name)
            names.append(name)
        except ConfigError as error:
            left_out[name] = str(error)
    plan = [(name, settings(a, name, seed)) for seed in a.seeds for name in names]
    for _, s in plan:
        claim(s)
    work = [(name, s) for name, s in plan if paired.answers(Path(s.out)) is None]
    if work:
        model = make(plain, splits["train"])
        sets = {name: Pixels(splits[name], make_preprocessing(plain, model)) for name in ("train", "test")}
        if not (a.out / "start" / CONFIG).exists():
            learner = make(plain, splits["train"])
            if a.compile:
                learner.compile()
            fit(learner, plain, sets["train"], a.deadline)
            model.load_state_dict(learner.state_dict())  # asked without another compilation
            told = {"preprocessing": sets["train"].p, "metrics": {"test_top1": ask(model, sets["test"])[1]}}
            save(model, a.out / "start", list(splits["train"].classes), **told)
            (a.out / "start" / STATE).unlink()
        for name, s in work:
            fine_tune(a, name, s, sets, splits["test"])
            paired.summarise(a, names, left_out)
    return paired.summarise(a, names, left_out)


def settings(a: argparse.Namespace, name: str, seed: int) -> Train:
    """Of one variant with one seed."""
    s = paired.settings(a, a.recipe, paired.VARIANTS[name], a.out / name / f"seed_{seed}", seed, a.epochs)
    return replace(s, lr=a.lr)


def claim(s: Train) -> None:
    """Write a run's settings down before anything else; ConfigError where the folder was begun with others."""
    out = Path(s.out)
    if (out / runs.RECIPE).exists():
        check_out(replace(s, resume=True), out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / runs.RECIPE, to_recipe(s))


def fine_tune(a: argparse.Namespace, name: str, s: Train, sets: dict[str, Pixels], test: ImageList) -> None:
    """One variant with one seed, from the pre-trained network to its answers on test."""
    out = Path(s.out)
    model = make(s, test)
    init_from(model, paired.start_of(a.out / "start", name))
    fit(model, s, sets["train"], a.deadline)
    if name == paired.PLAIN:
        write_answers(a.out / paired.FLIP / out.name, ask(model, sets["test"], flip=True)[0], test)
    guesses, _ = ask(model, sets["test"])
    write_answers(out, guesses, test)  # last: a run with answers is finished
    (out / STATE).unlink()


def make(s: Train, images: ImageList) -> Model:
    """The model of a run, on the device, its seed set."""
    torch.manual_seed(s.seed)
    args = s.backbone_args or None
    model = create_model(s.method, s.backbone, len(images.classes), s.image_size, s.pretrained, args, **s.options)
    return model.to(pick_device())


class Pixels:
    """A split on the device: uint8 `images` (images, 3, H, W) of the size from which crops are cut, and `labels`."""

    def __init__(self, images: ImageList, p: Preprocessing) -> None:
        resize = Resize(p)

        def read(path: Path) -> Tensor:
            image = resize(open_image(path))
            return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size[::-1], 3)

        with ThreadPoolExecutor() as pool:
            pixels = torch.stack(list(pool.map(read, images.paths)))
        self.p, device = p, pick_device()
        self.images = pixels.permute(0, 3, 1, 2).contiguous().to(device)
        self.labels = torch.tensor(images.labels, device=device)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (p.mean, p.std))

    def centre(self, part: slice) -> Tensor:
        """As evaluation sees them: the middle, normalised (B, 3, h, w)."""
        (rows, cols), (height, width) = self.images.shape[-2:], self.p.image_size
        top, left = round((rows - height) / 2), round((cols - width) / 2)
        pixels = self.images[part, :, top : top + height, left : left + width]
        return (pixels.float() / 255 - self.mean) / self.std

    def augmented(self, index: Tensor, smallest: float) -> Tensor:
        """The images `index` (B,) as training sees them: (B, 3, h, w), every image changed in its own way.

        A resized crop of `smallest` to all of the area, aspect 3/4 to 4/3, turned by up to 10 degrees and half of them
        mirrored; brightness, contrast and saturation by up to 40 %; a quarter with an erased box.
        """
        pixels = self.images[index].float() / 255
        batch = len(index)

        def draw(low: float, high: float) -> Tensor:
            return torch.empty(batch, device=pixels.device).uniform_(low, high)

        area, aspect = draw(smallest, 1), draw(math.log(3 / 4), math.log(4 / 3)).exp()
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        x, y = draw(-1, 1) * (1 - width), draw(-1, 1) * (1 - height)
        angle, mirror = draw(-0.17, 0.17), draw(-1, 1).sign()
        row = torch.stack((mirror * width * angle.cos(), -height * angle.sin(), x), dim=1)
        theta = torch.stack((row, torch.stack((mirror * width * angle.sin(), height * angle.cos(), y), dim=1)), dim=1)
        places = F.affine_grid(theta, [batch, 3, *self.p.image_size], align_corners=False)
        pixels = F.grid_sample(pixels, places, padding_mode="reflection", align_corners=False)

        bright, contrast, colour = (draw(0.6, 1.4).view(-1, 1, 1, 1) for _ in range(3))
        pixels = pixels * bright
        pixels = torch.lerp(pixels.mean(dim=(1, 2, 3), keepdim=True), pixels, contrast)
        pixels = torch.lerp(pixels.mean(dim=1, keepdim=True), pixels, colour).clamp(0, 1)
        pixels = (pixels - self.mean) / self.std

        lines, across = (torch.arange(side, device=pixels.device) / side for side in self.p.image_size)
        there, half_h, half_w = draw(0, 1) < 0.25, draw(0.05, 0.25), draw(0.05, 0.25)
        inside = ((lines - draw(0, 1)[:, None]).abs() < half_h[:, None])[:, :, None]
        inside = inside & ((across - draw(0, 1)[:, None]).abs() < half_w[:, None])[:, None]
        return pixels.masked_fill((inside & there[:, None, None])[:, None], 0.0)


def fit(model: Model, s: Train, images: Pixels, deadline: float) -> None:
    """Train as `s` says, from its saved state if there is one; past the `deadline` save it and raise Stopped."""
    out, device = Path(s.out), images.images.device
    out.mkdir(parents=True, exist_ok=True)
    batches = TrainBatches(len(images.labels), s.batch_size, 1, s.seed)
    optimizer = make_optimizer(s, model)
    schedule = make_schedule(s, optimizer, s.epochs * batches.steps)
    mixing = batch_mixing(s.mixup, s.cutmix, model.config.num_classes)
    log: list[dict[str, Any]] = []
    if (out / STATE).exists():
        state = torch.load(out / STATE, map_location="cpu", weights_only=True)  # AdamW counts its steps there
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
    model.train()
    saved = time.monotonic()
    for epoch in range(len(log), s.epochs):
        start, total = time.monotonic(), torch.zeros((), device=device)
        order = torch.from_numpy(batches.order(epoch)).to(device)
        for number in range(batches.steps):
            step = epoch * batches.steps + number
            torch.manual_seed(mix(s.seed, step))
            schedule.step_update(step)
            part = order[number * batches.size : (number + 1) * batches.size]
            pixels, labels = mixing(images.augmented(part, s.crop_scale), images.labels[part])
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
                loss = objective(model(pixels), labels, s.label_smoothing)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        mean = float(total) / batches.steps  # waits for the device
        if not math.isfinite(mean):
            raise SystemExit(f"{out}: the loss is no number in epoch {epoch + 1}; try a smaller --lr")
        seconds = time.monotonic() - start
        log.append({"epoch": epoch + 1, "loss": round(mean, 4), "seconds": round(seconds, 2)})
        print(f"{out} {json.dumps(log[-1])}", file=sys.stderr)
        late = time.monotonic() + seconds > deadline
        if late or epoch + 1 == s.epochs or time.monotonic() > saved + EVERY:
            saved = time.monotonic()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}
            torch.save(state, out / f"{STATE}.tmp")
            (out / f"{STATE}.tmp").replace(out / STATE)
            write_text(out / LOG, "".join(json.dumps(row) + "\n" for row in log))
        if late and epoch + 1 < s.epochs:
            raise Stopped(f"{out}: {epoch + 1} of {s.epochs} epochs")


@torch.inference_mode()
def ask(model: Model, images: Pixels, flip: bool = False) -> tuple[Tensor, float]:
    """The class (images,) that the model gives each image, and the share of right ones."""
    model.eval()
    parts = [slice(i, i + 256) for i in range(0, len(images.labels), 256)]
    outputs = answers(model, (images.centre(part) for part in parts), flip)
    guesses = torch.cat([output.logits.argmax(dim=1) for output in outputs])
    right = int((guesses == images.labels).sum())
    print(f"test: {right} of {len(guesses)}, {right / len(guesses):.1%}", file=sys.stderr)
    return guesses.cpu(), right / len(guesses)


def write_answers(out: Path, guesses: Tensor, images: ImageList) -> None:
    """What `paired.py` reads: a line an image."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "prediction"])
    for path, label, guess in zip(images.paths, images.labels, guesses.tolist(), strict=True):
        writer.writerow([f"{path.parent.name}/{path.name}", images.classes[label], images.classes[guess]])
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / PREDICTIONS, text.getvalue())


if __name__ == "__main__":
    main()
