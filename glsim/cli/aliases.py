"""Old spellings of verbs, which go on working for one version."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Words = list[str]


def translate(words: Sequence[str]) -> tuple[Words, str | None]:
    """The words of a call as they are spelt now, and a note that says so; None where nothing had to change."""
    for verb, respell in ALIASES.items():
        count = len(verb.split())
        if " ".join(words[:count]) == verb:
            new = respell(list(words[count:]))
            if new is not None:
                respelt, note = new
                return respelt, note
    return list(words), None


def predict_engine(words: Words) -> tuple[Words, str] | None:
    """`predict --engine ray`, which is `predict bulk`."""
    engine, rest = take(words, "--engine")
    if engine == "ray":
        return ["predict", "bulk", *rest], "predict --engine ray is now: glsim predict bulk"
    if engine == "local":
        return ["predict", *rest], "predict --engine local is now: glsim predict"
    return None


def index_eval_steps(words: Words) -> tuple[Words, str] | None:
    """`index eval --shots --steps --seed`, which is an experiment now."""
    rest, gone = words, []
    for option in ("--shots", "--steps", "--seed"):
        value, rest = take(rest, option, numbers=True)
        if value is not None:
            gone.append(option)
    if not gone:
        return None
    note = f"index eval takes no {', '.join(gone)} any more; benchmarks/new_classes.py adds classes in steps"
    return ["index", "eval", *rest], note


def take(words: Words, option: str, numbers: bool = False) -> tuple[str | None, Words]:
    """The value of `option` among the words before `--`, and the words without both; None where it is not there.

    With `numbers` all numbers that follow belong to it.
    """
    end = words.index("--") if "--" in words else len(words)
    for i, word in enumerate(words[:end]):
        name, equals, value = word.partition("=")
        if name != option:
            continue
        if equals:
            return value, words[:i] + words[i + 1 :]
        last = i + 2
        while numbers and last < end and words[last].replace(",", "").isdigit():
            last += 1
        return " ".join(words[i + 1 : last]), words[:i] + words[last:]
    return None, list(words)


ALIASES: dict[str, Callable[[Words], tuple[Words, str] | None]] = {
    "predict": predict_engine,
    "index eval": index_eval_steps,
}
