"""`lst-scale eval`: lm-evaluation-harness asks our models, which say what `lst-scale predict` and lm_eval's own models say."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from typer.testing import CliRunner, Result

from helpers.chats import save_chat_model, turns, write_rows
from helpers.finished import VALIDATION, finished_runs
from helpers.llama_runs import ENDS, METHOD, TEMPLATE, make_tokenizer, save_with_tokenizer
from helpers.llamas import make_llama
from helpers.models import make_t5
from helpers.recipes import recipe_writer
from lst_scale import LadderConfig, LadderModel
from lst_scale.cli.main import app
from lst_scale.data.files import load_records
from lst_scale.errors import ArgumentError, LstScaleError
from lst_scale.inference.lmeval.model import SubjectLM
from lst_scale.inference.lmeval.pairs import Judge, Pair
from lst_scale.inference.lmeval.run import Asked, evaluate
from lst_scale.inference.lmeval.subject import open_subject
from lst_scale.inference.predict import predict_file
from lst_scale.recipe.schema import load_recipe
from lst_scale.training.run import run

ROWS = [dict(row) for row in list(load_records(VALIDATION, "validation"))[:9]]
LABELS = ["act", "artifact", "attribute", "cognition", "communication", "food", "person", "state"]
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
ASKED = "{{word}}: {{definition}} It is a kind of"
EQUAL = 1e-4  # nats: sums of float32 in batches of other shapes


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """lm_eval's own models warn of all that they assume."""
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lm_eval|tqdm|multiprocess")
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with a chat template and 256 positions."""
    tokenizer = make_tokenizer(**ENDS)
    tokenizer.chat_template = CHAT
    return save_with_tokenizer("llama", tokenizer, tmp_path_factory.mktemp("llama"), max_position_embeddings=256)


@pytest.fixture(scope="module")
def runs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs beside the language model and in it, after a context and without one, and in a T5."""
    folder = tmp_path_factory.mktemp("runs")
    common: dict[str, Any] = {"task__template": TEMPLATE, "evaluation__method": "likelihood", "data__max_source_length": 100}
    common |= {"training__max_steps": 4, "training__evaluate_every": 4, "evaluation__batch_size": 4}
    context = {"backbone__context": {"text": "Kinds of words.", "examples": 2}}
    lora = {"name": "lora", "targets": ["q_proj", "v_proj"]}
    for name, changes in {
        "lst": {"method": METHOD},
        "after": {"method": METHOD} | context,
        "lora": {"method": lora},
        "lora-after": {"method": lora} | context,
        "prompt": {"method": {"name": "prompt", "num_vectors": 5}},
        "pointwise": {"method": METHOD | {"design": "pointwise"}},
    }.items():
        run(load_recipe(str(recipe_writer(folder, checkpoint)(name, **(common | changes)))))
    found = {path.name.removesuffix("-kind-seed0"): path for path in (folder / "runs").iterdir()}
    return found | {"t5": finished_runs(tmp_path_factory.mktemp("t5"), only=("class",))["class"]}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks on the rows of a file: labels, answers that are written, and texts."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "doc_to_text": ASKED}
    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    perplexity = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    choice = common | {"output_type": "multiple_choice", "doc_to_choice": LABELS, "doc_to_target": "kind", "metric_list": [metric]}
    written = common | {"output_type": "generate_until", "doc_to_target": "kind", "metric_list": [exact]}
    for name, task in {
        "kinds": choice,
        "kinds_of_two": choice
        | {
            "doc_to_text": "{{word}} {{definition}}",
            "doc_to_choice": ["artifact", "food"],
            "doc_to_target": "{{['artifact', 'food'].index('food')}}",
        },
        "words": written | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}},
        "texts": common
        | {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{definition}}", "metric_list": [perplexity]},
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | task))
    return folder


