"""Image models of timm and transformers, by name or folder: grids of convolutional networks, patches of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lst_scale.errors import LadderError, fence
from lst_scale.images.made import digest_of_weights, refuse_no_grid


class OfTimm:
    """The last map of a convolutional network of timm, or the patches of a vision transformer."""

    def __init__(self, name: str, size: int | None) -> None:
        import timm

        with fence(LadderError, f"vision.image_model=timm:{name} can't be loaded"):
            options = {} if size is None else {"img_size": size} if timm.models.is_model(name) and "vit" in name else {}
            self._model = timm.create_model(name, pretrained=True, num_classes=0, **options).eval().requires_grad_(False)
        found = timm.data.resolve_model_data_config(self._model)
        if size is not None:
            found["input_size"] = (3, size, size)
        found |= {"crop_pct": 1.0, "crop_mode": "squash"}  # the whole picture, aspect ratio lost, as the release has it
        self._transform = timm.data.create_transform(**found, is_training=False)
        self._name, self.identity = name, digest_of_weights(self._model, "timm", name, sorted(map(repr, found.items())))

    def prepared(self, picture: Any) -> Tensor:
        pixels: Tensor = self._transform(picture)
        return pixels

    @torch.no_grad()
    def features(self, pixels_B3HW: Tensor) -> Tensor:
        found: Tensor = self._model.forward_features(pixels_B3HW)
        first = getattr(self._model, "num_prefix_tokens", 0)  # class and register tokens come first
        features_BGF = found.flatten(2).transpose(1, 2) if found.ndim == 4 else found[:, first:]
        refuse_no_grid(f"timm:{self._name}", features_BGF.shape[1])
        return features_BGF


class OfTransformers:
    """The patches of a vision tower of transformers, such as CLIP's or SigLIP's; its own processor prepares pictures."""

    def __init__(self, name: str, size: int | None) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        with fence(LadderError, f"vision.image_model=transformers:{name} can't be loaded"):
            self._processor = AutoImageProcessor.from_pretrained(name)
            config = AutoConfig.from_pretrained(name)
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
            self._model = getattr(model, "vision_model", model).eval()
        self._model.requires_grad_(False)
        own = getattr(config, "vision_config", config)
        self._size = size or int(own.image_size)
        self._patch = int(own.patch_size)
        # Positions that were learned for another size are interpolated, where a model does not do that by itself.
        fixed = self._size != int(own.image_size) and "interpolate_pos_encoding" in inspect.signature(self._model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if fixed else {}
        self._name = name
        self.identity = digest_of_weights(self._model, "transformers", name, self._size, self._processor.to_dict())

    def prepared(self, picture: Any) -> Tensor:
        resized = picture.resize((self._size, self._size), resample=3)  # the whole picture, aspect ratio lost, as the release has it
        done = self._processor(images=resized, do_resize=False, do_center_crop=False, return_tensors="pt")
        pixels: Tensor = done["pixel_values"][0]
        return pixels

    @torch.no_grad()
    def features(self, pixels_B3HW: Tensor) -> Tensor:
        states: Tensor = self._model(pixel_values=pixels_B3HW, **self._options).last_hidden_state
        count = (self._size // self._patch) ** 2
        refuse_no_grid(f"transformers:{self._name}", count)
        return states[:, states.shape[1] - count :]  # class tokens come first
