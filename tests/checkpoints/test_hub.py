"""To the Hub and back. A folder stands for it: what huggingface_hub would send lies there, laid out like its cache."""

import fnmatch
import hashlib
import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.hub_mixin
import pytest
import torch
import yaml
from conftest import TINY, assert_same_weights, small_model
from huggingface_hub.errors import EntryNotFoundError

import glsim
from glsim import ConfigError, DataError, GlsimError, cli
from glsim.checkpoints import hub
from glsim.checkpoints.bundle import FILES
from glsim.checkpoints.push import push_bundle
from glsim.cli.push import Options
from glsim.training import runs, train
from glsim.training.config import Train


class Folder:
    """A Hub in a folder: repositories as snapshots of links to blobs, the way the library's cache holds them."""

    def __init__(self, root):
        self.root, self.private, self.asked = root, {}, []

    def snapshot(self, name):
        return self.root / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"

    def create_repo(self, repo_id, private, exist_ok):
        self.private[repo_id] = private
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id, folder_path, commit_message, **_):
        place = self.snapshot(repo_id)
        blobs = place.parent.parent / "blobs"
        shutil.rmtree(place, ignore_errors=True)
        blobs.mkdir(parents=True, exist_ok=True)
        place.mkdir(parents=True)
        for file in Path(folder_path).iterdir():
            blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            (place / file.name).symlink_to(Path("../..") / "blobs" / blob.name)
        return f"https://hub.example/{repo_id}/commit/abc"

    def hf_hub_download(self, repo_id, filename, **_):
        file = self.snapshot(repo_id) / filename
        if not file.parent.is_dir():
            raise OSError(f"no repository {repo_id}\nand more")
        if not file.is_file():
            raise EntryNotFoundError(filename)
        return str(file)

    def snapshot_download(self, repo_id, allow_patterns, revision, **more):
        inspect.signature(huggingface_hub.snapshot_download).bind(repo_id, **more)
        self.asked.append((repo_id, revision))
        names = [p.name for p in self.snapshot(repo_id).iterdir()]
        assert all(any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns) for name in names)
        return str(self.snapshot(repo_id))


@pytest.fixture
def the_hub(tmp_path, monkeypatch):
    folder = Folder(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", lambda token: folder)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", folder.hf_hub_download)
    monkeypatch.setattr(hub, "snapshot_download", folder.snapshot_download)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_a_token")
    return folder


@pytest.fixture
def bundle(tmp_path):
    model = small_model()
    measured = {"top1": 0.9, "correct": 9, "count": 10, "top5": 1.0, "per_class_mean": 0.9}
    data = {"source": "flowers", "counts": {"train": 50, "test": 10}, "split_hash": "ab" * 32}
    licence = {"data": "CC BY-SA 4.0", "backbone": "apache-2.0"}
    return glsim.save(model, tmp_path / "b", list("abcde"), metrics={"test": measured}, data=data, licence=licence)


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_there_and_back(the_hub, bundle, capsys):
    (bundle / "train.yaml").write_text("data: /home/somebody/flowers")  # of the run, not of the bundle
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    assert cli.main(["push", str(bundle), "owner/name", "--licence", "cc-by-nc-4.0"]) == 0
    assert capsys.readouterr().out == (
        "pushed: https://hub.example/owner/name/commit/abc (licence cc-by-nc-4.0)\nload it: hf-hub:owner/name\n"
    )
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before  # what lies here stays as it was
    sent = the_hub.snapshot("owner/name")
    assert sorted(p.name for p in sent.iterdir()) == sorted(FILES)
    config = json.loads((sent / "config.json").read_text())
    assert config["licence"] == {"data": "CC BY-SA 4.0", "backbone": "apache-2.0", "model": "cc-by-nc-4.0"}
    timm = config["pretrained_cfg"]
    assert timm["license"] == "cc-by-nc-4.0" and timm["input_size"] == [3, 64, 64]
    assert (config["architecture"], config["num_classes"]) == ("vit_tiny_patch16_224", 5)
    head = front_matter(sent)
    assert head["license"] == "cc-by-nc-4.0" and head["library_name"] == "glsim"
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.9
    assert "of the images: CC BY-SA 4.0" in (sent / "README.md").read_text()

    images = torch.randn(2, 3, 64, 64)
    model = glsim.load("hf-hub:owner/name")
    assert_same_weights(model, glsim.load(bundle))
    torch.testing.assert_close(model(images).logits, glsim.load(bundle)(images).logits, atol=1e-5, rtol=1e-5)
    assert model.config.label_names == list("abcde")
    glsim.load("hf-hub:owner/name@v1", top_o=2)
    assert the_hub.asked == [("owner/name", None), ("owner/name", "v1")]
    push_bundle(run=str(sent), repository="other/name", private=True)  # its licence is known by now
    assert front_matter(the_hub.snapshot("other/name"))["license"] == "cc-by-nc-4.0"
    assert the_hub.private == {"owner/name": None, "other/name": True}


