"""Text that a model writes after prompts, up to one of several strings or its own end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria

from lst_scale.backbone.families import family_of
from lst_scale.data.batches import collate
from lst_scale.data.columns import Ids
from lst_scale.data.encode import EncodedSplit
from lst_scale.data.rows import Row
from lst_scale.inference.lmeval.subject import Subject
from lst_scale.training.evaluation import ends_of


@torch.no_grad()
def written(
    subject: Subject, sources: Sequence[Sequence[int]], *, until: Sequence[str], max_new_tokens: int, options: Mapping[str, Any]
) -> list[str]:
    """Return what follows each of some prompts (token ids), up to the first of `until`; `options` are those of transformers' generate."""
    model, tokenizer = subject.model, subject.tokenizer
    rows = [Row("", "")] * len(sources)
    split = EncodedSplit(rows=rows, input_ids=Ids.of(sources), labels=Ids([]), pad_token_id=model.spec.pad_token_id)
    batch = collate(split, range(len(rows)))
    given = batch.input_ids_BS.shape[1] if model.spec.one_stack else 1  # what generate's ids begin with: the prompt, or a start token
    output_BT = family_of(model.spec.model_type, "this model").answers(
        model.generate,
        batch.input_ids_BS.to(model.device),
        batch.attention_mask_BS.to(model.device),
        max_new_tokens=max_new_tokens,
        source=subject.passes.source_of(batch),
        stopping_criteria=stop_sequences_criteria(tokenizer, list(until), given, len(rows)),
        **ends_of(model, tokenizer),
        **options,
    )
    texts = tokenizer.batch_decode(output_BT, skip_special_tokens=True)
    return [str(postprocess_generated_text(text, list(until), None)) for text in texts]
