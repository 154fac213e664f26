"""`glsim bench loading`: images a second that training loads, beside those that the model can use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glsim.cli.options import Decoding, Device, dataclass, required, setting
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.training.throughput import Throughput

PURPOSE = "Measure"


@dataclass(frozen=True, kw_only=True)
class Options(Decoding, Device):
    """Measure the images a second that training loads, and those that the model can use; which of the two waits."""

    recipe: str = required("recipe of the training, a file or a name: glsim recipes", path="reads")
    data: str = required("folder, CSV, hf:NAME or wds:FOLDER, as for train", path="reads")
    train: dict[str, Any] = setting({}, "settings instead of the recipe's, as --train.cache ram")
    seconds: float = setting(15.0, "how long loading, model and both together are timed each")
    workers: int | None = setting(None, "processes that load images; default: those of the recipe", least=0)
    out: str | None = setting(None, "folder for bench.json", path="folder")

    def check(self) -> None:
        """Some time."""
        super().check()
        if not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds}: above 0 is needed")


def run(options: Options, progress: bool) -> Throughput:
    """Measure it."""
    from glsim.training.throughput import measure_throughput

    return measure_throughput(**vars(options), progress=progress)


def show(r: Throughput, options: Options) -> str:
    """The three rates, and who waits."""
    height, width = r.image_size
    lines = [
        f"{r.method} on {r.backbone}, {width} x {height} pixels, batches of {r.batch_size}; "
        f"{r.workers} workers, cache {r.cache}; {r.environment['device']}"
    ]
    if r.cache_seconds is not None:
        lines.append(f"cache filled in {r.cache_seconds} s")
    lines += [
        f"loading  {r.loading:9,.1f} images/s",
        f"model    {r.model:9,.1f} images/s",
        f"together {r.together:9,.1f} images/s, {r.together / min(r.loading, r.model):.0%} of the slower one, "
        f"{r.together / r.model:.0%} of the model alone",
        f"the {r.waits} waits for the {'loader' if r.waits == 'model' else 'model'}",
    ]
    if options.out is not None:
        lines.append(f"written: {options.out}")
    return "\n".join(lines)
