"""Write docs/support.md, what works with what, each cell by the test that proves it: python docs/make_support_md.py

A cell is a test of tests/, as FILE::NAME, or a sentence on why there is none. A test that does not exist ends this in an error, so the page
can't promise what nothing tries; `tests/test_docs_site.py` keeps it fresh.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PAGE, TESTS = Path(__file__).parent / "support.md", Path(__file__).parents[1] / "tests"
T5, LLAMA, T5GEMMA = "T5, mT5", "Llama and its kin", "T5Gemma 2"
GEMMA_TAPS, GEMMA_RUNS = "test_t5gemma.py", "test_t5gemma_runs.py"
TAPS, RUNS, CONTEXT, PLACED = "test_decoder_only.py", "test_decoder_only_runs.py", "test_context.py", "test_placement.py"
PLACED_TAPS = f"{PLACED}::test_every_placement_gives_the_taps_of_the_replicated_backbone"
PLACED_RUNS = f"{PLACED}::test_every_placement_trains_to_the_losses_and_weights_of_one_process"
INSIDE = "test_inside_llms.py"
PROBE, POINTWISE, TAIL = "test_probe.py", "test_pointwise.py", "test_tail.py"
EVAL = "test_eval_harness.py"
MESSAGES = "test_messages_runs.py"
EVERY = "test_methods.py::test_every_method_trains_scores_and_saves_what_trains_alone"
Cell = str  # FILE::NAME of a test, or a sentence
TABLES: dict[str, list[tuple[str, Cell, Cell]]] = {
    "How the backbone is held": [
        (
            "fp32, bf16",
            "test_backbone.py::test_loaded_weights_give_transformers_logits",
            f"{TAPS}::test_taps_are_what_blocks_return_and_a_target_goes_on_from_its_source",
        ),
        (
            "int8, nf4",
            "test_backbone.py::test_quantization_covers_wo_and_stays_within_its_threshold",
            f"{RUNS}::test_a_packed_backbone_trains_a_side_network",
        ),
        ("`tensor_parallel`, `zero3`, `streamed`", PLACED_TAPS, PLACED_TAPS),
        ("the same, trained", PLACED_RUNS, PLACED_RUNS),
        (
            "the same in int8 and nf4",
            f"{PLACED}::test_quantized_blocks_travel_quantized",
            f"{PLACED}::test_packed_blocks_of_one_stack_train_alike_under_every_placement",
        ),
        (
            "the same, writing answers",
            PLACED_RUNS,
            f"{PLACED}::test_answers_of_one_stack_are_those_beside_a_whole_backbone_however_early_a_rank_is_done",
        ),
        (
            "the same, in `lst-scale predict`",
            f"{PLACED}::test_predictions_are_the_same_under_every_placement",
            f"{PLACED}::test_predictions_are_the_same_under_every_placement",
        ),
        (
            "the same, in `lst-scale plan`",
            f"{PLACED}::test_a_plan_knows_what_each_rank_holds",
            f"{PLACED}::test_a_plan_knows_what_each_rank_holds",
        ),
        ("`tensor_parallel` of Phi-3, OLMo 2 and 3", "-", "no: refused in one line; `zero3` and `streamed` hold them"),
        (
            "`streamed` with the tap cache",
            f"{PLACED}::test_blocks_that_are_streamed_fill_a_tap_cache",
            f"{PLACED}::test_blocks_that_are_streamed_fill_a_tap_cache",
        ),
        (
            "the tap cache",
            "test_tap_cache.py::test_training_from_disk_is_live_training_bit_for_bit_and_loads_no_backbone",
            f"{RUNS}::test_a_run_from_the_tap_cache_ends_as_the_live_one",
        ),
    ],
    "What trains": [
        ("`lst`", EVERY, f"{TAPS}::test_a_step_moves_the_side_network_alone"),
        (
            "`initialization: pruning`, `fisher`",
            "test_side_initialize.py::test_pruning_by_magnitude_equals_the_procedure_written_out",
            f"{RUNS}::test_a_side_network_that_was_carved_out_of_the_backbone_trains",
        ),
        (
            "`initialization: probe`",
            "no: write `pruning`",
            "test_probe_start.py::test_a_run_starts_with_a_lower_loss_than_at_random",
        ),
        (
            "`probe`",
            f"{PROBE}::test_every_placement_fits_what_the_replicated_backbone_does",
            f"{PROBE}::test_a_probe_is_fitted_scored_saved_and_answers_as_it_was_scored",
        ),
        ("`full`, `lora`", EVERY, f"{RUNS}::test_methods_inside_the_model_train_too"),
        ("`adapters`, `bitfit`, `prompt`", EVERY, f"{INSIDE}::test_a_finished_run_answers_a_file_as_it_was_scored"),
        (
            "prompts with completions",
            f"{MESSAGES}::test_methods_inside_the_model_and_encoder_decoders_take_them_too",
            f"{MESSAGES}::test_a_finished_run_answers_a_file_as_it_was_scored",
        ),
        (
            "conversations",
            "no: their tokenizers have no chat template",
            f"{MESSAGES}::test_conversations_from_the_tap_cache_after_a_context_end_as_the_live_run",
        ),
        ("pictures beside the text", "test_vision_runs.py::test_every_method_trains_on_pictures_and_resumes_bit_for_bit", "not yet"),
        (
            "designs `cross_attention`, `adapter`",
            "test_side_network.py::test_every_weight_of_every_design_trains_and_none_is_read_outside_its_module",
            "not yet",
        ),
        (
            "design `pointwise`",
            "refused: write `transformer`",
            f"{POINTWISE}::test_first_predictions_are_the_model_s_own_bit_for_bit_and_a_step_moves_the_side_network_alone",
        ),
        (
            "design `tail`",
            "refused: write `transformer`",
            f"{TAIL}::test_first_predictions_are_the_model_s_own_bit_for_bit_and_a_step_moves_the_updates_alone",
        ),
    ],
    "What runs share": [
        (
            "members on one pass",
            "test_members.py::test_members_end_as_they_would_alone",
            f"{RUNS}::test_members_on_one_pass_end_as_each_would_alone",
        ),
        (
            "a context before every row",
            f"{CONTEXT}::test_beside_an_encoder_the_context_begins_each_source_and_does_not_count",
            f"{CONTEXT}::test_the_tokens_of_a_context_are_run_once",
        ),
    ],
    "Afterwards": [
        (
            "generation with a cache",
            "test_generation.py::test_cached_greedy_equals_uncached_and_teacher_forced_argmax",
            f"{TAPS}::test_a_cache_changes_no_answer",
        ),
        (
            "`lst-scale predict`",
            "test_predict.py::test_predictions_are_the_answers_that_were_scored",
            f"{RUNS}::test_a_finished_run_answers_a_file_as_it_was_scored",
        ),
        ("`lst-scale eval`", f"{EVAL}::test_labels_are_as_likely_as_predict_says", f"{EVAL}::test_labels_are_as_likely_as_predict_says"),
        ("`lst-scale plan`", "test_plan.py::test_a_real_step_needs_what_was_planned", f"{RUNS}::test_a_real_step_needs_what_was_planned"),
        (
            "save and load",
            "test_side_model.py::test_a_saved_ladder_finds_its_backbone_and_computes_the_same",
            f"{TAPS}::test_what_is_saved_reads_back_and_fits_its_own_backbone_alone",
        ),
    ],
}
# The last column, by what a row is about; rows that it lacks are not there yet.
OF_T5GEMMA: dict[str, Cell] = {
    "fp32, bf16": f"{GEMMA_TAPS}::test_taps_are_what_blocks_return",
    "int8, nf4": f"{GEMMA_RUNS}::test_a_packed_backbone_trains_a_side_network",
    "`tensor_parallel`, `zero3`, `streamed`": PLACED_TAPS,
    "the same, trained": PLACED_RUNS,
    "the same in int8 and nf4": PLACED_TAPS,
    "the same, writing answers": PLACED_RUNS,
    "the same, in `lst-scale predict`": f"{PLACED}::test_predictions_are_the_same_under_every_placement",
    "the same, in `lst-scale plan`": f"{PLACED}::test_a_plan_knows_what_each_rank_holds",
    "`tensor_parallel` of Phi-3, OLMo 2 and 3": "-",
    "the tap cache": f"{GEMMA_RUNS}::test_a_run_from_the_tap_cache_ends_as_the_live_one",
    "`lst`": f"{GEMMA_TAPS}::test_a_step_moves_the_side_network_alone",
    "`probe`": f"{PROBE}::test_a_probe_is_fitted_scored_saved_and_answers_as_it_was_scored",
    "design `pointwise`": "refused: write `transformer`",
    "design `tail`": "refused: write `transformer`",
    "`full`, `lora`": f"{GEMMA_RUNS}::test_methods_inside_the_model_train_too",
    "`adapters`, `bitfit`, `prompt`": f"{INSIDE}::test_a_finished_run_answers_a_file_as_it_was_scored",
    "members on one pass": f"{GEMMA_RUNS}::test_members_on_one_pass_end_as_each_would_alone",
    "generation with a cache": f"{GEMMA_TAPS}::test_a_cache_changes_no_answer",
    "`lst-scale predict`": f"{GEMMA_RUNS}::test_a_finished_run_answers_a_file_as_it_was_scored",
    "`lst-scale eval`": f"{EVAL}::test_a_bare_model_of_two_stacks_says_what_lm_eval_s_own_does",
    "`lst-scale plan`": "test_plan.py::test_recipes_of_language_models_say_what_was_planned",
    "save and load": f"{GEMMA_TAPS}::test_what_is_saved_reads_back_and_fits_its_own_backbone_alone",
}
INTRODUCTION = f"""# What works with what

