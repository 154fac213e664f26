"""The HTML page of an audit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from glsim.data.audit import CHECKS, PROBLEM, Audit
from glsim.data.duplicates import PAIRS
from glsim.data.images import try_image
from glsim.data.limits import cores
from glsim.data.pages import render
from glsim.files import data_url

SHOWN, NAMED = 24, 1000  # findings of a check that the page shows with pictures, and by name
TEMPLATE = Path(__file__).with_suffix(".html")


class MemorySection(NamedTuple):
    """What the page says of the memory that the planned run needs."""

    about: str  # the run
    rows: list[tuple[str, str]]  # what needs memory, and how much
    verdict: str
    advice: list[str]


def as_html(audit: Audit, image_size: Sequence[int], memory: MemorySection) -> str:
    """The report as one page that needs no other file: what was found, with small pictures.

    Args:
        audit: what `glsim.data.audit:audit_images` returned.
        image_size: (height, width) that the network is to see, in pixels.
        memory: the section about the planned run.
    """
    shown = {image.path for f in audit.findings for item in f.items[:SHOWN] for image in item.images[:4]}
    pictures = thumbnails(sorted(shown))
    sections = []
    for finding in audit.findings:
        drawn = [item for item in finding.items[:SHOWN] if any(image.path in pictures for image in item.images)]
        sections.append((finding, drawn, [item for item in finding.items[:NAMED] if item not in drawn]))
    root = Path(audit.data) if Path(audit.data).is_dir() else Path(audit.data).parent
    problems = sum(f.severity == PROBLEM for f in audit.findings)
    warnings = len(audit.findings) - problems
    said = [f"{count} {what}" for count, what in ((problems, "found problems"), (warnings, "warn")) if count]
    worst = audit.findings and ("problem" if problems else "warning")
    return render(
        TEMPLATE,
        audit=audit,
        checks=CHECKS,
        counts={f.check: f.count for f in audit.findings},
        colour=worst or "good",
        image_size=image_size,
        memory=memory,
        named=NAMED,
        pairs=PAIRS,
        pictures=pictures,
        relative=lambda path: Path(path).relative_to(root) if Path(path).is_relative_to(root) else path,
        sections=sections,
        title=Path(audit.data).name,
        verdict=f"Of {len(CHECKS)} checks {' and '.join(said)}" if said else "Nothing found",
    )


def thumbnails(paths: Iterable[str], side: int = 192) -> dict[str, str]:
    """Small JPEGs as data addresses; a file that cannot be shown has none."""

    def small(image: Image.Image) -> str:
        image.thumbnail((side, side), reducing_gap=2.0)
        return data_url(image, quality=70)

    paths = list(paths)
    with ThreadPoolExecutor(cores()) as pool:
        drawn = zip(paths, pool.map(lambda path: try_image(path, small), paths), strict=True)
        return {path: picture for path, picture in drawn if isinstance(picture, str)}
