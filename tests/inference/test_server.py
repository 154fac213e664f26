"""The server as its clients meet it, over a socket; answers against those of `Predictor` for the same files."""

import base64
import http.client
import io
import json
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zlib
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from conftest import ROOT, choices, scene, small_model
from PIL import Image
from test_docs import SERVED, blocks, run_block

import glsim
from glsim import cli
from glsim.checkpoints.onnx_runtime import GraphModel
from glsim.cli import serve as verb
from glsim.data.images import open_image
from glsim.inference.predictor import Predictor, altered
from glsim.models.boxes import select_component
from glsim.models.plain import Plain
from glsim.models.scores import METRICS, needs_attention

serve = pytest.importorskip(
    "glsim.inference.server", reason="the extra demo is not installed", exc_type=glsim.ConfigError
)
from glsim.inference import server_limits  # noqa: E402
from glsim.inference.batcher import LOWEST, PredictRequest, Service  # noqa: E402

JPEG = {"Content-Type": "image/jpeg"}
_file = io.BytesIO()
scene((96, 64), 1).save(_file, "JPEG")
GOOD = _file.getvalue()


def ask(url, path, body=None, headers=None, method=None):
    """One request: status, JSON (or bytes), headers."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
        response = connection.getresponse()
        content = response.read()
        kind = response.getheader("content-type", "")
        return response.status, json.loads(content) if "json" in kind else content, dict(response.getheaders())
    finally:
        connection.close()


def form(files, fields=()):
    """Files (name, bytes) as the body of a form, and its headers."""
    mark = uuid.uuid4().hex
    parts = [f'name="images"; filename="{name}"\r\n\r\n'.encode() + content for name, content in files]
    parts += [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in fields]
    body = b"".join(f"--{mark}\r\nContent-Disposition: form-data; ".encode() + part + b"\r\n" for part in parts)
    return body + f"--{mark}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={mark}"}


def picture(url):
    """A data URL as an image."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def same(row, prediction):
    assert [a["label"] for a in row["answers"]] == list(prediction.labels)
    assert [a["probability"] for a in row["answers"]] == pytest.approx(prediction.probabilities, abs=1e-5)
    assert row["box"] == (list(prediction.box) if prediction.box else None)


def bomb(side):
    """A PNG file that claims `side` x `side` pixels and holds next to none."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9)))]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photographs of several kinds and sizes, one of them lying on its side."""
    folder = tmp_path_factory.mktemp("photos")
    scene((96, 64), 1).save(folder / "a.jpg")
    scene((64, 100), 2).save(folder / "b.png")
    scene((80, 80), 3).convert("RGBA").save(folder / "c.webp")
    lying = scene((120, 60), 4)
    lying.getexif()[0x0112] = 6
    lying.save(folder / "d.jpg", exif=lying.getexif())
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def site(run_folder):
    with serve.running(run_folder, port=0, max_mb=2, max_megapixels=1, queue=8) as url:
        yield url


@pytest.fixture
def held(run_folder, monkeypatch):
    """A server whose model waits for an event; also the sizes of the batches it was given."""
    going, sizes, real = threading.Event(), [], Service._ask

    def slow(self, decoded, request):
        sizes.append(len(decoded))
        assert going.wait(30)
        return real(self, decoded, request)

    monkeypatch.setattr(Service, "_ask", slow)
    with serve.running(run_folder, port=0, queue=6, batch_size=4, max_wait_ms=0) as url:
        yield url, going, sizes
        going.set()


