"""Ladder Side-Tuning at scale: a frozen encoder-decoder, a small side network, and as little repeated work as possible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lst_scale.version import __version__

if TYPE_CHECKING:
    from lst_scale.inference.pipeline import pipeline
    from lst_scale.side.config import LadderConfig
    from lst_scale.side.ensemble import LadderEnsemble
    from lst_scale.side.model import LadderModel
    from lst_scale.side.vision_config import VisionConfig

__all__ = ["LadderConfig", "LadderEnsemble", "LadderModel", "VisionConfig", "__version__", "pipeline"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import lst_scale.recipe.schema` stays free of torch and a wrong recipe is reported in well under a second.
    if name == "LadderConfig":
        from lst_scale.side.config import LadderConfig

        return LadderConfig
    if name == "LadderModel":
        from lst_scale.side.model import LadderModel

        return LadderModel
    if name == "VisionConfig":
        from lst_scale.side.vision_config import VisionConfig

        return VisionConfig
    if name == "LadderEnsemble":
        from lst_scale.side.ensemble import LadderEnsemble

        return LadderEnsemble
    if name == "pipeline":
        from lst_scale.inference.pipeline import pipeline

        return pipeline
    raise AttributeError(f"module 'lst_scale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
