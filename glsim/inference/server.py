"""HTTP server: web page and JSON API over the batcher.

Nothing that is sent is written to disk or kept after its answer. No path comes from outside.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import glsim
from glsim.checkpoints.bundle import load
from glsim.checkpoints.onnx_runtime import GraphModel
from glsim.data.images import BadImage
from glsim.files import one_line, printable, real
from glsim.inference.batcher import PredictRequest, Service
from glsim.inference.server_examples import Example, find_examples
from glsim.interpret.drawing import title_of
from glsim.models.scores import METRICS
from glsim.types import ConfigError, GlsimError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route
    from starlette.types import ASGIApp

    from glsim.inference.server_limits import Connection, Guard
    from glsim.inference.server_messages import Json, drain, log_error, read_files, read_query, say
except ImportError as error:
    raise ConfigError(f"serve needs more libraries ({error}): pip install 'glsim[demo]'") from error

GRACE_SECONDS = 10  # for what was taken in to be answered when the server is stopped
DRAIN_TIMES = 4  # how many times the limit of a request is still read of one that is refused
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
STATUS = {"too large": 413, "not an image": 415}  # by what the reason of a BadImage begins with; others: 400


@dataclass(eq=False)
class Site:
    """Answers of the server, by path."""

    service: Service
    name: str
    names: Iterable[str]  # it may be called by, besides addresses and localhost
    queue: int  # images taken in at most
    max_bytes: int  # of a request
    examples: list[Example]
    drawn: bool  # whether these are drawn birds

    def __post_init__(self) -> None:
        self.room = self.queue  # images that can still be taken in; only the event loop's thread touches it

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
        return Guard(app, {*self.names, "localhost", socket.gethostname()})

    # --- POST /predict --------------------------------------------------------------------------------------------

    async def predict(self, request: Request) -> Response:
        """Answer one or many images; what is asked of them stands in the query."""
        asked = read_query(request.query_params)
        self.service.check(asked)
        try:
            files = await read_files(request, self.queue, self.max_bytes)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        if len(files) > self.room:  # not before the body is there: who sends slowly takes nobody's place
            raise HTTPException(503, "too much to do; try again in a moment", {"Retry-After": "1"})
        self.room -= len(files)
        try:
            found: list[Any] = await asyncio.gather(
                *(self.answer(*file, asked) for file in files), return_exceptions=True
            )
        finally:
            self.room += len(files)
        for row in found:  # all have ended: the room is free again
            if isinstance(row, BaseException):
                raise row
        if len(found) == 1 and "error" in found[0]:
            return Json(found[0], found[0]["status"])
        return Json({"predictions": found})

    async def answer(self, name: str | None, content: bytes, asked: PredictRequest) -> dict[str, Any]:
        """One image's row of the response."""
        loop, service = asyncio.get_running_loop(), self.service
        try:
            decoded = await loop.run_in_executor(service.pool, service.decode, name or "image", content, asked)
            answer = await asyncio.wrap_future(service.submit(decoded, asked))
            row = answer.prediction._replace(path=name).as_dict()
            if asked.explain:
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
        """Say why, after what is still on its way: a client that writes does not listen."""
        await drain(request, DRAIN_TIMES * self.max_bytes)
        if isinstance(error, HTTPException):
            return say(error.status_code, error.detail, error.headers)
        if isinstance(error, ConfigError):
            return say(400, str(error))
        return say(500, f"the server failed: {type(error).__name__}")  # `Guard` says more, to whom it concerns

    # --- GET ------------------------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """Whether the model can answer, how much waits, what was done."""
        counts, alive = self.service.counts, self.service.alive
        body = {"status": "ok" if alive else "the model's thread has ended", "waiting": self.queue - self.room}
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
                "name": self.name,
                "method": config.method,
                "backbone": config.backbone,
                "image_size": list(service.preprocessing.image_size),
                "labels": service.predictor.labels,
                "calibrated": bool(config.calibration),
                "crops": service.selects,
                "metrics": metrics,
                "top_o": min(service.top_o or 8, rows * cols),
                "patches": rows * cols,
                "limits": {"bytes": self.max_bytes, "pixels": service.max_pixels, "images": self.queue},
                "examples": [e.name for e in self.examples],
                "drawn": self.drawn,
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
        found = [e for i, e in enumerate(self.examples) if str(i) == request.path_params["index"]]
        if not found:
            raise HTTPException(404, f"there are {len(self.examples)} examples, counted from 0")
        return found[0]

    async def file(self, request: Request) -> Response:
        """The page, its style, its script."""
        name, kind = PAGE[request.url.path]
        return Response((Path(__file__).parent / "page" / name).read_bytes(), media_type=kind)


