"""Floor 4: the web page and the JSON API over `service.py`: what is let in, and what comes back.

Nothing that is sent is written to disk or kept after its answer. No path comes from outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import ipaddress
import logging
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

import glsim
from glsim import synthetic
from glsim.bundle import load
from glsim.config import Serve
from glsim.data import find_images
from glsim.files import one_line, printable, read_bytes, real, shorten, to_json
from glsim.graphs import GraphModel
from glsim.images import BadImage, open_image
from glsim.pictures import title_of
from glsim.selection import METRICS
from glsim.service import Service, Wish
from glsim.types import ConfigError, GlsimError

try:
    import h11
    import python_multipart  # noqa: F401  (Starlette reads forms with it)
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers, MutableHeaders, QueryParams
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
except ImportError as error:
    raise ConfigError(f"serve needs more libraries ({error}): pip install 'glsim[demo]'") from error

HEAD_SECONDS = 10  # for the head of a request to come in
READ_SECONDS = 30  # for its body
SEND_SECONDS = 60  # for an answer to be fetched
LINGER_SECONDS = 2  # for a refusal to be, while what is still being sent is thrown away
TICK_SECONDS = 0.25  # how often these are looked at
CONNECTIONS = 200  # at a time, besides one for each place in the queue
REQUESTS = 16  # whose bytes may be on their way together, where the queue is not longer
GRACE_SECONDS = 10  # for what was taken in to be answered when the server is stopped
DRAIN_SECONDS, DRAIN_TIMES = 5, 4  # how long, and how many times the limit, a refused request is still listened to
NAME_LENGTH = 255  # characters of a file's name that an answer repeats
EXAMPLES, THUMBNAIL = 8, 192  # how many, and pixels of the longer side
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
STATUS = {"too large": 413, "not an image": 415}  # by what the reason of a BadImage begins with; others: 400
log = logging.getLogger(__name__)


class Example(NamedTuple):
    """An image to try."""

    name: str
    content: bytes
    thumbnail: bytes  # JPEG


class Site:
    """What the server answers, by path."""

    def __init__(self, service: Service, s: Serve, examples: list[Example]) -> None:
        self.service, self.s, self.examples = service, s, examples
        self.room = s.queue  # images that can still be taken in; only the event loop's thread touches it
        self.max_bytes, self.max_pixels = int(s.max_mb * 1e6), int(s.max_megapixels * 1e6)
        folder = Path(__file__).parent / "page"
        self.page = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in PAGE.items()}

    def app(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            Route("/predict", self.predict, methods=["POST"]),
            Route("/health", self.health),
            Route("/model", self.model),
            Route("/examples/{index}", self.example),
            Route("/thumbnails/{index}", self.thumbnail),
            *(Route(path, self.file) for path in PAGE),
        ]
        told = dict.fromkeys((HTTPException, ConfigError, Exception), self.refuse)
        app = Starlette(routes=routes, exception_handlers=told)
        app.router.redirect_slashes = False
        return Guard(app, {*(self.s.allowed_hosts or []), self.s.host, "localhost", socket.gethostname()})

    def limits(self) -> Limits:
        """What those may take who are not being answered."""
        return Limits(CONNECTIONS + self.s.queue, max(REQUESTS, self.s.queue) * self.max_bytes, self.max_bytes)

    # --- POST /predict --------------------------------------------------------------------------------------------

    async def predict(self, request: Request) -> Response:
        """Answer one or many images; what is asked of them stands in the query."""
        wish = wish_of(request.query_params)
        self.service.check(wish)
        try:
            files = await self.files(request)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        held = self.hold(len(files))  # not before the body is there: who sends slowly takes nobody's place
        try:
            found = await asyncio.gather(*(self.answer(*file, wish) for file in files), return_exceptions=True)
        finally:
            self.room += held
        rows = []
        for row in found:  # all have ended: the room is free again
            if isinstance(row, BaseException):
                raise row
            rows.append(row)
        if len(rows) == 1 and "error" in rows[0]:
            return Json(rows[0], rows[0]["status"])
        return Json({"predictions": rows})

    def hold(self, images: int) -> int:
        """Take up room for `images` and return how many; refused where there is not enough."""
        if images > self.room:
            raise HTTPException(503, "too much to do; try again in a moment", {"Retry-After": "1"})
        self.room -= images
        return images

    async def files(self, request: Request) -> list[tuple[str | None, bytes]]:
        """The images of a request, by name."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            return await self.form(request)
        if kind.startswith("image/") or kind == "application/octet-stream":
            return [(None, b"".join([chunk async for chunk in self.body(request)]))]
        said = f"Content-Type {quoted(kind)}" if kind else "no Content-Type"
        raise HTTPException(
            415, f"{said}: send images as multipart/form-data, or the bytes of one as image/.. or octet-stream"
        )

    async def form(self, request: Request) -> list[tuple[str | None, bytes]]:
        """The files of a form."""
        parser = MultiPartParser(request.headers, self.body(request), max_files=self.s.queue, max_fields=0)
        parser.spool_max_size = self.max_bytes + 1  # all of it stays in memory
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

    async def body(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The body in pieces, up to the limit: a longer one is refused as soon as it is known to be."""
        so_far = 0
        refusal = HTTPException(413, f"the request is too large: more than {self.s.max_mb:g} MB")
        declared = request.headers.get("content-length", "0")
        if int(declared) > self.max_bytes:
            raise refusal
        async for chunk in request.stream():
            so_far += len(chunk)
            if so_far > self.max_bytes:
                raise refusal
            yield chunk

    async def answer(self, name: str | None, content: bytes, wish: Wish) -> dict[str, Any]:
        """One image's row of the response."""
        loop, service = asyncio.get_running_loop(), self.service
        try:
            decoded = await loop.run_in_executor(service.pool, service.decode, name or "image", content, wish)
            answer = await asyncio.wrap_future(service.submit(decoded, wish))
            row = answer.prediction._replace(path=name).as_dict()
            if wish.explain:
                row["explanation"] = await loop.run_in_executor(service.pool, service.draw, decoded, answer)
            return row
        except BadImage as error:
            status = next((code for start, code in STATUS.items() if error.reason.startswith(start)), 400)
            return {"path": name, "error": error.reason, "status": status}
        except ConfigError:
            raise
        except Exception as error:
            log_error(f"{printable(name)} could not be answered", error)
            said = one_line(error) if isinstance(error, GlsimError) else type(error).__name__
            return {"path": name, "error": f"the model failed: {said}", "status": 500}

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Say why. What is still on its way is read first, within limits: a client that writes does not listen."""
        if "expect" not in request.headers:
            left = DRAIN_TIMES * self.max_bytes
            with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: all was read
                async with asyncio.timeout(DRAIN_SECONDS):
                    async for chunk in request.stream():
                        left -= len(chunk)
                        if left < 0:
                            break
        if isinstance(error, HTTPException):
            return say(error.status_code, error.detail, error.headers)
        if isinstance(error, ConfigError):
            return say(400, str(error))
        return say(500, f"the server failed: {type(error).__name__}")  # `Guard` says more, to whom it concerns

    # --- GET ------------------------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """Whether the model can answer, how much waits, what was done."""
        counts, alive = self.service.counts, self.service.alive
        body = {"status": "ok" if alive else "the model's thread has ended", "waiting": self.s.queue - self.room}
        return Json({**body, "room": self.room, **asdict(counts)}, 200 if alive else 503)

    async def model(self, _: Request) -> Response:
        """What the page has to know."""
        service = self.service
        config = service.model.config
        metrics = [
            {
                "name": m,
                "title": title_of(m),
                "about": about(m),
                "decides": service.decides(m),
                "top_o": service.takes_top_o(m),
            }
            for m in service.metrics()
        ]
        rows, cols = service.model.backbone.grid
        return Json(
            {
                "name": self.s.source if self.s.source.startswith("hf-hub:") else real(self.s.source).name,
                "method": config["method"],
                "backbone": config["backbone"],
                "image_size": list(service.preprocessing.image_size),
                "labels": service.predictor.labels,
                "calibrated": bool(config.get("calibration")),
                "crops": service.selects,
                "metrics": metrics,
                "top_o": min(service.top_o or 8, rows * cols),
                "patches": rows * cols,
                "limits": {"bytes": self.max_bytes, "pixels": self.max_pixels, "images": self.s.queue},
                "examples": [e.name for e in self.examples],
                "drawn": self.s.examples is None,
                "version": glsim.__version__,
            }
        )

    async def example(self, request: Request) -> Response:
        """An example, as its file is."""
        return Response(self.find(request).content, media_type="application/octet-stream")

    async def thumbnail(self, request: Request) -> Response:
        """An example, small."""
        return Response(self.find(request).thumbnail, media_type="image/jpeg")

    def find(self, request: Request) -> Example:
        """The example that a path names."""
        found = {str(index): example for index, example in enumerate(self.examples)}.get(request.path_params["index"])
        if found is None:
            raise HTTPException(404, f"there are {len(self.examples)} examples, counted from 0")
        return found

    async def file(self, request: Request) -> Response:
        """The page, its style, its script."""
        content, kind = self.page[request.url.path]
        return Response(content, media_type=kind)


class Guard:
    """Lets in what is meant for this server, and sends the headers that keep a browser from being used against it.

    A page elsewhere can have its own name point at this machine (DNS rebinding) or send forms here: the first shows in
    the name it calls us by, the second in the origin.
    """

    def __init__(self, app: ASGIApp, names: set[str]) -> None:
        self.app, self.names = app, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            wrong = self.wrong(Headers(scope=scope))
            await (say(403, wrong) if wrong else self.app)(scope, receive, send_with_headers)
        except Exception as error:  # whatever it was: the client is told in the way of all other errors
            log_error("a request failed", error)
            if not started:
                await say(500, f"the server failed: {type(error).__name__}")(scope, receive, send_with_headers)

    def wrong(self, headers: Headers) -> str | None:
        """Why a request is not meant for us."""
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if name not in self.names and not is_address(name):
            return f"called by the name {quoted(name)}; allow it with --allowed-hosts, or call by address or localhost"
        try:
            same = origin is None or urlsplit(origin).netloc == host
        except ValueError:
            same = False
        if not same:
            return f"sent by a page of {quoted(origin or '')}; only the page of this server may"
        return None


class Limits(NamedTuple):
    """How much all connections may take together."""

    connections: int
    bytes: int  # of bodies that come in and of answers that are not fetched yet
    request: int  # bytes of one body; what comes after them is not kept


class Connection(H11Protocol):
    """A connection that is ended where its client takes too long, or where there are too many.

    A client's part is the head of a request, its body, and fetching the answer; each has a time limit, however busily
    bytes trickle. Above `limits`, the connection goes that waits longest for its client, of the address that has most
    such. One whose request is being answered is left alone.
    """

    def __init__(self, *args: Any, limits: Limits, others: set[Connection], **options: Any) -> None:
        super().__init__(*args, **options)
        self.limits, self.others = limits, others
        self.stage: tuple[Any, float | None] = ((None, ""), None)  # which part of which request, seconds it may take
        self.ended = False
        self.since, self.received = 0.0, 0  # when that began, bytes that have come in it

    # --- what uvicorn calls ---------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """A client is there."""
        super().connection_made(transport)
        self.others.add(self)
        self.look()
        if len(self.others) > self.limits.connections:
            self.drop_one()
        self.timer = self.loop.call_later(TICK_SECONDS, self.tick)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self.timer.cancel()
        self.others.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of it."""
        if self.ended:
            return
        self.received += len(data)
        super().data_received(data)
        self.look()
        if sum(other.weight for other in self.others) > self.limits.bytes:
            self.drop_one()

    def send_400_response(self, msg: str) -> None:
        """What it says is no HTTP."""
        self.end(400, msg)

    def shutdown(self) -> None:
        """The server stops: what is being answered is waited for."""
        self.look()
        if self.stage[0][1] in ("head", "body"):
            self.end(503, "the server stops")
        else:
            super().shutdown()

    # --- time and room --------------------------------------------------------------------------------------------

    def look(self) -> None:
        """See whose turn it is."""
        theirs = self.conn.their_state
        if self.ended:
            stage, seconds = "end", LINGER_SECONDS
        elif self.transport.get_write_buffer_size():
            stage, seconds = "answer", SEND_SECONDS
        elif theirs is h11.IDLE:
            stage, seconds = "head", HEAD_SECONDS
        elif theirs is h11.SEND_BODY:
            stage, seconds = "body", READ_SECONDS
        else:
            stage, seconds = "", None
        if ((self.cycle, stage), seconds) != self.stage:
            if stage != "body":
                self.received = 0
            self.stage, self.since = ((self.cycle, stage), seconds), self.loop.time()

    @property
    def weight(self) -> int:
        """Bytes that are kept for this client until it has done its part."""
        return min(self.received, self.limits.request) + self.transport.get_write_buffer_size()

    def tick(self) -> None:
        """End the connection where its client has taken too long."""
        self.look()
        (_, stage), seconds = self.stage
        if seconds is not None and self.loop.time() - self.since > seconds:
            self.end(408, f"the {stage} of the request did not come in whole within {seconds:g} s")
        self.timer = self.loop.call_later(TICK_SECONDS, self.tick)

    def drop_one(self) -> None:
        """Make room."""
        waiting = [other for other in self.others if other.stage[1] is not None]
        addresses = Counter(other.client and other.client[0] for other in waiting)
        if waiting:
            oldest = min(waiting, key=lambda other: (-addresses[other.client and other.client[0]], other.since))
            oldest.end(503, "too many connections at a time; try again in a moment")

    def end(self, status: int, error: str) -> None:
        """Say why, to a client that has said something and has no answer yet, and close; the second time at once."""
        told = self.received and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.ended
        if told:
            response = say(status, error)
            response.headers.update({**HEADERS, "Connection": "close"})
            head = h11.Response(status_code=status, headers=response.raw_headers, reason=STATUS_PHRASES[status])
            with contextlib.suppress(h11.LocalProtocolError):  # to a request that takes no body
                for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
        self.ended = True
        if self.cycle is not None:  # who reads the body hears that there is no client any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if told:
            self.flow.resume_reading()  # a client that is writing loses what it was told where nobody reads
            self.transport.write_eof()
            self.look()
        else:
            self.transport.abort()  # close would wait until all is fetched


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


def wish_of(query: QueryParams) -> Wish:
    """What the query asks for. Raises ConfigError for what it cannot mean."""
    kinds: dict[str, Callable[[str], Any]] = {"top_k": whole, "metric": str, "top_o": whole, "explain": yes_or_no}
    values: dict[str, Any] = {}
    for name, value in query.multi_items():
        if name not in kinds or name in values:
            raise ConfigError(
                f"query: {quoted(name)} {'twice' if name in values else 'is unknown'}; known: {', '.join(kinds)}"
            )
        values[name] = kinds[name](value)
    return Wish(**values)


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


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_public(host: str) -> bool:
    """Whether others than this machine can reach what listens at `host`."""
    return not (ipaddress.ip_address(host).is_loopback if is_address(host) else host == "localhost")


def about(metric: str) -> str:
    """What a metric's docstring says first, without the shape; nothing for a method's own."""
    function = METRICS.get(metric.partition(":")[0])
    line = (inspect.getdoc(function) or "").partition("\n")[0] if function else ""
    return re.sub(r" \(B,[^)]*\)$", "", line)


def find_examples(source: str | None, max_pixels: int) -> list[Example]:
    """Some images spread over a folder or glob; without one, drawn birds. Raises DataError for one that is bad."""
    if source is None:
        birds = [synthetic.draw(b, np.random.default_rng([0, i]), 448) for i, b in enumerate(synthetic.species(5))]
        return [as_example(f"bird {i}.jpg", as_jpeg(bird.image), bird.image) for i, bird in enumerate(birds, start=1)]
    paths = find_images(source)
    chosen = [paths[i * len(paths) // EXAMPLES] for i in range(EXAMPLES)] if len(paths) > EXAMPLES else paths
    contents = [read_bytes(path) for path in chosen]
    return [
        as_example(path.name, content, open_image(path, content, max_pixels))
        for path, content in zip(chosen, contents, strict=True)
    ]


def as_example(name: str, content: bytes, image: Image.Image) -> Example:
    """An example with its thumbnail."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return Example(name, content, as_jpeg(small))


def as_jpeg(image: Image.Image) -> bytes:
    """An RGB image as the bytes of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def run(s: Serve) -> dict[str, Any]:
    """The verb: serve until SIGINT or SIGTERM, answer what was taken in, and say how much was done.

    A second SIGINT does not wait for answers: KeyboardInterrupt.
    """
    with prepared(s) as (site, server, listener, url):
        if is_public(s.host):
            sys.stderr.write(f"host={s.host}: everybody who can reach this machine can use it, there is no password\n")
        sys.stderr.write(f"{url}  (Ctrl-C stops it)\n")
        sys.stderr.flush()
        with signals_heard():
            server.run(sockets=[listener])
    if server.force_exit:
        raise KeyboardInterrupt
    return {"source": str(s.source), "url": url, **asdict(site.service.counts)}


@contextmanager
def running(s: Serve) -> Iterator[str]:
    """The same in a thread of this process, for notebooks and tests: the server's address, until the block ends."""
    with prepared(s) as (_, server, listener, url):
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield url
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def prepared(s: Serve) -> Iterator[tuple[Site, uvicorn.Server, socket.socket, str]]:
    """Model loaded, port taken: the site, a server for it, the socket it is to listen on, and its address."""
    with listen(s.host, s.port) as listener:
        model = load(s.source)
        if isinstance(model, GraphModel):
            raise ConfigError(f"{s.source} only answers, the page shows why too; serve the bundle it was exported from")
        service = Service(model, s.device, s.batch_size, s.max_wait_ms / 1000, s.workers, int(s.max_megapixels * 1e6))
        try:
            site = Site(service, s, find_examples(s.examples, int(s.max_megapixels * 1e6)))
            config = uvicorn.Config(
                site.app(),
                http=partial(Connection, limits=site.limits(), others=set()),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="error",  # warnings are of what clients send
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
            host, port = listener.getsockname()[:2]
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
            yield site, uvicorn.Server(config), listener, f"http://{f'[{host}]' if ':' in host else host}:{port}"
        finally:
            service.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError where there is no such address or the port is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on host={host}, port={port}: {error.strerror}; --port 0 takes any") from error


@contextmanager
def signals_heard() -> Iterator[None]:
    """Inside, uvicorn can hear SIGINT and SIGTERM and raise them again when it is done, without ending the process."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
