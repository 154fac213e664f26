"""The predictor: classes of images with their probabilities, the crop box, and an embedding where it is asked for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Unpack

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from glsim.checkpoints.bundle import labels_of, load, names_of, preprocessing_of, temperature_of, threshold_of
from glsim.data.box_options import Boxed, take_boxed
from glsim.data.class_names import ClassName, read_class_names
from glsim.data.detections import BoxPaths, find_examples
from glsim.data.hierarchy import decide, flat, read_taxonomy
from glsim.data.images import BadImage, taken_at
from glsim.data.limits import MAX_MEGAPIXELS, sharing
from glsim.data.loaders import ImageDataset
from glsim.data.places import read_allowed
from glsim.data.regions import Cut, Size, cut_of, file_of
from glsim.data.transforms import Preprocessing, eval_transform
from glsim.environment import pick_device
from glsim.files import make_parent, write_text
from glsim.inference.formats import FORMATS, format_of
from glsim.inference.results import WRITERS, About
from glsim.inference.sorting import sort_into as file_images
from glsim.interpret.heatmaps import Photograph
from glsim.models.base import EarlyExitModel, Model
from glsim.models.heads import NO_ANSWER, are_answers, top2_margin
from glsim.types import ConfigError, Output, choose, optional

T = TypeVar("T")


class Verdict(NamedTuple):
    """What is said where only sure answers are wanted."""

    label: str  # of the level; "unknown" where no level is sure
    level: str | None  # "label", or a coarser one of the taxonomy; None: unknown
    probability: float  # of that answer; of the best label where it is unknown


class Otherwise(NamedTuple):
    """What is said where all classes are allowed."""

    label: str
    probability: float


class Detection(NamedTuple):
    """The box of an image that was answered, as its detector or annotator told it."""

    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels of the upright image
    size: Size  # of that image
    category: str = ""  # what the detector calls it
    confidence: float | None = None  # of the detector; None: not told
    time: str | None = None  # when the image was taken, by its EXIF (ISO 8601); None: not told
    listed: str = ""  # the path of the image as the file of boxes has it
    record: tuple[int, int] = (0, 0)  # as in `glsim.data.annotation_formats:Mark`


class Prediction(NamedTuple):
    """The answer for one image, or for one box of it."""

    path: str | None  # None for an image that came from memory
    labels: tuple[str, ...]  # best first
    probabilities: tuple[float, ...]  # of `labels`
    box: tuple[int, int, int, int] | None  # the crop: left, top, right, bottom in pixels of the upright image
    second_pass: bool | None = None  # whether the crop was looked into; None: the method does not choose
    embedding: tuple[float, ...] | None = None  # the vector asked for, as the model gives it (not of unit length)
    verdict: Verdict | None = None  # where unsure answers are rejected
    detection: Detection | None = None  # the box that is answered; None: all of the image
    otherwise: Otherwise | None = None  # the best of all classes, where only some are allowed

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        answers = [{"label": n, "probability": p} for n, p in zip(self.labels, self.probabilities, strict=True)]
        box = list(self.box) if self.box else None
        told: dict[str, Any] = {"path": self.path, "answers": answers, "box": box, "second_pass": self.second_pass}
        told |= {"verdict": self.verdict._asdict()} if self.verdict is not None else {}
        told |= {"detection": self.detection._asdict()} if self.detection is not None else {}
        told |= {"otherwise": self.otherwise._asdict()} if self.otherwise is not None else {}
        return told | ({"embedding": list(self.embedding)} if self.embedding is not None else {})


class Loading(Boxed, total=False):
    """How image files are loaded and answered: keywords of all that does so, whose defaults `answer_files` has."""

    batch_size: int  # images at a time
    workers: int  # processes that load images
    skip_bad: bool  # leave unreadable images out; they are listed in `skipped`
    max_megapixels: float  # larger images are bad files
    device: str | None  # cpu, cuda, ..; None: the best there is
    progress: bool  # draw a progress bar


@dataclass(frozen=True)
class Predictions:
    """What `predict_images` returns."""

    source: str
    predictions: list[Prediction]
    skipped: list[str]  # files that cannot be read, and why
    second_pass_share: float | None  # of the images that had one; None where the method does not choose
    class_names: dict[str, ClassName] | None = optional()  # that people use, by label
    sorted: int | None = optional()  # images that are new in the folder `sort_into`


class Predictor:
    """`Predictor(source)(images)`: top-k answers for paths and PIL images.

    `source` is anything `glsim.load` takes, or a model from it. Images are decoded ahead of the model by `workers`
    processes (0: in this one) and run in batches. With `flip` the logits of each image and of its mirror image are
    averaged; box and embedding are those of the image itself. `embedding` names one of the model's vectors
    (`glsim.types:EMBEDDINGS`) to hand out too; for any but "global", no image is spared its second pass. With `reject`
    every answer has a verdict: "unknown" below the threshold of the bundle; with the CSV file `taxonomy`
    (`glsim.data.hierarchy:read_taxonomy`) a coarser level may reach it instead. A file of more than `max_megapixels` is
    bad (None: `glsim.data.limits:pixel_limit`, by default 110). With `only`, a file for `place` that
    `glsim.data.places:read_allowed` reads, no other class is answered: probabilities are normalised over the allowed.
    """

    def __init__(
        self,
        source: str | Path | Model,
        top_k: int = 5,
        batch_size: int = 32,
        workers: int = 0,
        device: str | None = None,
        flip: bool = False,
        embedding: str | None = None,
        reject: bool = False,
        taxonomy: str | Path | None = None,
        max_megapixels: float | None = None,
        only: str | Path | None = None,
        place: str | None = None,
    ) -> None:
        if max_megapixels is not None and not 0 < max_megapixels < math.inf:
            raise ConfigError(f"max_megapixels={max_megapixels}: a number above 0 is needed")
        if top_k < 1 or batch_size < 1:
            raise ConfigError(f"top_k={top_k}, batch_size={batch_size}: both have to be at least 1")
        model = source if isinstance(source, Model) else load(source)
        self.device = pick_device(device)
        self.model = without_early_exit(model.to(self.device).eval(), embedding)
        self.labels, self.preprocessing = labels_of(model), preprocessing_of(model)
        self.temperature = temperature_of(model)
        self.top_k, self.batch_size, self.workers = min(top_k, len(self.labels)), batch_size, workers
        self.flip, self.embedding = flip, embedding
        self.max_pixels = None if max_megapixels is None else max(1, round(max_megapixels * 1e6))
        self.threshold = threshold_of(model) if reject else None
        self.taxonomy = read_taxonomy(taxonomy, self.labels) if taxonomy is not None else flat(self.labels)
        self.refused: Tensor | None = None  # (C,) bool: classes that cannot be
        if only is not None:
            groups = self.taxonomy.classes_of_groups()
            allowed = read_allowed(only, self.labels, place, groups, names_of(model))
            self.refused = torch.ones(len(self.labels), dtype=torch.bool, device=self.device)
            self.refused[allowed] = False
            self.top_k = min(self.top_k, len(allowed))

    def __call__(self, images: Photograph | Sequence[Photograph]) -> list[Prediction]:
        """One `Prediction` an image, in order. Raises BadImage, naming the file, for one that cannot be read."""
        answers = self.stream([images] if isinstance(images, Photograph) else images)
        return list(sift(answers)[0].values())

    def stream(self, images: Sequence[Photograph]) -> Iterator[Prediction | BadImage]:
        """The same one by one, without stopping at a bad file: its BadImage stands in the place of the answer."""
        for image, answer in zip(images, self.each(images, self.predictions), strict=True):
            path = None if isinstance(image, Image.Image) else str(file_of(image))
            yield answer if isinstance(answer, BadImage) else answer._replace(path=path)

    def each(
        self, images: Sequence[Photograph], read: Callable[[Output, Sequence[Cut]], Sequence[T | None]]
    ) -> Iterator[T | BadImage]:
        """One by one what `read` makes of the model's output for some pictures and their cuts, None for an answer that
        is no number; or what is bad about the image."""
        rest = iter(images)
        for output, items in self.outputs(images):
            cuts = [item for item in items if not isinstance(item, BadImage)]
            rows = iter(read(output, cuts) if output is not None else ())
            for item, image in zip(items, rest, strict=False):
                row = item if isinstance(item, BadImage) else next(rows)
                name = "image" if isinstance(image, Image.Image) else image
                yield row if row is not None else BadImage(name, NO_ANSWER)

    def outputs(self, images: Sequence[Photograph]) -> Iterator[tuple[Output | None, list[Cut | BadImage]]]:
        """In order, some images at a time: what the model says of those that could be read (None: none could), and for
        every one where it lies in its file, or what is bad about it."""
        read: deque[Cut | BadImage] = deque()  # images that wait for their answer

        def batches() -> Iterator[Tensor]:
            for batch, items in self.loader(images):
                read.extend(items)
                if batch is not None:
                    yield batch.to(self.device)

        for output in answers(self.model, batches(), self.flip):
            left, items = len(output.logits), []
            while left:
                items.append(read.popleft())
                left -= not isinstance(items[-1], BadImage)
            yield output, items
        if read:
            yield None, list(read)

    def loader(self, images: Sequence[Photograph]) -> DataLoader:
        """Batches (B, 3, H, W) of what can be read, with every image's `Cut` or its BadImage."""
        transform = partial(_with_cut, eval_transform(self.preprocessing))
        dataset: Any = ImageDataset(images, transform, keep_bad=True, max_pixels=self.max_pixels)
        workers = max(0, min(self.workers, len(images) - 1))
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=workers,
            worker_init_fn=sharing() if workers else None,
            collate_fn=_collate,
            pin_memory=self.device.type != "cpu",
        )

    def predictions(self, output: Output, cuts: Sequence[Cut]) -> list[Prediction | None]:
        """The answers that the model's `output` for pictures from these `cuts` stands for; None: it is no number."""
        logits = output.logits.float() / self.temperature
        otherwise: Sequence[Otherwise | None] = [None] * len(cuts)
        probabilities = logits.softmax(dim=1)
        if self.refused is not None:
            best = probabilities.max(dim=1)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            otherwise = [Otherwise(self.labels[i], p) for i, p in pairs]
            probabilities = logits.masked_fill(self.refused, -math.inf).softmax(dim=1)
        real = are_answers(output.logits, self.temperature)
        if self.embedding:
            real &= embedding_of(output, self.embedding).isfinite().all(dim=1)
        top, nothing = probabilities.topk(self.top_k), [None] * len(cuts)
        labels = [tuple(self.labels[i] for i in row) for row in top.indices.tolist()]
        boxes = nothing if output.selection is None else output.selection.boxes.tolist()
        crops = [box and _in_image(box, cut, self.preprocessing) for box, cut in zip(boxes, cuts, strict=True)]
        unsure = nothing if output.needs_second_pass is None else output.needs_second_pass.tolist()
        vectors = map(tuple, embedding_of(output, self.embedding).tolist()) if self.embedding else nothing
        verdicts = self.verdicts(probabilities, self.threshold) if self.threshold is not None else nothing
        found = [cut.box and Detection(cut.box, cut.whole) for cut in cuts]
        rows = zip(
            labels, map(tuple, top.values.tolist()), crops, unsure, vectors, verdicts, found, otherwise, strict=True
        )
        return [Prediction(None, *row) if told else None for row, told in zip(rows, real.tolist(), strict=True)]

    def verdicts(self, probabilities: Tensor, threshold: float) -> list[Verdict]:
        """The finest sure answers, of (B, C)."""
        groups, sums = self.taxonomy.best(probabilities)
        rows = zip(decide(sums, threshold).tolist(), groups.tolist(), sums.tolist(), strict=True)
        levels, names = self.taxonomy.levels, self.taxonomy.groups
        return [
            Verdict(names[level][row[level]], levels[level], p[level]) if level >= 0 else Verdict("unknown", None, p[0])
            for level, row, p in rows
        ]


