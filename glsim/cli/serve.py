"""`glsim serve`: a web page and a JSON API for a model."""

from __future__ import annotations

import ipaddress
import sys
from typing import TYPE_CHECKING

from glsim.cli.options import Decoding, Device, positional, setting

if TYPE_CHECKING:
    from glsim.inference.server import Served

PURPOSE = "Answer"


class Options(Decoding, Device):
    """A web page and a JSON API on this machine: drop an image, see the answer and why. Needs glsim[demo]."""

    source: str = positional("bundle, hf-hub:owner/name or official .pth", path="reads")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: every network this machine is in")
    port: int = setting(7860, "port to listen on (0: any that is free)", least=0, most=65535)
    allowed_hosts: list[str] | None = setting(None, "names it may be called by, besides addresses and localhost")
    batch_size: int = setting(16, "images answered together at most", least=1)
    max_wait_ms: float = setting(10.0, "milliseconds an image waits at most for others to be answered with", least=0)
    queue: int = setting(
        64, "images taken in at most; what comes then is refused (503) until some are answered", least=1
    )
    workers: int = setting(2, "threads that decode images", least=1)
    max_mb: float = setting(20.0, "megabytes of a request", least=0.001)
    max_megapixels: float = setting(50.0, "megapixels of an image")
    examples: str | None = setting(
        None, "folder or glob of images to try on the page; default: drawn birds", path="reads"
    )


def run(options: Options, progress: bool) -> Served:
    """Serve it, after saying where."""
    from glsim.inference.server import serve

    def announce(url: str) -> None:
        if is_public(options.host):
            warning = "everybody who can reach this machine can use it, there is no password"
            sys.stderr.write(f"host={options.host}: {warning}\n")
        sys.stderr.write(f"{url}  (Ctrl-C stops it)\n")
        sys.stderr.flush()

    return serve(**vars(options), announce=announce)


def is_public(host: str) -> bool:
    """Whether others than this machine can reach what listens at `host`."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def show(r: Served, options: Options) -> str:
    """What was done until it was stopped."""
    at_a_time = f", {r.answered / r.batches:.1f} at a time" if r.batches else ""
    others = "".join(f", {count} {what}" for what, count in (("refused", r.refused), ("failed", r.failed)) if count)
    return f"stopped: {r.answered} images answered{at_a_time}{others}"
