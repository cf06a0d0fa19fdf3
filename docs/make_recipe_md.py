"""Write docs/recipe.md, the reference of everything that a recipe can say: python docs/make_recipe_md.py

Names, defaults and allowed values come from the schema; the meaning of a key is the comment at its line, or above it, in
lst_scale/recipe/*.py. `tests/test_recipe_reference.py` keeps the page fresh and every key explained.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from lst_scale.recipe import backbone as recipe_backbone
from lst_scale.recipe import method as recipe_method
from lst_scale.recipe import release as recipe_release
from lst_scale.recipe import schema as recipe
from lst_scale.recipe import task as recipe_task
from lst_scale.recipe import vision as recipe_vision
from lst_scale.recipe.marks import Mark

PAGE = Path(__file__).parent / "recipe.md"
SECTIONS = {  # by the key that they stand under
    "": "Recipe",
    "task": "FileTask",
    "task, of the release": "ReleaseTask",
    "vision": "VisionRecipe",
    "backbone": "BackboneRecipe",
    "backbone.context": "ContextRecipe",
    "backbone.placement, replicated": "Replicated",
    "backbone.placement, tensor_parallel": "TensorParallel",
    "backbone.placement, zero3": "Zero3",
    "backbone.placement, streamed": "Streamed",
    "method, lst": "LstRecipe",
    "method.tail": "TailRecipe",
    "method, probe": "ProbeRecipe",
    "method, full": "FullRecipe",
    "method, lora": "LoraRecipe",
    "method, prompt": "PromptRecipe",
    "method, adapters": "AdaptersRecipe",
    "method, bitfit": "BitfitRecipe",
    "optimizer": "OptimizerRecipe",
    "training": "TrainingRecipe",
    "data": "DataRecipe",
    "evaluation": "EvaluationRecipe",
    "cache": "CacheRecipe",
    "logging": "LoggingRecipe",
}
INTRODUCTION = """# What a recipe can say

Made by `python docs/make_recipe_md.py` from the classes in `schema.py`,
`task.py`, `release.py`, `vision.py`,
`method.py` and `backbone.py`: change it there.
On the command line a key is written with its section: `training.max_steps=100`, `method.reduction_factor=4`.
`lst-scale train RECIPE --print-recipe` shows a recipe with every default filled in.
"""


def page() -> str:
    """Return the text of docs/recipe.md."""
    definitions = recipe.Recipe.model_json_schema()["$defs"] | {"Recipe": recipe.Recipe.model_json_schema()}
    parts = [INTRODUCTION]
    for key, name in SECTIONS.items():
        kind = _class(name)
        title = f"## `{key.split(',')[0]}`{', ' + key.split(', ')[1] if ',' in key else ''}" if key else "## At the top"
        about = inspect.getdoc(kind) if "__doc__" in vars(kind) and kind.__doc__ else ""
        rows = [_row(field, schema, name, definitions) for field, schema in definitions[name]["properties"].items()]
        parts.append(
            "\n".join(
                [title, *([about or ""] if about else []), "", "| key | meaning | default | allowed |", "| --- | --- | --- | --- |", *rows]
            )
        )
    return "\n".join(parts).replace("\n## ", "\n\n## ") + "\n"


def meanings(name: str) -> dict[str, str]:
    """Return the comment of each field of a class and of those that it inherits from."""
    found: dict[str, str] = {}
    for kind in reversed(_class(name).__mro__):
        if not kind.__module__.startswith("lst_scale.recipe."):
            continue
        above: list[str] = []
        for line in inspect.getsource(kind).splitlines():
            comment = re.match(r"    # (.*)", line)
            field = re.match(r"    ([a-z_0-9]+): [^#]*?(?:# (?!type:)(.*))?$", re.sub(r"  # type: [^#]*", "  ", line))
            if comment is not None:
                above.append(comment[1])
                continue
            if field is not None:
                found[field[1]] = " ".join([*above, *([field[2].strip()] if field[2] else [])])
            above = []
    return found


def _class(name: str) -> type[Any]:
    modules = (recipe, recipe_method, recipe_task, recipe_release, recipe_vision, recipe_backbone)
    (found,) = {id(kind): kind for module in modules if (kind := vars(module).get(name))}.values()
    result: type[Any] = found
    return result


def _row(field: str, schema: dict[str, Any], name: str, definitions: dict[str, Any]) -> str:
    required = field in definitions[name].get("required", ())
    default = "required" if required else _default(schema.get("default"), schema)
    meaning = meanings(name).get(field, "").replace("METRICS", ", ".join(recipe_task.METRICS))
    rules = [rule.meaning for rule in _class(name).model_fields[field].metadata if isinstance(rule, Mark)]
    cells = (f"`{field}`", "; ".join([meaning.rstrip("."), *rules]) if rules else meaning, default, _allowed(schema))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(value: Any, schema: dict[str, Any]) -> str:
    if "$ref" in schema or isinstance(value, dict):
        return "as below"
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _allowed(schema: dict[str, Any]) -> str:
    """Return a JSON schema in words."""
    if "$ref" in schema:
        return f"a mapping ({schema['$ref'].rpartition('/')[2].removesuffix('Recipe').lower()})"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    several = schema.get("anyOf") or schema.get("oneOf")
    if several:
        return " or ".join(dict.fromkeys(_allowed(each) for each in several if each.get("type") != "null"))
    if schema.get("type") == "array":
        inner = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        return f"list of: {_allowed(inner)}"
    bounds = [f"{sign} {schema[key]:,}" for key, sign in _BOUNDS.items() if key in schema]
    return " ".join([_TYPES.get(schema.get("type", ""), "anything"), ", ".join(bounds)]).strip()


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`", "array": "list"}


if __name__ == "__main__":
    PAGE.write_text(page())