Made by `python docs/make_support_md.py`: each cell is the test that proves it. "{T5}" are T5, T5 v1.1, Flan-T5, mT5, ByT5 and UL2;
"{LLAMA}" are Llama, Qwen 2 and 3, Mistral, Gemma 1 to 3 (text), Phi-3, SmolLM3, OLMo 2 and 3 and Granite, of which the
tests of taps run all twelve.
Everything runs on the CPU in the tests; what has been run on a GPU is [told with its measurements](benchmarks.md#on-a-gpu).
"""


@cache
def _tests_of(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def shown(cell: Cell) -> str:
    """Return a cell as the page has it.

    Raises:
        KeyError: it names a test that does not exist.
    """
    file, _, name = cell.partition("::")
    if not name:
        return cell
    if name not in _tests_of(file):
        raise KeyError(f"tests/{cell}")
    return f"yes: `{name}`"


def _row(what: str, first: Cell, second: Cell) -> str:
    return f"| {what} | {shown(first)} | {shown(second)} | {shown(OF_T5GEMMA.get(what, 'not yet'))} |"


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    for title, rows in TABLES.items():
        lines = [f"| | {T5} | {LLAMA} | {T5GEMMA} |", "| --- | --- | --- | --- |"]
        lines += [_row(*row) for row in rows]
        parts.append(f"## {title}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
