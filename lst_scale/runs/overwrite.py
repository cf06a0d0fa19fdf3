"""What `--overwrite` removes: the files that runs write, one by one, in a folder that a run's recipe marks as one. Imports no torch.

Nothing else goes, whatever folder a name leads to; links are not followed, since what they lead to may be anybody's.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lst_scale.errors import ArgumentError, LstScaleError, RecipeError, fence
from lst_scale.recipe import decode
from lst_scale.runs.lock import LOCK
from lst_scale.system.durable import writing

RECIPE = "recipe.yaml"

# What runs of any version write: paths below the folder.
_STEP = r"(checkpoints|best)/(step-\d+|\.step-\d+\.(partial|replaced))"
_TRAINED = r"(side_network|trained|probe|\.(side_network|trained|probe)\.(partial|replaced))"
_FOLDERS = re.compile(rf"checkpoints|best|{_STEP}|{_TRAINED}|tensorboard|slurm|slurm/local")
_FILES = re.compile(
    "|".join(
        (
            r"recipe\.yaml|result\.json|start\.json|trackers\.json|metrics\.(jsonl|partial)|log\.txt",
            r"\.(recipe\.yaml|result\.json|start\.json|trackers\.json|metrics\.jsonl)\.[0-9a-f]{8}\.partial",
            rf"{_STEP}/(weights\.safetensors|moments\.safetensors|state\.json)",
            rf"{_TRAINED}/(side_network\.safetensors|ladder_config\.json|config\.json|trained\.safetensors|method\.json|README\.md)",
            rf"{_TRAINED}/(adapter_model\.safetensors|adapter_config\.json|probe\.safetensors|probe\.json)",
            r"tensorboard/events\.out\.tfevents\.[^/]+",
            r"slurm/((jobs|starts)\.jsonl|failure-\d+\.json|local/\d+_[^/]+)",
        )
    )
)


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What `remove_run` did."""

    files: int
    left: tuple[str, ...]  # what no run wrote, and stays

    def sentence(self, folder: Path) -> str | None:
        """Return it in words; None when the folder was empty."""
        if not self.files and not self.left:
            return None
        names = ", ".join(self.left[:5]) + (f" and {len(self.left) - 5} more" if len(self.left) > 5 else "")
        what = f"removed {self.files} files of an earlier run from {folder}" if self.files else f"{folder} held no run"
        return f"{what}; left as they are: {names}" if self.left else what


def refuse_to_overwrite(folder: Path) -> None:
    """Look whether `remove_run` may do its work, and change nothing.

    Raises:
        ArgumentError: the folder or a part of it is a link, or files named as a run's stand there without a run's recipe.
        StorageError: the folder can't be read.
    """
    _divided(folder)


def remove_run(folder: Path) -> Removed:
    """Remove the run in `folder`, file by file; the folder itself stays.

    The recipe goes last: it is the mark by which a run that was removed by half is still known.

    Raises:
        ArgumentError: as `refuse_to_overwrite` does.
        StorageError: the disk refused.
    """
    ours, folders, others = _divided(folder)
    with writing(folder):
        for path in sorted(ours, key=lambda path: path == folder / RECIPE):
            path.unlink(missing_ok=True)
    for path in reversed(folders):
        with contextlib.suppress(OSError):  # something else is in it
            path.rmdir()
    return Removed(files=len(ours), left=tuple(others))


def _divided(folder: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Return a run's files below its folder, its folders from the top down, and the names of all else."""
    if folder.is_symlink():
        raise _is_link(folder)
    ours: list[Path] = []
    folders: list[Path] = []
    others: list[str] = []
    with writing(folder):
        for entry in _walk(folder) if folder.exists() else ():
            name = Path(entry.path).relative_to(folder).as_posix()
            known = _FILES.fullmatch(name) or _FOLDERS.fullmatch(name)
            if known and entry.is_symlink():
                raise _is_link(Path(entry.path))
            if _FOLDERS.fullmatch(name) and entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif _FILES.fullmatch(name) and entry.is_file(follow_symlinks=False):
                ours.append(Path(entry.path))
            elif name != LOCK:
                others.append(name)
    if ours and not _is_recipe(folder / RECIPE):
        raise ArgumentError(
            f"{folder} holds {ours[0].relative_to(folder)} but no {RECIPE} of a run, and --overwrite removes nothing but runs: "
            "empty it yourself, or change name="
        )
    return ours, folders, others


def _walk(folder: Path, top: Path | None = None) -> Iterator[os.DirEntry[str]]:
    """Yield all entries of a folder, and of those of its folders that runs make."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            yield entry
            name = Path(entry.path).relative_to(top or folder).as_posix()
            if _FOLDERS.fullmatch(name) and entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), top or folder)


def _is_link(path: Path) -> ArgumentError:
    return ArgumentError(f"{path} is a link to {os.readlink(path)}, and --overwrite follows none: remove the link, or change name=")


def _is_recipe(path: Path) -> bool:
    """Whether a file is the recipe of a run, of whatever version."""
    if not path.is_file():
        return False
    with contextlib.suppress(LstScaleError), fence(RecipeError, str(path)):
        tree, _ = decode.read_yaml(path.read_text(encoding="utf-8"), str(path))
        return {"name", "task", "backbone", "method"} <= tree.keys()
    return False
