import errno
import json
import os

import pytest

from glsim.files import (
    ERROR_LENGTH,
    JSON_DEPTH,
    one_line,
    open_regular,
    printable,
    read_json,
    replacing,
    shorten,
    to_json,
    write_json,
    write_text,
)
from glsim.types import DataError


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
