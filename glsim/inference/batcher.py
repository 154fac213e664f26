"""Batcher of prediction requests: images decoded in threads, answered together by one thread.

`server.py` is the HTTP around it.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glsim.data.images import BadImage, fit_size, read_image
from glsim.data.regions import whole
from glsim.data.transforms import eval_transform
from glsim.files import data_url
from glsim.inference.predictor import Prediction, Predictor, altered, probe, to_original
from glsim.interpret.drawing import title_of
from glsim.interpret.heatmaps import heatmaps_of, metrics_of, selections_of, to_photograph
from glsim.models.scores import check_metric, check_top
from glsim.types import ConfigError, DataError

MOST_ANSWERS = 100  # classes that can be asked for
PHOTO, MAP, CROP = 1280, 320, 480  # pixels at most of the longer side of what is drawn
LOWEST, COLORMAP = 0.4, "turbo"  # opacity of the heat-map where it is 0, as a share of that where it is 1


class PredictRequest(NamedTuple):
    """Options of a request for the answer to an image."""

    top_k: int = 5
    metric: str | None = None  # None: the model's own
    top_o: int | None = None  # None: the model's own
    explain: bool = False  # pictures too


class Decoded(NamedTuple):
    """An image made ready."""

    image: Tensor  # (3, H, W), normalised
    size: tuple[int, int]  # width, height of the upright image
    photo: Image.Image | None  # the same image, PHOTO pixels at most, to draw on


class Heatmap(NamedTuple):
    """Heat-map and box of an image, from which pictures are drawn."""

    metric: str
    values: np.ndarray  # float32 (H, W) in [0, 1], over the network's view
    box: tuple[int, int, int, int]  # in pixels of the upright image
    used: bool  # whether the answer came from this selection


class Answer(NamedTuple):
    """What the model says of one image."""

    prediction: Prediction
    heatmap: Heatmap | None  # where pictures are asked for


@dataclass
class Job:
    """One image that waits for its answer."""

    decoded: Decoded
    request: PredictRequest
    arrived: float = field(default_factory=time.monotonic)
    future: Future[Answer] = field(default_factory=Future)


@dataclass
class Counts:
    """What was done since the start."""

    answered: int = 0  # images
    refused: int = 0  # images that could not be read, or of which the model was asked what it cannot do
    failed: int = 0  # images that the model failed on, or of which no picture could be drawn
    batches: int = 0


@dataclass(eq=False)
class Service:
    """`model` for many callers at once.

    `metric` is the score that pictures show unless another is asked for, `top_o` the model's own
    (`glsim.models.base:Model`). `decode` and `draw` are for the threads of `pool`, `submit` for any thread. One thread
    of its own has the model: it takes up to `batch_size` images that wait, and waits `max_wait` seconds at most for
    company to come. Close it with `close`: what was submitted is still answered.
    """

    model: Any
    device: str | None = None
    batch_size: int = 16
    max_wait: float = 0.01
    workers: int = 2
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        self.predictor = Predictor(self.model, top_k=MOST_ANSWERS, device=self.device)
        self.preprocessing = self.predictor.preprocessing
        self.transform = eval_transform(self.preprocessing)
        # Once before the first caller, who then need not wait for what is set up.
        self.selects = probe(self.model).selection is not None
        self.metric: str = (self.model.metric or self.model.config.method) if self.selects else "gls_cos"
        self.any_metric = self.model.metric is not None  # chooses by scores, whose ever
        self.top_o: int | None = self.model.top_o
        self.own_top_o = "top_o" in self.model.config.options
        self.counts, self._lock = Counts(), Lock()
        self.pool = ThreadPoolExecutor(self.workers, "decode")
        self._waiting: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer what waits, then end all threads."""
        self._waiting.put(None)
        self._thread.join()
        self.pool.shutdown()

    @property
    def alive(self) -> bool:
        """Whether the thread with the model runs."""
        return self._thread.is_alive()

    # --- what can be asked ----------------------------------------------------------------------------------------

    def metrics(self) -> list[str]:
        """The model's own, then every other that its backbone can serve."""
        return list(dict.fromkeys([self.metric, *metrics_of(self.model)]))

    def decides(self, metric: str | None) -> bool:
        """Whether the answer depends on what `metric` selects; if not, it only draws."""
        return self.selects and (metric in (None, self.metric) or self.any_metric)

    def takes_top_o(self, metric: str | None) -> bool:
        """Whether it matters with `metric` how many best patches are taken."""
        return self.own_top_o or (self.top_o is not None and not self.decides(metric))

    def check(self, request: PredictRequest) -> None:
        """Raise ConfigError, saying what would work, for a request that this model cannot serve."""
        if not 1 <= request.top_k <= MOST_ANSWERS:
            raise ConfigError(f"top_k={request.top_k}: 1 to {MOST_ANSWERS}")
        if request.metric not in (None, self.metric):
            check_metric(request.metric, self.model.backbone.has_attention)
        if request.top_o is not None:
            check_top(request.top_o, self.model.backbone.grid, "top_o")
            if not self.takes_top_o(request.metric):
                raise ConfigError(f"top_o: {self.model.config.method!r} chooses its patches by another rule")

    # --- an image -------------------------------------------------------------------------------------------------

    def decode(self, name: str, content: bytes, request: PredictRequest) -> Decoded:
        """Make the bytes of a file ready. Raises BadImage."""

        def ready(image: Image.Image) -> Decoded:
            photo = None
            if request.explain:
                size = fit_size(image.size, min(PHOTO, max(image.size)))
                photo = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
            return Decoded(self.transform(image), image.size, photo)

        try:
            return read_image(name, ready, content, self.max_pixels)
        except BadImage:
            self._count(refused=1)
            raise

    def submit(self, decoded: Decoded, request: PredictRequest) -> Future[Answer]:
        """Put an image among those that wait. The answer raises ConfigError for what the model cannot be asked."""
        job = Job(decoded, request)
        self._waiting.put(job)
        return job.future

    def draw(self, decoded: Decoded, answer: Answer) -> dict[str, Any]:
        """The pictures of an answer, as data URLs: the photograph, the coloured map to lay over it, the crop."""
        try:
            heatmap, photo = answer.heatmap, decoded.photo
            assert heatmap is not None and photo is not None
            size = fit_size(photo.size, MAP)
            everywhere = np.ones_like(heatmap.values)
            heat, seen = (to_photograph(m, size, self.preprocessing) for m in (heatmap.values, everywhere))
            colours = matplotlib.colormaps[COLORMAP](heat)
            colours[..., 3] = (
                LOWEST + (1 - LOWEST) * heat
            ) * seen  # no colour where the network was not shown anything
            to_photo = (photo.width / decoded.size[0], photo.height / decoded.size[1])
            left, top, right, bottom = (round(side * to_photo[i % 2]) for i, side in enumerate(heatmap.box))
            crop = photo.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
            crop.thumbnail((CROP, CROP), Image.Resampling.LANCZOS)
            return {
                "metric": heatmap.metric,
                "title": title_of(heatmap.metric),
                "box": list(heatmap.box),
                "used": heatmap.used,
                "size": list(decoded.size),
                "photo": data_url(photo, quality=88),
                "heatmap": data_url(Image.fromarray((colours * 255).round().astype(np.uint8)), "PNG"),
                "crop": data_url(crop, quality=88),
            }
        except Exception:
            self._count(answered=-1, failed=1)
            raise

    # --- the thread with the model --------------------------------------------------------------------------------

    def _work(self) -> None:
        while batch := self._take():
            groups: dict[Any, list[Job]] = {}
            for job in batch:
                if job.future.set_running_or_notify_cancel():
                    groups.setdefault(job.request._replace(top_k=0), []).append(job)
            for jobs in groups.values():
                self._answer(jobs)

    def _take(self) -> list[Job]:
        """The images of the next batch; none at the end."""
        job = self._waiting.get()
        if job is None:
            return []
        batch, until = [job], job.arrived + self.max_wait
        while len(batch) < self.batch_size:
            try:
                job = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                break
            if job is None:
                self._waiting.put(None)  # after this batch
                break
            batch.append(job)
        return batch

    def _answer(self, jobs: list[Job]) -> None:
        """Answer images that share a request, but for `top_k`. Where that fails, each alone: one spoils no other."""
        try:
            answers = self._ask([job.decoded for job in jobs], jobs[0].request)
        except Exception as error:  # the thread has to outlive whatever one batch does to it
            if len(jobs) > 1 and not isinstance(error, ConfigError):
                for job in jobs:
                    self._answer([job])
                return
            self._count(**{"refused" if isinstance(error, ConfigError) else "failed": len(jobs)})
            # asyncio hands on no StopIteration: who awaits it would wait for ever.
            told = RuntimeError("StopIteration") if isinstance(error, StopIteration) else error
            for job in jobs:
                job.future.set_exception(told)
            return
        self._count(batches=1)
        for job, answer in zip(jobs, answers, strict=True):
            if answer is None or not all(map(math.isfinite, answer.prediction.probabilities)):
                self._count(failed=1)
                job.future.set_exception(DataError("its answer is not finite"))
                continue
            self._count(answered=1)
            p, k = answer.prediction, job.request.top_k
            p = p._replace(labels=p.labels[:k], probabilities=p.probabilities[:k])
            job.future.set_result(answer._replace(prediction=p))

    @torch.inference_mode()
    def _ask(self, decoded: list[Decoded], request: PredictRequest) -> list[Answer | None]:
        images = torch.stack([d.image for d in decoded]).to(self.predictor.device)
        sizes = [d.size for d in decoded]
        cuts = [whole(size) for size in sizes]
        asked = {"metric": request.metric if self.any_metric else None, "top_o": request.top_o}
        model = altered(self.model, **{name: value for name, value in asked.items() if value is not None})
        if not request.explain:
            return [p and Answer(p, None) for p in self.predictor.predictions(model(images), cuts)]
        output, ((metric, selection, _),) = selections_of(model, images, [request.metric])
        predictions, maps = self.predictor.predictions(output, cuts), heatmaps_of(selection, images)
        decides, answers = self.decides(request.metric), []
        for p, values, box, size in zip(predictions, maps, selection.boxes.tolist(), sizes, strict=True):
            shown = to_original(box, size, self.preprocessing)
            answers.append(p and Answer(p, Heatmap(metric, values, shown, decides and p.second_pass is not False)))
        return answers

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + number)