def test_nothing_goes_without_a_licence_a_token_or_a_whole_bundle(the_hub, bundle, monkeypatch, tmp_path):
    settings = {"run": str(bundle), "repository": "owner/name"}
    with pytest.raises(
        ConfigError, match=r"give one: --licence apache-2.0 \(of the weights it started from: apache-2.0;"
    ):
        push_bundle(**settings)
    for wrong in ("unknown", " "):
        with pytest.raises(ConfigError, match="licence='.*': name the licence"):
            Options(**settings, licence=wrong)
    for wrong in ("name", "a/b/c", "a b/c"):
        with pytest.raises(ConfigError, match="owner/name is needed"):
            Options(run="b", repository=wrong, licence="mit")
    with pytest.raises(DataError, match="none is no bundle folder; make one with"):
        push_bundle(run=str(tmp_path / "none"), repository="owner/name", licence="mit")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token for the Hub: log in once with `hf auth login`, or set HF_TOKEN"):
        push_bundle(**settings, licence="mit")
    monkeypatch.setattr(hub, "get_token", lambda: "hf_a_token")
    weights = bytearray((bundle / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match="is damaged"):
        push_bundle(**settings, licence="mit")
    (bundle / "model.safetensors").unlink()
    (tmp_path / "secret").write_text("a private key")
    (bundle / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="was refused: it is a link to .*secret, outside of the bundle"):
        push_bundle(**settings, licence="mit")
    assert not the_hub.root.exists()


def test_no_network_is_one_sentence(bundle, monkeypatch, capsys):
    """The library itself, towards a port where nobody listens."""
    monkeypatch.setattr(hub, "get_token", lambda: "hf_a_token")
    api = huggingface_hub.hub_mixin.HfApi
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", lambda token: api("http://127.0.0.1:9", token))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the library tries five times
    assert cli.main(["push", str(bundle), "owner/name", "--licence", "mit"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("glsim push: owner/name could not be pushed: ") and len(said.splitlines()) == 1
    for name in ("nobody/nothing", "a/b/c"):
        with pytest.raises(DataError, match=f"hf-hub:{name} cannot be had: .+") as error:
            glsim.load(f"hf-hub:{name}")
        assert len(str(error.value).splitlines()) == 1


def test_what_is_no_bundle_over_there(the_hub, tmp_path):
    with pytest.raises(DataError, match="hf-hub:owner/none cannot be had: no repository owner/none"):
        glsim.load("hf-hub:owner/none")
    for name, text, message in (
        ("list", "[]", "hf-hub:owner/list cannot be had"),
        ("broken", "{", "hf-hub:owner/broken cannot be had"),
        ("other", '{"architecture": "resnet18", "files": {"model.safetensors": "/etc/passwd"}}', "it lacks method"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(text)
        the_hub.upload_folder(f"owner/{name}", folder, "")
        with pytest.raises(DataError, match=message):
            glsim.load(f"hf-hub:owner/{name}")


def test_an_error_of_the_http_library_is_one_sentence(monkeypatch):
    class ProxyError(Exception):
        pass

    def refuse(**_):
        raise ProxyError("503 from the proxy\nand more")

    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", refuse)
    with pytest.raises(DataError, match="^hf-hub:owner/name cannot be had: 503 from the proxy$"):
        glsim.load("hf-hub:owner/name")


def test_what_a_run_says_of_its_origin(birds, tmp_path, run_folder):
    """The card of a run: what it was trained on and how, what came out, and under which licences."""
    head, card = front_matter(run_folder), (run_folder / "README.md").read_text()
    config, metrics = (json.loads((run_folder / name).read_text()) for name in ("config.json", "metrics.json"))
    assert config["licence"] == {"data": "unknown", "backbone": "none, trained from nothing"}
    assert config["training"]["start"] == "nothing" and config["training"]["epochs"] == TINY["epochs"]
    assert "license" not in head and "base_model" not in head
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == metrics["test"]["top1"]
    test = metrics["test"]
    assert f"- test: top-1 {test['top1']:.2%} ({test['correct']} of {test['count']})" in card
    assert "18 train, 9 test images, split hash" in card and config["data"]["split_hash"][:16] in card
    assert "of the weights it started from: none, trained from nothing; of the images: unknown" in card

    first = glsim.save(glsim.load(run_folder), tmp_path / "first", licence={"model": "mit"})
    settings = TINY | {"epochs": 1, "data": str(birds), "init_from": str(first), "data_licence": "CC0"}
    train.train(Train(out=str(tmp_path / "second"), **settings), progress=False)
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["licence"] == {"data": "CC0", "backbone": "mit"} and config["training"]["start"] == "first"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"pretrained": True}, ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "unknown", "apache-2.0")),
        (
            {"pretrained": True, "dataset": "pets"},
            ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "CC BY-SA 4.0", "apache-2.0"),
        ),
        (
            {"pretrained": True, "backbone_args": {"checkpoint_path": "x"}},
            ("weights named in backbone_args", "unknown", "unknown"),
        ),
        ({"pretrained": False, "dataset": "cub"}, ("nothing", "none in its README", "none, trained from nothing")),
    ],
)
def test_licences_follow_from_the_settings(settings, wanted):
    """Of a pre-trained network timm says it, of a named data set the catalogue."""
    s = Train(data="d", out="o", **settings)
    found = runs.provenance(s, small_model(), 16)
    assert (found["training"]["start"], found["licence"]["data"], found["licence"]["backbone"]) == wanted
    assert found["training"]["batch_size"] == 16


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the library, whose temporary folder survives an error
def test_errors_have_the_right_exit_codes(bundle, the_hub, monkeypatch):
    assert cli.main(["push", str(bundle), "owner/name"]) == 2
    assert cli.main(["push", str(bundle / "none"), "owner/name", "--licence", "mit"]) == 3
    monkeypatch.setattr(the_hub, "upload_folder", lambda **_: (_ for _ in ()).throw(OSError("the Hub is full")))
    with pytest.raises(GlsimError, match="owner/name could not be pushed: the Hub is full"):
        push_bundle(run=str(bundle), repository="owner/name", licence="mit")


def test_labels_are_no_markdown_in_the_card(tmp_path):
    labels = ["a\n# b", "[x](http://y)", "<img src=z>", "| c |", "001.Black_footed"]
    folder = glsim.save(
        small_model(),
        tmp_path / "b",
        labels,
        licence={"data": "none\n\n## free\n---\n"},
        data={"source": "d`\n# e", "counts": {"tr\nain": 1}, "split_hash": "0`\n"},
        calibration={"count": 1, "data": "v`\n# f"},
    )
    text = (folder / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# glsim on vit_tiny_patch16_224"]
    assert lines.count("---") == 2
    assert r": a\\n# b, \[x\](http://y), \<img src=z\>, \| c \|, 001.Black_footed." in text
    assert r"- Data: `` d`\n# e ``, 1 tr\\nain images, split hash `` 0`\n ``" in text
    assert glsim.load(folder).config.label_names == labels  # as they are, for programs
