"""Find what ships with the package: recipes, DeepSpeed files, the embedded backbone and data. Imports no torch.

In a checkout recipes/ and ds_configs/ stand at the top; in a wheel they are inside the package.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from lst_scale.errors import RecipeError, did_you_mean, fence
from lst_scale.system.names import shown

PACKAGE = Path(__file__).resolve().parent.parent
EMBEDDED = "embedded:"

# Each value has one owner: these are the recipe's, and a DeepSpeed file that sets one is refused.
_OWNED_BY_RECIPE = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.warmup and optimizer.schedule",
    "fp16": "method.precision",
    "bf16": "method.precision",
    "amp": "method.precision",
    "torch_autocast": "method.precision",
    "steps_per_print": "logging.log_every_steps",
    "tensorboard": "logging.tensorboard",
}


def cache_folder(name: str) -> Path:
    """Return where this machine keeps what can be made again: block files, Fisher information, taps."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lst_scale" / name


def resolve(name: str) -> str:
    """Return the path that "embedded:..." stands for; any other name comes back unchanged."""
    if not name.startswith(EMBEDDED):
        return name
    path = PACKAGE / "embedded" / name.removeprefix(EMBEDDED)
    if not path.exists():
        valid = [EMBEDDED + str(item.relative_to(PACKAGE / "embedded")) for item in sorted((PACKAGE / "embedded").glob("*"))]
        raise RecipeError(f"{name!r} does not ship with lst_scale.{did_you_mean(name, valid)}")
    return str(path)


def available_recipes() -> list[str]:
    return sorted(path.stem for path in _folder("recipes").glob("*.yaml"))


def available_ds_configs() -> list[str]:
    return sorted(path.stem for path in _folder("ds_configs").glob("*.json"))


def find_recipe(name: str) -> Path:
    """Return the file of a shipped recipe, or the path itself when it names a file."""
    try:
        return _find(name, _folder("recipes"), ".yaml", available_recipes(), "--recipe")
    except RecipeError as error:
        raise RecipeError(f"{error} A model is named by backbone.checkpoint=, not here.") from None


def load_ds_config(name: str) -> dict[str, Any]:
    """Return the DeepSpeed configuration that `training.deepspeed` names: a file of ds_configs/ or a path.

    Raises:
        RecipeError: there is no such file, it is no JSON object, or it sets what the recipe owns.
    """
    path = _find(name, _folder("ds_configs"), ".json", available_ds_configs(), "training.deepspeed")
    with fence(RecipeError, f"training.deepspeed: {path} is not valid JSON"):
        config = json.loads(_with_variables(path))
    if not isinstance(config, dict):
        raise RecipeError(f"training.deepspeed: {path} must hold a JSON object")
    owned = [f"{key} (the recipe's {_OWNED_BY_RECIPE[key]})" for key in config if key in _OWNED_BY_RECIPE]
    if owned:
        raise RecipeError(f"training.deepspeed: {path} sets what the recipe owns: {', '.join(owned)}; remove it there")
    _refuse_wrong_kinds(path, config)
    return config


def _refuse_wrong_kinds(path: Path, config: dict[str, Any]) -> None:
    """Look at what we read ourselves; DeepSpeed looks at the rest when it is started."""
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise RecipeError(f'training.deepspeed: {path}: zero_optimization is {zero!r:.40}, and should be an object such as {{"stage": 2}}')
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        raise RecipeError(f"training.deepspeed: {path}: zero_optimization.stage is {stage!r:.40}: write 0, 1, 2 or 3")


def _with_variables(path: Path) -> str:
    """Return the file's text with $NAME replaced from the environment: where fast disks are differs from site to site."""
    text = path.read_text(encoding="utf-8-sig")
    unset = sorted({name for name in re.findall(r"\$(\w+)", text) if name not in os.environ})
    if unset:
        raise RecipeError(f"training.deepspeed: {path.name} needs {', '.join(unset)}: export {unset[0]}=/a/folder/on/a/fast/disk")
    return re.sub(r"\$(\w+)", lambda match: json.dumps(os.environ[match[1]])[1:-1], text)


def _folder(name: str) -> Path:
    packaged = PACKAGE / f"_{name}"
    return packaged if packaged.exists() else PACKAGE.parent / name


def _find(name: str, folder: Path, suffix: str, available: list[str], where: str) -> Path:
    if name in available:
        return folder / f"{name}{suffix}"
    with fence(RecipeError, f"{where}: {shown(name)}"):
        if Path(name).is_file():
            return Path(name)
    raise RecipeError(
        f"{where}: {shown(name)} is neither a file nor one of those that ship.{did_you_mean(name[:60], available, nearness=0.75)}"
    )
