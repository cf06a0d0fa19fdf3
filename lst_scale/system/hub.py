"""The hub: a name's files as a folder of this machine, and a folder's files under a name. All of it by huggingface_hub.

HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HOME mean what they mean there.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lst_scale.errors import ArgumentError, LstScaleError, printable, reason_of

NAME = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = ("*.json", "*.safetensors", "*.model")  # of a checkpoint: nothing that could run


def is_name(source: str | Path) -> bool:
    """Return whether this can only be owner/name, and no folder that is there."""
    return isinstance(source, str) and NAME.fullmatch(source) is not None and not source.startswith(".") and not Path(source).exists()


def folder_of(
    source: str | Path,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    error: type[LstScaleError] = ArgumentError,
) -> Path:
    """Return a folder of this machine: the one that is named, or what the hub holds under owner/name, downloaded where it is not here yet.

    Args:
        patterns: of the files that are wanted.
        revision: a branch, tag or commit of the hub's.

    Raises:
        error: the hub has no such name, or can't be reached; or a revision is asked of a folder, which has none.
    """
    if not is_name(source):
        if revision is not None:
            raise error(f"revision {revision!r} is one of the hub's, and {source} is a folder: leave it out")
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=list(patterns)))
    except Exception as failure:
        raise error(
            f"{source} is no folder, and the hub can't be reached or lacks it ({_told(failure)}): "
            "write the path of a folder, or download it first where there is a network"
        ) from failure


def push(
    fill: Callable[[Path], None],
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str = "Upload side network",
    create_pr: bool = False,
) -> str:
    """Put what `fill` writes into a folder under a name of the hub, which is made where it isn't there; return the commit's address.

    Args:
        private: whether a new name is seen by its owner alone; None: as the owner has set.
        revision: a branch, which is made where it isn't there; None: the main one.
        create_pr: offer a pull request.

    Raises:
        ArgumentError: it is no name, or the hub refuses or can't be reached.
    """
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None:
        raise ArgumentError(f"{name!r} is no name for the hub: write owner/name")
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as where:
        folder = Path(where) / "files"
        fill(folder)
        try:
            api = HfApi(token=token)
            name = api.create_repo(name, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(name, branch=revision, exist_ok=True)
            done = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=revision, create_pr=create_pr)
        except Exception as failure:
            raise ArgumentError(
                f"{name} could not be pushed to the hub ({_told(failure)}): write a name that your token (HF_TOKEN) may write to"
            ) from failure
    return str(done.pr_url if create_pr else done.commit_url)


def _told(failure: Exception) -> str:
    """Return what kind of failure this is, and what the hub said of it, in one line."""
    said = getattr(failure, "server_message", None)
    return f"{type(failure).__name__}: {printable(' '.join(said.split())) if said else reason_of(failure)}"
