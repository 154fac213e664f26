"""`glsim bench loading`: images a second that training loads, beside those that the model can use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glsim.cli.options import Decoding, Device, Lines, required, setting

if TYPE_CHECKING:
    from glsim.training.throughput import Throughput

PURPOSE = "Measure"
CALL = "glsim.training.throughput:measure_throughput"


class Options(Decoding, Device):
    """Measure the images a second that training loads, and those that the model can use; which of the two waits."""

    recipe: str = required("recipe of the training, a file or a name: glsim recipes", path="reads")
    data: str = required("folder, CSV, hf:NAME or wds:FOLDER, as for train", path="reads")
    train: dict[str, Any] = setting({}, "settings instead of the recipe's, as --train.cache ram")
    seconds: float = setting(15.0, "how long loading, model and both together are timed each", above=0)
    workers: int | None = setting(None, "processes that load images; default: those of the recipe", least=0)
    out: str | None = setting(None, "folder for bench.json", path="folder")


def show(r: Throughput, options: Options) -> Lines:
    """The three rates, and who waits."""
    height, width = r.image_size
    yield (
        f"{r.method} on {r.backbone}, {width} x {height} pixels, batches of {r.batch_size}; "
        f"{r.workers} workers, cache {r.cache}; {r.environment['device']}"
    )
    if r.cache_seconds is not None:
        yield f"cache filled in {r.cache_seconds} s"
    yield f"loading  {r.loading:9,.1f} images/s"
    yield f"model    {r.model:9,.1f} images/s"
    slower, alone = r.together / min(r.loading, r.model), r.together / r.model
    yield f"together {r.together:9,.1f} images/s, {slower:.0%} of the slower one, {alone:.0%} of the model alone"
    yield f"the {r.waits} waits for the {'loader' if r.waits == 'model' else 'model'}"
    if options.out is not None:
        yield f"written: {options.out}"
