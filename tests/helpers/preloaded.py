"""Imported once by the server that ranks are forked from: every module of the package, and what it imports while it runs."""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil

# Where there is a GPU: CUDA works in no process forked from one that has asked it anything.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import lst_scale

ON_THE_WAY = (
    "pytest",  # a rank imports its parent's main module
    "sklearn.metrics",
    "transformers.models.t5.tokenization_t5",
    "transformers.models.mt5",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.pin_memory",
    "deepspeed.comm.mori",
    "setuptools",
    "distutils.ccompiler",
    "torch.profiler",
)
for module in pkgutil.walk_packages(lst_scale.__path__, "lst_scale."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in ON_THE_WAY:
    with contextlib.suppress(ImportError):  # of another version, whose ranks then import what they need
        importlib.import_module(name)
