"""Replies of the server: JSON that is valid whatever stands in it, errors, and the headers of every answer."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from glsim.files import printable, shorten, to_json

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
log = logging.getLogger(__name__)


class Json(JSONResponse):
    """A value as JSON that is valid whatever stands in it."""

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return to_json(content).encode("utf-8", "backslashreplace")


def say(status: int, error: str, headers: Mapping[str, str] | None = None) -> Json:
    """An error as every client gets it: JSON, and short whatever the client sent."""
    return Json({"error": printable(shorten(error))}, status, headers)


def quoted(text: object) -> str:
    """What a client sent, in a sentence to it whose end it is to see."""
    return repr(shorten(text, 100))


def log_error(what: str, error: Exception) -> None:
    """Say on the server's side what failed and where; a client's text cannot act on a terminal."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    log.error("%s", "\n".join([what, *map(printable, lines)]))