def predict_images(
    source: str | Path,
    images: Sequence[str],
    *,
    options: Mapping[str, Any] | None = None,
    top_k: int = 5,
    flip: bool = False,
    reject: bool = False,
    taxonomy: str | Path | None = None,
    only: str | Path | None = None,
    place: str | None = None,
    class_names: str | Path | None = None,
    embedding: str | None = None,
    format: str | None = None,  # noqa: A002
    out: str | Path | None = None,
    sort_into: str | Path | None = None,
    links: bool = False,
    **loading: Unpack[Loading],
) -> Predictions:
    """Answer files, folders and globs with a model, and write the answers to a file where one is named.

    Args:
        source: what `glsim.load` takes.
        images: files, folders or globs, or where `boxes` are given, those whose boxes are answered;
            `glsim.inference.ray_bulk:predict_bulk` takes lists and object stores too.
        options: options of the method to change.
        class_names: CSV file of `glsim.data.class_names:read_class_names`; by default the names in the bundle.
        format: of `out`, a name of `glsim.inference.formats:FORMATS` or `glsim.inference.results:WRITERS`; by default
            by the ending of `out`.
        out: file for the answers.
        sort_into: folder in which images are filed by their answers (`glsim.inference.sorting:sort_into`).
        links: file links in place of copies.
        loading: see `Loading`.

    The others are those of `Predictor`.

    Raises:
        ConfigError: for an option that does not fit, or a bundle without the threshold that `reject` needs.
        DataError: for images or a model that are not there, and BadImage for one that cannot be read.
    """
    form = format or format_of(out)
    write = choose(form, {**FORMATS, **WRITERS}, "format")
    if out is not None:
        make_parent(out)  # first: what cannot be made must not come late
    boxed, others = take_boxed(loading)
    if form in WRITERS and (boxed.get("boxes") is None or out is None):
        raise ConfigError(f"format={form}: it is a file of boxes; add --boxes FILE and --out FILE")
    paths, model = find_examples(images, boxed), load(source, **options or {})
    labels = labels_of(model)
    names = names_of(model) if class_names is None else read_class_names(class_names, labels)
    asked: dict[str, Any] = {"top_k": top_k, "flip": flip, "embedding": embedding, "reject": reject}
    asked |= {"taxonomy": taxonomy, "only": only, "place": place}
    found, skipped = answer_files(model, paths, **asked, **others)
    predictions: list[Prediction] = list(found.values())
    if isinstance(paths, BoxPaths):
        predictions = list(with_detections(found, paths))
    if out is not None and form in FORMATS:
        write_text(out, write(predictions, names))
    elif out is not None and isinstance(paths, BoxPaths):
        least = boxed.get("min_confidence", 0.0)
        about = About(str(boxed["boxes"]), str(source), labels, _now(), names, paths.given, least)
        write(Path(out), predictions, about)
    sorted_ = None
    if sort_into is not None:
        answered = ((str(p.path), p.labels[0] if p.verdict is None else p.verdict.label) for p in predictions)
        sorted_ = file_images(sort_into, answered, links)
    again = [a.second_pass for a in predictions if a.second_pass is not None]
    share = sum(again) / len(again) if again else None
    return Predictions(str(source), predictions, skipped, share, dict(names) or None, sorted_)