def in_background(function, *arguments):
    """Call in a thread; the list gets the result."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments)))
    thread.start()
    return thread, found


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_the_answers_are_those_of_predict(site, run_folder, photos):
    expected = glsim.Predictor(run_folder)(photos)
    status, said, _ = ask(site, "/predict", *form([(p.name, p.read_bytes()) for p in photos]))
    assert status == 200 and [row["path"] for row in said["predictions"]] == [p.name for p in photos]
    for row, prediction in zip(said["predictions"], expected, strict=True):
        same(row, prediction)
    for path, prediction in zip(photos, expected, strict=True):
        status, said, _ = ask(site, "/predict?top_k=2", path.read_bytes(), {"Content-Type": "application/octet-stream"})
        (row,) = said["predictions"]
        assert status == 200 and row["path"] is None and "explanation" not in row
        same(row, prediction._replace(labels=prediction.labels[:2], probabilities=prediction.probabilities[:2]))


def test_another_mechanism_is_that_of_a_model_loaded_with_it(site, run_folder, photos):
    answers = []
    for metric, top_o in (("gls_l1", 2), ("attention:block=0", 9), ("rollout", None), (None, 16)):
        options = {k: v for k, v in (("metric", metric), ("top_o", top_o)) if v is not None}
        (expected,) = glsim.Predictor(glsim.load(run_folder, **options))(photos[0])
        query = "&".join(f"{k}={v}" for k, v in options.items())
        for more in ("", "&explain=true"):
            status, said, _ = ask(site, f"/predict?{query}{more}", photos[0].read_bytes(), JPEG)
            assert status == 200
            same(said["predictions"][0], expected)
        assert said["predictions"][0]["explanation"]["metric"] == (metric or "gls_border")
        assert said["predictions"][0]["explanation"]["used"] is True
        answers.append(expected.box)
    assert len(set(answers)) > 1
    same(
        ask(site, "/predict", photos[0].read_bytes(), JPEG)[1]["predictions"][0],
        glsim.Predictor(run_folder)(photos[0])[0],
    )


def test_pictures_show_the_map_the_box_and_the_crop(site, run_folder, photos):
    path = photos[3]  # lying on its side
    _, said, _ = ask(site, "/predict?explain=true&metric=psm", path.read_bytes(), JPEG)
    why, upright = said["predictions"][0]["explanation"], open_image(path)
    photo, heat, crop = (picture(why[name]) for name in ("photo", "heatmap", "crop"))
    assert why["title"] == "PSM" and why["size"] == list(upright.size) == list(photo.size) == [60, 120]
    assert np.abs(np.asarray(photo, float) - np.asarray(upright, float)).mean() < 3

    left, top, right, bottom = why["box"]
    assert why["box"] == said["predictions"][0]["box"] and crop.size == (right - left, bottom - top)
    assert np.abs(np.asarray(crop, float) - np.asarray(upright.crop(why["box"]), float)).mean() < 4

    model = glsim.load(run_folder, metric="psm")
    (expected,) = glsim.explain(model, path)
    opacity = np.asarray(heat.convert("RGBA").resize(upright.size, Image.Resampling.BOX))[..., 3] / 255
    inside = np.s_[24:96, 12:48]  # well within what the network is shown
    shown = (opacity[inside] - LOWEST) / (1 - LOWEST)
    assert heat.mode == "RGBA" and expected[inside].std() > 0.1
    assert np.abs(shown - expected[inside]).max() < 0.04
    assert opacity[0, 0] == 0  # the network is not shown the edge


@pytest.mark.parametrize(
    ("method", "own", "decides", "takes_top_o"),  # by its own metric, by another
    [
        ("plain", "gls_cos", (False, False), (True, True)),
        ("cal", "cal", (True, False), (False, True)),
        ("rams", "rams", (True, True), (False, False)),
    ],
)
def test_methods_that_choose_otherwise_say_so_or_only_draw(tmp_path, method, own, decides, takes_top_o, photos):
    glsim.save(small_model(method, "resnet18" if method == "cal" else "vit_tiny_patch16_224"), tmp_path / "b")
    (expected,) = glsim.Predictor(tmp_path / "b")(photos[0])
    with serve.running(tmp_path / "b", port=0) as url:
        model = ask(url, "/model")[1]
        metrics = [model["metrics"][0], next(m for m in model["metrics"] if m["name"] == "gls_l2")]
        assert metrics[0]["name"] == own and model["crops"] == (method != "plain")
        for metric, decided, takes in zip(metrics, decides, takes_top_o, strict=True):
            assert (metric["decides"], metric["top_o"]) == (decided, takes)
            query = f"/predict?explain=1&metric={metric['name']}"
            row = ask(url, query, GOOD, JPEG)[1]["predictions"][0]
            assert row["explanation"]["used"] == decided
            if metric["name"] == own or not decided:
                same(row, expected)
            status, said, _ = ask(url, query + "&top_o=1", GOOD, JPEG)
            if takes:  # a box of its own, and the answer as it was
                assert said["predictions"][0]["explanation"]["box"] != row["explanation"]["box"]
                same(said["predictions"][0], expected)
            else:
                assert status == 400 and "chooses its patches by another rule" in said["error"]


@pytest.mark.parametrize("method", glsim.METHODS)
def test_every_method_serves_every_metric_it_lists_and_is_left_as_it_was(method):
    model = small_model(method, args={"depth": 3})
    before, images = {k: v for k, v in vars(model).items() if not k.startswith("_")}, [scene((70, 50), 5)]
    content = io.BytesIO()
    images[0].save(content, "PNG")
    service = Service(model, "cpu", max_wait=0)
    try:
        assert set(METRICS) <= set(service.metrics())
        for metric in service.metrics():
            request = PredictRequest(metric=metric, top_o=3 if service.takes_top_o(metric) else None, explain=True)
            service.check(request)
            decoded = service.decode("x", content.getvalue(), request)
            answer = service.submit(decoded, request).result(30)
            assert sum(answer.prediction.probabilities) == pytest.approx(1, abs=1e-4)
            assert answer.heatmap.metric == metric and np.isfinite(answer.heatmap.values).all()
            assert picture(service.draw(decoded, answer)["crop"]).size
    finally:
        service.close()
    assert {k: v for k, v in vars(model).items() if not k.startswith("_")} == before


@pytest.mark.parametrize("margin", [0.0, 2.0])
def test_the_box_of_an_answer_after_one_pass_is_only_drawn(margin):
    """No two classes are closer than 0 in probability, and none farther apart than 2."""
    service = Service(small_model(early_loss=1.0, margin=margin), "cpu", max_wait=0)
    try:
        request = PredictRequest(explain=True)
        answer = service.submit(service.decode("x", GOOD, request), request).result(30)
        assert answer.prediction.second_pass is answer.heatmap.used is bool(margin)
    finally:
        service.close()


@pytest.mark.parametrize("method", ["glsim", "plain", "cal"])
def test_what_can_be_asked_does_not_depend_on_what_is_being_answered(method):
    """Requests are checked in other threads than the one that answers by another metric."""
    service = Service(small_model(method, "resnet18" if method == "cal" else "vit_tiny_patch16_224"), "cpu")

    def state():
        return (
            [(m, service.decides(m), service.takes_top_o(m)) for m in service.metrics()],
            service.metric,
            service.top_o,
        )

    try:
        before, own = state(), service.model.top_o
        other = altered(service.model, metric="random", top_o=1)
        assert state() == before and (other.metric, other.top_o) == ("random", 1) and service.model.top_o == own
    finally:
        service.close()


class OwnRule(Plain):
    """A method that draws scores by a rule of its own, with no number of patches."""

    top_o = None

    def select(self, scores, images):
        return select_component(scores, 1.0, self.backbone.grid_of(images), images.shape[-2:])


def test_a_method_declares_whether_its_rule_takes_a_number_of_patches():
    model = small_model("plain")
    model.__class__ = OwnRule
    service = Service(model, "cpu")
    try:
        assert not service.decides("gls_l2") and not service.takes_top_o("gls_l2")
        with pytest.raises(glsim.ConfigError, match="top_o: 'plain' chooses its patches by another rule"):
            service.check(PredictRequest(metric="gls_l2", top_o=3))
    finally:
        service.close()


def test_networks_without_attention_list_only_what_they_can_serve():
    service = Service(small_model("glsim", "convnext_atto"), "cpu")
    try:
        assert set(service.metrics()) == {m for m in METRICS if not needs_attention(m)}
        with pytest.raises(glsim.ConfigError, match="reads attention maps"):
            service.check(PredictRequest(metric="rollout"))
    finally:
        service.close()


# --- what is refused --------------------------------------------------------------------------------------------------


FORM = {"Content-Type": "multipart/form-data"}
BAD = {  # body, headers, status, what is said
    "empty": (b"", JPEG, 400, "empty file (0 bytes)"),
    "no image": (b"%PDF-1.7 rubbish", JPEG, 415, "not an image"),
    "half an image": (GOOD[: len(GOOD) // 2], JPEG, 400, "truncated"),
    "bomb": (bomb(40_000), JPEG, 413, "too large: 1600 megapixels, limit 1 (--max-megapixels)"),
    "just too large": (bomb(1_001), JPEG, 413, "too large: 1.002 megapixels, limit 1 (--max-megapixels)"),
    "too long": (b"x" * 2_000_001, JPEG, 413, "more than 2 MB"),
    "text": (GOOD, {"Content-Type": "text/plain"}, 415, "send images as multipart/form-data"),
    "curl's own": (GOOD, {"Content-Type": "application/x-www-form-urlencoded"}, 415, "send images as"),
    "untyped": (GOOD, {}, 415, "no Content-Type"),
    "form without boundary": (b"", FORM, 400, "oundary"),
    "broken form": (b"--x\r\nrubbish", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "form: "),
    "empty form": (*form([]), 400, "no file in it"),
    "options in the form": (*form([("a.jpg", GOOD)], [("top_k", 3)]), 400, "options go into the query"),
    "too many": (*form([("a.jpg", GOOD)] * 9), 400, "Too many files. Maximum number of files is 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_their_reason(site, case):
    body, headers, status, said = BAD[case]
    got, answer, _ = ask(site, "/predict", body, headers)
    assert got == status and said in answer["error"], answer
    assert ask(site, "/health")[1]["room"] == 8


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("topk=3", "'topk' is unknown; known: top_k, metric, top_o, explain"),
        ("top_k=3&top_k=4", "'top_k' twice"),
        ("top_k=0", "top_k=0: 1 to 100"),
        ("top_k=101", "top_k=101: 1 to 100"),
        ("top_k=three", "'three' is no whole number"),
        ("top_o=-1", "'-1' is no whole number"),
        ("top_o=17", "choose 1 to 16"),
        ("metric=psn", f"unknown metric 'psn'; {choices(METRICS)}"),
        ("metric=rollout:from=2", "has no from; it has: first, last"),
        ("metric=attention:block=9", "there is no block 9"),
        ("metric=random:seed=99999999999999999999", "numbers below 2147483648 are needed"),
        ("explain=maybe", "'maybe' is neither true nor false"),
    ],
)
def test_wrong_options_say_what_would_work(site, query, said):
    status, answer, _ = ask(site, f"/predict?{query}", GOOD, JPEG)
    assert status == 400 and said in answer["error"], answer


def test_bad_files_among_good_ones_are_rows_with_an_error(site, run_folder, photos):
    files = [
        ("good.jpg", GOOD),
        ("bad.jpg", b"rubbish"),
        ("cut.jpg", GOOD[:500]),
        ("big.png", bomb(2000)),
        ("b.png", photos[1].read_bytes()),
    ]
    status, said, _ = ask(site, "/predict", *form(files))
    rows = said["predictions"]
    assert status == 200 and [row["path"] for row in rows] == [name for name, _ in files]
    assert [row.get("status") for row in rows] == [None, 415, 400, 413, None]
    assert all(row["error"] for row in rows[1:4])
    same(rows[4], glsim.Predictor(run_folder)(photos[1])[0])
    status, said, _ = ask(site, "/predict", *form([("no \N{SNOWMAN}.jpg", b"rubbish")]))
    assert status == 415 and said["path"] == "no \N{SNOWMAN}.jpg" and said["error"].startswith("not an image")


def raw(url, *pieces):
    """Send bytes as they are; what comes back until the server closes or is silent for long."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return connection.recv(65536)


