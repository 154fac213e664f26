"""What is printed: the answer whole or not at all, and nothing of a library among it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any


def put(text: str, stream: Any) -> None:
    """Print `text`, if there is any. Raises OSError where it does not arrive; nor does Python try again as it ends."""
    if not text:
        return
    try:
        print(text, file=stream, flush=True)
    except OSError:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        raise


@contextmanager
def libraries_apart() -> Iterator[None]:
    """Inside, what is printed on stdout goes to stderr, past Python too: stdout is for the answer."""
    own, saved = sys.stdout, None
    with suppress(OSError, ValueError, AttributeError):
        if own.fileno() == 1 and sys.stderr.fileno() == 2:
            own.flush()
            saved = os.dup(1)
            os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            with suppress(OSError):
                own.flush()  # what those said who hold the stream from before
            os.dup2(saved, 1)
            os.close(saved)