def _now() -> str:
    return datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")


def answer_files(
    model: Model,
    paths: Sequence[Path],
    read: Callable[[Output, Sequence[Cut]], Sequence[Any]] | None = None,
    *,
    batch_size: int = 32,
    workers: int = 2,
    skip_bad: bool = False,
    max_megapixels: float = MAX_MEGAPIXELS,
    device: str | None = None,
    progress: bool = False,
    **options: Any,
) -> tuple[dict[int, Any], list[str]]:
    """What `sift` returns of what a `Predictor` with these options says of files: predictions, or what `read` makes of
    outputs (`Predictor.each`). The keywords are told by `Loading`."""
    options |= {"batch_size": batch_size, "workers": workers, "device": device, "max_megapixels": max_megapixels}
    predictor = Predictor(model, **options)
    answers = predictor.each(paths, read) if read else predictor.stream(paths)
    return sift(tqdm(answers, total=len(paths), unit="image", disable=not progress), skip_bad)


def with_detections(found: Mapping[int, Prediction], paths: BoxPaths) -> Iterator[Prediction]:
    """Answers by the number of their box, with what the detector told of it, and when the image was taken."""
    path, time = "", None
    for row, answer in found.items():
        if answer.path != path:
            path, time = str(answer.path), taken_at(str(answer.path))
        assert answer.detection is not None
        boxes = paths.boxes
        told: dict[str, Any] = {"category": boxes.category_of(row), "confidence": boxes.confidence_of(row)}
        told |= {"listed": boxes.images[boxes.image[row]], "record": tuple(boxes.record[row].tolist())}
        yield answer._replace(detection=answer.detection._replace(**told, time=time))


