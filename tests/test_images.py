"""Pictures of rows, features of image models, and where they are remembered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel

from helpers.pictures import CHANNELS, GRID, make_pictures, make_tower, task_of, vision_of
from lst_scale.data.pictures import open_picture, picture_of
from lst_scale.data.tasks import file_rows
from lst_scale.errors import DataError, LadderError, LstScaleError, StorageError
from lst_scale.images.features import ImageReader
from lst_scale.recipe.task import FileTask
from lst_scale.recipe.vision import VisionRecipe
from lst_scale.system.assets import cache_folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures") / "shapes", 6)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def files_of(rows: Path, **changes: Any) -> list[tuple[str, ...]]:
    return [row.images for row in file_rows(FileTask.model_validate_json(json.dumps(task_of(rows, **changes))), "train")]


def parts() -> Iterator[Path]:
    return cache_folder("images").rglob("features.npy")


def test_features_are_the_tower_s_patches_row_by_row(tower: Path, rows: Path) -> None:
    (file,) = files_of(rows)[0]
    images = ImageReader(VisionRecipe.model_validate(vision_of(tower))).read([(file,)]).of([0, -1])
    assert images.features_BIGF.shape == (2, 1, GRID**2, CHANNELS) and images.features_BIGF.dtype == torch.float16
    resized = Image.open(file).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    pixels = CLIPImageProcessor.from_pretrained(tower)(images=resized, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = CLIPVisionModel.from_pretrained(tower).eval()(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(images.features_BIGF[0].float(), expected, rtol=1e-3, atol=1e-3)  # float16's steps


def test_a_tower_in_bf16_reads_larger_pictures_than_its_own(tower: Path, rows: Path, tmp_path: Path) -> None:
    """Computed in float32, positions interpolated."""
    CLIPVisionModel.from_pretrained(tower, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    CLIPImageProcessor.from_pretrained(tower).save_pretrained(tmp_path / "half")
    recipe = VisionRecipe.model_validate(vision_of(tmp_path / "half", image_size=64))
    images = ImageReader(recipe).read(files_of(rows)[:1]).of([0])
    assert images.features_BIGF.shape == (1, 1, 8 * 8, CHANNELS) and bool(images.features_BIGF.isfinite().all())


def test_a_picture_is_read_once_a_machine_and_image_model(tower: Path, rows: Path) -> None:
    recipe, files = VisionRecipe.model_validate(vision_of(tower)), files_of(rows)
    assert len(files) == 12
    first = ImageReader(recipe).read(files[:8])
    (part,) = parts()
    assert np.load(part).shape[0] == 4  # two rows a picture
    again = ImageReader(recipe).read(files)
    assert sorted(len(np.load(each)) for each in parts()) == [2, 4]
    assert torch.equal(first.of([5]).features_BIGF, again.of([5]).features_BIGF)
    assert first.digest != again.digest


def test_a_row_may_have_two_pictures(tower: Path, rows: Path) -> None:
    images = ImageReader(VisionRecipe.model_validate(vision_of(tower))).read(files_of(rows, images=["image", "other"]))
    two = images.of([2]).features_BIGF
    assert two.shape[1] == 2 and not torch.equal(two[:, 0], two[:, 1])
    assert torch.equal(two[:, 1], images.of([4]).features_BIGF[:, 0])


def test_damaged_features_are_named(tower: Path, rows: Path) -> None:
    recipe = VisionRecipe.model_validate(vision_of(tower))
    ImageReader(recipe).read(files_of(rows))
    (part,) = parts()
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(StorageError, match="holds damaged features: remove that folder"):
        ImageReader(recipe).read(files_of(rows)).of(range(12))
    part.write_bytes(content[:50])
    with pytest.raises(StorageError, match="is damaged: remove"):
        ImageReader(recipe).read(files_of(rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_dim": 8}, "vision.feature_dim is 8, but transformers:{tower} makes 16 channels: write 16"),
        ({"pooled_grid": 5}, "vision.pooled_grid 5 is finer than the 4 x 4 features of an image: write 4 or less"),
        ({"image_model": "transformers:/nowhere"}, "vision.image_model=transformers:/nowhere can't be loaded"),
    ],
    ids=str,
)
def test_an_image_model_that_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], message: str, tower: Path, rows: Path) -> None:
    with pytest.raises(LadderError) as caught:
        ImageReader(VisionRecipe.model_validate(vision_of(tower, **changes))).read(files_of(rows))
    assert message.format(tower=tower) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("gone.png", "rows.jsonl: row 1: image names gone.png, which is no file"),
        ("", "row 1: image holds no picture: write a file's path, or its bytes"),
        (None, "row 1: image holds no picture"),
        (7, "row 1: image holds no picture"),
    ],
)
def test_a_row_without_its_picture_is_named(cell: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "which", "answer": "red", "image": cell}) + "\n")
    with pytest.raises(DataError) as caught:
        files_of(tmp_path / "rows.jsonl")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_of_pictures_that_is_not_there_is_named(rows: Path) -> None:
    with pytest.raises(DataError, match="row 1 has no field 'photo'"):
        files_of(rows, images=["photo"])


def test_the_row_of_a_broken_picture_is_named(tower: Path, rows: Path, tmp_path: Path) -> None:
    whole = files_of(rows)[0][0]
    (tmp_path / "broken.png").write_bytes(Path(whole).read_bytes()[:60])
    reader = ImageReader(VisionRecipe.model_validate(vision_of(tower)))
    for name, message in (("broken.png", "is no whole picture"), ("gone.png", "can't be read")):
        file = str(tmp_path / name)
        with pytest.raises(DataError, match=rf"^colours, train: row 2: {re.escape(file)} {message}.*: (replace|put)") as caught:
            reader.read([(whole,), (file,), (file,)], "colours, train")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"no picture", b"", b"\x89PNG\r\n\x1a\n cut"])
def test_a_broken_picture_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(LstScaleError, match=r"broken.png is no whole picture .*: replace it, or remove its rows"):
        open_picture(str(tmp_path / "broken.png"))


def test_pictures_may_be_bytes_in_parquet_as_datasets_stores_them(rows: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    content = (rows.parent / "3.png").read_bytes()
    both = [{"bytes": content, "path": None}, {"bytes": None, "path": str(rows.parent / "4.png")}]
    table = pyarrow.table({"question": ["which", "which"], "answer": ["grey", "red"], "image": both})
    parquet.write_table(table, tmp_path / "rows.parquet")
    kept, named = files_of(tmp_path / "rows.parquet")
    assert Path(kept[0]).read_bytes() == content and named[0] == str(rows.parent / "4.png")


def test_two_that_keep_one_picture_at_once_both_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    write, found = Path.write_bytes, []

    def while_another_does(path: Path, content: bytes) -> int:
        monkeypatch.setattr(Path, "write_bytes", write)
        written = write(path, content)
        found.append(picture_of(content, "image", "rows", 1))
        return written

    monkeypatch.setattr(Path, "write_bytes", while_another_does)
    found.append(picture_of(b"a picture", "image", "rows", 1))
    assert [Path(file).read_bytes() for file in found] == [b"a picture"] * 2
    assert list(Path(found[0]).parent.iterdir()) == [Path(found[0])]


def test_efficientnet_lite0_reads_a_picture_as_a_grid(rows: Path) -> None:
    recipe = VisionRecipe(image_model="efficientnet-lite0", image_size=64, feature_dim=1280, pooled_grid=2)
    features = ImageReader(recipe).read(files_of(rows)[:4]).of([0, 2]).features_BIGF.float()
    assert features.shape == (2, 1, 4, 1280)
    assert float(features.min()) >= 0 and 0.5 < float(features.max()) <= 6  # ReLU6
    assert not torch.allclose(features[0], features[1], atol=0.1)
