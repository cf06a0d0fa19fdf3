"""The code that runs is the code at submission: a copy of the package, named by its contents, first on PYTHONPATH in the job."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from lst_scale.system import assets

_SKIPPED = ("__pycache__", "embedded")  # the embedded model and data are no code: linked to, not copied


def take(folder: Path) -> Path:
    """Copy package, recipes and DeepSpeed files into `folder`/HASH, once for the same contents, and return that path."""
    sources = {"lst_scale": assets.PACKAGE}
    if not (assets.PACKAGE / "_recipes").exists():  # a checkout: they stand beside the package
        sources |= {name: assets.PACKAGE.parent / name for name in ("recipes", "ds_configs")}
    path = folder / _digest(sources)
    if path.exists():
        return path
    partial = folder / f".{path.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for name, source in sources.items():
        shutil.copytree(source, partial / name, ignore=shutil.ignore_patterns(*_SKIPPED))
    (partial / "lst_scale" / "embedded").symlink_to(assets.PACKAGE / "embedded")
    try:
        os.replace(partial, path)
    except OSError:  # another submission was first
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _digest(sources: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        for file in sorted(source.rglob("*")):
            if file.is_file() and not set(file.relative_to(source).parts) & set(_SKIPPED):
                digest.update(f"{name}/{file.relative_to(source)}".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
