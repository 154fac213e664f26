"""Floor 4: names for images."""

from __future__ import annotations

import csv
import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from glsim.backbone import Model, StagedModel
from glsim.bundle import labels_of, load, pick_device, preprocessing_of, temperature_of, write_text
from glsim.config import Predict
from glsim.data import ImageDataset, find_images
from glsim.heads import lead
from glsim.images import BadImage
from glsim.transforms import Preprocessing, eval_transform
from glsim.types import ConfigError, Output


class Prediction(NamedTuple):
    """The answer for one image."""

    path: str | None  # None for an image that came from memory
    labels: tuple[str, ...]  # best first
    probabilities: tuple[float, ...]  # of `labels`
    box: tuple[int, int, int, int] | None  # the crop: left, top, right, bottom in pixels of the upright image
    second_pass: bool | None = None  # whether the crop was looked into; None: the method does not choose

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        answers = [{"label": n, "probability": p} for n, p in zip(self.labels, self.probabilities, strict=True)]
        box = list(self.box) if self.box else None
        return {"path": self.path, "answers": answers, "box": box, "second_pass": self.second_pass}


class Predictor:
    """`Predictor(source)(images)`: top-k answers for paths and PIL images.

    `source` is anything `glsim.load` takes, or a model from it. Images are decoded ahead of the model by `workers`
    processes (0: in this one) and run in batches. With `flip` the logits of each image and of its mirror image are
    averaged; the box is that of the image itself.
    """

    def __init__(
        self,
        source: str | Path | Model,
        top_k: int = 5,
        batch_size: int = 32,
        workers: int = 0,
        device: str | None = None,
        flip: bool = False,
    ) -> None:
        if top_k < 1 or batch_size < 1:
            raise ConfigError(f"top_k={top_k}, batch_size={batch_size}: both have to be at least 1")
        model = source if isinstance(source, Model) else load(source)
        self.device = pick_device(device)
        self.model = model.to(self.device).eval()
        self.labels, self.preprocessing = labels_of(model), preprocessing_of(model)
        self.temperature = temperature_of(model)
        self.top_k, self.batch_size, self.workers = min(top_k, len(self.labels)), batch_size, workers
        self.flip = flip

    def __call__(self, images: str | Path | Image.Image | Sequence[str | Path | Image.Image]) -> list[Prediction]:
        """One `Prediction` an image, in order. Raises BadImage, naming the file, for one that cannot be read."""
        predictions = []
        for answer in self.stream([images] if isinstance(images, str | Path | Image.Image) else images):
            if isinstance(answer, BadImage):
                raise answer
            predictions.append(answer)
        return predictions

    def stream(self, images: Sequence[str | Path | Image.Image]) -> Iterator[Prediction | BadImage]:
        """The same one by one, without stopping at a bad file: its BadImage stands in the place of the answer."""
        transform = _WithSize(eval_transform(self.preprocessing))
        dataset: Any = ImageDataset(images, transform, keep_bad=True)
        loader = DataLoader(dataset, batch_size=self.batch_size, num_workers=self.workers, collate_fn=_collate)
        paths = iter([None if isinstance(image, Image.Image) else str(image) for image in images])
        read: deque[tuple[int, int] | BadImage] = deque()  # sizes of the images that wait for their answer

        def batches() -> Iterator[Tensor]:
            for batch, items in loader:
                read.extend(items)
                if batch is not None:
                    yield batch.to(self.device)

        for output in answers(self.model, batches(), self.flip):
            for prediction in self._named(output):
                while isinstance(size := read.popleft(), BadImage):
                    next(paths)
                    yield size
                box = prediction.box and to_original(prediction.box, size, self.preprocessing)
                yield prediction._replace(path=next(paths), box=box)
        yield from (item for item in read if isinstance(item, BadImage))

    def _named(self, output: Output) -> list[Prediction]:
        """The predictions of a batch; boxes are in pixels of the network's view."""
        top = (output.logits.float() / self.temperature).softmax(dim=1).topk(self.top_k)
        nothing = [None] * len(output.logits)
        boxes = map(tuple, output.selection.boxes.tolist()) if output.selection is not None else nothing
        unsure = output.aux["unsure"].tolist() if "unsure" in output.aux else nothing
        rows = zip(top.indices.tolist(), top.values.tolist(), boxes, unsure, strict=True)
        return [
            Prediction(None, tuple(self.labels[i] for i in indices), tuple(values), box, again)
            for indices, values, box, again in rows
        ]


@torch.inference_mode()
def answers(model: nn.Module, batches: Iterable[Tensor], flip: bool = False) -> Iterator[Output]:
    """What `model` says of each of `batches` (B, 3, H, W), in order.

    With `flip`, the mean of its logits (B, C) there and mirrored. A `StagedModel` with a margin gets the images whose
    first answer is unsure in batches as large as the largest so far, so that the outputs come a little later.
    """
    if isinstance(model, StagedModel) and model.margin is not None and not flip:
        yield from _regrouped(model, model.margin, batches)
        return
    for images in batches:
        output = model(images)
        yield output._replace(logits=(output.logits + model(images.flip(-1)).logits) / 2) if flip else output


