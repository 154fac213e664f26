"""Exceptions as sentences for people: what happened, what to change, and the exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from glsim.files import one_line
from glsim.types import GlsimError

# What libraries say when memory has run out, whatever class their error has.
MEMORY = (
    *("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "unable to mmap"),
    *("insufficient shared memory", "alloc_failed", "bad_alloc"),
)
PLAIN: tuple[tuple[type[BaseException], str, int], ...] = (  # what each is told as, and the status
    (UnicodeError, "a text is in another encoding than UTF-8: ", 3),
    (OSError, "", 1),  # a full disk, a folder that cannot be written
    (RecursionError, "something is nested too deeply: ", 1),
    (ImportError, "a library is missing or broken: ", 1),
    (SystemExit, "a library ended the program, with ", 1),
)
COSTLY = ("batch_size", "batch_sizes", "workers", "image_size", "sizes")  # settings that memory depends on


def explain_error(error: BaseException, settings: Any) -> tuple[list[str], int]:
    """What happened and what to change, in a sentence (and lines of details), and the status."""
    if isinstance(error, GlsimError):
        details = "".join(f"\n  {line}" for line in error.details)
        return [said(error).removesuffix(details), *error.details], error.exit_code
    for cause in causes(error):
        kind, text = type(cause), str(cause).lower()
        if kind is KeyboardInterrupt:  # while it imports, NumPy makes an ImportError of it
            return ["interrupted"], 130
        if "dataloader worker" in text and ("killed" in text or "exited unexpectedly" in text):
            advice = lower(settings, "workers", "batch_size")
            return [f"a process that loads images has died, mostly for want of memory: {said(cause)}; {advice}"], 1
        full = isinstance(cause, RuntimeError) and any(sign in text for sign in MEMORY)
        full = full or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
        if full or isinstance(cause, MemoryError) or kind.__name__ == "OutOfMemoryError":
            return [f"memory has run out: {said(cause)}; {lower(settings, *COSTLY)}"], 1
        if kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
            return [f"torch.compile does not work here: {said(cause)}; leave out --compile"], 1
        if "more than 1 value per channel" in text:
            advice = "a larger --batch-size or --image-size helps, or a backbone without batch norm"
            return [f"batch norm has only one value a channel: {said(cause)}; {advice}"], 1
        if kind.__name__ == "AcceleratorError":
            return [f"the device failed: {said(cause)}; see whether it works with --device cpu"], 1
    for wanted, told, code in PLAIN:
        if isinstance(error, wanted):
            return [told + said(error)], code
    advice = "please report it, with what --traceback (or GLSIM_TRACEBACK=1) shows"
    return [f"internal error: {type(error).__name__}: {said(error)}; {advice}"], 1


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the one that led to it, and so on."""
    known: list[BaseException] = []
    while error is not None and error not in known:
        known.append(error)
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def said(error: BaseException) -> str:
    """The text of an error: of our own all of it, of a library's the first line."""
    whole = isinstance(error, GlsimError) and "Traceback (most recent call last)" not in str(error)
    return str(error) if whole else one_line(error)


def lower(settings: Any, *names: str) -> str:
    """Advice to lower those of the settings `names` that this verb has."""
    had = {name: getattr(settings, name) for name in names if getattr(settings, name, 0) != 0}
    options = [f"--{n.replace('_', '-')}" + (f" (now {v})" if v is not None else "") for n, v in had.items()]
    return f"lower {' or '.join(options)}" if options else "a smaller model helps, or a machine with more memory"
