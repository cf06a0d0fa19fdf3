"""Strict decoding of recipes: YAML -> tree -> frozen record, with all mistakes reported at once.

Each message is one line: the dotted key, what is wrong, what to write instead.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError

from lst_scale.errors import RecipeError, did_you_mean

M = TypeVar("M", bound=BaseModel)

Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A record of what can be set: unknown keys and wrong types are mistakes, and what was read does not change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Loader(yaml.SafeLoader):
    """YAML that reads 3e-3 as a number (YAML 1.1 wants 3.0e-3) and refuses a key said twice."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)  # type: ignore[no-untyped-call]
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is written twice", key_node.start_mark)
        seen.add(key)
    return dict(loader.construct_pairs(node, deep=True))  # type: ignore[no-untyped-call]


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(text: str, where: str) -> tuple[dict[str, Any], list[str]]:
    """Return the tree of a recipe, with the mistakes found so far: none here, since broken YAML leaves nothing to look at.

    Raises:
        RecipeError: the text is no YAML mapping.
    """
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise RecipeError(f"{where}:{line} {error.problem}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, for instance task: rte")
    return tree, []


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write `a.b=value` overrides into the tree, values read as YAML, and return the mistakes among them."""
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            problems.append(f"{override!r} is no override: write key=value, for instance training.epochs=3")
            continue
        try:
            decoded = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError:
            problems.append(f"{key}: {value!r} can't be read as a value; quote it")
            continue
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            # A section that is not there yet is made; one that is no mapping (task: rte) is replaced.
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = decoded
    return problems


def build(model: type[M], tree: dict[str, Any], problems: list[str]) -> M:
    """Return the record, or raise every mistake at once.

    Raises:
        RecipeError: one line a mistake.
    """
    record = None
    try:
        record = model.model_validate(_lists_as_tuples(tree))
    except ValidationError as error:
        problems = problems + list(_messages(model, error))
    if problems or record is None:
        raise RecipeError("\n       ".join(problems))
    return record


def _lists_as_tuples(value: Any) -> Any:
    """YAML has lists, frozen records have tuples; strict decoding tells them apart."""
    if isinstance(value, dict):
        return {key: _lists_as_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_as_tuples(item) for item in value)
    return value


def _messages(model: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        location = tuple(part for part in problem["loc"] if isinstance(part, str | int))
        path, annotation = _walk(model, location)
        kind, given = problem["type"], problem["input"]
        if kind == "extra_forbidden":
            valid = _fields_of(_walk(model, location[:-1])[1])
            yield f"{'.'.join(path)}: there is no such key.{did_you_mean(path[-1], valid)}"
        elif kind in ("union_tag_not_found", "union_tag_invalid") and isinstance(given, dict) and "name" in given:
            yield f"{'.'.join(path)}.name: {given['name']!r} is not valid.{did_you_mean(str(given['name']), _names(annotation))}"
        elif kind in ("union_tag_not_found", "union_tag_invalid"):
            yield f"{'.'.join(path)}: needs a name; write name: {' or '.join(_names(annotation))}"
        elif kind == "missing" and isinstance(location[-1], int):
            yield f"{'.'.join(path[:-1])}: needs more than {location[-1]} values"
        elif kind == "missing":
            yield f"{'.'.join(path)}: is missing; write {path[-1]}: ..."
        elif kind == "literal_error":
            yield f"{'.'.join(path)}: {given!r} is not valid.{did_you_mean(str(given), _literals(annotation))}"
        elif kind == "too_short":
            yield f"{'.'.join(path)}: needs at least {problem['ctx']['min_length']} value"
        elif kind == "value_error":
            yield f"{'.'.join(path) or 'recipe'}: {problem['ctx']['error']}"
        else:
            wanted = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            wanted = re.sub(r"dictionary or instance of \w+", "a mapping of keys to values", wanted).replace("tuple", "list")
            yield f"{'.'.join(path)}: {list(given) if isinstance(given, tuple) else given!r} should be {wanted}"


def _walk(model: type[BaseModel], location: tuple[str | int, ...]) -> tuple[list[str], Any]:
    """Return the dotted path that a person knows (without pydantic's names of union branches) and the field's annotation."""
    path: list[str] = []
    annotation: Any = model
    for part in location:
        if isinstance(part, str) and part.startswith("<"):
            annotation = _branch(annotation, part)  # of a union, see `either` and `tagged`
            continue
        fields = _model_of(annotation)
        if fields is not None and isinstance(part, str):
            path.append(part)
            annotation = fields.model_fields[part].annotation if part in fields.model_fields else None
        elif isinstance(part, int):
            path.append(str(part))
    return path, annotation


def _branch(annotation: Any, tag: str) -> Any:
    """Return the branch called `tag` somewhere in a union, or the annotation itself."""
    for option in get_args(annotation):
        if isinstance(option, Tag) and option.tag == tag:
            return get_args(annotation)[0]
        found = _branch(option, tag)
        if found is not option:
            return found
    return annotation


def _names(annotation: Any) -> list[str]:
    """Return what the `name` of any branch of a `tagged` union may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _literals(annotation.model_fields["name"].annotation)
    return [name for option in get_args(annotation) for name in _names(option)]


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for option in get_args(annotation):
        found = _model_of(option)
        if found is not None:
            return found
    return None


def _fields_of(annotation: Any) -> list[str]:
    fields = _model_of(annotation)
    return list(fields.model_fields) if fields is not None else []


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) in (Union, types.UnionType) or get_args(annotation):
        return [value for option in get_args(annotation) for value in _literals(option)]
    return []


def either(**branches: Any) -> Any:
    """Return a union whose branch is chosen by what was written (word, mapping, list or number), so that only its mistakes are told."""
    kinds = {dict: "mapping", tuple: "list", str: "word", int: "number", float: "number"}
    fallback = next(iter(branches))

    def choose(value: Any) -> str:
        kind = "mapping" if isinstance(value, BaseModel) else kinds.get(type(value), fallback)
        return f"<{kind if kind in branches else fallback}>"

    tagged = tuple(Annotated[branch, Tag(f"<{kind}>")] for kind, branch in branches.items())
    return Annotated[Union[tagged], Discriminator(choose)]  # noqa: UP007, made at run time


def tagged(**branches: type[BaseModel]) -> Any:
    """Return a union of sections chosen by their `name`: each one's knobs exist only under it. A bare word stands for its mapping."""

    def choose(value: Any) -> str | None:
        name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
        return f"<{name}>" if name in branches else None

    union = tuple(Annotated[branch, Tag(f"<{name}>")] for name, branch in branches.items())
    word = BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
    return Annotated[Union[union], Discriminator(choose), word]  # noqa: UP007, made at run time
