"""The parser: words of the command line (and a recipe) to checked options, by jsonargparse."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from argparse import SUPPRESS
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from glsim.types import ConfigError


def parse(name: str, options: type, words: list[str], recipe: Callable[[str], Path] | None = None) -> Any:
    """Words of the command line to an object of the dataclass `options`; exits with 0 where they ask for help.

    `recipe` finds and checks the YAML file that --recipe names, for a verb that takes one. Raises ConfigError for what
    does not fit.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    class ReadRecipe(ActionConfigFile):
        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            assert recipe is not None
            super().__call__(parser, cfg, str(recipe(values)), option_string)

    fields = in_order(options)
    positionals = [f.name.upper() for f in fields if f.metadata.get("positional")]
    parser = ArgumentParser(
        prog=f"glsim {name}",
        usage=" ".join(["glsim", name, *positionals, "[options]"]),
        description=options.__doc__,
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print-recipe",
    )
    if recipe is not None:
        text = "YAML file with options below, or a name: glsim recipes"
        parser.add_argument("--recipe", action=ReadRecipe, help=text)
    hints = typing.get_type_hints(options)
    for f in fields:
        add_option(parser, f, hints[f.name], recipe is not None)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    numbers = {f"--{f.name.replace('_', '-')}" for f in fields if hints[f.name] in (list[int], list[float])}
    try:
        values = parser.parse_args(split_commas(words, numbers)).as_dict()
    except ArgumentError as error:
        known = [option for action in parser._actions for option in action.option_strings]
        given = [word.partition("=")[0] for word in words if word.startswith("--")]
        wrong = [word for word in given if word.partition(".")[0] not in known]
        close = [f"did you mean {match}?" for word in wrong for match in get_close_matches(word, known, n=1)]
        said = [" ".join(str(error).split()), *close, f"glsim {name} --help lists the options"]
        raise ConfigError("; ".join(said)) from None
    return options(**{f.name: values[f.name] for f in fields})


def in_order(options: type) -> list[dataclasses.Field]:
    """The fields as help shows them: without a name first, then the verb's own, then those it shares."""
    own = inspect.get_annotations(options)
    return sorted(dataclasses.fields(options), key=lambda f: (not f.metadata.get("positional"), f.name not in own))


def split_commas(words: list[str], options: set[str]) -> list[str]:
    """`--sizes 224,448` or `--sizes=224,448` as `--sizes 224 448`, for `options` that take several numbers."""
    result, option = [], ""
    for word in words:
        if word.startswith("--"):
            option, _, value = word.partition("=")
            result += [option, *filter(None, value.split(","))] if option in options else [word]
        else:
            result += filter(None, word.split(",")) if option in options else [word]
    return result


def add_option(parser: Any, f: dataclasses.Field, hint: Any, recipes: bool) -> None:
    """One field of a settings class as an option, or as a word without a name.

    What is on already, by default or where `recipes` may say so, has an option that turns it off.
    """
    given: dict[str, Any] = {"help": f.metadata["help"]}
    if hint is bool:
        given["action"] = "store_true"
    elif hint in (list[int], list[float], list[str], list[str] | None):
        given |= {"nargs": "+", "type": str if hint == list[str] | None else typing.get_args(hint)[0]}
    else:
        given["type"] = str if hint == str | None else hint  # a text is never YAML: `null` is a name
    needed = f.default is f.default_factory is dataclasses.MISSING
    if not needed:
        given["default"] = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    if f.metadata.get("positional"):
        parser.add_argument(f.name, **given if needed else {"nargs": "?", **given})
        return
    option = f"--{f.name.replace('_', '-')}"
    parser.add_argument(option, **{"required": True, **given} if needed else given)
    if hint is bool and (given["default"] or recipes):
        off = f"--no-{option[2:]}"
        parser.add_argument(off, dest=f.name, action="store_false", default=SUPPRESS, help=f"not {option}")
