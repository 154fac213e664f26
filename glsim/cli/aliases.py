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
    end = words.index("--") if "--" in words else len(words)
    for alias in ALIASES:
        if words[:1] != [alias.verb] or words[:2] == alias.now.split() or not _is_verb(alias.now):
            continue
        for i, word in enumerate(words[:end]):
            option, equals, value = word.partition("=")
            if option == alias.option and alias.value in (None, value if equals else "".join(words[i + 1 : i + 2])):
                kept = [f"{alias.renamed}{equals}{value}"] if alias.renamed else []
                behind = i + 1 if equals or alias.value is None else i + 2
                said = " ".join(filter(None, (alias.verb, alias.option, alias.value)))
                new = [*alias.now.split(), *words[1:i], *kept, *words[behind:]]
                return new, f"{said} is now: glsim {alias.now}"
    if words[:2] == ["index", "eval"] and (kept := _without_numbers(words[:end], STEPS)) != words[:end]:
        note = f"index eval takes no {', '.join(STEPS)} any more; benchmarks/new_classes.py adds classes in steps"
        return kept + words[end:], note
    return words, None


def _without_numbers(words: list[str], options: Sequence[str]) -> list[str]:
    """The words without `options` and the numbers that follow each."""
    kept, inside = [], False
    for word in words:
        inside = word.partition("=")[0] in options or (inside and word.replace(",", "").isdigit())
        if not inside:
            kept.append(word)
    return kept


def _is_verb(name: str) -> bool:
    return Path(__file__).with_name(f"{name.replace(' ', '_')}.py").is_file()
