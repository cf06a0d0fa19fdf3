"""Remember what operations on fake tensors give, so that a block like the one before costs next to nothing.

`FakeTensorMode` has a memory of its own, which takes longer to ask than everything else in a step. Here a hit makes the result at once.
Remembered are operations that make tensors of their own and operations that write into their first argument, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

_CPU = torch.device("cpu")
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_WRITTEN = object()  # the result is the first argument

# Of each operation, by its address (they live as long as torch, and hash slowly): its kind, and what it gave for which arguments.
_known: dict[int, tuple[str | None, dict[Any, Any]]] = {}

# The attributes of the last mode's fake tensors.
_like: dict[str, Any] = {}


def run(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return what `func` gives for these arguments, fake or real."""
    mode = _mode_of(args)
    if mode is None:
        return func(*args, **kwargs)
    kind, known = _known.get(id(func)) or _known.setdefault(id(func), (_kind_of(func), {}))
    if kind is None:
        return func(*args, **kwargs)
    if kind == "view":
        with in_kernel_invocation_manager(mode):
            view = func(*args, **kwargs)
        return _fake(mode, view)
    key = _key(args, kwargs)
    if key is None:
        return func(*args, **kwargs)
    entry = known.get(key)
    if entry is None:
        result = func(*args, **kwargs)
        entry = _written(args, result) if kind == "writes" else _made(result)
        if entry is not None:
            known[key] = entry
        return result
    if entry is _WRITTEN:
        return args[0]
    if isinstance(entry, list):
        return tuple(_make(mode, *each) for each in entry)
    return _make(mode, *entry)


def _make(mode: Any, size: Any, stride: Any, dtype: torch.dtype) -> FakeTensor:
    with torch._C._DisableTorchDispatch():
        empty = torch.empty_strided(size, stride, dtype=dtype, device="meta")
    return _fake(mode, empty)


def _fake(mode: Any, meta: Tensor) -> FakeTensor:
    """Return `FakeTensor(mode, meta, _CPU)`, in half the time: with the attributes of one that was made so."""
    if _like.get("fake_mode") is not mode:
        _like.clear()
        _like.update(FakeTensor(mode, meta, _CPU).__dict__)
    made = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=_CPU)
    torch._C._set_throw_on_mutable_data_ptr(made)
    made.__dict__.update(_like)
    return made


def _mode_of(args: Any) -> Any:
    """Return the mode of a first argument that is a fake tensor on the CPU without known contents, or the one we are in without tensors."""
    first: Any = args[0] if args else None
    if type(first) is list and first:
        first = first[0]
    if isinstance(first, Tensor):
        return first.fake_mode if isinstance(first, FakeTensor) and _is_ours(first) else None
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def _is_ours(value: Any) -> bool:
    return type(value) is FakeTensor and value.constant is None and value.fake_device == _CPU


def _kind_of(func: Any) -> str | None:
    """Return "view", "makes", "writes", or None for what is left to torch."""
    if func is torch.ops.aten._unsafe_view.default:  # does not call itself one
        return "view"
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten" or torch.Tag.dynamic_output_shape in func.tags:
        return None
    returns, arguments = func._schema.returns, func._schema.arguments
    if not returns or any(str(each.type) != "Tensor" for each in returns):
        return None
    if func.is_view:
        return "view" if len(returns) == 1 else None
    written = [number for number, each in enumerate(arguments) if each.alias_info is not None]
    if not written:
        return "makes"
    return "writes" if written == [0] and len(returns) == 1 else None


def _key(args: Any, kwargs: Any) -> Any:
    found: list[Any] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()]
    if not _add(found, args):
        return None
    for name, value in kwargs.items():
        found.append(name)
        if not _add(found, (value,)):
            return None
    return tuple(found)


def _add(found: list[Any], values: Any) -> bool:
    """Add what tells values apart; return False where one has more to it than that."""
    for value in values:
        if type(value) is FakeTensor:
            if not _is_ours(value):
                return False
            found += (Tensor, value.shape, value.stride(), value.dtype)
        elif isinstance(value, _PLAIN):
            found += (type(value), value)
        elif isinstance(value, (list, tuple)):
            found += (type(value), len(value))
            if not _add(found, value):
                return False
        else:
            return False
    return True


def _written(args: Any, result: Any) -> Any:
    return _WRITTEN if result is args[0] else None


def _made(result: Any) -> Any:
    if isinstance(result, tuple):
        found = [_made(each) for each in result]
        return None if None in found else found
    if not _is_ours(result) or result.storage_offset() != 0:
        return None
    whole = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta").untyped_storage().nbytes()
    return (result.shape, result.stride(), result.dtype) if whole == result.untyped_storage().nbytes() else None
