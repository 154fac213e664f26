"""Prefixes of data sources: `hf:` (Hugging Face data sets) and `wds:` (WebDataset shards).

Shards are read where they are: an image is named SHARD.tar/NAME, and `glsim.data.images` opens it there. Images of
Hugging Face data sets are written out once.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from glsim.data.hugging_face import write_out
from glsim.types import ConfigError


class Source(NamedTuple):
    """A `--data` that begins with `hf:` or `wds:`: KIND:NAME[:CONFIG][,KEY=VALUE ..], taken apart."""

    kind: str
    name: str  # owner/name on the Hub, or a folder
    options: dict[str, str]


KINDS = {"hf": ("config", "image", "label"), "wds": ("label",)}  # and the options of each


def parse(source: str | Path) -> Source | None:
    """Take a source apart; None for a path. Raises ConfigError for an option that its kind does not have."""
    kind, colon, name = str(source).partition(":")
    if kind not in KINDS or not colon:
        return None
    given = ""
    if not Path(name).exists():
        name, _, given = name.partition(":")
    options = {}
    for i, part in enumerate(given.split(",") if given else ()):
        key, equals, value = part.partition("=")
        if not equals and not i:
            key, value = "config", part
        if key not in KINDS[kind] or not value:
            raise ConfigError(f"{source}: cannot read {part!r}; options of {kind}: {', '.join(KINDS[kind])}")
        options[key] = value
    return Source(kind, name, options)


def located(source: str | Path) -> Path:
    """Where the images of a source lie: the folder of the shards, the list of what was written out, or the path itself.

    Raises ConfigError and DataError as `parse` and `write_out` do.
    """
    parsed = parse(source)
    if parsed is None:
        return Path(source)
    if parsed.kind == "wds":
        return Path(parsed.name)
    return write_out(parsed.name, *(parsed.options.get(key) for key in KINDS["hf"]))
