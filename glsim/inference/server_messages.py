"""Requests to the server, options in the query and images in the body; its replies, JSON whatever stands in it."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from typing import Any

import python_multipart  # noqa: F401  (Starlette reads forms with it)
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from glsim.files import one_line, printable, shorten, to_json
from glsim.inference.batcher import PredictRequest
from glsim.types import ConfigError

DRAIN_SECONDS = 5  # how long a request that is refused is still read
NAME_LENGTH = 255  # characters of a file's name that an answer repeats
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
log = logging.getLogger(__name__)


async def read_files(request: Request, most: int, max_bytes: int) -> list[tuple[str | None, bytes]]:
    """The images of a request, at most `most`, with their names; HTTPException for what is none or too much."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await read_form(request, most, max_bytes)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [(None, b"".join([chunk async for chunk in read_body(request, max_bytes)]))]
    said = f"Content-Type {quoted(kind)}" if kind else "no Content-Type"
    raise HTTPException(
        415, f"{said}: send images as multipart/form-data, or the bytes of one as image/.. or octet-stream"
    )


async def read_form(request: Request, most: int, max_bytes: int) -> list[tuple[str | None, bytes]]:
    """The files of a form."""
    parser = MultiPartParser(request.headers, read_body(request, max_bytes), max_files=most, max_fields=0)
    parser.spool_max_size = max_bytes + 1  # all of it stays in memory
    try:
        form = await parser.parse()
    except (ClientDisconnect, HTTPException):
        raise
    except MultiPartException as error:
        what = "options go into the query, as /predict?top_k=3" if "fields" in error.message else error.message
        raise HTTPException(400, f"form: {what}") from None
    except Exception as error:  # of a charset that cannot decode names, and what else a client may think of
        raise HTTPException(400, f"form: {one_line(error)}") from None
    files: list[tuple[str | None, bytes]] = []
    for _, file in form.multi_items():
        assert not isinstance(file, str)  # max_fields
        files.append((printable(shorten(file.filename, NAME_LENGTH)), await file.read()))
        await file.close()
    if not files:
        raise HTTPException(400, "form: no file in it; as curl -F images=@photo.jpg")
    return files


async def read_body(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body in pieces, up to the limit: a longer one is refused as soon as it is known to be."""
    so_far = 0
    refusal = HTTPException(413, f"the request is too large: more than {max_bytes / 1e6:g} MB")
    declared = request.headers.get("content-length", "0")
    if int(declared) > max_bytes:
        raise refusal
    async for chunk in request.stream():
        so_far += len(chunk)
        if so_far > max_bytes:
            raise refusal
        yield chunk


async def drain(request: Request, most: int) -> None:
    """Read what is still on its way, up to `most` bytes and for some seconds; nothing of who waits to be asked."""
    if "expect" in request.headers:
        return
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: all was read
        async with asyncio.timeout(DRAIN_SECONDS):
            async for chunk in request.stream():
                most -= len(chunk)
                if most < 0:
                    break


def read_query(query: QueryParams) -> PredictRequest:
    """The options in a query. Raises ConfigError for what it cannot mean."""
    kinds: dict[str, Callable[[str], Any]] = {"top_k": whole, "metric": str, "top_o": whole, "explain": yes_or_no}
    values: dict[str, Any] = {}
    for name, value in query.multi_items():
        if name not in kinds or name in values:
            raise ConfigError(
                f"query: {quoted(name)} {'twice' if name in values else 'is unknown'}; known: {', '.join(kinds)}"
            )
        values[name] = kinds[name](value)
    return PredictRequest(**values)


def whole(value: str) -> int:
    """A whole number."""
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise ConfigError(f"query: {quoted(value)} is no whole number")
    return int(value)


def yes_or_no(value: str) -> bool:
    """True or false."""
    if value.lower() not in ("1", "true", "0", "false"):
        raise ConfigError(f"query: {quoted(value)} is neither true nor false")
    return value.lower() in ("1", "true")


# --- replies ----------------------------------------------------------------------------------------------------------


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