def _regrouped(model: StagedModel, margin: float, batches: Iterable[Tensor]) -> Iterator[Output]:
    held: deque[Output] = deque()  # whose unsure images are not all answered
    unsure: deque[tuple[Any, ...]] = deque()  # those images: output, row in it, image, token, box
    size = 1

    def second(count: int) -> None:
        outputs, rows, *inputs = zip(*(unsure.popleft() for _ in range(count)), strict=True)
        logits, _ = model.second(*map(torch.stack, inputs))
        for output, row, late in zip(outputs, rows, logits, strict=True):
            output.logits[row] = late

    def answered() -> Iterator[Output]:
        while held and not (unsure and unsure[0][0] is held[0]):
            yield held.popleft()

    for images in batches:
        size = max(size, len(images))
        given, logits, selection = model.first(images)
        output = Output(logits, selection, aux={"unsure": lead(logits) < margin})
        held.append(output)
        rows = output.aux["unsure"].nonzero()[:, 0].tolist()
        unsure += [(output, row, images[row], given[row], selection.boxes[row]) for row in rows]
        while len(unsure) >= size:
            second(size)
        yield from answered()
    if unsure:
        second(len(unsure))
    yield from answered()


def to_original(box: Sequence[int], size: tuple[int, int], p: Preprocessing) -> tuple[int, int, int, int]:
    """A box in pixels of the network's view, back in pixels of the upright image of `size` (width, height)."""
    height, width = p.resized(size)
    scale = (size[0] / width, size[1] / height)
    margin = ((width - p.image_size[1]) / 2, (height - p.image_size[0]) / 2)
    left, top, right, bottom = (round((v + margin[i % 2]) * scale[i % 2]) for i, v in enumerate(box))
    return left, top, right, bottom


def run(s: Predict, progress: bool = True) -> dict[str, Any]:
    """The verb: predictions and skipped files, as plain values; BadImage is raised unless `s.skip_bad`."""
    paths = find_images(s.images)
    model = load(s.source, **s.options)
    predictor = Predictor(model, s.top_k, s.batch_size, min(s.workers, len(paths) - 1), s.device, s.flip)
    predictions, skipped = [], []
    for answer in tqdm(predictor.stream(paths), total=len(paths), unit="image", disable=not progress):
        if not isinstance(answer, BadImage):
            predictions.append(answer)
        elif s.skip_bad:
            skipped.append(str(answer))
        else:
            raise answer
    if s.out is not None:
        write_text(s.out, FORMATS[str(s.format)](predictions))
    again = [a.second_pass for a in predictions if a.second_pass is not None]
    return {
        "source": str(s.source),
        "predictions": [a.as_dict() for a in predictions],
        "skipped": skipped,
        "second_pass_share": sum(again) / len(again) if again else None,
    }


def as_text(predictions: Sequence[Prediction]) -> str:
    """A line an image: path, then classes with probabilities, then the box."""
    lines = []
    for a in predictions:
        answers = ", ".join(f"{name} {p:.1%}" for name, p in zip(a.labels, a.probabilities, strict=True))
        lines.append(f"{a.path}: {answers}" + (f"  crop {','.join(map(str, a.box))}" if a.box else ""))
    return "".join(line + "\n" for line in lines)


def as_jsonl(predictions: Sequence[Prediction]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(a.as_dict(), ensure_ascii=False) + "\n" for a in predictions)


def as_csv(predictions: Sequence[Prediction]) -> str:
    """One row an image and rank: path, rank, label, probability, left, top, right, bottom."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "rank", "label", "probability", "left", "top", "right", "bottom"])
    for a in predictions:
        for rank, (name, p) in enumerate(zip(a.labels, a.probabilities, strict=True), start=1):
            writer.writerow([a.path, rank, name, f"{p:.6f}", *(a.box or ("",) * 4)])
    return text.getvalue()


FORMATS: dict[str, Callable[[Sequence[Prediction]], str]] = {"text": as_text, "jsonl": as_jsonl, "csv": as_csv}


class _WithSize:
    """A transform that also tells the size (width, height) of the image it was given."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        return self.transform(image), image.size


def _collate(items: list[Any]) -> tuple[Tensor | None, list[tuple[int, int] | BadImage]]:
    """Stack what could be read, None where nothing could; each image's size, or what is bad about it."""
    good = [item[0][0] for item in items if not isinstance(item, BadImage)]
    marks = [item if isinstance(item, BadImage) else item[0][1] for item in items]
    return (torch.stack(good) if good else None), marks
