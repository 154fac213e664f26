"""What a run remembers of the conditions it was made under."""

import shutil
import subprocess
import sys

import pytest
import torch

from glsim.environment import commit, environment, processor


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_of_a_checkout_and_whether_it_was_changed(tmp_path):
    def git(*words):
        said = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(said, check=True, capture_output=True, text=True).stdout.strip()

    assert commit(tmp_path) is None
    git("init")
    assert commit(tmp_path) is None  # nothing was committed yet
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "a")
    assert commit(tmp_path) == git("rev-parse", "HEAD") and len(commit(tmp_path)) == 40
    (tmp_path / "b.py").write_text("new, not part of the source yet")
    assert "changes" not in commit(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert commit(tmp_path) == git("rev-parse", "HEAD") + "+changes"
    (tmp_path / "below").mkdir()
    assert commit(tmp_path / "below") is None  # a package installed below somebody else's checkout


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None


def test_versions_device_command_and_date(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["glsim", "train"])  # pytest's own is another one in each of its processes
    about = environment(torch.device("cpu"))
    assert set(about) == {"date", "command", "commit", "versions", "device"}
    assert (
        about["versions"]["torch"] == torch.__version__.split("+")[0] or about["versions"]["torch"] == torch.__version__
    )
    assert about["device"] == f"cpu ({processor()}, threads: {torch.get_num_threads()})"
    assert torch.backends.cpu.get_cpu_capability() in processor()
    assert about["date"].endswith("+00:00") and about["command"] == "glsim train"