def test_a_large_upload_is_refused_before_it_is_read(site):
    """By its declared length before anything was sent, and without one as soon as there was too much."""
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
    assert b" 413 " in raw(site, head + b"Content-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n").splitlines()[0]
    pieces = [b"%x\r\n%s\r\n" % (500_000, b"x" * 500_000)] * 6  # 3 MB, and no end
    assert b" 413 " in raw(site, head + b"Transfer-Encoding: chunked\r\n\r\n", *pieces, b"0\r\n\r\n").splitlines()[0]
    assert ask(site, "/health")[1]["room"] == 8


HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
BODY = HEAD + b"Content-Length: 1000\r\n\r\n"


@contextmanager
def dawdling(url, count, sent):
    """Open connections that have sent `sent` and nothing more."""
    address = urlsplit(url)
    with ExitStack() as stack:
        opened = [
            stack.enter_context(socket.create_connection((address.hostname, address.port), 20)) for _ in range(count)
        ]
        for connection in opened:
            connection.sendall(sent)
        yield opened


def said_at_the_end(connection):
    """What comes until the server closes, also where it does so in the midst of something."""
    said = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            said += piece
    return said


@pytest.mark.parametrize("sent", [b"", b"P", HEAD, BODY, BODY + b"ab"], ids=["nothing", "P", "head", "empty", "body"])
def test_who_sends_slowly_closes_the_server_for_nobody(run_folder, sent):
    """More of them than there are places, and than there may be connections."""
    with serve.running(run_folder, port=0, queue=4) as url, dawdling(url, 300, sent):
        start = time.monotonic()
        for _ in range(3):
            assert ask(url, "/predict", *form([("a.jpg", GOOD)] * 4))[0] == 200
        assert ask(url, "/health")[1]["room"] == 4
        assert time.monotonic() - start < server_limits.HEAD_SECONDS / 2


