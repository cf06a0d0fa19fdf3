"""The cases of benchmarks/faults.py: what users did, and what would have been right."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fault_place import Case, Done, Place
from safetensors.torch import load_file, save_file

HOLDS = "holds"
CASES: list[Case] = []


def case(id: str, what: str, test: str) -> Callable[[Callable[[Place], str]], Callable[[Place], str]]:
    """Register a function as a case."""

    def add(run: Callable[[Place], str]) -> Callable[[Place], str]:
        CASES.append(Case(id=id, what=what, run=run, test=test))
        return run

    return add


def refusal(done: Done, says: str) -> str:
    """Judge a command that should have been refused in one line with these words."""
    return HOLDS if done.refused and re.search(says, done.said) else done.kind


def success(done: Done, says: str = "") -> str:
    """Judge a command that should have worked, and said this."""
    if done.status == 0 and not done.has_traceback:
        return HOLDS if re.search(says, done.said) else "says nothing of it"
    return "refused" if done.refused else done.kind


def refuses(
    id: str, what: str, says: str, test: str, *arguments: str, prepare: Callable[[Place], Any] | None = None, **changes: Any
) -> None:
    """Register a training run that should be refused. `prepare` may spoil files first; what it returns changes the recipe."""

    def run(place: Place) -> str:
        more = prepare(place) if prepare else None
        place.recipe(**(changes | (more or {})))
        return refusal(place.train(*arguments), says)

    CASES.append(Case(id=id, what=what, run=run, test=test))


def rows(*pairs: tuple[str, str], fill: int = 8) -> str:
    """Return a CSV file of such rows, over and over."""
    return "text,label\n" + "".join(f'"{text}","{label}"\n' for text, label in list(pairs) * fill)


def with_labels(*labels: str) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        for name in ("train.csv", "validation.csv"):
            place.write(name, rows(*((f"word {n}", label) for n, label in enumerate(labels))))

    return prepare


def spoiled(change: Callable[[Path], object]) -> Callable[[Place], dict[str, str]]:
    """Return a preparation that trains on a changed copy of the backbone."""

    def prepare(place: Place) -> dict[str, str]:
        folder = place.checkpoint()
        change(folder)
        return {"backbone__checkpoint": str(folder)}

    return prepare


def config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def larger_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] += [[f"more{number}", -1.0] for number in range(100)]
    path.write_text(json.dumps(content))


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "encoder.block.0" in name)
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def text_recipe(id: str, what: str, content: str | bytes, says: str) -> None:
    """Register a recipe file as it stands."""

    def run(place: Place) -> str:
        place.write("recipe.yaml", content)
        return refusal(place.train(limit=30), says)

    CASES.append(Case(id=id, what=what, run=run, test="test_recipe_faults.py"))


# A: silently wrong, or data loss

FIT = "test_tokenizer_fit.py"
refuses("A1", "checkpoint without its tokenizer", "tokenizer", FIT, prepare=spoiled(without_tokenizer))
for number, labels in enumerate((("act ",), ("New  York",), ("Ä",), ("日",))):
    refuses(
        f"A2{'abcd'[number]}",
        f"label {labels[0]!r}, which the tokenizer changes",
        "label",
        FIT,
        prepare=with_labels(*labels, "person"),
        evaluation__method="generation",
    )
refuses("A2e", "labels with the same tokens, by likelihood", "same tokens|tokenizer", FIT, prepare=with_labels("New York", "New  York"))
refuses(
    "A3",
    "max_target_length cuts labels",
    "max_target_length",
    FIT,
    prepare=with_labels("red apple pie", "red apple cake"),
    data__max_target_length=2,
)
refuses(
    "A3b",
    "max_new_tokens shorter than a label",
    "max_new_tokens",
    FIT,
    evaluation__method="generation",
    evaluation__max_new_tokens=1,
    prepare=with_labels("red apple pie", "red apple cake"),
)


@case("A4", "task.name=../../../precious --overwrite", "test_recipe_faults.py::test_what_names_a_folder_can_not_leave_it")
def _(place: Place) -> str:
    kept = place.write("precious-seed0/thesis.doc", "years of work")
    place.recipe()
    done = place.train("name=d", "task.name=../../../precious", "--overwrite")
    if not kept.exists():
        return "destroys a foreign file"
    return refusal(done, "task.name") if not (place.folder / "precious-seed0" / "recipe.yaml").exists() else "writes outside output_dir"


for number, name in enumerate(("", "a/b", "a\nb", "<img src=x>")):
    refuses(f"A4{'bcde'[number]}", f"task.name={name!r}", "task.name", "test_recipe_faults.py", task__name=name)


@case("A5", "ensemble --name ../victim --overwrite", "test_ensemble_result.py::test_an_ensemble_s_name_is_one_for_a_folder")
def _(place: Place) -> str:
    runs = [str(place.run_copy(name)) for name in ("base", "other")]
    victim = place.folder / "victim-t-seed0"
    (victim / "checkpoints").mkdir(parents=True)
    place.write("victim-t-seed0/recipe.yaml", "name: victim")
    done = place.tool("ensemble", *runs, "--name", "../victim", "--overwrite")
    return refusal(done, "name") if (victim / "checkpoints").exists() else "destroys a folder outside output_dir"


@case(
    "A6",
    "cache remove of a folder with any key.json",
    "test_cache_folders.py::test_a_folder_whose_mark_is_not_ours_is_named_skipped_and_never_removed",
)
def _(place: Place) -> str:
    kept = place.write("F/precious/thesis.doc", "years of work")
    place.write("F/precious/key.json", "{}")
    place.tool("cache", "remove", "precious", "--folder", str(place.folder / "F"))
    return HOLDS if kept.exists() else "destroys a foreign file"


@case("A6b", 'cache remove ""', "test_cache_folders.py::test_an_empty_name_removes_nothing")
def _(place: Place) -> str:
    kept = place.write("F/precious/thesis.doc", "years of work")
    place.write("F/precious/key.json", "{}")
    done = place.tool("cache", "remove", "", "--folder", str(place.folder / "F"))
    return (HOLDS if done.status else done.kind) if kept.exists() else "destroys a foreign file"


@case(
    "A8", "a line break in output_dir at submission", "test_recipe_faults.py::test_a_path_holds_no_control_character_and_fits_a_file_system"
)
def _(place: Place) -> str:
    planted = place.folder / "planted"
    recipe = place.recipe(output_dir=f"{place.folder}/o\ntouch {planted} #")
    done = place.tool("slurm", "submit", "--recipe", str(recipe), "--dry-run", "--gpus-per-node", "0", "--tasks-per-node", "1")
    return refusal(done, "output_dir|control") if f"\ntouch {planted}" not in done.out else "the script runs it"


@case("A8b", "a line break in --partition", "test_slurm_records.py::test_no_control_character_gets_into_the_options_of_a_job")
def _(place: Place) -> str:
    recipe = place.recipe()
    options = ("--gpus-per-node", "0", "--tasks-per-node", "1", "--partition", "p\ntouch planted #")
    done = place.tool("slurm", "submit", "--recipe", str(recipe), "--dry-run", *options)
    return refusal(done, "partition") if "\ntouch planted" not in done.out else "the script runs it"


def predicted(place: Place, content: str | bytes, name: str = "inputs.csv", *arguments: str, **options: Any) -> tuple[Done, Path]:
    run, inputs, output = place.run_copy(), place.write(name, content), place.folder / "answers.jsonl"
    return place.tool("predict", str(run), str(inputs), "--output", str(output), *arguments, **options), output


@case("A9", "predict: an empty source cell", "test_predict.py::test_a_row_that_training_would_refuse_is_refused")
def _(place: Place) -> str:
    done, _output = predicted(place, '{"text": "one"}\n{"text": null}\n', "inputs.jsonl")
    return refusal(done, "line 2|row 1|row 2")


@case("A9b", "predict: a column called prediction", "test_predict.py")
def _(place: Place) -> str:
    done, output = predicted(place, '{"text": "one", "prediction": "mine"}\n', "inputs.jsonl")
    return (
        "overwrites the column"
        if done.status == 0 and "mine" not in output.read_text()
        else success(done)
        if done.status == 0
        else refusal(done, "prediction")
    )


@case("A9c", "predict: NaN in another column", "test_predict.py::test_what_json_lacks_is_written_as_text_or_null")
def _(place: Place) -> str:
    done, output = predicted(place, '{"text": "one", "x": NaN}\n', "inputs.jsonl")
    return "writes what is no JSON" if done.status == 0 and re.search(r"\bNaN\b(?!\")", output.read_text()) else success(done)


@case(
    "A11", "two --resume in one folder at once", "test_run_folder.py::test_a_second_start_in_a_folder_in_use_is_refused_and_changes_nothing"
)
def _(place: Place) -> str:
    place.recipe(training__max_steps=4000, training__epochs=9999)
    command = ("-m", "lst_scale.train", "--recipe", str(place.folder / "recipe.yaml"), "--resume")
    first = place.start(*command)
    place.wait_for(lambda: any((place.folder / "runs").rglob("metrics.jsonl")), first)
    second = place.python(*command, limit=25)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    return "both train" if second.status is None else refusal(second, "in use|another process|uses")


def state(id: str, what: str, change: Callable[[dict[str, Any]], Any], test: str = "test_checkpoint_faults.py") -> None:
    """Register a resume after the newest checkpoint's state was edited."""

    @case(id, what, test)
    def _(place: Place) -> str:
        run = place.run_copy()
        path = next((run / "checkpoints").glob("step-*")) / "state.json"
        content = json.loads(path.read_text())
        content = change(content) or content
        path.write_text(json.dumps(content))
        (run / "result.json").unlink()
        done = place.python("-m", "lst_scale.train", "--recipe", str(run / "recipe.yaml"), "--resume", limit=45)
        return (
            HOLDS if not done.has_traceback and done.status is not None and re.search("damaged|no longer|whole", done.said) else done.kind
        )


