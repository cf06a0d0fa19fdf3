"""Strict decoding of recipes: YAML -> tree -> frozen record, with all mistakes reported at once.

Each message is one line: the dotted key, what is wrong, what to write instead.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError

from lst_scale.errors import RecipeError, did_you_mean, fence, reason_of
from lst_scale.system.names import shown

M = TypeVar("M", bound=BaseModel)

Count = Annotated[int, Field(ge=1, le=10**9)]
LONGEST_TEXT = 200_000  # characters; a recipe has 20 lines
MOST_VALUES = 20_000  # in a recipe, each alias counted as what it stands for


class Section(BaseModel):
    """A record of what can be set: unknown keys and wrong types are mistakes, and what was read does not change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    no_effect: ClassVar[tuple[str, ...]] = ()  # keys elsewhere in a recipe that say nothing beside this section


class _Loader(yaml.SafeLoader):
    """YAML that reads 3e-3 as a number (YAML 1.1 wants 3.0e-3), and whose keys are words, each said once."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        _refuse_bombs(node)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # 2020-13-45, 0b_, !!int abc, a number of 5000 digits
            raise yaml.constructor.ConstructorError(None, None, reason_of(error), node.start_mark) from error


class Dumper(yaml.SafeDumper):
    """YAML that this loader reads back: a name such as 1e5 is quoted."""


_NUMBER = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_Loader.add_implicit_resolver(*_NUMBER)
Dumper.add_implicit_resolver(*_NUMBER)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) and not _is_merge(key_node) else None
        if _is_merge(key_node):
            problem = "merge keys (<<) are not read: write the keys out"
        elif not isinstance(key, str):
            problem = f"the key {shown(key_node.value)} is no word" if isinstance(key_node, yaml.ScalarNode) else "a key is a word"
        elif key in seen:
            problem = f"the key {shown(key)} is written twice"
        else:
            seen.add(key)
            continue
        raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
    return dict(loader.construct_pairs(node, deep=True))  # type: ignore[no-untyped-call]


def _is_merge(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:merge")


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _refuse_bombs(root: yaml.Node | None) -> None:
    """Refuse what is small as text and huge, or endless, once its aliases are followed."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise yaml.composer.ComposerError(None, None, "an alias inside of what it stands for", node.start_mark)
        if id(node) not in sizes:
            open_nodes.add(id(node))
            children = node.value if isinstance(node, yaml.SequenceNode) else ()
            children = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else children
            sizes[id(node)] = 1 + sum(map(size, children))
            open_nodes.discard(id(node))
        if sizes[id(node)] > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_VALUES} values", node.start_mark)
        return sizes[id(node)]

    if root is not None:
        size(root)


def _load(text: str, where: str) -> Any:
    """Return what a YAML text says.

    Raises:
        RecipeError: it can't be read; one line with `where`, and the number of the line where there are several.
    """
    if len(text) > LONGEST_TEXT:
        raise RecipeError(f"{where}: {len(text):,} characters, and {LONGEST_TEXT:,} are read")
    with fence(RecipeError, where):
        try:
            return yaml.load(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            line = f" line {error.problem_mark.line + 1}:" if error.problem_mark and where else ""
            raise RecipeError(f"{where}:{line} {reason_of(ValueError(error.problem))}") from error


def read_text(path: Path) -> str:
    """Return a text file that a person wrote.

    Raises:
        RecipeError: it can't be read, or is no UTF-8 text; names it.
    """
    with fence(RecipeError, str(path)):
        if not path.is_file():
            raise RecipeError(f"{path} is no file")
        data = path.read_bytes() if path.stat().st_size <= 4 * LONGEST_TEXT else b""
        if not data and path.stat().st_size:
            raise RecipeError(f"{path}: {path.stat().st_size:,} bytes, and {LONGEST_TEXT:,} characters are read")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: byte {error.start + 1} is not UTF-8 text: save the file as UTF-8") from error


def read_yaml(text: str, where: str) -> tuple[dict[str, Any], list[str]]:
    """Return the tree of a recipe, with the mistakes found so far: none here, since broken YAML leaves nothing to look at.

    Raises:
        RecipeError: the text is no YAML mapping.
    """
    tree = _load(text, where)
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, for instance task: rte")
    return tree, []


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write `a.b=value` overrides into the tree, values read as YAML, and return the mistakes among them."""
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(f"{shown(override)} is no override: write key=value, for instance training.epochs=3")
            continue
        try:
            decoded = _load(value, "")
        except RecipeError as error:
            problems.append(f"{_word(key)}: {shown(value)} can't be read as a value; quote it ({str(error).removeprefix(':').strip()})")
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
    problems = problems + [f"{_said(text)} holds half a character (a lone surrogate)" for text in _texts(tree) if _is_broken(text)]
    try:
        record = model.model_validate(_lists_as_tuples(tree))
    except ValidationError as error:
        problems = problems + list(_messages(model, error))
    if problems or record is None:
        raise RecipeError("\n       ".join(problems))
    return record


def _texts(value: Any) -> Iterator[str]:
    """Yield all text in a tree, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in itertools.chain(*value.items()) if isinstance(value, dict) else value:
            yield from _texts(item)


def _is_broken(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


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
        path = [_word(part) for part in path]
        kind, given = problem["type"], problem["input"]
        if kind == "extra_forbidden":
            valid = _fields_of(_walk(model, location[:-1])[1])
            yield f"{'.'.join(path)}: there is no such key.{did_you_mean(path[-1][:60], valid)}"
        elif kind in ("union_tag_not_found", "union_tag_invalid") and isinstance(given, dict) and "name" in given:
            yield f"{'.'.join(path)}.name: {_said(given['name'])} is not valid.{did_you_mean(str(given['name'])[:60], _names(annotation))}"
        elif kind in ("union_tag_not_found", "union_tag_invalid"):
            yield f"{'.'.join(path)}: needs a name; write name: {' or '.join(_names(annotation))}"
        elif kind == "missing" and isinstance(location[-1], int):
            yield f"{'.'.join(path[:-1])}: needs more than {location[-1]} values"
        elif kind == "missing":
            yield f"{'.'.join(path)}: is missing; write {path[-1]}: ..."
        elif kind == "literal_error":
            yield f"{'.'.join(path)}: {_said(given)} is not valid.{did_you_mean(str(given)[:60], _literals(annotation))}"
        elif kind == "too_short":
            yield f"{'.'.join(path)}: needs at least {problem['ctx']['min_length']} value"
        elif kind == "value_error":
            yield f"{'.'.join(path) or 'recipe'}: {problem['ctx']['error']}"
        else:
            wanted = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            wanted = re.sub(r"dictionary or instance of \w+", "a mapping of keys to values", wanted).replace("tuple", "list")
            yield f"{'.'.join(path)}: {_said(given)} should be {wanted}"


def _said(given: Any) -> str:
    """Return a value as a person wrote it, on one line, a long one cut."""
    with contextlib.suppress(ValueError):  # a number of more digits than Python prints
        text = repr(list(given) if isinstance(given, tuple) else given)
        return text if len(text) <= 100 else f"{text[:100]}..."
    return "that"


def _word(key: str) -> str:
    """Return a key for a message: words as they are, anything else in quotes."""
    return key if re.fullmatch(r"[\w.-]{1,100}", key) else shown(key)


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
        return f"<{name}>" if isinstance(name, str) and name in branches else None

    union = tuple(Annotated[branch, Tag(f"<{name}>")] for name, branch in branches.items())
    word = BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
    return Annotated[Union[union], Discriminator(choose), word]  # noqa: UP007, made at run time
