import csv
import errno
import io
import json
import os

import pytest

from glsim.files import (
    ERROR_LENGTH,
    JSON_DEPTH,
    MARKER,
    check_regular,
    check_writable,
    code_span,
    csv_plain,
    csv_text,
    expand,
    is_junk,
    make_folder,
    markdown,
    one_line,
    open_regular,
    parse_json,
    printable,
    read_json,
    read_lines,
    replacing,
    shorten,
    shown,
    to_json,
    write_json,
    write_text,
)
from glsim.types import LONGEST, MOST, ConfigError, DataError, GlsimError


def test_only_regular_files_are_opened_and_nothing_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for name in ("fifo", "link"):
        with pytest.raises(OSError, match="not a regular file") as error:
            open_regular(tmp_path / name)
        assert error.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="not a regular file"):
        open_regular("/dev/zero")
    with pytest.raises(IsADirectoryError, match="a folder"):
        open_regular(tmp_path / "folder")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    write_text(tmp_path / "file", "é")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == "é".encode()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "damaged"),
        ("[]", r"wanted an object, got \[\]"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": [-Infinity]}', "-Infinity is no JSON"),
        ('{"a": ' + "[" * 970 + "]" * 970 + "}", "more than 64 levels"),
        ("[" * 100_000, "more than 64 levels"),
        (b"\xff\xff{}", "utf-"),
    ],
)
def test_json_that_is_none_is_named(tmp_path, text, why):
    file = tmp_path / "x.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=why) as error:
        read_json(file)
    assert str(error.value).startswith(str(file))
    assert len(str(error.value)) < 1000


def test_json_as_deep_as_it_may_be(tmp_path):
    deep = {"a": 1}
    for _ in range(JSON_DEPTH - 2):
        deep = {"a": deep}
    write_json(tmp_path / "x.json", deep)
    assert read_json(tmp_path / "x.json") == deep


def test_a_fifo_for_a_json_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(DataError, match="not a regular file"):
        read_json(tmp_path / "x.json")


def test_json_has_no_nan():
    value = {"a": [float("nan"), (1.5, float("inf"))], "b": "菖蒲"}
    assert json.loads(to_json(value)) == {"a": [None, [1.5, None]], "b": "菖蒲"}


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x"
    write_text(file, "before")
    with pytest.raises(ZeroDivisionError), replacing(file) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["x"]


def test_text_for_people():
    assert printable("a\x1b[31m\nb\x07\u202egnp.\x9b") == r"a\x1b[31m\nb\x07\u202egnp.\x9b"
    assert printable("菖蒲 é\udcff") == r"菖蒲 é\udcff"
    assert shorten("a" * (ERROR_LENGTH + 7)).endswith("a .. (7 more characters)")
    assert one_line(ValueError("\n first \nsecond")) == "first"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 10**6))) < ERROR_LENGTH + 50


def test_json_shows_nothing_unseen_and_may_be_ascii():
    value = {"a\x9b": "\u2028 \u202e \x1b\n \u83d6 \u00e9 \U0001f426", "b": ["\udcff"]}
    for text in (to_json(value), to_json(value, indent=2), to_json(value, ascii=True)):
        assert json.loads(text.encode("utf-8", "backslashreplace")) == value
        assert not set(text) & set("\x9b\u2028\u202e\x1b")
    assert to_json(value, ascii=True).isascii() and "\u83d6" in to_json(value)


def test_every_text_of_a_value_is_shown():
    assert shown({"a\n": ["b\x1b", ("c\x07", 1.5, None)]}) == {"a\\n": ["b\\x1b", ("c\\x07", 1.5, None)]}


FORMULAS = ["=1+1", "+x", "-2+3", "@x", " =1", "'=x", "''@x", "\uff1d1", "-", "=cmd|' /C calc'!A0"]
TEXTS = ["a=b", "'x", "", "-5", "+1.5e-3", ".5", "-.5", "plain", "a;=1"]


def test_csv_for_spreadsheets_and_back():
    cells = [*FORMULAS, *TEXTS]
    row = next(csv.reader(io.StringIO(csv_text([[*cells, -3, -1.5, True, None, "\t=1", "\r\nx", 'a,"b']]))))
    written = row[: len(cells)]
    assert written == [*(f"'{cell}" for cell in FORMULAS), *TEXTS]
    assert [csv_plain(cell) for cell in written] == cells
    assert row[len(cells) :] == ["-3", "-1.5", "True", "", r"\t=1", r"\r\nx", 'a,"b']


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a\n# b", r"a\\n# b"),
        ("# a", r"\# a"),
        ("- a", r"\- a"),
        ("1. a", r"1\. a"),
        ("---", r"\---"),
        ("001.Black_footed_Albatross", "001.Black_footed_Albatross"),
        ("_a_ *b* `c` [d](e) <f> |", r"\_a\_ \*b\* \`c\` \[d\](e) \<f\> \|"),
        ("&lt; & AT&T", r"\&lt; & AT&T"),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("\x1b[31m", r"\\x1b\[31m"),
    ],
)
def test_nothing_in_a_text_is_markdown(text, escaped):
    assert markdown(text) == escaped


def test_code_spans_hold_backticks_and_line_ends():
    assert code_span("a") == "`a`" and code_span("a`b\n") == r"`` a`b\n ``" and code_span("``") == "``` `` ```"


@pytest.mark.parametrize("kind", ["", "hf:", "wds:", "local-dir:"])
def test_the_home_folder(monkeypatch, kind):
    monkeypatch.setenv("HOME", "/h")
    assert expand(f"{kind}~/x") == f"{kind}/h/x" and expand(f"{kind}~") == f"{kind}/h"
    for path in ("a/~/x", "x~", "~nobody-of-this-name/x", ""):
        assert expand(kind + path) == kind + path
    assert expand("s3://~/x") == "s3://~/x" and expand("hf-hub:~/x") == "hf-hub:~/x"