state("A12", "state.json says step 1e9", lambda content: content["progress"].update(step=10**9))
state("A12b", 'state.json with "sha256": {}', lambda content: content.update(sha256={}))
state("B12", "state.json without progress", lambda content: content.pop("progress") and None)

refuses("A13", "pearson of labels that are words", "pearson", "test_metrics.py", task__metrics=["pearson"])
refuses(
    "A13b",
    "config.json with fewer layers than the weights",
    "layer|block|tensor",
    "test_early_checks.py",
    prepare=spoiled(config(num_layers=2)),
)
refuses("A13c", "members: ['members=[seed=1]']", "members", "test_recipe_faults.py", members=["members=[seed=1]"])


@case("A13d", "parquet bytes as source", "test_data_faults.py::test_a_parquet_cell_that_is_no_text_is_refused_by_row")
def _(place: Place) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": [b"abc"] * 8, "label": ["artifact", "person"] * 4}), place.folder / "train.parquet")
    place.recipe(task__train=str(place.folder / "train.parquet"))
    return refusal(place.train(), "row|bytes|text")


@case("A13e", "edited normalize_taps in ladder_config.json", "test_predict.py::test_a_side_network_whose_description_was_edited_is_refused")
def _(place: Place) -> str:
    run, inputs = place.run_copy(), place.write("inputs.csv", "text\none\n")
    path = run / "side_network" / "ladder_config.json"
    path.write_text(path.read_text().replace('"normalize_taps": false', '"normalize_taps": true'))
    return refusal(place.tool("predict", str(run), str(inputs)), "side_network|ladder_config")


