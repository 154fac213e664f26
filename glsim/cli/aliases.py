"""Old spellings of verbs: they go on working for one version, translated, with a note of the new spelling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Alias(NamedTuple):
    """An option that made another verb of an old one, and what stands in its place now."""

    verb: str
    option: str
    now: str  # the new verb
    value: str | None = None  # the spelling is old with this value only
    renamed: str | None = None  # the option of the new verb that takes the values; None: it needs none


ALIASES = (
    Alias("explain", "--contrast", "explain contrast", renamed="--classes"),
    Alias("explain", "--layers", "explain layers"),
    Alias("bench", "--loader", "bench loading", renamed="--recipe"),
    Alias("predict", "--engine", "predict bulk", value="ray"),
)


def translate(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The words of a command line in today's spelling, and a note where they were in an old one.

    Nothing is translated to a verb that is not there, nor behind `--`.
    """
    words = list(words)
    for alias in ALIASES:
        if words[:1] == [alias.verb] and words[:2] != alias.now.split() and _is_verb(alias.now):
            found = _find(alias, words)
            if found:
                start, end = found
                _, equals, value = words[start].partition("=")
                kept = [f"{alias.renamed}{equals}{value}"] if alias.renamed else []
                said = " ".join(filter(None, (alias.verb, alias.option, alias.value)))
                new = [*alias.now.split(), *words[1:start], *kept, *words[end:]]
                return new, f"{said} is now: glsim {alias.now}"
    return words, None


def _find(alias: Alias, words: list[str]) -> tuple[int, int] | None:
    """Where the option of `alias` stands, and where the words behind it begin; None where it does not stand there."""
    for i, word in enumerate(words[: words.index("--")] if "--" in words else words):
        option, equals, value = word.partition("=")
        if option == alias.option:
            if alias.value is None:
                return i, i + 1
            if (value if equals else "".join(words[i + 1 : i + 2])) == alias.value:
                return i, i + (1 if equals else 2)
    return None


def _is_verb(name: str) -> bool:
    return Path(__file__).with_name(f"{name.replace(' ', '_')}.py").is_file()
