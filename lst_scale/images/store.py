"""Features of images, remembered on disk by image model and image, not by example: a picture with ten questions is read once a machine.

    ~/.cache/lst_scale/images/MODEL/part-000000/features.npy   (n, G, F) in float16
    ~/.cache/lst_scale/images/MODEL/part-000000/images.json    of each of the n: the picture's digest, and the CRC-32 of its features

Parts are added and never changed. One process writes, under a lock; others wait and then find what it wrote. What is read is checked
against its CRC-32 the first time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lst_scale.data.pictures import PictureError, open_picture
from lst_scale.errors import StorageError
from lst_scale.images.model import ImageModel
from lst_scale.runs.logs import progress_of
from lst_scale.system.assets import cache_folder
from lst_scale.system.durable import write_directory, writing

FEATURES, IMAGES = "features.npy", "images.json"
SETTING = "XDG_CACHE_HOME"
AT_ONCE, PART = 32, 4096  # pictures that an image model is given together, and that a part holds


class FeatureStore:
    """The features that one image model made on this machine."""

    def __init__(self, model: ImageModel) -> None:
        self.folder = cache_folder("images") / hashlib.sha256(model.identity.encode()).hexdigest()[:32]
        self._model = model
        self._parts: list[NDArray[np.float16]] = []
        self._places: dict[str, tuple[int, int]] = {}  # of each picture's digest: part and number in it
        self._checksums: dict[str, int] = {}
        self._checked: set[str] = set()

    def fill(self, pictures: Mapping[str, str]) -> None:
        """See to it that all of these are there: files of pictures, by their digests.

        Raises:
            PictureError: a picture can't be read.
            StorageError: the disk refused.
        """
        self._look()
        if pictures.keys() <= self._places.keys():
            return
        with self._alone():
            self._look()  # another process may have written them meanwhile
            missing = [digest for digest in pictures if digest not in self._places]
            with progress_of(len(missing), 0, shown=True, what="reading image") as advance:
                for first in range(0, len(missing), PART):
                    some = missing[first : first + PART]
                    self._add(some, [pictures[digest] for digest in some], advance)
        self._look()

    def __getitem__(self, digest: str) -> NDArray[np.float16]:
        """Return one picture's features (G, F).

        Raises:
            StorageError: they are not as they were written.
        """
        part, number = self._places[digest]
        features_GF: NDArray[np.float16] = self._parts[part][number]
        if digest not in self._checked:
            if zlib.crc32(features_GF.tobytes()) != self._checksums[digest]:
                raise StorageError(f"{self.folder} holds damaged features: remove that folder, and they are made again")
            self._checked.add(digest)
        return features_GF

    def _look(self) -> None:
        """Open the parts that are new."""
        for folder in sorted(self.folder.glob("part-*"))[len(self._parts) :]:
            try:
                features = np.load(folder / FEATURES, mmap_mode="r")
                images = json.loads((folder / IMAGES).read_text())
                pairs = [(str(digest), int(checksum)) for digest, checksum in images]
            except (OSError, ValueError, TypeError, EOFError) as error:
                raise StorageError(f"{folder} is damaged: remove {self.folder}, and its features are made again") from error
            for number, (digest, checksum) in enumerate(pairs):
                self._places[digest], self._checksums[digest] = (len(self._parts), number), checksum
            self._parts.append(features)

    def _add(self, digests: Sequence[str], files: Sequence[str], advance: object) -> None:
        found = []
        for first in range(0, len(files), AT_ONCE):
            some = files[first : first + AT_ONCE]
            features_BGF = self._model.features(torch.stack([self._model.prepared(open_picture(file)) for file in some]))
            for file, features_GF in zip(some, features_BGF, strict=True):
                if not torch.isfinite(features_GF.half()).all():
                    raise PictureError(file, "has no finite features in float16: choose another vision.image_model, or remove its rows")
            found.append(features_BGF.half().numpy())
            advance(len(some))  # type: ignore[operator]
        features, folder = np.concatenate(found), self.folder / f"part-{len(self._parts):06d}"

        def write(partial: Path) -> None:
            np.save(partial / FEATURES, features)
            sums = [zlib.crc32(each.tobytes()) for each in features]
            (partial / IMAGES).write_text(json.dumps(list(zip(digests, sums, strict=True))))

        write_directory(folder, write, lambda whole: np.load(whole / FEATURES, mmap_mode="r"), SETTING)
        self._look()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with writing(self.folder, SETTING):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        with lock:
            with contextlib.suppress(OSError):  # a file system without locks: each writes, and all find one
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def digest_of_file(file: str) -> str:
    """Return the digest of a picture's file."""
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise PictureError(file, f"can't be read ({error.strerror}): put the picture there, or remove its rows") from error
