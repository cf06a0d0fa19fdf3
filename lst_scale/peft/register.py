"""Make `LADDER` a PEFT type. This is the one place that touches what peft keeps to itself."""

from __future__ import annotations

from typing import Any

import peft
from packaging.version import Version
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from lst_scale.errors import LadderError

NAME, PREFIX = "LADDER", "ladder_"
KNOWN = (Version("0.21"), Version("0.22"))  # from, below


def ladder_type() -> Any:
    """Return `PeftType.LADDER`, which is added to the enum when it isn't there.

    `register_peft_method` refuses names outside that enum, and an enum has no public way to grow.

    Raises:
        LadderError: this version of peft was never tried.
    """
    known = PeftType.__members__.get(NAME)
    if known is not None:
        return known
    found = Version(peft.__version__)
    if not KNOWN[0] <= found < KNOWN[1]:
        raise LadderError(f"lst_scale.peft knows peft from {KNOWN[0]} and below {KNOWN[1]}, not {found}: pip install 'peft>=0.21,<0.22'")
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    return member


def register_ladder(config: type, model: type) -> None:
    """Tell peft which config and tuner `LADDER` means; once a process."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if ladder_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model, prefix=PREFIX)
