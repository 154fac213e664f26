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
    Alias("predict", "--engine", "predict", value="local"),
)
STEPS = ("--shots", "--steps", "--seed")  # of `index eval`, each with numbers behind it


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
    if words[:2] == ["index", "eval"] and (kept := _without_numbers(words, STEPS)) != words:
        return kept, f"index eval takes no {', '.join(STEPS)} any more; benchmarks/new_classes.py adds classes in steps"
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


def _without_numbers(words: list[str], options: Sequence[str]) -> list[str]:
    """The words without `options` and the numbers that follow each; what stands behind `--` stays."""
    end = words.index("--") if "--" in words else len(words)
    kept, inside = [], False
    for word in words[:end]:
        inside = word.partition("=")[0] in options or (inside and word.replace(",", "").isdigit())
        if not inside:
            kept.append(word)
    return kept + words[end:]


def _is_verb(name: str) -> bool:
    return Path(__file__).with_name(f"{name.replace(' ', '_')}.py").is_file()