def sift(answers: Iterable[T | BadImage], skip_bad: bool = False) -> tuple[dict[int, T], list[str]]:
    """Answers by their places, and what is bad about other images; without `skip_bad` the first such is raised."""
    found: dict[int, T] = {}
    skipped = []
    for place, answer in enumerate(answers):
        if not isinstance(answer, BadImage):
            found[place] = answer
        elif skip_bad:
            skipped.append(str(answer))
        else:
            raise answer
    return found, skipped


@torch.inference_mode()
def probe(model: Model) -> Output:
    """What `model` says of a blank image."""
    height, width = preprocessing_of(model).image_size
    return model(torch.zeros(1, 3, height, width, device=next(model.parameters()).device))


@torch.inference_mode()
def answers(model: nn.Module, batches: Iterable[Tensor], flip: bool = False) -> Iterator[Output]:
    """What `model` says of each of `batches` (B, 3, H, W), in order.

    With `flip`, the mean of its logits (B, C) there and mirrored; unsure is who was so in either view. Without, an
    `EarlyExitModel` with a margin gets the images whose first answer is unsure in batches as large as the largest so
    far, so that the outputs come a little later.
    """
    if isinstance(model, EarlyExitModel) and model.margin is not None and not flip:
        yield from _regrouped(model, model.margin, batches)
        return
    for images in batches:
        yield _mean(model(images), model(images.flip(-1))) if flip else model(images)


