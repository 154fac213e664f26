"""`glsim serve`: a web page and a JSON API for a model."""

from __future__ import annotations

import ipaddress
import sys
from typing import TYPE_CHECKING

from glsim.cli.options import MISSING, Decoding, Device, dataclass, positional, setting
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.inference.server import Served

PURPOSE = "Answer"


@dataclass(frozen=True, kw_only=True)
class Options(Decoding, Device):
    """A web page and a JSON API on this machine: drop an image, see the answer and why. Needs glsim[demo]."""

    source: str = positional(MISSING, "bundle, hf-hub:owner/name or official .pth", path="reads")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: every network this machine is in")
    port: int = setting(7860, "port to listen on (0: any that is free)", least=0)
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

    def check(self) -> None:
        """A port is a number of 16 bits."""
        super().check()
        if self.port > 65535:
            raise ConfigError(f"port={self.port}: 0 to 65535")


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
    text = f"stopped: {r.answered} images answered"
    if r.batches:
        text += f", {r.answered / r.batches:.1f} at a time"
    if r.refused:
        text += f", {r.refused} refused"
    if r.failed:
        text += f", {r.failed} failed"
    return text
