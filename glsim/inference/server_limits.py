"""Limits of the server: hosts that may ask, number of connections, time-outs, bytes of a request.

A page elsewhere can have its own name point at this machine (DNS rebinding) or send forms here: `Guard` refuses both.
A client that is slow takes nobody's place: `Connection` ends what takes too long.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from glsim.inference.server_messages import HEADERS, log_error, quoted, say

HEAD_SECONDS = 10  # for the head of a request to come in
READ_SECONDS = 30  # for its body
SEND_SECONDS = 60  # for an answer to be fetched
LINGER_SECONDS = 2  # for a refusal to be, while what is still being sent is thrown away
TICK_SECONDS = 0.25  # how often these are looked at
CONNECTIONS = 200  # at a time, besides one for each place in the queue
REQUESTS = 16  # whose bytes may be on their way together, where the queue is not longer


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
        name, same = "", origin is None
        with contextlib.suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""
        with contextlib.suppress(ValueError):
            same = same or urlsplit(origin or "").netloc == host
        if name not in self.names and not is_address(name):
            return f"called by the name {quoted(name)}; allow it with --allowed-hosts, or call by address or localhost"
        return None if same else f"sent by a page of {quoted(origin or '')}; only the page of this server may"


class Connection(H11Protocol):
    """A connection that is ended where its client takes too long, or where there are too many.

    A client's part is the head of a request, its body, and fetching the answer; each has a time limit, however busily
    bytes trickle. The server takes in `queue` images, and `max_bytes` in a request; what comes after them is not kept.
    Where all connections are too many, or hold too many bytes of bodies and of answers that are not fetched yet, that
    one goes that waits longest for its client, of the address that has most such. One whose request is being answered
    is left alone.
    """

    def __init__(self, *args: Any, queue: int, max_bytes: int, others: set[Connection], **options: Any) -> None:
        super().__init__(*args, **options)
        self.max_bytes, self.others = max_bytes, others
        self.most, self.most_bytes = CONNECTIONS + queue, max(REQUESTS, queue) * max_bytes
        self.stage: tuple[Any, float | None] = ((None, ""), None)  # which part of which request, seconds it may take
        self.ended = False
        self.since, self.received = 0.0, 0  # when that began, bytes that have come in it

    # --- what uvicorn calls ---------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """A client is there."""
        super().connection_made(transport)
        self.others.add(self)
        self.look()
        if len(self.others) > self.most:
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
        if sum(other.weight for other in self.others) > self.most_bytes:
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
        return min(self.received, self.max_bytes) + self.transport.get_write_buffer_size()

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


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