def _mean(output: Output, mirrored: Output) -> Output:
    unsure, other = output.needs_second_pass, mirrored.needs_second_pass
    if unsure is not None and other is not None:
        unsure = unsure | other
    return output._replace(logits=(output.logits + mirrored.logits) / 2, needs_second_pass=unsure)


def _regrouped(model: EarlyExitModel, margin: float, batches: Iterable[Tensor]) -> Iterator[Output]:
    held: deque[Output] = deque()  # whose unsure images are not all answered
    unsure: deque[tuple[Any, ...]] = deque()  # those images: output, row in it, image, token, box
    size = 1

    def second(count: int) -> None:
        outputs, rows, *inputs = zip(*(unsure.popleft() for _ in range(count)), strict=True)
        seconds = model.second_pass(*map(torch.stack, inputs)).logits
        for output, row, late in zip(outputs, rows, seconds, strict=True):
            output.logits[row] = late

    def answered() -> Iterator[Output]:
        while held and not (unsure and unsure[0][0] is held[0]):
            yield held.popleft()

    for images in batches:
        size = max(size, len(images))
        given, logits, selection = model.first_pass(images)
        wants = top2_margin(logits) < margin
        output = Output(logits, selection, embeddings={"global": given}, needs_second_pass=wants)
        held.append(output)
        rows = wants.nonzero()[:, 0].tolist()
        # A view of a row would keep the images of its whole batch.
        unsure += [(output, row, images[row].clone(), given[row], selection.boxes[row]) for row in rows]
        while len(unsure) >= size:
            second(size)
        yield from answered()
    if unsure:
        second(len(unsure))
    yield from answered()


def embedding_of(output: Output, name: str) -> Tensor:
    """The embedding `name` of a batch (B, D) in float32; ConfigError lists those the model gives."""
    if not (found := output.embeddings):
        raise ConfigError(f"embedding={name}: this model gives none; of an exported graph, ask the bundle")
    return choose(name, found, "embedding of this model").float()


def without_early_exit(model: Model, embedding: str | None) -> Model:
    """`model`, or where it may spare the second pass that an embedding needs, one of the same weights that does not."""
    if embedding in (None, "global") or not isinstance(model, EarlyExitModel) or model.margin is None:
        return model
    return altered(model, margin=None)


def altered(model: Model, **values: Any) -> Model:
    """A model of the same weights where attributes of `model`, which stays as it is, have other values."""
    model = copy(model)
    vars(model).update(values)
    return model


def to_original(box: Sequence[int], size: tuple[int, int], p: Preprocessing) -> tuple[int, int, int, int]:
    """A box in pixels of the network's view, back in pixels of the upright image of `size` (width, height)."""
    height, width = p.resized(size)
    scale = (size[0] / width, size[1] / height)
    margin = ((width - p.image_size[1]) / 2, (height - p.image_size[0]) / 2)
    left, top, right, bottom = (round((v + margin[i % 2]) * scale[i % 2]) for i, v in enumerate(box))
    return left, top, right, bottom


def _in_image(box: Sequence[int], cut: Cut, p: Preprocessing) -> tuple[int, int, int, int]:
    """`to_original` of a picture that was cut out of an image, in pixels of the image."""
    left, top, right, bottom = to_original(box, cut.size, p)
    x, y = cut.view[:2]
    return left + x, top + y, right + x, bottom + y


def _with_cut(transform: Callable[[Image.Image], Tensor], image: Image.Image) -> tuple[Tensor, Cut]:
    return transform(image), cut_of(image)


def _collate(items: list[Any]) -> tuple[Tensor | None, list[Cut | BadImage]]:
    """Stack what could be read, None where nothing could; each one's `Cut`, or what is bad about it."""
    good = [item[0][0] for item in items if not isinstance(item, BadImage)]
    marks = [item if isinstance(item, BadImage) else item[0][1] for item in items]
    return (torch.stack(good) if good else None), marks
