"""Image tokens of a side network (VL-T5's visual embedding; Cho et al. 2021). The backbone never sees them.

    image: max-pooled grid x grid -> pooled x pooled, each image by itself
    token = RMSNorm(Linear(feature)) + RMSNorm(Linear(box, area)) + image_order[image] + object_order[j]      j = 0.. in each image

Shapes: B rows, S text tokens, I images a row, G grid positions an image, N = pooled^2, M = I * N image tokens, F feature channels,
D = d_model.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import family_of
from lst_scale.backbone.spec import BackboneSpec
from lst_scale.errors import LadderError
from lst_scale.inputs.images import Images
from lst_scale.side.vision_config import VisionConfig

BOX_NUMBERS = 4  # x1, x2, y1, y2, as the release orders them
LEAST_IMAGE_ORDERS = 2  # the release's table has two rows, for one image too


def checked_images(config: VisionConfig | None, rows: int, features: Tensor | None, boxes: Tensor | None) -> Images | None:
    """Return a batch's images as a side network of this configuration reads them; None where it reads none.

    Raises:
        LadderError: they are missing, too many, or of another shape.
    """
    if config is None:
        if features is not None or boxes is not None:
            raise LadderError(
                "this side network reads no images: leave image_features and boxes out, or write LadderConfig(vision=VisionConfig(...))"
            )
        return None
    if features is None:
        raise LadderError(
            f"this side network reads images: pass image_features ({rows}, {_counts(config)}, grid positions, {config.feature_dim})"
        )
    _refuse_other_features(config, rows, features)
    if boxes is not None and (
        boxes.shape[:2] != features.shape[:2] or boxes.ndim != 4 or boxes.shape[2] < config.tokens_per_image or boxes.shape[3] != 4
    ):
        least = (*features.shape[:2], config.tokens_per_image, BOX_NUMBERS)
        raise LadderError(f"boxes are {tuple(boxes.shape)}, but must be {least} or more in the third place: x1, x2, y1, y2 of each token")
    return Images(features_BIGF=features, boxes_BIG4=boxes)


def _refuse_other_features(config: VisionConfig, rows: int, features: Tensor) -> None:
    shape = tuple(features.shape)
    if features.ndim != 4:
        raise LadderError(
            f"image_features are {shape}, but must have four dimensions: rows, images, grid positions, {config.feature_dim} channels"
        )
    if shape[0] != rows:
        raise LadderError(f"image_features are of {shape[0]} rows, but the texts are {rows}: give each text its images")
    if shape[1] not in config.image_counts:
        raise LadderError(f"image_features hold {shape[1]} images a row, but this side network reads {_counts(config)} (vision.num_images)")
    if shape[3] != config.feature_dim:
        raise LadderError(f"image_features have {shape[3]} channels, but this side network reads {config.feature_dim} (vision.feature_dim)")
    grid = isqrt(shape[2])
    if grid**2 != shape[2] or grid < config.pooled_grid:
        raise LadderError(
            f"image_features hold {shape[2]} positions an image, which is no square grid of at least {config.pooled_grid} x "
            f"{config.pooled_grid} (vision.pooled_grid): leave out class tokens, and write a smaller pooled_grid for a smaller grid"
        )


def _counts(config: VisionConfig) -> str:
    return " or ".join(map(str, config.image_counts))


def beside_images(attention_mask_BS: Tensor, length: int) -> Tensor:
    """Return the mask of `length` positions of which the first are these, and the rest image tokens, which all may be seen."""
    beside = attention_mask_BS.new_ones(len(attention_mask_BS), length - attention_mask_BS.shape[1])
    return torch.cat([attention_mask_BS, beside], 1)


class NormedLinear(nn.Module):
    """RMSNorm(Linear(x))."""

    def __init__(self, width_in: int, norm: nn.Module, d_model: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, d_model)
        self.norm = norm

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = self.norm(self.linear(values))
        return result


class VisualEmbedding(nn.Module):
    """Features of images -> image tokens (B, M, D)."""

    def __init__(self, spec: BackboneSpec, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        family = family_of(spec.model_type, "this backbone")
        self.features = NormedLinear(config.feature_dim, family.side_norm(spec, spec.d_model), spec.d_model)
        self.boxes = NormedLinear(BOX_NUMBERS + 1, family.side_norm(spec, spec.d_model), spec.d_model)
        self.image_order = nn.Embedding(max(LEAST_IMAGE_ORDERS, *config.image_counts), spec.d_model)

    def forward(self, images: Images, object_order_ND: Tensor) -> Tensor:
        tokens_BIND = self.features(self._pooled(images.features_BIGF)) + self.boxes(self._with_area(images))
        order_ID = self.image_order(torch.arange(tokens_BIND.shape[1], device=tokens_BIND.device))
        tokens_BMD: Tensor = (tokens_BIND + order_ID[:, None] + object_order_ND).flatten(1, 2)
        return tokens_BMD

    def num_tokens(self, images: Images) -> int:
        """Return M, the image tokens of each row."""
        return images.features_BIGF.shape[1] * self.config.tokens_per_image

    def _pooled(self, features_BIGF: Tensor) -> Tensor:
        rows, num_images, positions, channels = features_BIGF.shape
        grid, pooled = isqrt(positions), self.config.pooled_grid
        maps = features_BIGF.float().reshape(rows * num_images, grid, grid, channels).permute(0, 3, 1, 2)
        return nn.functional.adaptive_max_pool2d(maps, pooled).permute(0, 2, 3, 1).reshape(rows, num_images, pooled**2, channels)

    def _with_area(self, images: Images) -> Tensor:
        if images.boxes_BIG4 is None:  # the same for every token
            return images.features_BIGF.new_zeros(1, 1, 1, BOX_NUMBERS + 1, dtype=torch.float32)
        boxes_BIN4 = images.boxes_BIG4[:, :, : self.config.tokens_per_image].float()
        x1, x2, y1, y2 = boxes_BIN4.unbind(-1)
        return torch.cat([boxes_BIN4, ((y2 - y1) * (x2 - x1))[..., None]], -1)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Fill all weights as the release does.

        | weight | start |
        | --- | --- |
        | linear maps | uniform in +- 1 / sqrt(fan in), biases too |
        | image order | N(0, 1) |
        | norms | 1 |
        """
        for part in (self.features, self.boxes):
            draw_as_torch_does(part.linear, generator)
            assert isinstance(part.norm.weight, Tensor)
            part.norm.weight.fill_(1.0)
        self.image_order.weight.normal_(generator=generator)


@torch.no_grad()
def draw_as_torch_does(linear: nn.Linear, generator: torch.Generator) -> None:
    """Fill a linear map from U(-1/sqrt(fan in), 1/sqrt(fan in)), which is how torch makes one."""
    bound = linear.in_features**-0.5
    for parameter in linear.parameters():
        parameter.uniform_(-bound, bound, generator=generator)