def test_what_can_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("gone")
    for name in ("photos/a.jpg", "photos/.DS_Store", "ours/a.jpg", "ours/.glsim", "mixed/a.jpg", "mixed/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.rglob("*"))
    for name, folder in [
        ("file", False),
        ("new/a", False),
        ("folder", True),
        ("new/folder", True),
        ("folder/a", False),
        ("ours", True),
    ]:
        check_writable(tmp_path / name, folder)
    for name, folder, said in [
        ("file", True, "is a file; name a folder"),
        ("folder", False, "is a folder; name a file"),
        ("file/a/b", False, "file, which is a file"),
        ("file/a/b", True, "file, which is a file"),
        ("fifo", False, "not a regular file"),
        ("fifo", True, "name a folder"),
        ("link", True, "link to what is not there"),
        ("photos", True, "holds images that glsim did not write"),
        ("mixed", True, "holds images that glsim did not write"),
    ]:
        with pytest.raises(ConfigError, match=said) as error:
            check_writable(tmp_path / name, folder)
        assert str(error.value).startswith(str(tmp_path / name))
    for name in ("/proc/x", "/proc/new/x", str(tmp_path / ("x" * 300))):
        with pytest.raises(GlsimError, match="cannot be written"):
            check_writable(name)
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_are_bounded_and_travel():
    import pickle

    error = DataError("a" * 10**6 + " what works", details=[f"line {i}" + "b" * 10**5 for i in range(1000)])
    lines = str(error).split("\n  ")
    assert len(lines) == 1 + MOST + 1 and max(map(len, lines)) < LONGEST + 60
    assert "characters left out" in lines[0] and lines[0].endswith(" what works") and lines[-1] == ".. and 950 more"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.details) == (DataError, str(error), error.details)
    assert str(DataError("x")) == "x" and str(DataError("x", details=["y", "z"])) == "x\n  y\n  z"


def test_what_a_worker_process_said_is_at_the_end_of_its_traceback():
    text = "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n{0}: {1}"
    assert one_line(ValueError(text.format("ValueError", "no good\nmore"))) == "no good"
    assert one_line(RuntimeError(text.format("other.Odd", "no good"))) == "other.Odd: no good"


def test_lines_end_with_a_line_feed_alone(tmp_path):
    (tmp_path / "a").write_text("a\u2028b\x0c\x85\x1c\r\n\nc\n", encoding="utf-8", newline="")
    assert read_lines(tmp_path / "a") == ["a\u2028b\x0c\x85\x1c", "", "c"]


def test_a_file_is_read_up_to_a_size(tmp_path):
    for name in ("x.json", "y.json"):
        (tmp_path / name).write_text("{}")
    os.truncate(tmp_path / "x.json", 3 * 2**30)  # sparse: it takes no room
    with pytest.raises(
        DataError, match=r"x\.json is damaged or cannot be read: .*3,221,225,472 bytes, more than the 16,7"
    ):
        read_json(tmp_path / "x.json")
    with pytest.raises(DataError, match="more than the 1 that"):
        read_json(tmp_path / "y.json", most=1)
    assert read_json(tmp_path / "y.json", most=2) == {}
    with pytest.raises(DataError, match="no name of a file"):
        read_json(f"{tmp_path}/a\0b")


def test_many_small_values_are_read_at_once():
    assert len(parse_json("[" + "[]," * 300_000 + "0]", list)) == 300_001


@pytest.mark.parametrize(
    "name", ["@SynoEAStream", "RECYCLED", "found.000", "SYNOPHOTO_THUMB_XL.jpg", "a.sync-conflict-1.jpg"]
)
def test_more_that_systems_put_there(name):
    assert is_junk(name) and not is_junk("..") and not is_junk("thumbs") and not is_junk("@home")


def test_what_would_be_lost_is_not_replaced(tmp_path):
    for name in (
        "photos/a.jpg",
        "photos/notes.txt",
        "run/config.json",
        "run/curve.png",
        "a.webp",
        "thesis.txt",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name, folder, said in [
        ("photos", True, "holds images that glsim did not write"),
        ("a.webp", False, "is an image, and would be replaced"),
        ("run/config.json", False, "is part of a model, and would be replaced"),
    ]:
        with pytest.raises(ConfigError, match=said):
            check_writable(tmp_path / name, folder)
    for name, folder in [("run", True), ("thesis.txt", False), ("README.md", False), ("run/answers.json", False)]:
        check_writable(tmp_path / name, folder)


def test_a_way_back_marks_nobodys_folder(tmp_path):
    (tmp_path / "iris").mkdir()
    (tmp_path / "iris" / "1.jpg").touch()
    make_folder(tmp_path / "iris" / "new" / ".." / "pictures")
    assert (tmp_path / "iris" / "pictures" / MARKER).is_file() and not (tmp_path / "iris" / MARKER).exists()


def test_a_file_of_the_system_that_would_be_waited_for_is_refused(tmp_path, monkeypatch):
    """As /proc/kmsg, which is regular, says that it is empty, and has nothing to read yet."""
    (tmp_path / "empty").touch()
    with open_regular(tmp_path / "empty") as file:
        assert file.read() == b""
    closed, close = [], os.close

    def read(*_):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "read", read)
    monkeypatch.setattr(os, "close", lambda number: closed.append(number) or close(number))
    for look in (open_regular, check_regular):
        with pytest.raises(OSError, match="with nothing to read yet"):
            look(tmp_path / "empty")
    assert len(closed) == 2
