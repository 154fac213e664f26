"""Settings of a comparison of speed, which its rows and the processes that measure memory share. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from glsim.data.limits import MAX_MEGAPIXELS
from glsim.models import METHODS
from glsim.settings import Settings, setting
from glsim.types import ConfigError, choose

DTYPES = ("float32", "bfloat16", "float16")
LISTS = ("methods", "sources", "backbones", "sizes", "batch_sizes", "dtypes")


class SpeedSettings(Settings):
    """Time models in turn: answers, training steps, images a second, peak memory, and their ratios."""

    methods: list[str] = setting(["plain", "glsim"], "what to measure; options after a colon: glsim:crop_size=112")
    sources: list[str] = setting(
        [], "trained bundles or exported .onnx to measure instead, at their own image size", path="reads"
    )
    backbones: list[str] = setting(["vit_base_patch16_224"], "timm model names")
    sizes: list[int] = setting([224], "sides of the images in pixels", least=1)
    batch_sizes: list[int] = setting([1, 8], "images at a time", least=1)
    dtypes: list[str] = setting(["float32"], "float32, bfloat16, float16: of the weights; in training, of autocast")
    compile: Literal["no", "yes", "both"] = setting("no", "compile the models with torch.compile")
    against: str | None = setting(
        None, "a method (or source): divide what the others took by what this one took", path="reads"
    )
    training: bool = setting(True, "time training steps too: forward, backward, SGD")
    memory: bool = setting(True, "measure peak memory too, each row in a process of its own")
    data: str | None = setting(
        None,
        "images (folder or glob): how many a second are read, prepared and answered; with --sources a data set as "
        "for train, whose test images are what is answered (the cost of a model may depend on them)",
        path="reads",
    )
    images: int = setting(128, "with --sources and --data: test images in every turn, in memory beforehand")
    workers: int = setting(2, "processes that load images", least=0)
    repeats: int = setting(10, "rounds in which every model has its turn; median and quartiles are over these", least=1)
    warmup: int = setting(2, "rounds before those, not counted", least=0)
    num_classes: int = setting(200, "outputs of the last layer", least=1)
    backbone_args: dict[str, Any] = setting({}, "handed to timm, as --backbone-args.depth 6")
    out: str | None = setting(None, "folder for bench.json and plots", path="folder")
    device: str | None = setting(None, "cpu, cuda, ..; default: the best there is")
    max_megapixels: float = setting(
        MAX_MEGAPIXELS, "megapixels of an image; a larger one is a bad file, and none of it is decoded", above=0
    )

    def check(self) -> None:
        """Known names, each once, and nothing that sources have of their own."""
        super().check()
        for method in self.methods:
            choose(method.partition(":")[0], METHODS, "method")
        for dtype in self.dtypes:
            choose(dtype, dict.fromkeys(DTYPES), "dtype")
        if self.against is not None:
            choose(self.against, dict.fromkeys(self.sources or self.methods), "method to compare against")
        for name in LISTS:
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}={values}: each only once")
            if not values and name != "sources":
                raise ConfigError(f"{name}={values}: one or more")
        if self.sources:
            usual = SpeedSettings()
            for name in ("methods", "backbones", "sizes", "num_classes", "backbone_args"):
                if getattr(self, name) != getattr(usual, name):
                    raise ConfigError(f"{name}={getattr(self, name)}: not with --sources, which have their own")
            if self.images < max(self.batch_sizes):
                raise ConfigError(f"images={self.images}: at least the largest of batch_sizes, {max(self.batch_sizes)}")