@case("A13f", "NaN in side_network.safetensors", "test_predict.py::test_weights_that_no_run_writes_are_refused")
def _(place: Place) -> str:
    run, inputs = place.run_copy(), place.write("inputs.csv", "text\none\n")
    path = run / "side_network" / "side_network.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return refusal(place.tool("predict", str(run), str(inputs)), "side_network")


@case("A14", "--overwrite on a run folder that is a link", "test_run_folder.py::test_an_overwrite_follows_no_link_and_removes_nothing_then")
def _(place: Place) -> str:
    place.run_copy("base").rename(place.folder / "elsewhere")
    (place.folder / "runs" / "case-t-seed0").symlink_to(place.folder / "elsewhere")
    place.recipe()
    return refusal(place.train("--overwrite"), "link")


# B: tracebacks and lost work


@case(
    "B1",
    "disk full while a checkpoint is written (RLIMIT_FSIZE)",
    "test_run_folder.py::test_a_full_disk_is_told_as_such_by_safetensors_too",
)
def _(place: Place) -> str:
    place.recipe()
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); sys.argv = sys.argv[1:]; "
    limited += "runpy.run_module('lst_scale.train', run_name='__main__', alter_sys=True)"
    done = place.python("-c", limited, "train", "--recipe", str(place.folder / "recipe.yaml"))
    return refusal(done, "could not write|File too large")


