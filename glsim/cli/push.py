"""`glsim push`: upload of a bundle to the Hugging Face Hub."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from glsim.cli.options import Settings, positional, setting
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.checkpoints.push import PushedBundle

PURPOSE = "Share"
CALL = "glsim.checkpoints.push:push_bundle"


class Options(Settings):
    """Send a bundle to the Hugging Face Hub, with its licence; load it there as hf-hub:owner/name."""

    run: str = positional("bundle folder", path="reads")
    repository: str = positional("owner/name; made where it is not there yet")
    licence: str | None = setting(None, "of the weights, by the Hub's name for it: apache-2.0, cc-by-nc-4.0, ..")
    data_licence: str | None = setting(None, "of the images; default: what the bundle says")
    backbone_licence: str | None = setting(None, "of the weights it started from; default: what the bundle says")
    private: bool = setting(False, "make the repository private")

    def check(self) -> None:
        """A repository of an owner, and licences that are named."""
        super().check()
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repository):
            raise ConfigError(f"repository={self.repository!r}: owner/name is needed")
        for name in ("licence", "data_licence", "backbone_licence"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or (name == "licence" and value == "unknown")):
                raise ConfigError(f"{name}={value!r}: name the licence, for example apache-2.0")


def show(r: PushedBundle, options: Options) -> str:
    """Where it went, and how to load it."""
    return f"pushed: {r.commit} (licence {r.licence['model']})\nload it: hf-hub:{r.repository}"
