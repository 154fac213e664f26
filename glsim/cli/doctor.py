"""`glsim doctor`: what is wrong with a data set, and the memory that a planned run needs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glsim.cli.options import Decoding, Device, Lines, PlannedModel, positional, setting
from glsim.data.box_options import BoxExamples, boxed_of
from glsim.models import METHODS
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.data.audit import Audit
    from glsim.data.audit_page import MemorySection
    from glsim.training.memory import MemoryEstimate

PURPOSE = "Data"
RUN = (
    *("method", "backbone", "image_size", "options", "backbone_args", "batch_size", "optimizer", "precision", "freeze"),
    "device",
)
READING = ("near", "min_images", "workers", "max_megapixels")


class Options(BoxExamples, Decoding, Device, PlannedModel):
    """Look through a data set before training: bad files, duplicates, leaks, labels, sizes, memory; writes a page."""

    data: str = positional("folder or CSV, as for train", path="reads")
    out: str = setting("doctor.html", "page to write; an older one is replaced", path="file")
    near: int = setting(
        32, "pictures are nearly the same when at most so many of the 256 bits of their hash differ", least=0
    )
    min_images: int = setting(5, "training images a class should have", least=1)
    test_fraction: float = setting(
        0.2, "share held out as test where the data has no split of its own", least=0, below=1
    )
    split_seed: int = setting(0, "of that share")
    workers: int | None = setting(
        None, "processes that read images; default: one a core; 0: none beside this one", least=0
    )
    method: str = setting("glsim", "the planned run, as for train; its memory is estimated", choices=METHODS)
    batch_size: int = setting(8, "images at a time, on each device", least=1)
    optimizer: str = setting("sgd", "sgd (Nesterov), adamw, or any other name timm knows")
    precision: Literal["no", "fp16", "bf16"] = setting("no", "mixed precision")
    freeze: int | Literal["none", "backbone"] = setting("none", "what is not trained: backbone, or its first N blocks")


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The audit, the memory of the planned run, and where the page is."""

    audit: Audit
    memory: MemoryEstimate
    out: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """All of it on one level."""
        return vars(self.audit) | {name: value for name, value in vars(self).items() if name != "audit"}


def run(options: Options, progress: bool) -> Diagnosis:
    """Audit the data, estimate the memory of the planned run, write the page."""
    from glsim.data.audit import audit_images, list_images
    from glsim.data.audit_page import as_html
    from glsim.data.limits import pixel_limit
    from glsim.files import write_text
    from glsim.training.memory import estimate_memory

    began, out = time.perf_counter(), Path(options.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"out={options.out}: name a file, in a folder that is there")
    seed, fraction = options.split_seed, options.test_fraction
    listing = list_images(options.data, split_seed=seed, test_fraction=fraction, boxed=boxed_of(options))
    # Before the images are read, for a wrong setting must not wait for them.
    memory = estimate_memory(len(listing.classes), **{name: getattr(options, name) for name in RUN})
    reading = {name: getattr(options, name) for name in READING}
    audit = audit_images(listing, image_size=memory.image_size, **reading, progress=progress)
    seconds = round(time.perf_counter() - began, 1)
    with pixel_limit(options.max_megapixels):
        write_text(out, as_html(audit, memory.image_size, memory_section(memory)))
    return Diagnosis(audit=audit, memory=memory, out=str(out), seconds=seconds)


def memory_section(m: MemoryEstimate) -> MemorySection:
    """The estimate as the page shows it."""
    from glsim.data.audit_page import MemorySection
    from glsim.training.memory import SLACK, as_gib

    height, width = m.image_size
    return MemorySection(
        about=f"{m.method} on {m.backbone}, {width} x {height} pixels, batches of {m.batch_size}, "
        f"precision {m.precision}.",
        rows=[
            (f"weights ({m.parameters / 1e6:.1f} million)", as_gib(m.weights)),
            ("gradients", as_gib(m.gradients)),
            ("optimiser", as_gib(m.optimizer)),
            (f"activations of {m.batch_size} image{'' if m.batch_size == 1 else 's'}", as_gib(m.activations)),
            (f"together, and {SLACK - 1:.0%} for what comes and goes", as_gib(m.total)),
            (f"free on {m.device}", as_gib(m.free)),
        ],
        verdict=f"It fits; so would batches of {m.largest_batch_size:,}." if m.fits else "It will not fit. What helps:",
        advice=m.advice,
    )


def show(r: Diagnosis, options: Options) -> Lines:
    """What was found, every problem by name; the memory of the planned run; where the page is."""
    from glsim.training.memory import as_gib

    audit, m = r.audit, r.memory
    images = ", ".join(f"{count} {split}" for split, count in audit.counts.items())
    yield f"{audit.data}: {images} images of {audit.classes.count} classes, {r.seconds} s"
    for f in audit.findings:
        yield f"{f.severity}: {f.title}: {f.count}. {f.advice}"
        most = 5 if f.severity == "warning" else f.count
        for item in f.items[:most]:
            paths = " = ".join(image.path for image in item.images)
            yield "  " + ": ".join(part for part in (paths, item.note) if part)
        if f.count > most:
            yield f"  .. and {f.count - most} more (--json lists all)"
    verdict = f"batches up to {m.largest_batch_size} fit" if m.fits else "it will not fit; what helps:"
    yield f"memory of a step: about {as_gib(m.total)}, free on {m.device}: {as_gib(m.free)}; {verdict}"
    yield from (f"  {advice}" for advice in m.advice)
    if not audit.findings:
        yield "nothing found"
    yield f"page: {r.out}"