@case("B2", "predict: parquet with a timestamp", "test_predict.py::test_what_json_lacks_is_written_as_text_or_null")
def _(place: Place) -> str:
    import datetime

    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["one"], "when": [datetime.datetime(2026, 1, 1)]}), place.folder / "made.parquet")
    return success(predicted(place, (place.folder / "made.parquet").read_bytes(), "inputs.parquet")[0])


@case("B2b", "predict --output: a folder", "test_predict.py::test_a_place_that_can_not_be_written_is_told_before_the_backbone_is_loaded")
def _(place: Place) -> str:
    run, inputs = place.run_copy(), place.write("inputs.csv", "text\none\n")
    return refusal(place.tool("predict", str(run), str(inputs), "--output", str(place.folder)), "folder|directory")


@case("B3", "Ctrl-C while it trains", "test_signals.py::test_ctrl_c_saves_and_the_resumed_run_ends_as_if_nothing_had_been")
def _(place: Place) -> str:
    place.recipe(training__max_steps=4000, training__epochs=9999, training__save_every_steps=4000, logging__log_every_steps=1)
    process = place.start("-m", "lst_scale.train", "--recipe", str(place.folder / "recipe.yaml"))
    place.wait_for(lambda: any(path.stat().st_size > 500 for path in (place.folder / "runs").rglob("metrics.jsonl")), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    saved = any((place.folder / "runs").rglob("checkpoints/step-*"))
    return HOLDS if saved and "Traceback" not in out + err else "traceback, nothing saved" if not saved else "traceback"


@case("B4", "output_dir is a file", "test_run_folder.py::test_something_in_the_way_of_what_is_written_is_one_line")
def _(place: Place) -> str:
    place.recipe(output_dir=str(place.write("taken", "")))
    return refusal(place.train(), "taken")


@case("B4b", "cache.folder is a file", "test_cache_folders.py::test_a_cache_folder_that_can_not_be_made_is_told_in_one_line")
def _(place: Place) -> str:
    place.recipe(cache={"enabled": True, "folder": str(place.write("taken", ""))})
    return refusal(place.train(), "taken")


def beside(id: str, what: str, file: str, content: str, test: str, *command: str, says: str = "") -> None:
    """Register a command over several runs, of which one has this file damaged: the others must be shown."""

    @case(id, what, test)
    def _(place: Place) -> str:
        place.run_copy("base")
        broken = place.run_copy("other")
        path = broken / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        where = ["--output-dir"] if command[0] == "slurm" else []
        done = place.tool(*command, *where, str(place.folder / "runs"))
        return success(done, says or "base")


for number, content in enumerate(("{", "{}", "[]", '{"scores": 1}')):
    beside(
        f"B5{'abcd'[number]}",
        f"compare beside result.json = {content}",
        "result.json",
        content,
        "test_compare.py::test_a_broken_result_is_named_and_left_out",
        "compare",
    )
beside("B6", "slurm status beside an odd line in jobs.jsonl", "slurm/jobs.jsonl", "odd\n", "test_slurm_records.py", "slurm", "status")
beside(
    "B6b",
    "slurm status beside markup in a message",
    "slurm/failure-0.json",
    '{"error": "[/red] x", "job": "1"}',
    "test_slurm_records.py",
    "slurm",
    "status",
)


@case(
    "B7",
    "cache list beside a foreign key.json",
    "test_cache_folders.py::test_a_folder_whose_mark_is_not_ours_is_named_skipped_and_never_removed",
)
def _(place: Place) -> str:
    place.write("F/odd/key.json", "{")
    return success(place.tool("cache", "list", "--folder", str(place.folder / "F")))


@case(
    "B8, F3",
    "a wrong column, mended, and the same command again",
    "test_early_checks.py::test_a_start_that_fails_leaves_no_folder_and_the_mended_one_goes_on",
)
def _(place: Place) -> str:
    place.recipe()
    place.train("task.target=lable")
    return success(place.train())


YAML = "name: x\ntask: {name: t}\n"
text_recipe("B9", "recipe with a latin-1 comment", b"# caf\xe9\n" + YAML.encode(), "UTF-8|text")
text_recipe("B9b", "recipe in UTF-16", YAML.encode("utf-16"), "UTF-8|text")
text_recipe("B9c", "recipe with a NUL", "name: x\0\n", "recipe.yaml")
text_recipe("B9d", "recipe with the date 2020-13-45", "name: 2020-13-45\n", "recipe.yaml|name")
text_recipe("B9e", "recipe with a number of 5,000 digits", "name: x\nseed: " + "9" * 5000 + "\n", "recipe.yaml|seed|digits")
text_recipe("B9f", "recipe with the key [a]", "? [a]\n: 1\n", "recipe.yaml")
text_recipe("B9g", "recipe with 3,000 nested brackets", "name: " + "[" * 3000, "recipe.yaml")
text_recipe(
    "C6",
    "recipe with an alias bomb of 8 levels",
    "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
    "alias|recipe.yaml",
)
refuses("B9h", "method.name.x=1", "method.name", "test_recipe_faults.py", "method.name.x=1")

DATA = "test_data_faults.py::test_a_template_holds_plain_names_only"
for number, template in enumerate(("{text!z}", "{text:d}", "{text:{text}}", "{text!r:>9999999999}")):
    refuses(f"B10{'abcd'[number]}", f"template {template!r}", "template", DATA, task__template=template)
EARLY = "test_early_checks.py::test_a_damaged_config_is_one_line"
refuses("B11", "tokenizer larger than the vocabulary", "tokenizer", FIT, prepare=spoiled(larger_tokenizer))
refuses("B11b", 'config d_model "32"', "config.json|d_model", EARLY, prepare=spoiled(config(d_model="32")))
refuses("B11c", "config d_model -1", "config.json|d_model", EARLY, prepare=spoiled(config(d_model=-1)))
refuses(
    "B11d",
    "config decoder_start_token_id out of range",
    "decoder_start_token_id",
    EARLY,
    prepare=spoiled(config(decoder_start_token_id=99999)),
)
refuses("B11e", "config feed_forward_proj unknown", "feed_forward_proj", EARLY, prepare=spoiled(config(feed_forward_proj="gated-none")))
refuses("B11f", "config.json a list", "config.json", EARLY, prepare=spoiled(lambda folder: (folder / "config.json").write_text("[]")))


@case("B12b", "step-99999999 as a file", "test_checkpoint_faults.py::test_what_only_looks_like_a_checkpoint_is_passed_over")
def _(place: Place) -> str:
    run = place.run_copy()
    (run / "checkpoints" / "step-99999999").write_text("")
    (run / "result.json").unlink()
    return success(place.python("-m", "lst_scale.train", "--recipe", str(run / "recipe.yaml"), "--resume"))


@case("B12c", "metrics.jsonl not UTF-8", "test_checkpoint_faults.py::test_a_damaged_line_of_numbers_is_dropped_at_a_resume")
def _(place: Place) -> str:
    run = place.run_copy()
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    (run / "result.json").unlink()
    return success(place.python("-m", "lst_scale.train", "--recipe", str(run / "recipe.yaml"), "--resume"))


def deepspeed(content: str) -> Callable[[Place], dict[str, str]]:
    return lambda place: {"training__deepspeed": str(place.write("ds.json", content))}


NUMBERS = "test_recipe_faults.py::test_a_number_without_sense_is_refused_with_what_would_have"
refuses(
    "B13", 'DeepSpeed stage "banana"', "ds.json", "test_recipe_faults.py", prepare=deepspeed('{"zero_optimization": {"stage": "banana"}}')
)
refuses("B13b", "DeepSpeed zero_optimization 3", "ds.json", "test_recipe_faults.py", prepare=deepspeed('{"zero_optimization": 3}'))
for letter, override in zip(
    "cdefgh",
    (
        "optimizer.warmup=.nan",
        "optimizer.learning_rate=1e38",
        "seed=4611686018427387904",
        "data.max_source_length=1e30",
        "method.side_heads=1000000000",
        "optimizer.learning_rate=.inf",
    ),
    strict=True,
):
    refuses(f"B13{letter}", override, override.partition("=")[0].rpartition(".")[2], NUMBERS, override)
refuses("B13i", "a name of 300 letters", "name", "test_recipe_faults.py", name="x" * 300)
refuses("B13j", "a data path of 5,000 letters", "task.train|name", "test_data_faults.py", task__train="x" * 5000)
refuses("B13k", "members: ['seed=\"0']", "members", "test_recipe_faults.py", members=['seed="0'])


def jsonl(content: str) -> Callable[[Place], dict[str, str]]:
    return lambda place: {"task__train": str(place.write("train.jsonl", content))}


refuses(
    "B13l",
    "JSONL with a number of 5,000 digits",
    "train.jsonl",
    "test_data_faults.py",
    prepare=jsonl('{"text": ' + "9" * 5000 + ', "label": "person"}\n'),
)
refuses(
    "B13m",
    "JSONL with a lone surrogate",
    "train.jsonl",
    "test_data_faults.py",
    prepare=jsonl('{"text": "\\ud800", "label": "person"}\n' * 8),
)
refuses("B13n", "JSONL nested 100,000 deep", "train.jsonl", "test_data_faults.py", prepare=jsonl("[" * 100_000 + "\n"))


def planning(id: str, what: str, says: str, *arguments: str) -> None:
    @case(id, what, "test_plan.py::test_mistakes_are_told_in_one_line")
    def _(place: Place) -> str:
        return refusal(place.tool("plan", "--recipe", "quickstart", *arguments, limit=60), says)


planning("B13o", "plan --gpu-memory infGB", "memory", "--gpu-memory", "infGB")
planning("B13p", "plan for sources of 1e12 tokens", "max_source_length|tokens", "data.max_source_length=1000000000000")
planning("C6b", "plan --target 1000000", "target", "--target", "1000000")

# C: unclear

refuses(
    "C1",
    "NaN in the backbone's weights",
    "not finite.*(block|backbone)|no learning rate",
    "test_broken_backbone.py",
    prepare=spoiled(not_finite),
)


@case("C2", "CSV as Excel writes it", "test_data_faults.py::test_csv_is_read_as_spreadsheets_write_it")
def _(place: Place) -> str:
    path = place.folder / "train.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    place.recipe()
    return success(place.train())


@case("C4", "YAML merge keys", "test_recipe_faults.py")
def _(place: Place) -> str:
    path = place.recipe()
    path.write_text(path.read_text() + "common: &c {max_source_length: 16}\n")
    done = place.train(limit=30)
    merged = place.write(
        "recipe.yaml",
        path.read_text().replace("common: &c {max_source_length: 16}\n", "").replace("data:\n", "data:\n  <<: {max_eval_rows: 4}\n"),
    )
    done = place.train(limit=60)
    return (
        HOLDS
        if done.status == 0 or (done.refused and "merge" in done.said and "constructor" not in done.said)
        else done.kind
        if merged
        else ""
    )


refuses("C5", "side_heads=7", "side_heads", "test_early_checks.py", "method.side_heads=7")
refuses("C5b", "backbone.checkpoint=''", "backbone.checkpoint", "test_recipe_faults.py", backbone__checkpoint="")
refuses("C5c", "max_target_length=1", "max_target_length", FIT, data__max_target_length=1)
refuses("C6c", "evaluation.num_beams=100000", "num_beams", NUMBERS, "evaluation.num_beams=100000")
refuses("C6d", "a template that pads to 1e10", "template", DATA, task__template="{text:>9999999999}")


@case("C6e", "a sweep of a million members", "test_recipe_faults.py::test_a_million_members_are_refused_without_being_made")
def _(place: Place) -> str:
    place.recipe(members={"seed": list(range(1000)), "optimizer.learning_rate": [n / 1e6 for n in range(1, 1001)]})
    return refusal(place.train(limit=60), "members")


# F: first contact


@case("F2", "generate(inputs=..., synced_gpus=...), as Seq2SeqTrainer calls it", "test_trainer.py")
def _(place: Place) -> str:
    code = f"""
import torch; from lst_scale import LadderModel, LadderConfig; from transformers import T5ForConditionalGeneration
model = LadderModel(T5ForConditionalGeneration.from_pretrained({str(place.embedded)!r}), LadderConfig(reduction_factor=4, side_layers=[0]))
model.generate(inputs=torch.ones(1, 3, dtype=torch.long), synced_gpus=False, max_new_tokens=2)"""
    return success(place.python("-c", code))


@case(
    "F4",
    "a wrong column and a wrong layer, told before torch is imported",
    "test_early_checks.py::test_mistakes_in_data_and_shapes_are_told_before_torch_is_imported",
)
def _(place: Place) -> str:
    place.recipe(task__target="lable", method__side_layers=[99])
    code = "import runpy, sys; sys.argv = ['train', '--recipe', 'recipe.yaml']\n"
    code += "try: runpy.run_module('lst_scale.train', run_name='__main__')\nfinally: print('torch' in sys.modules)"
    done = place.python("-c", code)
    return (
        "after torch"
        if "True" in done.out
        else "one at a time"
        if not ("lable" in done.said and "99" in done.said)
        else refusal(done, "lable")
    )


@case("F4b", "submit --dry-run of a file that is not there", "test_early_checks.py::test_submit_and_sweep_refuse_what_train_refuses")
def _(place: Place) -> str:
    recipe = place.recipe(task__train="nope.csv")
    return refusal(
        place.tool("slurm", "submit", "--recipe", str(recipe), "--dry-run", "--gpus-per-node", "0", "--tasks-per-node", "1"), "nope.csv"
    )


@case("F5", "whose line is it, of two members", "test_logs.py::test_lines_of_several_runs_say_on_the_console_whose_they_are")
def _(place: Place) -> str:
    place.recipe(members=["method.reduction_factor=2", "method.reduction_factor=4"], logging__log_every_steps=1)
    done = place.train()
    lines = [line for line in done.said.splitlines() if "step 1: loss" in line]
    return (
        HOLDS
        if len(lines) == 2 and all(not line.startswith("step") for line in lines)
        else "lines without names"
        if done.status == 0
        else done.kind
    )


def said(id: str, what: str, test: str, arguments: Sequence[str], wanted: str) -> None:
    @case(id, what, test)
    def _(place: Place) -> str:
        place.recipe()
        done = place.tool(*arguments)
        return HOLDS if done.status == 0 and re.search(wanted, done.said) else "not there" if not done.has_traceback else "traceback"


LINE = "test_command_line.py"
said("F6", "lst-scale train --help shows --overwrite", LINE, ["train", "--help"], "--overwrite")
said("F6b", "lst-scale train recipe.yaml", LINE, ["train", "recipe.yaml"], "score")
said("F6c", "lst-scale --version", LINE, ["--version"], r"\d+\.\d+")


@case("F7", "the model card says task, labels and scores", "test_card.py::test_the_card_of_a_run_tells_its_facts_and_answers")
def _(place: Place) -> str:
    card = (place.run_copy() / "side_network" / "README.md").read_text()
    return HOLDS if all(word in card for word in ("artifact", "accuracy", "transformers")) else "says nothing of them"


@case("F9", "training.start_from=RUN", "test_warm_start.py::test_a_run_begins_where_another_ended")
def _(place: Place) -> str:
    run = place.run_copy()
    place.recipe(name="further")
    return success(place.train(f"training.start_from={run}"))


@case(
    "F10",
    "logging.tensorboard=true without tensorboard",
    "test_command_line.py::test_an_extra_that_is_missing_is_told_before_anything_is_loaded",
)
def _(place: Place) -> str:
    place.recipe()
    hidden = "import runpy, sys; sys.argv = sys.argv[1:]; sys.modules['tensorboard'] = sys.modules['torch.utils.tensorboard'] = None; "
    hidden += "runpy.run_module('lst_scale.train', run_name='__main__', alter_sys=True)"
    return refusal(
        place.python("-c", hidden, "train", "--recipe", str(place.folder / "recipe.yaml"), "logging.tensorboard=true"), r"tensorboard\]"
    )


@case("F13", "an empty label", "test_data_faults.py::test_a_row_that_can_not_be_used_is_one_line_that_names_it")
def _(place: Place) -> str:
    place.write("train.csv", rows(("one", ""), ("two", "person")))
    place.recipe()
    return refusal(place.train(), "empty|label")


@case("F13b", "predict ... data.max_eval_rows=5", "test_predict.py::test_an_override_without_effect_is_refused")
def _(place: Place) -> str:
    return refusal(predicted(place, "text\none\n", "inputs.csv", "data.max_eval_rows=5")[0], "max_eval_rows")


@case("F13c", "cache list where none is", "test_cache_folders.py::test_a_cache_where_none_is_says_where_it_looked")
def _(place: Place) -> str:
    return success(place.tool("cache", "list"), str(place.folder / "cache"))


@case("F13d", 'LadderConfig(side_layers="all"), dir(lst_scale)', LINE)
def _(place: Place) -> str:
    code = "import lst_scale; assert 'LadderModel' in dir(lst_scale); lst_scale.LadderConfig(reduction_factor=4, side_layers='all')"
    return success(place.python("-c", code))


assert len({case.id for case in CASES}) == len(CASES) and shutil
