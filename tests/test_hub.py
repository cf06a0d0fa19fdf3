"""The hub: a side network and a run go up and come down, by the hub's own protocol, on a server of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import lst_scale
from helpers.finished import finished_runs
from helpers.hub import TOKEN, Hub, running
from helpers.launchers import fresh
from helpers.llamas import make_llama
from helpers.paths import ROOT
from helpers.tiny import tiny_ladder
from lst_scale import LadderConfig, LadderModel
from lst_scale.errors import ArgumentError, LadderError
from lst_scale.side import files


@dataclass(frozen=True)
class Done:
    hub: Hub
    told: dict[str, Any]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """All that is asked of the hub, in one process, since this one is offline from its start."""
    folder = tmp_path_factory.mktemp("hub")
    run = finished_runs(folder, only=["class"])["class"]
    # Large files go by the hub's older way, which plain HTTP serves; what is newer has servers of its own.
    own = {"HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with running() as hub:
        environment = fresh() | own | {"HF_ENDPOINT": hub.url}
        command = [sys.executable, "-m", "helpers.hub_program", str(run), str(folder)]
        ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:] + "\n".join(hub.asked[-20:])
        return Done(hub, json.loads((folder / "told.json").read_text()))


def test_a_side_network_goes_up_and_comes_down_by_branch(done: Done) -> None:
    told, hub = done.told["ladder"], done.hub
    assert told["commit"].startswith(f"{hub.url}/me/side/commit/") and told["branch"] != told["commit"]
    assert told["main is the first"] and told["the branch is the second"]
    assert hub.private["me/side"] is True and hub.private["me/run"] is False
    assert set(hub.files("me/side", "main") or ()) == {files.WEIGHTS, files.CONFIG, files.CARD, "config.json"}
    assert "PUT /large/" in " ".join(hub.asked), "weights go beside the commit, as the hub wants large files"


def test_its_card_loads_it_by_its_name(done: Done) -> None:
    card = (done.hub.files("me/side", "main") or {})[files.CARD].decode()
    assert "LadderModel.from_pretrained('me/side', t5)" in card and "/tmp" not in card


def test_auto_config_reads_what_is_there(done: Done) -> None:
    assert done.told["ladder"]["config"] == ["ladder", True, [0, 2], ["LadderModel"]]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no such name", "LadderError: me/nothing is no folder, and the hub can't be reached or lacks it (RepositoryNotFoundError: "),
        ("no such branch", "LadderError: me/side is no folder, and the hub can't be reached or lacks it (RevisionNotFoundError: "),
        ("no token", "ArgumentError: me/other could not be pushed to the hub (HfHubHTTPError: Invalid username or password.)"),
        ("no name", "ArgumentError: 'a b/c' is no name for the hub: write owner/name"),
    ],
)
def test_what_the_hub_refuses_is_one_line(what: str, message: str, done: Done) -> None:
    said = done.told["ladder"][what]
    assert said.startswith(message) and "\n" not in said


def test_what_a_trainer_pushes_opens(done: Done) -> None:
    assert done.told["trainer"]["opens"]
    assert "model.safetensors" in (done.hub.files("me/trained", "main") or {})


def test_a_run_answers_from_the_hub_as_from_its_folder(done: Done) -> None:
    told, found = done.told["run"], done.hub.files("me/run", "main") or {}
    assert told["same answers"] and told["labels"] == ["artifact", "food"] and told["side network"] and told["copy"]
    assert told["root"].startswith("LadderError: ") and "give the side_network folder of a run" in told["root"]
    folder = {f"side_network/{name}" for name in (files.WEIGHTS, files.CONFIG, files.CARD, "config.json")}
    assert set(found) == {"recipe.yaml", "result.json", "README.md", *folder}
    assert "pipe = lst_scale.pipeline('me/run')" in found["README.md"].decode()


def test_a_name_of_the_hub_without_a_network_is_one_line() -> None:
    for ask in (LadderModel.from_pretrained, lst_scale.pipeline):
        with pytest.raises((LadderError, ArgumentError), match=r"^nobody/nothing is no folder, and the hub can't be reached") as refusal:
            ask("nobody/nothing")  # type: ignore[operator]
        assert "\n" not in str(refusal.value)


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    tiny_ladder().save_pretrained(tmp_path / "side")
    with pytest.raises(LadderError, match=r"^revision 'main' is one of the hub's, and .*/side is a folder: leave it out"):
        LadderModel.from_pretrained(tmp_path / "side", revision="main")


def test_config_json_says_what_it_is_to_others_and_nothing_to_us(tmp_path: Path) -> None:
    model = LadderModel(make_llama("llama"), LadderConfig(reduction_factor=8, side_layers=[1, 3]))
    model.save_pretrained(tmp_path / "side")
    config = AutoConfig.from_pretrained(tmp_path / "side")
    assert config.model_type == "ladder" and config.is_encoder_decoder is False and config.vocab_size == 97
    assert config.ladder["reduction_factor"] == 8 and config.base_model_name_or_path == "live model"
    record = json.loads((tmp_path / "side" / "config.json").read_text())
    assert record["ladder"] == json.loads((tmp_path / "side" / files.CONFIG).read_text())["config"]
    (tmp_path / "side" / "config.json").write_text("{")
    assert LadderModel.from_pretrained(tmp_path / "side", model.backbone).side.config == model.side.config