@pytest.mark.parametrize(
    ("sent", "drop", "said"),
    [
        (b"", b"", b""),
        (b"P", b"O", b"the head of the request did not come in whole within 0.5 s"),
        (HEAD, b"x", b"the head of the request did not come in whole within 0.5 s"),
        (BODY, b"", b"the body of the request did not come in whole within 0.5 s"),
        (BODY, b"y", b"the body of the request did not come in whole within 0.5 s"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n", b"y", b'"status": "ok"'),
    ],
    ids=["nothing", "a method", "a head", "no body", "a body", "a body nobody asked for"],
)
def test_what_does_not_come_in_whole_ends(run_folder, monkeypatch, sent, drop, said):
    """However busily it trickles."""
    for name in ("HEAD_SECONDS", "READ_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(server_limits, name, 0.5)
    with serve.running(run_folder, port=0, queue=2) as url, dawdling(url, 3, sent) as opened:
        start = time.monotonic()
        with suppress(OSError):
            while time.monotonic() < start + 10:
                opened[0].sendall(drop)
                time.sleep(0.05)
                if not drop:
                    break
        found = [said_at_the_end(connection) for connection in opened]
        assert all(said in answer for answer in found[1:]) and time.monotonic() - start < 5
        assert all(not answer or b"content-security-policy" in answer.lower() for answer in found)
        if b"did not" in said:
            assert found[1].startswith(b"HTTP/1.1 408 ") and b"application/json" in found[1]
        assert ask(url, "/predict", GOOD, JPEG)[0] == 200


def test_who_does_not_fetch_the_answer_is_not_waited_for(run_folder, monkeypatch):
    monkeypatch.setattr(server_limits, "SEND_SECONDS", 0.5)
    asked = b"GET /examples/0 HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000  # 30 MB of answers
    with serve.running(run_folder, port=0) as url, dawdling(url, 1, asked) as (connection,):
        time.sleep(2)
        assert said_at_the_end(connection).count(b"HTTP/1.1 200 OK") < 1000


def test_bytes_on_their_way_are_bounded_and_the_oldest_go_first(run_folder, monkeypatch):
    monkeypatch.setattr(server_limits, "REQUESTS", 2)
    sent = HEAD + b"Content-Length: 1000000\r\n\r\n" + bytes(900_000)
    with (
        serve.running(run_folder, port=0, queue=2, max_mb=1) as url,
        dawdling(url, 1, sent) as first,
        dawdling(url, 4, sent) as later,
    ):
        assert b" 503 " in said_at_the_end(first[0]).splitlines()[0]
        assert ask(url, "/predict", GOOD, JPEG)[0] == 200
        kept = 0
        for connection in [*first, *later]:
            connection.setblocking(False)
            try:
                connection.recv(1)
            except BlockingIOError:
                kept += 1
            except OSError:
                pass
        assert kept <= 2


def test_one_address_does_not_push_out_another(run_folder, monkeypatch):
    monkeypatch.setattr(server_limits, "CONNECTIONS", 4)
    with serve.running(run_folder, port=0, queue=1, host="0.0.0.0") as url:
        port = urlsplit(url).port
        other = socket.create_connection(("127.0.0.1", port), 20, source_address=("127.0.0.2", 0))
        with other, dawdling(url, 20, b"P"):
            other.sendall(BODY + b"ab")
            assert ask(url, "/health")[0] == 200
            other.sendall(bytes(998))
            assert b" 415 " in other.recv(65536).splitlines()[0]


def test_a_client_that_leaves_takes_no_place(site):
    with dawdling(site, 1, BODY):
        assert ask(site, "/health")[1]["room"] == 8
    assert ask(site, "/predict", GOOD, JPEG)[0] == 200


NAMED = b'--q\r\nContent-Disposition: form-data; name="i"; filename="%s"\r\n\r\nx\r\n--q--\r\n'
DIGITS = b"9" * 6000
UNFORESEEN = {  # what is sent, status, what is said
    "a number of 6,000 digits": (b"GET /examples/%s HTTP/1.1" % DIGITS, 404, b"there are 5 examples"),
    "of a thumbnail": (b"GET /thumbnails/%s HTTP/1.1" % DIGITS, 404, b"there are 5 examples"),
    "another script's digit": (b"GET /examples/%D9%A1 HTTP/1.1", 404, b"there are 5 examples"),
    "no text": (b"GET /%00%ff%1b HTTP/1.1", 404, b"Not Found"),
    "a slash behind": (b"GET /health/ HTTP/1.1", 404, b"Not Found"),
    "a method of its own": (b"BREW /predict HTTP/1.1", 405, b"Method Not Allowed"),
    "trace": (b"TRACE / HTTP/1.1", 405, b"Method Not Allowed"),
    "everything": (b"OPTIONS * HTTP/1.1", 404, b"Not Found"),
    "a proxy's": (b"CONNECT evil.example:80 HTTP/1.1", 404, b"Not Found"),
    "another server's": (b"GET http://evil.example/health HTTP/1.1", 404, b"Not Found"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01", 400, b"Invalid HTTP request"),
    "HTTP 0.9": (b"GET /", 400, b"Invalid HTTP request"),
    "a path of 200 kB": (b"GET /%s HTTP/1.1" % (b"a" * 200_000), 400, b"Invalid HTTP request"),
    "a header of 200 kB": (b"GET / HTTP/1.1\r\nX: %s" % (b"a" * 200_000), 400, b"Invalid HTTP request"),
    "a long length": (b"POST /predict HTTP/1.1\r\nContent-Length: " + DIGITS, 400, b"Invalid HTTP request"),
    "no length": (b"POST /predict HTTP/1.1\r\nContent-Length: -1", 400, b"Invalid HTTP request"),
    "unknown coding": (b"POST /predict HTTP/1.1\r\nTransfer-Encoding: gzip", 400, b"Invalid HTTP request"),
    "a long option": (b"POST /predict?top_k=%s HTTP/1.1\r\nContent-Length: 0" % DIGITS, 400, b"is no whole number"),
    "a long seed": (
        b"POST /predict?metric=random:seed=%s HTTP/1.1\r\nContent-Length: 0" % DIGITS,
        400,
        b"random:seed=9",
    ),
    "a long origin": (b"GET /health HTTP/1.1\r\nOrigin: http://%s" % DIGITS, 403, b"sent by a page of 'http://999"),
    "a long type": (
        b"POST /predict HTTP/1.1\r\nContent-Type: %s\r\nContent-Length: 0" % DIGITS,
        415,
        b"send images as",
    ),
}
for charset, name, said in (
    (b"undefined", b"a", b"form: "),
    (b"utf-7", b"a\x1b[2J\xff", b"\\\\x1b[2J"),
    (b"unicode_escape", rb"\ud800\n\x9b", b"\\\\ud800\\\\n\\\\x9b"),
    (DIGITS, b"n" * 1000, b" .. (745 more characters)"),
):
    body = NAMED % name
    head = b"POST /predict HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=q; charset=" + charset
    UNFORESEEN[f"a name in {charset[:20].decode()}"] = (
        head + b"\r\nContent-Length: %d\r\nHost: localhost\r\nConnection: close\r\n\r\n" % len(body) + body,
        400 if charset == b"undefined" else 415,
        said,
    )


@pytest.mark.parametrize("case", UNFORESEEN)
def test_whatever_is_asked_the_answer_is_short_json(site, case, caplog):
    asked, status, said = UNFORESEEN[case]
    end = b"" if b"Host:" in asked else b"\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with dawdling(site, 1, asked + end) as (connection,):
        head, _, body = said_at_the_end(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"content-security-policy: " in head.lower()
    assert b"content-type: application/json" in head.lower() and said in body and json.loads(body)["error"]
    assert len(body) < 1500 and not set(body) & set(range(32)) and not caplog.text


def test_a_failure_of_the_server_itself_is_json_too(site, monkeypatch, caplog):
    def broken(*_):
        raise KeyError("\x1b[2J nothing of this is for the client")

    monkeypatch.setattr(serve, "read_query", broken)
    status, said, headers = ask(site, "/predict", GOOD, JPEG)
    assert (status, said) == (500, {"error": "the server failed: KeyError"})
    assert "content-security-policy" in headers
    until = time.monotonic() + 10
    while "nothing of this" not in caplog.text and time.monotonic() < until:
        time.sleep(0.05)  # the client is answered first, the log is written then
    assert "nothing of this" in caplog.text
    monkeypatch.setattr(serve.Guard, "wrong", broken)
    assert ask(site, "/health")[:2] == (500, {"error": "the server failed: KeyError"})
    assert "\x1b" not in caplog.text


def test_nothing_is_written_to_disk(site, monkeypatch):
    def rollover(self):
        raise AssertionError("an upload went to disk")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", rollover)
    large = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (700, 700, 3), np.uint8)).save(large, "PNG")
    assert len(large.getvalue()) > 1_400_000  # more than Starlette keeps in memory of its own accord
    status, said, _ = ask(site, "/predict", *form([("large.png", large.getvalue())]))
    assert status == 200 and said["predictions"][0]["answers"]


# --- many at once -----------------------------------------------------------------------------------------------------


def test_what_waits_is_answered_together(held):
    url, going, sizes = held
    first = in_background(ask, url, "/predict", GOOD, JPEG)
    wait_for(lambda: sizes == [1])  # the model is busy
    others = [in_background(ask, url, "/predict", GOOD, JPEG) for _ in range(5)]
    wait_for(lambda: ask(url, "/health")[1]["waiting"] == 6)
    time.sleep(0.3)  # until they are decoded
    going.set()
    for thread, found in [first, *others]:
        thread.join(30)
        assert found[0][0] == 200
    assert sizes == [1, 4, 1]
    assert ask(url, "/health")[1] | {"status": "ok"} == {
        "status": "ok",
        "waiting": 0,
        "room": 6,
        "answered": 6,
        "refused": 0,
        "failed": 0,
        "batches": 3,
    }


def test_a_full_queue_says_come_back(held):
    url, going, sizes = held
    first = in_background(ask, url, "/predict", *form([("a.jpg", GOOD)] * 5))
    wait_for(lambda: sizes)
    status, said, headers = ask(url, "/predict", *form([("a.jpg", GOOD)] * 2))
    assert status == 503 and headers["retry-after"] == "1" and "try again" in said["error"]
    last = in_background(ask, url, "/predict", GOOD, JPEG)
    wait_for(lambda: ask(url, "/health")[1]["room"] == 0)
    assert ask(url, "/predict", GOOD, JPEG)[0] == 503
    assert ask(url, "/health")[0] == 200
    going.set()
    for thread, found in (first, last):
        thread.join(30)
        assert found[0][0] == 200
    assert ask(url, "/predict", GOOD, JPEG)[0] == 200


def test_an_image_waits_no_longer_than_it_has_to(run_folder):
    """Alone it waits `max_wait` for company and no longer; a full batch does not wait at all."""
    service = Service(glsim.load(run_folder), "cpu", batch_size=2, max_wait=1.0)
    try:
        decoded = service.decode("x", GOOD, PredictRequest())
        start = time.monotonic()
        alone = service.submit(decoded, PredictRequest())
        alone.result(30)
        assert time.monotonic() - start >= 1.0
        start = time.monotonic()
        pair = [service.submit(decoded, PredictRequest()) for _ in range(2)]
        assert [future.result(30) for future in pair] and time.monotonic() - start < 0.9
        assert service.counts.batches == 2
    finally:
        service.close()


def test_requests_of_different_kinds_in_one_batch_keep_apart(held, run_folder):
    url, going, sizes = held
    first = in_background(ask, url, "/predict", GOOD, JPEG)
    wait_for(lambda: sizes == [1])
    queries = ["metric=gls_l1&top_o=2", "metric=attention:block=7", "top_k=1"]
    others = [in_background(ask, url, f"/predict?{query}", GOOD, JPEG) for query in queries]
    wait_for(lambda: ask(url, "/health")[1]["waiting"] == 4)
    time.sleep(0.3)
    going.set()
    for thread, _ in [first, *others]:
        thread.join(30)
    (status, said, _), (wrong, why, _), (_, short, _) = (found[0] for _, found in others)
    (expected,) = glsim.Predictor(glsim.load(run_folder, metric="gls_l1", top_o=2))(open_image("x", GOOD))
    assert status == 200 and (wrong, "no block 7" in why["error"]) == (400, True)
    same(said["predictions"][0], expected)
    assert len(short["predictions"][0]["answers"]) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [(torch.OutOfMemoryError("no room for it"), "OutOfMemoryError"), (StopIteration(), "RuntimeError")],
)
def test_a_model_that_fails_once_answers_the_next(run_folder, monkeypatch, caplog, error, said):
    real, failing = Service._ask, [True]

    def fails_once(self, decoded, request):
        if failing.pop() if failing else False:
            raise error
        return real(self, decoded, request)

    monkeypatch.setattr(Service, "_ask", fails_once)
    with serve.running(run_folder, port=0) as url:
        status, answer, _ = ask(url, "/predict", GOOD, JPEG)
        assert status == 500 and answer["error"] == f"the model failed: {said}"
        assert str(error) in caplog.text
        assert ask(url, "/predict", GOOD, JPEG)[0] == 200
        health = ask(url, "/health")[1]
        assert (health["failed"], health["answered"], health["room"]) == (1, 1, 64)


def test_an_image_that_the_model_fails_on_spoils_no_other(run_folder, monkeypatch, caplog):
    """Neither where it makes the whole batch fail, nor where its answer is no number."""
    real, dark = Predictor.predictions, []

    def spoilt(self, output, cuts):
        found, sizes = real(self, output, cuts), [cut.whole for cut in cuts]
        if (30, 30) in sizes:
            raise RuntimeError("\x1b[2J no such image")
        nan = (float("nan"),) * 3
        return [p._replace(probabilities=nan) if size == (31, 31) else p for p, size in zip(found, sizes, strict=True)]

    for side in (30, 31):
        file = io.BytesIO()
        scene((side, side)).save(file, "PNG")
        dark.append(file.getvalue())
    monkeypatch.setattr(Predictor, "predictions", spoilt)
    with serve.running(run_folder, port=0, max_wait_ms=300) as url:
        files = [("a.jpg", GOOD), ("raises\x1b.png", dark[0]), ("nan.png", dark[1]), ("b.jpg", GOOD), ("no", b"no")]
        status, said, _ = ask(url, "/predict", *form(files))
        rows = said["predictions"]
        assert status == 200 and [row.get("status") for row in rows] == [None, 500, 500, None, 415]
        assert rows[1]["error"] == "the model failed: RuntimeError" and "not finite" in rows[2]["error"]
        assert ask(url, "/predict", dark[1], JPEG)[0] == 500
        health = ask(url, "/health")[1]
        assert (health["answered"], health["failed"], health["refused"]) == (2, 3, 1)
    assert "no such image" in caplog.text and "\x1b" not in caplog.text


def test_pictures_that_cannot_be_drawn_are_a_failure(run_folder, monkeypatch):
    monkeypatch.setattr("glsim.inference.batcher.data_url", lambda *_, **__: 1 / 0)
    with serve.running(run_folder, port=0) as url:
        status, said, _ = ask(url, "/predict?explain=1", *form([("a.jpg", GOOD)]))
        assert status == 500 and said["path"] == "a.jpg" and "ZeroDivisionError" in said["error"]
        health = ask(url, "/health")[1]
        assert (health["answered"], health["failed"], health["room"]) == (0, 1, 64)


# --- who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:80"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:7860"}, 200),
        ({"Host": "192.168.7.9:7860"}, 200),
        ({"Host": socket.gethostname()}, 200),
        ({"Host": "evil.example"}, 403),  # a name of the attacker's that was made to point here
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost:80@evil.example"}, 403),
        ({"Host": "[evil"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:5", "Origin": "http://localhost:5"}, 200),
        ({"Host": "localhost:5", "Origin": "http://localhost:6"}, 403),
        ({"Host": "localhost:5", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:5", "Origin": "null"}, 403),
        ({"Host": "localhost:5", "Origin": "http://["}, 403),
    ],
)
def test_only_pages_of_this_server_may_ask(site, headers, status):
    got, said, _ = ask(site, "/predict", GOOD, JPEG | headers)
    assert got == status, said


def test_a_name_can_be_allowed(run_folder):
    with serve.running(run_folder, port=0, allowed_hosts=["Birds.example"]) as url:
        assert ask(url, "/health", headers={"Host": "birds.example:443"})[0] == 200
        assert ask(url, "/health", headers={"Host": "fish.example"})[0] == 403


def test_answers_carry_headers_that_shut_browsers_in(site):
    for path in ("/", "/page.js", "/health", "/nothing"):
        _, _, headers = ask(site, path)
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert not [name for name in headers if name.startswith("access-control")]
    _, _, headers = ask(site, "/predict", b"", {"Host": "evil.example"})
    assert "content-security-policy" in headers


@pytest.mark.parametrize(
    "path",
    [
        "/../config.py",
        "/%2e%2e/config.py",
        "/page/index.html",
        "/examples/5",
        "/examples/-1",
        "/examples/x",
        "/model.safetensors",
        "//etc/passwd",
        "/thumbnails/..%2f0",
    ],
)
def test_there_is_no_way_to_other_files(site, path):
    assert ask(site, path)[0] == 404


def test_the_page_needs_nothing_from_elsewhere(site):
    """Every address in what a browser is sent is one of this server."""
    for path in serve.PAGE:
        status, content, headers = ask(site, path)
        assert status == 200 and headers["content-type"].startswith("text/")
        assert not re.findall(rb"(?:https?:)?//[\w.]+\.\w+", content), path
    assert ask(site, "/predict")[0] == 405


def test_examples_are_drawn_birds_or_those_given(site, run_folder, photos, tmp_path):
    model = ask(site, "/model")[1]
    assert model["examples"] == [f"bird {i}.jpg" for i in range(1, 6)] and model["drawn"]
    assert open_image("x", ask(site, "/examples/4")[1]).size == (448, 448)
    for i in range(20):
        scene((300, 200), i).save(tmp_path / f"{i:02d}.png")
    with serve.running(run_folder, port=0, examples=str(tmp_path)) as url:
        model = ask(url, "/model")[1]
        assert model["examples"] == [f"{i:02d}.png" for i in (0, 2, 5, 7, 10, 12, 15, 17)] and not model["drawn"]
        assert ask(url, "/examples/1")[1] == (tmp_path / "02.png").read_bytes()
        assert open_image("x", ask(url, "/thumbnails/1")[1]).size == (192, 128)
    (tmp_path / "02.png").write_bytes(b"rubbish")
    with (
        pytest.raises(glsim.DataError, match=r"02\.png: not an image"),
        serve.running(run_folder, port=0, examples=str(tmp_path)),
    ):
        pass


def test_the_server_tells_what_it_serves_and_not_where_it_lies(site, run_folder):
    model = ask(site, "/model")[1]
    assert model["name"] == run_folder.name and str(run_folder.parent) not in json.dumps(model)
    assert model["labels"] == glsim.Predictor(run_folder).labels and model["patches"] == 16 and model["top_o"] == 4
    assert next(m["name"] for m in model["metrics"]) == "gls_border" and len(model["metrics"]) == len(METRICS)
    assert model["metrics"][0]["about"] == (
        "What the patch has more of the class token (cosine) than of the image's border: its mean patch."
    )
    assert model["limits"] == {"bytes": 2_000_000, "pixels": 1_000_000, "images": 8}
    assert model["calibrated"] is False


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("127.0.0.1", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("10.0.0.3", True),
        ("birds.example", True),
    ],
)
def test_what_others_can_reach(host, public):
    assert verb.is_public(host) is public


def start(*words):
    command = [sys.executable, "-m", "glsim.cli", "serve", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    while not (found := re.search(r"http://\S+", lines[-1] if lines else "")):
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
    return process, found[0], "".join(lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_it_after_what_it_took_in_was_answered(number, run_folder):
    public = ["--host", "0.0.0.0"] if number == signal.SIGINT else []
    process, url, said = start(run_folder, "--port", "0", "--max-wait-ms", "1500", "--json", *public)
    try:
        assert ("there is no password" in said) == bool(public)
        thread, found = in_background(ask, url, "/predict", GOOD, JPEG)  # waits for company: 1.5 s
        wait_for(lambda: ask(url, "/health")[1]["waiting"] == 1)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        thread.join(30)
        assert found[0][0] == 200 and found[0][1]["predictions"][0]["answers"]
        assert (process.returncode, err) == (0, "")
        summary = json.loads(out)
        assert (summary["answered"], summary["batches"], summary["url"]) == (1, 1, url)
        with pytest.raises(ConnectionRefusedError):
            ask(url, "/health")
    finally:
        process.kill()
        process.communicate()


def test_settings_that_cannot_be_are_one_sentence(run_folder, capsys, tmp_path):
    def said(*words):
        code = cli.main(["serve", *map(str, words)])
        return code, capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, err = said(run_folder, "--port", taken.getsockname()[1])
        assert code == 2 and "--port 0 takes any" in err
    code, err = said(run_folder, "--host", "no.such.host.invalid", "--port", 0)
    assert code == 2 and "no.such.host.invalid" in err
    assert said(run_folder, "--batch-size", 0) == (2, "glsim serve: batch_size=0: at least 1 is needed\n")
    assert said(run_folder, "--port", 70000)[0] == 2
    assert said(tmp_path / "none", "--port", 0)[0] == 3
    assert said(run_folder, "--port", 0, "--examples", tmp_path)[0] == 3


def test_an_exported_graph_is_not_served(capsys, monkeypatch):
    """It would be loaded like a bundle; it has nothing to draw from."""
    monkeypatch.setattr(serve, "load", lambda path: GraphModel([], {}, Path(path)))
    assert cli.main(["serve", "model.onnx", "--port", "0"]) == 2
    assert "model.onnx only answers" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(run_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "glsim.inference.server")
    assert cli.main(["serve", str(run_folder)]) == 2
    assert "pip install 'glsim[demo]'" in capsys.readouterr().err


def test_text_for_people():
    result = serve.Served("m", "http://x", answered=30, refused=2, failed=0, batches=12)
    assert verb.show(result, verb.Options(source="m")) == "stopped: 30 images answered, 2.5 at a time, 2 refused"


# --- docs/serve.md ----------------------------------------------------------------------------------------------------


def test_the_commands_of_the_docs_do_what_they_say(tmp_path, monkeypatch, run_folder):
    """Every curl line is run against a server; the JSON block below the first holds the keys and types it prints."""
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    monkeypatch.chdir(tmp_path)
    for name in ("photo.jpg", "other.jpg"):
        scene((96, 64)).save(name)
    Path("broken.jpg").write_bytes(b"rubbish")
    page = list(blocks(ROOT / "docs" / "serve.md"))
    commands = [
        line
        for block in page
        if block.language == "bash"
        for line in block.text.splitlines()
        if line.startswith("curl")
    ]
    assert len(commands) >= 4
    with serve.running(run_folder, port=0) as url:
        answers = [
            json.loads(
                subprocess.run(
                    shlex.split(c.replace(SERVED, url), comments=True), capture_output=True, check=True
                ).stdout
            )
            for c in commands
        ]
    shown = [json.loads(block.text) for block in page if block.language == "json"]
    assert len(shown) >= 3
    for example in shown:
        assert any(shape(example) == shape(answer) for answer in answers), example


def shape(value):
    """Keys and types of a JSON value; of a list, the different ones."""
    if isinstance(value, dict):
        return {key: shape(v) for key, v in value.items()}
    if isinstance(value, list):
        return sorted({json.dumps(shape(v)) for v in value})
    return type(value).__name__


def test_the_python_of_the_docs_runs(tmp_path, monkeypatch, run_folder):
    monkeypatch.chdir(tmp_path)
    scene((96, 64)).save("photo.jpg")
    clients = [b for b in blocks(ROOT / "docs" / "serve.md") if b.language == "python" and SERVED in b.text]
    assert clients
    with serve.running(run_folder, port=0) as url:
        for block in clients:
            said = run_block(block._replace(text=block.text.replace(SERVED, url)), {})
            (expected,) = glsim.Predictor(run_folder)("photo.jpg")
            assert expected.labels[0] in said
