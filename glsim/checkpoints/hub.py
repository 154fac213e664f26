"""Files on the Hugging Face Hub, by the mixin of its own library."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, get_token, snapshot_download

from glsim.files import one_line
from glsim.types import ConfigError, DataError, GlsimError


class HubFiles(ModelHubMixin):
    """The files of a repository: name -> text, or a file to copy."""

    def __init__(self, files: Mapping[str, str | Path]) -> None:
        self.files = files

    def _save_pretrained(self, save_directory: Path) -> None:
        for name, content in self.files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, save_directory / name)
            else:
                (save_directory / name).write_text(content, encoding="utf-8")

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls, *, model_id: str, names: Sequence[str], files: Any = None, **how: Any
    ) -> HubFiles:
        # `files` is what the mixin found by the name of our argument in somebody's config: nothing to heed.
        folder = Path(snapshot_download(model_id, allow_patterns=list(names), **how))
        return cls({name: folder / name for name in names})


def fetch(name: str, names: Sequence[str]) -> Path:
    """The folder that holds the files `names` of the repository "owner/name" or "owner/name@revision".

    Raises DataError when they cannot be had: no such repository, no access, no network.
    """
    repository, _, revision = name.partition("@")
    try:
        found = HubFiles.from_pretrained(repository, revision=revision or None, names=names)
    except Exception as error:  # of the HTTP library's own classes too, and whatever the mixin meets in a config
        raise DataError(f"hf-hub:{name} cannot be had: {one_line(error)}") from error
    return Path(found.files[names[0]]).parent


def push(files: Mapping[str, str | Path], name: str, message: str, private: bool | None = None) -> str:
    """Send files to a repository of the Hub, made where it is not there yet.

    Args:
        files: what to send, by their names there.
        name: owner/name.
        message: of the commit.
        private: whether a new repository is; None: the Hub's default.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: without a token.
        GlsimError: when they cannot be sent.
    """
    if get_token() is None:
        raise ConfigError("there is no token for the Hub: log in once with `hf auth login`, or set HF_TOKEN")
    try:
        return str(HubFiles(files).push_to_hub(name, commit_message=message, private=private))
    except Exception as error:  # a refused connection is of another class with every HTTP library that the Hub's had
        raise GlsimError(f"{name} could not be pushed: {one_line(error)}") from error
