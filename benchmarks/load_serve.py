"""Put `glsim serve` under load: many clients, some of their requests rubbish; check every answer and the memory.

    python benchmarks/load_serve.py runs/flowers flowers/test
    python benchmarks/load_serve.py runs/flowers flowers/test --requests 2000 --clients 50 --options --batch-size 32

Starts a server in a process of its own, on a free port of this machine, and answers the same images by `Predictor` to
compare with. One request in ten is rubbish (text, half an image, an image of too many pixels, a body that is too long,
an option that is unknown, a client that leaves) and has to be refused as such; all others have to be answered, with
the label of `Predictor` and its probability to 1e-3. A client that meets a full queue (503) comes back after the time
the server names. Resident memory is read after each fifth of the requests, the first of which is for warming up.

Exit code 4 where a good request failed, a bad one did not, or the memory grew by more than a tenth after the warm-up.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

import glsim
from glsim.data.image_files import find_images

NOT_HELD = 4
RUBBISH, GROWTH = 0.1, 0.1  # share of the requests; share that the memory may grow by
HEADERS = {"Content-Type": "application/octet-stream"}
MAX_MB = 4


def bomb() -> bytes:
    """A PNG file that claims 40,000 x 40,000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9)))]
    packed = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


# What to send in place of an image, and the status that has to come back.
BAD: dict[str, tuple[Callable[[bytes], tuple[str, bytes]], int]] = {
    "text": (lambda _: ("/predict", b"this is no image"), 415),
    "half an image": (lambda image: ("/predict", image[: len(image) // 2]), 400),
    "too many pixels": (lambda _: ("/predict", bomb()), 413),
    "too long": (lambda _: ("/predict", bytes(MAX_MB * 1_000_000 + 1)), 413),
    "unknown option": (lambda image: ("/predict?topk=3", image), 400),
}


def main() -> int:
    """Parse, start the server, load it, report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="bundle")
    parser.add_argument("images", help="folder or glob")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the order and of the rubbish")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="handed to glsim serve; comes last")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    paths = find_images(arguments.images)
    paths = chance.sample(paths, min(len(paths), 60))
    images = [path.read_bytes() for path in paths]
    truth = glsim.Predictor(arguments.source)(paths)
    server, port = start(arguments.source, arguments.options)
    try:
        load = Load(port, images, truth)
        process = psutil.Process(server.pid)
        jobs = [
            (chance.randrange(len(images)), chance.random() < RUBBISH, chance.random())
            for _ in range(arguments.requests)
        ]
        fifth = -(-len(jobs) // 5)
        memory, started = [process.memory_info().rss], time.perf_counter()
        with ThreadPoolExecutor(arguments.clients) as clients:
            for first in range(0, len(jobs), fifth):
                list(clients.map(load.request, jobs[first : first + fifth]))
                memory.append(process.memory_info().rss)
        seconds = time.perf_counter() - started
        health = load.ask("GET", "/health")[1]
    finally:
        server.terminate()
        code = server.wait(30)
    return report(load, health, memory, seconds, arguments.clients, code)


def start(source: str, options: list[str]) -> tuple[subprocess.Popen[str], int]:
    """A server on a free port."""
    command = [sys.executable, "-m", "glsim.cli", "serve", source, "--port", "0", "--max-mb", str(MAX_MB), *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"http://\S+:(\d+)", line):
            threading.Thread(
                target=lambda: print(*server.stderr or "", sep="", end="", file=sys.stderr), daemon=True
            ).start()
            return server, int(found[1])
        print(line, end="", file=sys.stderr)
    raise SystemExit(server.wait())


class Load:
    """What the clients do, and what they met."""

    def __init__(self, port: int, images: list[bytes], truth: list[glsim.Prediction]) -> None:
        self.port, self.images, self.truth = port, images, truth
        self.latencies: list[float] = []
        self.met: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.own = threading.local()

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """One request on this thread's connection: status and JSON."""
        for _ in range(200):
            if not hasattr(self.own, "connection"):
                self.own.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            connection = self.own.connection
            try:
                connection.request(method, path, body, HEADERS if body is not None else {})
                response = connection.getresponse()
                said = json.loads(response.read())
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                # The server closes a connection that was idle, or whose request it refused: HTTP says to open another.
                connection.close()
                del self.own.connection
                self.met["connections opened again"] += 1
                continue
            if response.status != 503:
                return response.status, said
            self.met["full (503)"] += 1
            time.sleep(float(response.headers["Retry-After"]))
        raise RuntimeError(f"{method} {path}: never let in")

    def request(self, job: tuple[int, bool, float]) -> None:
        """Send one image, or rubbish, and check what comes back."""
        index, rubbish, which = job
        if rubbish:
            self.send_rubbish(index, which)
            return
        begun = time.perf_counter()
        status, said = self.ask("POST", "/predict", self.images[index])
        self.latencies.append(time.perf_counter() - begun)
        row, expected = said.get("predictions", [{}])[0], self.truth[index]
        best = (row.get("answers") or [{"label": None, "probability": 0}])[0]
        right = best["label"] == expected.labels[0] and abs(best["probability"] - expected.probabilities[0]) < 1e-3
        self.met["answered"] += right
        if not (status == 200 and right):
            self.wrong.append(f"{expected.path}: {status} {said}, expected {expected.labels[0]}")

    def send_rubbish(self, index: int, which: float) -> None:
        """Something that has to be refused."""
        kinds = [*BAD, "leaves"]
        kind = kinds[int(which * len(kinds))]
        self.met["rubbish"] += 1
        if kind == "leaves":
            with socket.create_connection(("127.0.0.1", self.port)) as connection:
                head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
                connection.sendall(head + b"Content-Length: 100000\r\n\r\n" + self.images[index][:100])
            return
        make, expected = BAD[kind]
        status, said = self.ask("POST", *make(self.images[index]))
        if status != expected or not said.get("error"):
            self.wrong.append(f"{kind}: {status} {said}, expected {expected}")


def report(load: Load, health: dict[str, Any], memory: list[int], seconds: float, clients: int, code: int) -> int:
    """Print what was seen; the exit code."""
    cuts = statistics.quantiles(load.latencies, n=100)
    total = len(load.latencies) + load.met["rubbish"]
    print(
        f"{total} requests from {clients} clients in {seconds:.1f} s: {load.met['answered']} answered right, "
        f"{load.met['rubbish']} rubbish, {len(load.wrong)} not as they should be"
    )
    print(
        f"{load.met['answered'] / seconds:.1f} images/s, {health['answered']} images in {health['batches']} batches, "
        f"mean {health['answered'] / max(1, health['batches']):.2f}"
    )
    print(
        f"latency of good requests: median {1000 * cuts[49]:.0f} ms, 90 % {1000 * cuts[89]:.0f} ms, "
        f"99 % {1000 * cuts[98]:.0f} ms, longest {1000 * max(load.latencies):.0f} ms"
    )
    print(
        f"met: a full queue (503) {load.met['full (503)']} times, "
        f"{load.met['connections opened again']} connections that had to be opened again"
    )
    print("resident memory, MB: " + ", ".join(f"{m / 1e6:.0f}" for m in memory) + " (start, after each fifth)")
    problems = load.wrong[:5]
    if memory[-1] > (1 + GROWTH) * memory[1]:
        problems.append(f"memory grew by {memory[-1] / memory[1] - 1:.0%} after the first fifth")
    if health["waiting"]:
        problems.append(f"{health['waiting']} places were not given back")
    if code:
        problems.append(f"the server ended with {code}")
    print(*(f"not held: {problem}" for problem in problems), sep="\n", end="\n" if problems else "")
    return NOT_HELD if problems else 0


if __name__ == "__main__":
    sys.exit(main())
