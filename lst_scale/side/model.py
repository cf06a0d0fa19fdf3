"""LadderModel: a frozen backbone and a side network as one model that trains, generates, saves and loads.

The backbone is no submodule: `parameters()`, `state_dict()`, `train()` and an optimizer see the side network alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lst_scale.backbone import as_backbone
from lst_scale.backbone.taps import Backbone
from lst_scale.errors import LadderError
from lst_scale.side import files, hub_config, release
from lst_scale.side.config import LadderConfig
from lst_scale.side.initialize import initialize_random
from lst_scale.side.ladder import Form, Ladder
from lst_scale.side.network import SideNetwork
from lst_scale.side.one_stack import OneStack
from lst_scale.side.saved import join
from lst_scale.side.two_stacks import TwoStacks
from lst_scale.system import hub


class LadderModel(Ladder):
    """A side network on a frozen backbone.

    Args:
        backbone: a live T5 or mT5 of transformers, the name or folder of one (loaded in float32), or
            anything behind `backbone.taps.Backbone`.
        side: the design of a fresh side network, whose weights start at random (seed 0), its position tables as the backbone's (see
            `lst_scale.side.initialize` for pruning); or a side network that has its weights.
    """

    side: SideNetwork

    def __init__(self, backbone: Any, side: LadderConfig | SideNetwork) -> None:
        frozen = as_backbone(backbone)
        super().__init__(frozen, _fresh(frozen, side) if isinstance(side, LadderConfig) else side, form_of(frozen))
        self.register_state_dict_post_hook(_add_record)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_take_record)  # type: ignore[no-untyped-call]

    # Weights under the release's names, and files.

    def load_release_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Load side weights under the original release's names.

        Raises:
            LadderError: a weight is missing, unknown or of another shape; nothing is loaded then.
        """
        found = release.from_release(weights, self._trained(), self.side.spec)
        self.side.load_state_dict(self.side.state_dict() | found)

    def release_state_dict(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """Return the side weights under the original release's names; with `keep_vars` the live parameters."""
        return {release.release_name(name): tensor for name, tensor in self._trained(keep_vars=keep_vars).items()}

    def _trained(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """Return the side weights without what is frozen among them: the release has the object order in its word table."""
        frozen = {name for name, _ in self.side.named_buffers()}
        return {name: tensor for name, tensor in self.side.state_dict(keep_vars=keep_vars).items() if name not in frozen}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the side network alone: weights (safetensors), configuration with the backbone's identity, model card."""
        save_side_network(Path(folder), self.side.state_dict(), self.side.config, self.backbone)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload side network",
        create_pr: bool = False,
    ) -> str:
        """Put what `save_pretrained` writes under owner/name on the hub, and return the commit's address.

        Args:
            private: whether a new name is seen by its owner alone; None: as the owner has set.
            revision: a branch, made where it isn't there.

        Raises:
            ArgumentError: the hub refuses, or can't be reached.
        """

        def fill(folder: Path) -> None:
            files.write(folder, self.side.state_dict(), self.side.config, self.backbone.identity, self.backbone.spec, called=name)

        options: dict[str, Any] = {"private": private, "revision": revision, "token": token, "create_pr": create_pr}
        return hub.push(fill, name, message=commit_message, **options)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        backbone: Any = None,
        *,
        allow_other_backbone: bool = False,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> LadderModel:
        """Read a saved side network and join it with its backbone, loaded by its recorded name unless given.

        Args:
            folder: one of this machine, or a name of the hub, owner/name.
            subfolder: below it; "side_network" of a run.
            revision: a branch, tag or commit of the hub.
            token: of the hub's, in place of the one that it has been told.

        Raises:
            LadderError: the folder is not whole, or the backbone is not the one that the side network was trained on.
        """
        found = hub.folder_of(folder, files.wanted(subfolder), revision=revision, token=token, error=LadderError)
        saved = files.read(found / subfolder)
        frozen, side = join(saved, backbone, allow_other_backbone=allow_other_backbone)
        return cls(frozen, side.to(frozen.device).eval())


def form_of(backbone: Backbone) -> Form:
    """Return what calls of a ladder beside this backbone mean."""
    return OneStack(len(backbone.identity.context)) if backbone.spec.one_stack else TwoStacks()


def _fresh(backbone: Backbone, config: LadderConfig) -> SideNetwork:
    side = SideNetwork(backbone.spec, config)
    initialize_random(side, seed=0, weights=backbone.weight_source)
    return side.to(backbone.device)


def _add_record(model: LadderModel, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Let a state dict say what its weights are, since transformers' Trainer saves nothing else."""
    state[prefix + files.RECORD] = files.as_bytes(files.record_of(model.side.config, model.backbone.identity, model.backbone.spec))


def _take_record(model: LadderModel, state: dict[str, Any], prefix: str, *_others: Any) -> None:
    found = state.pop(prefix + files.RECORD, None)
    if found is not None:
        files.refuse_another_design(
            files.from_bytes(found), files.record_of(model.side.config, model.backbone.identity, model.backbone.spec)
        )


def save_side_network(folder: Path, weights: Mapping[str, Tensor], config: LadderConfig, backbone: Backbone) -> None:
    """Write side weights by our names with all that `LadderModel.from_pretrained` needs."""
    files.write(folder, weights, config, backbone.identity, backbone.spec)


hub_config.register()

__all__ = ["LadderModel", "form_of", "save_side_network"]