@pytest.fixture
def own(tasks: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes one task into a folder of its own: `kinds` with changes."""

    def own(**changes: Any) -> Path:
        folder = tmp_path / "own"
        folder.mkdir(exist_ok=True)
        text = yaml.safe_dump(yaml.safe_load((tasks / "kinds.yaml").read_text()) | {"task": "mine"} | changes)
        (folder / "mine.yaml").write_text(text.replace("'!function ", "!function ").replace(".asked'", ".asked"))
        return folder

    return own


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=True)


def said(*arguments: str | Path) -> str:
    """Return the one line that a command is refused with."""
    done = command(*arguments)
    assert isinstance(done.exception, LstScaleError), done.output + repr(done.exception)
    assert "\n" not in str(done.exception)
    return str(done.exception)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("task", number, 1)) for number, each in enumerate(arguments)
    ]


def ours(folder: Path | None, checkpoint: Path | None = None, **options: Any) -> SubjectLM:
    fp32 = [] if checkpoint is None else ["backbone.precision=fp32"]
    subject = open_subject(folder, None if checkpoint is None else str(checkpoint), fp32)
    return SubjectLM(subject, **({"batch_size": 3, "most_tokens": subject.most_tokens, "with_end": False, "chat": False} | options))


def assert_equally_likely(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=EQUAL)


def assert_shares(samples: Path, expected: list[dict[str, float]], labels: list[str]) -> None:
    """Assert that labels are as likely beside one another as `lst-scale predict --probabilities` says of each row."""
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    assert len(lines) == len(ROWS)
    for line, shares in zip(lines, expected, strict=True):
        nats = [float(answers[0][0]) for answers in line["resps"]]
        whole = math.log(sum(map(math.exp, nats)))
        assert [each - whole for each in nats] == pytest.approx([math.log(shares[label]) for label in labels], abs=EQUAL)


PAIRS: list[tuple[str, str]] = [
    *((f"{row['word']}: {row['definition']} It is a kind of", f" {label}") for row in ROWS for label in LABELS[:3]),
    ("", "a text without a prompt"),
    ("a", " prompt of one letter"),
    ("blanks at the end go over  ", "to what follows"),
    ("<s>it begins as texts begin", " already"),
    ("longer than there are positions for " * 30, " and an answer"),
    ("a cat", " sat on the mat, and the mat was what the cat had sat on before it sat there"),
]


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_a_bare_language_model_says_what_lm_eval_s_own_does(kind: str, checkpoint: Path) -> None:
    theirs = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4)
    mine = ours(None, checkpoint)
    assert mine.max_length == theirs.max_length == 256
    if kind == "loglikelihood":
        assert_equally_likely(mine.loglikelihood(requests(kind, *PAIRS)), theirs.loglikelihood(requests(kind, *PAIRS)))
        assert mine.cut == 1
    elif kind == "loglikelihood_rolling":
        texts = [(row["definition"],) for row in ROWS[:3]] + [("windows go over a text that is longer than they are, " * 20,)]
        found, expected = (model.loglikelihood_rolling(requests(kind, *texts)) for model in (mine, theirs))
        assert found == pytest.approx(expected, rel=1e-6, abs=EQUAL)
    else:
        prompts = [(prompt, {"until": ["\n\n", "e"], "max_gen_toks": 9, "do_sample": False}) for prompt, _ in PAIRS[:12:3]]
        prompts += [(prompt, {"until": [], "max_gen_toks": 5, "temperature": 0.0}) for prompt, _ in PAIRS[1:9:3]]
        found, expected = (model.generate_until(requests(kind, *prompts)) for model in (mine, theirs))
        assert found == expected and any(found) and not any("e" in text for text in found[:4])


def test_windows_of_attention_see_no_padding(tmp_path: Path) -> None:
    """Of six tokens here, so that prompts of unlike length would push one another out of sight."""
    tokenizer = make_tokenizer(**ENDS)
    options = {"vocab_size": len(tokenizer) + 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "max_position_embeddings": 256}
    make_llama("gemma3_text", **options).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    theirs = HFLM(pretrained=str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=4)
    pairs = requests("loglikelihood", *PAIRS)
    assert_equally_likely(ours(None, tmp_path / "model").loglikelihood(pairs), theirs.loglikelihood(pairs))
    model = LadderModel(str(tmp_path / "model"), LadderConfig(reduction_factor=4, side_layers=[1, 3]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "side")
    together, alone = (ours(tmp_path / "side", batch_size=size).loglikelihood(pairs) for size in (8, 1))
    assert_equally_likely(together, alone)


@pytest.mark.parametrize("kind", ["t5", "t5gemma2"])
def test_a_bare_model_of_two_stacks_says_what_lm_eval_s_own_does(kind: str, tmp_path: Path) -> None:
    folder = make_t5(tmp_path) if kind == "t5" else save_with_tokenizer(kind, make_tokenizer(**ENDS), tmp_path)
    theirs = HFLM(pretrained=str(folder), backend="seq2seq", device="cpu", dtype="float32", batch_size=4)
    mine = ours(None, folder)
    pairs = [pair for pair in PAIRS if not pair[0].startswith("<s>")]
    assert_equally_likely(mine.loglikelihood(requests("loglikelihood", *pairs)), theirs.loglikelihood(requests("loglikelihood", *pairs)))
    prompts = [(prompt, {"until": ["\n"], "max_gen_toks": 7, "do_sample": False}) for prompt, _ in PAIRS[:9:3]]
    found, expected = (model.generate_until(requests("generate_until", *prompts)) for model in (mine, theirs))
    # Its own models let a T5 write as many tokens more as its prompt has: max_gen_toks is no limit there.
    assert any(found) and all(theirs.startswith(mine) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["lst", "after", "pointwise", "lora", "lora-after", "prompt", "t5"])
def test_labels_are_as_likely_as_predict_says(name: str, runs: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    task = "kinds_of_two" if name == "t5" else "kinds"
    labels = ["artifact", "food"] if name == "t5" else LABELS
    if name == "t5":  # whose rows name their fields
        text = (tasks / "kinds_of_two.yaml").read_text().replace("{{word}} {{definition}}", "word: {{word}} definition: {{definition}}")
        tasks = tmp_path / "of-the-run"
        tasks.mkdir()
        (tasks / "kinds_of_two.yaml").write_text(text)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    wide = ["data.max_source_length=100"]
    predict_file([runs[name]], tmp_path / "rows.jsonl", tmp_path / "answers.jsonl", wide, probabilities=True)
    expected = [json.loads(line)["probabilities"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    samples = tmp_path / "samples.jsonl"
    record = evaluate(Asked(folder=runs[name], tasks=[task], include=[tasks], with_end=True, samples=samples))
    assert_shares(samples, expected, labels)
    if name != "t5":
        right = sum(max(shares, key=shares.__getitem__) == row["kind"] for shares, row in zip(expected, ROWS, strict=True))
        assert record["results"]["kinds"]["acc,none"] == pytest.approx(right / len(ROWS))
    assert (record["model"]["context_tokens"] > 0) == ("after" in name)


def test_conversations_are_written_as_a_run_on_some_was_trained(own: Any, tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "chat")
    talks = [{"messages": turns(row["definition"], row["kind"])} for row in ROWS]
    files = {split: str(write_rows(tmp_path / f"{split}.jsonl", talks)) for split in ("train", "validation")}
    task = {"name": "kind", "kind": "classification", "labels": LABELS, "messages": "messages"} | files
    common: dict[str, Any] = {"task": task, "method": METHOD, "evaluation__method": "likelihood", "training__max_steps": 2}
    common |= {"data__max_source_length": 100, "backbone__context": {"text": "Say what kind of thing it is."}}
    run(load_recipe(str(recipe_writer(tmp_path, model)("talks", **common))))
    folder, samples = tmp_path / "runs" / "talks-kind-seed0", tmp_path / "samples.jsonl"
    predict_file([folder], write_rows(tmp_path / "rows.jsonl", talks), tmp_path / "answers.jsonl", probabilities=True)
    expected = [json.loads(line)["probabilities"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    include = own(doc_to_text="{{definition}}")
    evaluate(Asked(folder=folder, tasks=["mine"], include=[include], with_end=True, chat=True, samples=samples))
    assert_shares(samples, expected, LABELS)


def test_a_prompt_is_read_once_for_all_of_its_continuations(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """And what continuations have in common up to their last token once, too."""
    subject = open_subject(runs["lst"], None, ())
    counts = {"read": 0, "extend": 0}
    for name in counts:
        original = getattr(type(subject.passes.backbone), name)

        def counted(self: Any, ids: Any, *others: Any, name: str = name, original: Any = original) -> Any:
            counts[name] += len(ids)
            return original(self, ids, *others)

        monkeypatch.setattr(type(subject.passes.backbone), name, counted)
    ends = [(9,), (10,), (11, 12), (11, 13), (14, 15, 16)]
    pairs = [Pair((5, 6, 7 + row), end) for row in range(5) for end in ends]
    found = Judge(subject.model, subject.passes, 3)(pairs)
    assert counts == {"read": 5, "extend": 15} and len(found) == len(pairs)
    alone = [Judge(subject.model, subject.passes, 1)([pair])[0] for pair in pairs]
    assert_equally_likely([(each.nats, each.is_greedy) for each in found], [(each.nats, each.is_greedy) for each in alone])


@pytest.mark.parametrize("name", ["lst", "after", "pointwise", "lora", "prompt"])
def test_a_text_is_as_likely_whole_as_in_two_parts(name: str, runs: dict[str, Path]) -> None:
    """The prompt's last token alone, or all of it: two ways through the model, and one answer."""
    model = ours(runs[name])
    text = (5, 9, 14, 33, 60, 21)
    whole, first, rest = model._judge([Pair((4,), text), Pair((4,), text[:2]), Pair((4, *text[:2]), text[2:])])
    assert whole.nats == pytest.approx(first.nats + rest.nats, abs=EQUAL)
    pairs = [Pair((4, *text[:before]), text[before:end]) for before in (0, 1, 3) for end in (4, 5, 6)]
    together, alone = model._judge(pairs), [model._judge([pair])[0] for pair in pairs]
    assert [each.nats for each in together] == pytest.approx([each.nats for each in alone], abs=EQUAL)


def test_a_saved_side_network_answers_as_its_run(runs: dict[str, Path]) -> None:
    for name in ("lst", "after"):
        found, expected = (
            ours(folder).loglikelihood(requests("loglikelihood", *PAIRS[:9])) for folder in (runs[name] / "side_network", runs[name])
        )
        assert found == expected


def test_what_a_run_writes_is_what_predict_writes(runs: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    changes = ["evaluation.method=generation", "evaluation.max_new_tokens=6"]
    for name in ("lst", "after", "lora"):
        predict_file([runs[name]], tmp_path / "rows.jsonl", tmp_path / "answers.jsonl", changes)
        expected = [json.loads(line)["prediction"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        samples = tmp_path / "samples.jsonl"
        evaluate(Asked(folder=runs[name], tasks=["words"], include=[tasks], samples=samples))
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
        assert [line["resps"][0][0].strip() for line in lines] == [text.split("\n")[0].strip() for text in expected]


def test_the_command_prints_a_table_and_writes_the_same_numbers(runs: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    output = tmp_path / "numbers.json"
    options = ["--tasks", "kinds,texts", "--tasks", "words", "--include", tasks, "--limit", "5", "--batch-size", "2"]
    done = command(runs["lst"], *options, "--output", output, "backbone.precision=fp32")
    assert done.exit_code == 0, done.output + repr(done.exception)
    record = json.loads(output.read_text())
    assert record["results"]["kinds"].keys() >= {"acc,none", "acc_stderr,none"}
    assert record["n-samples"]["kinds"] == {"original": 9, "effective": 5}
    assert record["results"]["texts"]["word_perplexity,none"] > 1
    assert record["settings"]["batch_size"] == 2 and record["model"]["method"] == "lst" and record["model"]["run"] == str(runs["lst"])
    table = [line.split() for line in done.stdout.splitlines()]
    assert table[0] == ["task", "metric", "value", "+-", "filter", "shots", "rows"]
    assert {line[0]: line[1] for line in table[1:]} == {"kinds": "acc", "texts": "word_perplexity", "words": "exact_match"}
    assert f"{record['results']['kinds']['acc,none']:.4f}" in table[1] and table[1][-2:] == ["0", "5"]
    alone = command(runs["lst"], *options, "--json")
    assert json.loads(alone.stdout)["results"] == record["results"]


def test_a_group_is_its_tasks_and_their_mean(runs: dict[str, Path], tasks: Path, own: Any) -> None:
    folder = own(doc_to_text="!function code.asked")
    (folder / "code.py").write_text("def asked(row):\n    print('a function of a task prints')\n    return row['word']\n")
    (folder / "both.yaml").write_text(
        yaml.safe_dump({"group": "both", "task": ["mine", "kinds"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]})
    )
    done = command(runs["lst"], "--tasks", "both", "--include", folder, "--include", tasks, "--limit", "4", "--json")
    results = json.loads(done.stdout)["results"]
    assert results["both"]["acc,none"] == pytest.approx((results["mine"]["acc,none"] + results["kinds"]["acc,none"]) / 2)


def test_examples_and_conversations_stand_before_questions(checkpoint: Path, runs: dict[str, Path], own: Any, tmp_path: Path) -> None:
    folder = own(fewshot_split="test")
    samples = tmp_path / "samples.jsonl"
    common: dict[str, Any] = {"tasks": ["mine"], "include": [folder], "limit": 2, "samples": samples}
    evaluate(Asked(folder=runs["lst"], num_fewshot=2, chat=True, most_tokens=60, **common))
    prompt = json.loads(samples.read_text().splitlines()[0])["arguments"][0][0]
    assert prompt.count("<user>") == 3 and prompt.count("<assistant>") == 3 and prompt.endswith("<assistant>")
    told: list[str] = []
    record = evaluate(Asked(folder=None, checkpoint=str(checkpoint), num_fewshot=1, most_tokens=60, **common), told.append)
    prompt = json.loads(samples.read_text().splitlines()[0])["arguments"][0][0]
    assert prompt.count("It is a kind of") == 2 and "<user>" not in prompt
    assert record["n-shot"]["mine"] == 1 and record["model"]["run"] is None
    assert record["settings"]["cut_prompts"] > 0 and any("lost their beginning" in sentence for sentence in told)


def test_mistakes_are_one_line_before_a_backbone_is_loaded(
    runs: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lst_scale.inference.lmeval.run.open_subject", lambda *_: pytest.fail("a backbone was about to be loaded"))
    lst, include = runs["lst"], ["--include", tasks]
    assert "write --tasks NAME,NAME" in said(lst)
    assert "give the folder of a finished run, or --backbone" in said("--tasks", "kinds")
    assert "leave it or" in said(lst, "--backbone", "x", "--tasks", "kinds")
    assert "is no folder: give that of a finished run" in said(tmp_path / "none", "--tasks", "kinds")
    assert "--include" in said(lst, "--tasks", "kinds", "--include", tmp_path / "none")
    assert "is no place for a file" in said(lst, "--tasks", "kinds", *include, "--output", tmp_path)
    assert "data.max_source_length has no effect" in said(lst, "data.max_source_length=9", "--tasks", "kinds", *include)
    with monkeypatch.context() as launched:
        launched.setenv("WORLD_SIZE", "2")
        assert "is one process: start it without a launcher" in said(lst, "--tasks", "kinds", *include)
    assert "task has no effect" in said("--backbone", "x", "task=a", "--tasks", "kinds", *include)


def test_a_task_that_is_not_there_lists_names_near_it(runs: dict[str, Path], tasks: Path, own: Any) -> None:
    message = said(runs["lst"], "--tasks", "kinds,kindz", "--include", tasks)
    assert "is called 'kindz': near it are kinds" in message
    folder = own()
    (folder / "other.yaml").write_text("task: [")
    assert "other.yaml can't be read as a task" in said(runs["lst"], "--tasks", "other", "--include", folder)


def test_code_of_the_folder_runs_and_code_of_the_hub_does_not(runs: dict[str, Path], own: Any, tmp_path: Path) -> None:
    folder = own(doc_to_text="!function code.asked")
    (folder / "code.py").write_text("def asked(row):\n    return f'What is {row[\"word\"]}?'\n")
    samples = tmp_path / "samples.jsonl"
    evaluate(Asked(folder=runs["lst"], tasks=["mine"], include=[folder], limit=1, samples=samples))
    assert json.loads(samples.read_text())["arguments"][0][0] == f"What is {ROWS[0]['word']}?"
    own(metric_list=[{"metric": "seqeval", "aggregation": "mean", "higher_is_better": True}])
    assert "code that the hub would send (seqeval)" in said(runs["lst"], "--tasks", "mine", "--include", folder)
    own(unsafe_code=True)
    assert "runs code that the model writes" in said(runs["lst"], "--tasks", "mine", "--include", folder)
    own(doc_to_text="!function code.asked")
    (folder / "code.py").write_text("def asked(row):\n    return row['nothing']\n")
    assert "can't be loaded: 'nothing' is missing (code.py, line 2)" in said(runs["lst"], "--tasks", "mine", "--include", folder)


def test_what_a_model_can_t_be_asked_is_one_line(runs: dict[str, Path], tasks: Path, own: Any, checkpoint: Path) -> None:
    assert "which a model that answers a source can't say" in said(runs["t5"], "--tasks", "texts", "--include", tasks)
    assert "has no chat template" in said(runs["t5"], "--chat", "--tasks", "kinds", "--include", tasks)
    folder = own(
        output_type="generate_until", doc_to_choice=None, metric_list=[{"metric": "exact_match"}], generation_kwargs={"temprature": 1}
    )
    assert "Did you mean 'temperature'" in said(runs["lst"], "--tasks", "mine", "--include", folder)
    with pytest.raises(ArgumentError, match=r"--max-length 999: prompt and answer have 2 to 256 tokens"):
        evaluate(Asked(folder=None, checkpoint=str(checkpoint), tasks=["kinds"], include=[tasks], most_tokens=999))


def test_without_lm_eval_the_command_names_the_extra(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'lst_scale[eval]'" in said(runs["lst"], "--tasks", "kinds")
    assert "lm_eval" in sys.modules  # by these tests themselves
