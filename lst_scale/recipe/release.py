"""Tasks in the file formats of the release's CLIP-T5 (VL-T5's; Cho et al. 2021): what a recipe says of one, and what each is. No torch.

DATASETS/vqa/     karpathy_{train,val,test}.json, v2_mscoco_{train,val}2014_annotations.json (ten human answers, for the score)
DATASETS/GQA/     train.json, valid.json (both are trained on), testdev.json (the score)
DATASETS/nlvr/    train.json, valid.json, test.json
DATASETS/COCO/    dataset_coco.json (captions, Karpathy's splits, restval in train)
.../clip_features/data_clip_RN101_att/NAME.h5     an image's features, (49, 2048), as the data set NAME/features
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

from lst_scale.recipe.decode import Count, Section
from lst_scale.system.names import PathText

FORMATS = ("vqa", "gqa", "nlvr2", "caption")
EPOCHS = 20
LONGEST_ANSWER = 19  # new tokens: the release leaves its library's 20, which count the start token
FEATURES = "clip_features/data_clip_RN101_att"


@dataclass(frozen=True, kw_only=True)
class Format:
    """What the release makes of one kind of files."""

    prompt: str
    files: Mapping[str, tuple[str, ...]]  # by split, below the folder of data sets
    images: Mapping[str, str]  # the folder of images' features by split, below that of data sets
    image_fields: tuple[str, ...] = ("img_id",)
    kind: Literal["classification", "text"] = "text"
    labels: tuple[str, ...] | None = None
    metrics: tuple[str, ...]
    loss: Literal["token_mean", "example_mean"] = "example_mean"
    scored: bool = False  # a drawn answer's loss is multiplied by its score
    share: Fraction = Fraction(1)  # of training.global_batch_size: rows of a step
    source_length: int | None = None  # tokens
    target_length: int | None = None
    num_beams: int = 1


def _each(splits: tuple[str, ...], folder: str) -> Mapping[str, str]:
    return MappingProxyType(dict.fromkeys(splits, folder))


_THREE = ("train", "validation", "test")
COCO_SPLITS = MappingProxyType(
    {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}
)  # as dataset_coco.json calls them
FORMAT: Mapping[str, Format] = MappingProxyType(
    {
        "vqa": Format(
            prompt="vqa: ",
            files={split: (f"vqa/karpathy_{name}.json",) for split, name in zip(_THREE, ("train", "val", "test"), strict=True)},
            images=_each(_THREE, f"COCO/{FEATURES}"),
            metrics=("vqa_accuracy",),
            scored=True,
            source_length=20,
            target_length=10,
        ),
        "gqa": Format(
            prompt="gpa: ",
            files={"train": ("GQA/train.json", "GQA/valid.json"), "validation": ("GQA/testdev.json",)},
            images={"train": f"VG/{FEATURES}", "validation": f"GQA/{FEATURES}"},
            metrics=("gqa_accuracy",),
            share=Fraction(100, 60),
            source_length=20,
            target_length=10,
        ),
        "nlvr2": Format(
            prompt="nlvr: ",
            files={split: (f"nlvr/{name}.json",) for split, name in zip(_THREE, ("train", "valid", "test"), strict=True)},
            images=_each(_THREE, f"nlvr/{FEATURES}"),
            image_fields=("img0", "img1"),
            kind="classification",
            labels=("true", "false"),
            metrics=("accuracy", "consistency"),
            share=Fraction(20, 60),
        ),
        "caption": Format(
            prompt="caption: ",
            files=dict.fromkeys(_THREE, ("COCO/dataset_coco.json",)),
            images=_each(_THREE, f"COCO/{FEATURES}"),
            metrics=("cider",),
            loss="token_mean",
            share=Fraction(50, 60),
            source_length=40,
            target_length=40,
            num_beams=5,
        ),
    }
)


class ReleaseTask(Section):
    """A task in the file formats of the release's CLIP-T5, with its texts, splits, losses, metrics and way of answering: vqa (VQAv2), gqa,
    nlvr2, or caption (COCO). `task: vqa` is short for `task: {format: vqa}`.
    """

    format: Literal["vqa", "gqa", "nlvr2", "caption"]  # what its files are
    folder: PathText = "datasets"  # the release's folder of data sets, with vqa/, GQA/, nlvr/ and COCO/
    # a folder that holds a file for each image, called by the image's name; None: the release's folder of features, for vision.image_model
    # hdf5
    images: PathText | None = None
    # the first words of the text; None: the release's: "vqa: ", "gpa: " (gqa: a slip of the pen that its checkpoints were trained with),
    # "nlvr: " and "caption: "
    prompt: str | None = None
    # rows of a step; None: the release's part of training.global_batch_size: all, 100/60 (gqa), 20/60 (nlvr2), 50/60 (caption)
    global_batch_size: Count | None = None
    num_beams: Count | None = None  # of generation; None: the release's, 5 for captions and 1 for answers
    max_new_tokens: Count | None = None  # None: 19, as in the release

    @property
    def of(self) -> Format:
        """What the release makes of such files."""
        return FORMAT[self.format]
