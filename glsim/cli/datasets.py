"""`glsim datasets`: the named data sets, and one of them prepared in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from glsim.cli.options import Lines, Settings, positional, setting
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.data.prepare import DataSetInfo

PURPOSE = "Data"


class Options(Settings):
    """List the data sets glsim knows by name, or prepare one in a folder for --dataset NAME."""

    action: Literal["list", "prepare"] = positional("list, or prepare NAME", "list")
    name: str | None = positional("synthetic, or a name of the list", None)
    root: str | None = setting(None, "folder to make, or to fill", path="folder")
    source: list[str] | None = setting(
        None, "the publisher's archives, or the folder they were unpacked in", path="reads"
    )
    partial: bool = setting(False, "leave out listed images that are not there, and accept other counts")
    classes: int = setting(8, "synthetic: how many species")
    train: int = setting(60, "synthetic: training images a class")
    val: int = setting(0, "synthetic: validation images a class")
    test: int = setting(20, "synthetic: test images a class")
    size: int = setting(224, "synthetic: pixels a side")
    part_scale: float = setting(1.0, "synthetic: size of the parts that tell species apart")
    clutter: float = setting(1.0, "synthetic: how busy the background is")
    bird_scale: float = setting(1.0, "synthetic: size of the bird, 0.2 to 1")
    seed: int = setting(0, "synthetic: another seed draws other images")

    def check(self) -> None:
        """What is prepared has a name and a folder."""
        super().check()
        if self.action == "prepare" and (self.name is None or self.root is None):
            raise ConfigError("prepare needs a name and a folder, as: glsim datasets prepare synthetic --root FOLDER")


def run(options: Options, progress: bool) -> DataSetInfo | dict[str, list[DataSetInfo]]:
    """List them, or prepare one."""
    from glsim.data.prepare import list_datasets, prepare_dataset

    if options.action == "list":
        return {"datasets": list_datasets()}
    return prepare_dataset(**{name: value for name, value in vars(options).items() if name != "action"})


def show(r: DataSetInfo | dict[str, list[DataSetInfo]], options: Options) -> Lines:
    """Each name with counts, protocol, licence and address; or what lies in the folder now, and what comes next."""
    if not isinstance(r, dict):
        yield f"{r.name}: {r.classes} classes, {show_counts(r.counts or {})} images in {r.root}"
        if r.csv is not None:
            yield f"list: {r.csv}, split {r.split_hash}"
            yield f"licence: {r.licence}"
            yield f"next: glsim train --dataset {r.name} --data {r.root} --out RUN"
        return
    for d in r["datasets"]:
        if d.counts is None:
            yield f"{d.name:10} {d.about}"
        else:
            how = "downloaded by prepare" if d.download else "download it yourself, then prepare --source"
            yield f"{d.name:10} {d.about}: {d.classes} classes, {show_counts(d.counts) or 'counts not stated'}"
            yield f"{'':10} {d.protocol}"
            yield f"{'':10} licence: {d.licence}; {d.homepage} ({how})"


def show_counts(counts: dict[str, int]) -> str:
    """Images by split: 600 train, 60 test."""
    return ", ".join(f"{n} {split}" for split, n in counts.items())
