"""Pictures of rows: which file a row names, and what can be wrong with it. Needs Pillow, of the extra [vision]."""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lst_scale.errors import DataError, printable
from lst_scale.system.assets import cache_folder, resolve


class PictureError(DataError):
    """A file that is no picture; whoever knows which row has it says so."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file} {reason}")
        self.file = file


def picture_of(value: Any, field: str, path: str, number: int) -> str:
    """Return the file of a row's picture, given its cell: a path, relative to the row's own file or whole, or bytes, which go to a file.

    Raises:
        DataError: the cell holds no picture, or there is no such file; names file and row.
    """
    if type(value).__module__.startswith("PIL."):  # as a data set of the hub gives it
        value = _as_png(value)
    if isinstance(value, Mapping) and {"bytes", "path"} <= value.keys():  # as `datasets.Image` is stored in parquet
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    if isinstance(value, bytes):
        return str(_kept(value))
    if not isinstance(value, str) or not value.strip() or "\n" in value:
        raise DataError(f"{path}: row {number}: {field} holds no picture: write a file's path, or its bytes")
    file = Path(resolve(path)).parent / value
    if not file.is_file():
        raise DataError(f"{path}: row {number}: {field} names {printable(value)}, which is no file beside {path}: mend the path")
    return str(file.resolve())


def _as_png(picture: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _kept(content: bytes) -> Path:
    file = cache_folder("pictures") / hashlib.sha256(content).hexdigest()
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")  # its own: all ranks may write the same picture at once
        partial.write_bytes(content)
        partial.replace(file)
    return file


def open_picture(file: str) -> Any:
    """Return a picture in RGB.

    Raises:
        PictureError: the file is missing, or is no whole picture.
    """
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise PictureError(file, "is gone: put the picture there, or remove its rows") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PictureError(file, f"is no whole picture ({printable(str(error))[:100]}): replace it, or remove its rows") from error
