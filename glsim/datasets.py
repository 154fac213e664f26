"""Floor 4: the data sets glsim knows by name."""

from __future__ import annotations

from typing import Any

from glsim import synthetic
from glsim.config import Datasets
from glsim.types import ConfigError, choose

ABOUT = {
    "synthetic": "birds drawn from a seed, told apart by one small part each, with masks of part and body; no download"
}


def run(s: Datasets) -> dict[str, Any]:
    """The verb: the list of names, or `s.root` filled with the data set `s.name`."""
    if s.action == "list":
        return {"datasets": [{"name": name, "about": about} for name, about in ABOUT.items()]}
    if s.name is None or s.root is None:
        raise ConfigError("prepare needs a name and a folder, as: glsim datasets prepare synthetic --root FOLDER")
    choose(s.name, ABOUT, "data set")
    counts = {"train": s.train, "val": s.val, "test": s.test}
    try:
        synthetic.write(
            s.root, s.classes, **counts, size=s.size, seed=s.seed, part_scale=s.part_scale, clutter=s.clutter
        )
    except (ValueError, FileExistsError) as error:
        raise ConfigError(str(error)) from error
    made = {split: n * s.classes for split, n in counts.items() if n}
    return {"name": s.name, "root": s.root, "classes": s.classes, "counts": made}
