"""The command line: verbs, options, exit codes. torch is imported only once the options are valid.

A verb is a file of this folder: `index_build.py` is `glsim index build`. It holds `PURPOSE` (its heading in the help),
`Options` (settings of `glsim.settings`; its docstring is the help), `CALL`, the function of the library that takes the
options and returns the result, or where that is not one call, `run(options, progress)`, which assembles it; and
`show(result, options)`, the same for people: a text, or its lines.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args, get_type_hints

from glsim import __version__
from glsim.cli.aliases import translate
from glsim.cli.errors import explain_error
from glsim.cli.output import libraries_apart, put
from glsim.cli.parser import parse
from glsim.files import check_writable, document, one_line, printable, shown, to_json
from glsim.settings import outputs
from glsim.types import ConfigError, DataWarning, GlsimError, bounded

FLAGS = ("--json", "--traceback")  # of every verb
PARTS = ("aliases", "errors", "options", "output", "parser")  # files of this folder that are no verbs
PURPOSES = ("Start", "Data", "Train", "Measure", "Answer", "Explain", "Share")  # headings of the help


class Verb(NamedTuple):
    """What the file of a verb holds."""

    purpose: str
    options: type
    run: Callable[[Any, bool], Any]  # options and whether to draw a progress bar; returns the result
    show: Callable[[Any, Any], str | Iterable[str]]  # result and options, every text in them made safe to print
    recipe: Callable[[str], Path] | None = None  # finds and checks the file of --recipe, for a verb that has it
    raw: bool = False  # `show` writes for programs too: it gets the texts as they are, and escapes them itself


def verb_names() -> list[str]:
    """The verbs, in the order of the alphabet."""
    names = {path.stem for path in Path(__file__).parent.glob("[a-z]*.py")} - set(PARTS)
    return sorted(name.replace("_", " ") for name in names)


def load_verb(name: str) -> Verb:
    """A verb by its name."""
    module = import_module(f"glsim.cli.{name.replace(' ', '_')}")
    more = {field: getattr(module, field.upper()) for field in ("recipe", "raw") if hasattr(module, field.upper())}
    run = partial(call_library, module.CALL) if hasattr(module, "CALL") else module.run
    return Verb(module.PURPOSE, module.Options, run, module.show, **more)


def call_library(name: str, options: Any, progress: bool) -> Any:
    """What a function of the library, `module:name`, makes of options; `progress` is for one that draws a bar."""
    function = resolve_name(name)
    bar = {"progress": progress} if "progress" in keywords_of(function) else {}
    return function(**vars(options), **bar)


def keywords_of(function: Callable[..., Any]) -> set[str]:
    """The arguments of a function, those of a TypedDict that it unpacks (PEP 692) too."""
    names = set(signature(function).parameters)
    for p in signature(function).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            (unpacked,) = get_args(get_type_hints(function)[p.name])
            names |= unpacked.__annotations__.keys()
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `glsim VERB ..`; returns the status: 0 ok, 1 failure, 2 usage, 3 data, 4 failed check, 130 interrupted.

    Whatever happens, with --json one document is printed, and without it the answer or one sentence.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    own = words[: words.index("--")] if "--" in words else words
    as_json, traced = (flag in own for flag in FLAGS)
    words = [word for word in own if word not in FLAGS] + words[len(own) :]
    closed = sys.stdout is None
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who called us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")  # what the encoding cannot say is escaped
    call = Call(as_json, os.environ.get("RANK", "0") == "0")  # of several processes one speaks
    try:
        code, text = call.answer(words)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if traced or os.environ.get("GLSIM_TRACEBACK"):
            with suppress(OSError):
                put("".join(traceback.format_exception(error)), sys.stderr)
        code, text = call.fail(error)
    finally:
        part_processes()
    if closed and text:
        return call.fail(GlsimError("standard output is closed, and the answer lost; --out keeps it in a file"))[0]
    try:
        put(text, sys.stdout)
    except BrokenPipeError:  # the reader of our output left: head, less
        return code or 1
    except OSError as error:
        return call.fail(error)[0]
    return code


class Call:
    """One call of the command line, and what is known of it by the time that something goes wrong."""

    def __init__(self, as_json: bool, speaks: bool) -> None:
        self.as_json, self.speaks = as_json, speaks
        self.name = "glsim"
        self.settings: Any = None
        self.notes: list[str] = []  # what a DataWarning said
        self.told: set[str] = set()

    def answer(self, words: list[str]) -> tuple[int, str]:
        """The status, and what is printed on stdout."""
        if not words and self.as_json:
            raise ConfigError(f"name a verb: {', '.join(verb_names())}")
        if not words or words[0] in ("-h", "--help"):
            return 0 if words else 2, usage()
        if words[0] == "--version":
            return 0, __version__
        words, note = translate(words)
        if note:
            self.tell(f"note: {note}")
        name, rest = split_verb(words)
        if name.split()[1:] in (["-h"], ["--help"]):
            return 0, usage(name.split()[0])
        if name not in verb_names():
            raise ConfigError(f"unknown verb {name!r}; choose from: {', '.join(verb_names())}")
        self.name, verb = f"glsim {name}", load_verb(name)
        with redirect_stdout(io.StringIO()) as printed:
            try:
                self.settings = parse(name, verb.options, rest, verb.recipe)
            except SystemExit as stop:  # it printed its help, or a recipe
                return int(stop.code or 0), printed.getvalue().rstrip("\n")
        for option, (path, role) in outputs(self.settings).items():
            try:
                check_writable(path, role == "folder")
            except GlsimError as error:
                raise type(error)(f"{option}={error}") from error
        with libraries_apart(), warnings.catch_warnings():
            warnings.simplefilter("always", DataWarning)
            warnings.showwarning = self.note
            result = verb.run(self.settings, sys.stderr.isatty() or not self.as_json)
        said = document(result)
        code = int(said.get("exit_code") or 0)  # of a verb that looked and found something wrong
        if not self.speaks:
            return code, ""
        if self.as_json:
            return code, self.document(said | {"notes": self.notes} if self.notes else said)
        settings = self.settings
        if not verb.raw:
            result, settings = shown(result), SimpleNamespace(**shown(vars(settings)))
        text = verb.show(result, settings)
        return code, text if isinstance(text, str) else "\n".join(text)

    def document(self, value: dict[str, Any]) -> str:
        """The JSON document; of ASCII where stdout cannot say everything."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return to_json(value, ascii=encoding.lower().replace("-", "") != "utf8")

    def note(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        """Show a warning as one line, once; what is said of the data also goes into the document."""
        if str(message) in self.told:
            return
        self.told.add(str(message))
        if issubclass(category, DataWarning):
            self.notes.append(str(message))
            self.tell(f"note: {message}")
        else:
            self.tell(f"note: {one_line(Warning(message))} ({category.__name__} of a library)")

    def tell(self, *lines: str) -> None:
        """Print lines for people, the first with the name of the verb."""
        with suppress(OSError):
            first, *more = [printable(bounded(line)) for line in lines]
            put("\n  ".join([f"{self.name}: {first}", *more]), sys.stderr)

    def fail(self, error: BaseException) -> tuple[int, str]:
        """Say on stderr what went wrong; returns the status, and with --json the document for stdout."""
        lines, code = explain_error(error, self.settings)
        self.tell(*lines)
        if not (self.as_json and self.speaks):
            return code, ""
        return code, self.document({"error": "\n  ".join(map(bounded, lines)), "exit_code": code})


def split_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb, of one word or of two (`index build`), and the words after it."""
    names = verb_names()
    count = 2 if " ".join(words[:2]) in names or (words[0] not in names and _family(words[0], names)) else 1
    return " ".join(words[:count]), list(words[count:])


def _family(first: str, names: Sequence[str]) -> list[str]:
    """The verbs of two words that begin with `first`."""
    return [name for name in names if name.startswith(f"{first} ")]


def part_processes() -> None:
    """Leave the process group of a run of several: threads of it that outlive Python abort the process now and then."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def usage(first: str = "") -> str:
    """What `glsim --help` prints, or `glsim FIRST --help` for the first word of a family of verbs."""
    names = _family(first, verb_names()) if first else verb_names()
    width = max(map(len, names))
    rows: dict[str, list[str]] = {purpose: [] for purpose in PURPOSES}
    for name in names:
        verb = load_verb(name)
        rows[verb.purpose].append(f"  {name:{width}}  {(verb.options.__doc__ or '').splitlines()[0]}")
    lines = ["usage: glsim VERB [options]", "", "Fine-grained image recognition.", ""]
    for purpose in filter(rows.get, PURPOSES):
        lines += [f"{purpose}:", *rows[purpose], ""]
    lines.append("glsim VERB --help tells the options of a verb; --json prints one JSON document,")
    return "\n".join([*lines, "--traceback where an error arose."])
