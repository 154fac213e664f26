"""Requests to the server: options in the query, images in the body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

import python_multipart  # noqa: F401  (Starlette reads forms with it)
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from glsim.files import one_line, printable, shorten
from glsim.inference.batcher import PredictRequest
from glsim.inference.server_replies import quoted
from glsim.types import ConfigError

DRAIN_SECONDS = 5  # how long a request that is refused is still read
NAME_LENGTH = 255  # characters of a file's name that an answer repeats


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