def about(metric: str) -> str:
    """What a metric's docstring says first, without the shape; nothing for a method's own."""
    function = METRICS.get(metric.partition(":")[0])
    line = (inspect.getdoc(function) or "").partition("\n")[0] if function else ""
    return re.sub(r" \(B,[^)]*\)$", "", line)


@dataclass(frozen=True)
class Served:
    """What `serve` returns: what was done until the server was stopped."""

    source: str
    url: str
    answered: int  # images
    refused: int  # images that could not be read, or of which the model was asked what it cannot do
    failed: int  # images that the model failed on, or of which no picture could be drawn
    batches: int


def serve(source: str | Path, *, announce: Callable[[str], None] = lambda url: None, **options: Any) -> Served:
    """Serve the page and the API until SIGINT or SIGTERM; what was taken in by then is answered.

    Args:
        source: what `glsim.load` takes, no exported graph.
        announce: called with the address once the server listens there.
        options: those of `open_server`.

    Raises:
        KeyboardInterrupt: for a second SIGINT, which does not wait for answers.

    The others are those of `open_server`.
    """
    with open_server(source, **options) as (site, server, listener, url):
        announce(url)
        with signals_kept_from_ending():
            server.run(sockets=[listener])
    if server.force_exit:
        raise KeyboardInterrupt
    return Served(str(source), url, **asdict(site.service.counts))


@contextmanager
def running(source: str | Path, **options: Any) -> Iterator[str]:
    """A server in a thread of this process, for notebooks and tests: its address, until the block ends.

    `options` are those of `open_server`.
    """
    with open_server(source, **options) as (_, server, listener, url):
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
def open_server(
    source: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    allowed_hosts: Sequence[str] | None = None,
    batch_size: int = 16,
    max_wait_ms: float = 10.0,
    queue: int = 64,
    workers: int = 2,
    max_mb: float = 20.0,
    max_megapixels: float = 50.0,
    examples: str | None = None,
    device: str | None = None,
) -> Iterator[tuple[Site, uvicorn.Server, socket.socket, str]]:
    """Model loaded, port taken: the site, a server for it, the socket it is to listen on, and its address.

    Args:
        source: what `glsim.load` takes, no exported graph.
        host: address to listen on; 0.0.0.0 is every network this machine is in.
        port: port to listen on; 0 is any that is free.
        allowed_hosts: names it may be called by, besides addresses and localhost.
        batch_size: images answered together at most.
        max_wait_ms: milliseconds an image waits at most for others to be answered with.
        queue: images taken in at most; what comes then is refused (503) until some are answered.
        workers: threads that decode images.
        max_mb: megabytes of a request.
        max_megapixels: megapixels of an image.
        examples: folder or glob of images to try on the page; by default drawn birds.
        device: cpu, cuda, ..; by default the best there is.

    Raises:
        ConfigError: for an address or a port that cannot be had, or an exported graph.
        DataError: for a model or examples that are not there.
    """
    max_pixels, max_bytes = int(max_megapixels * 1e6), int(max_mb * 1e6)
    with listen(host, port) as listener:
        model = load(source)
        if isinstance(model, GraphModel):
            raise ConfigError(f"{source} only answers, the page shows why too; serve the bundle it was exported from")
        with closing(Service(model, device, batch_size, max_wait_ms / 1000, workers, max_pixels)) as service:
            name = str(source) if str(source).startswith("hf-hub:") else real(source).name
            found = find_examples(examples, max_pixels)
            names = [host, *(allowed_hosts or [])]
            site = Site(service, name, names, queue, max_bytes, found, drawn=examples is None)
            protocol: Any = partial(Connection, queue=queue, max_bytes=max_bytes, others=set())
            config = uvicorn.Config(
                site.app(),
                http=protocol,
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


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError where there is no such address or the port is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on host={host}, port={port}: {error.strerror}; --port 0 takes any") from error


@contextmanager
def signals_kept_from_ending() -> Iterator[None]:
    """Inside, uvicorn can hear SIGINT and SIGTERM and raise them again when it is done, without ending the process."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
