"""Prompt tuning (Lester et al. 2021) of a text that goes on into its own answer: peft's module and files, with positions of our own.

peft puts trained vectors before all that it is given and drops what it is told of positions. Where a text is padded on its left, vectors
and text then stand apart, by more or less from row to row. Here they stand before a row's first token, and positions count tokens alone:

              pad pad  v v v  t t t t
    positions           0 1 2  3 4 5 6

Without padding that is what peft computes, so what was trained here answers alike in plain peft.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor, nn

from lst_scale.backbone.cache_argument import CACHE


class PromptedText(PeftModelForCausalLM):  # type: ignore[misc]
    """A model with P trained vectors before each row. Masks may have zeros anywhere."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None, **options: Any) -> Any:
        """Return the model's output for vectors and tokens (B, P + S); positions, the vectors' among them, are counted here.

        After a cache in which vectors and tokens are already, it is that of the new tokens alone; the mask (B, S) is of all tokens.
        """
        cache = options.get(CACHE)
        past = 0 if cache is None else cache.get_seq_length()
        from_BL, mask_BL = self._places(attention_mask)
        embedding_BLD = self.word_embeddings(input_ids) if past else self._embedded(input_ids, from_BL)
        positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, past:]
        return self.base_model(inputs_embeds=embedding_BLD, attention_mask=mask_BL, position_ids=positions_BL, **options)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Return the tokens given (B, S), then the new ones."""
        from_BL, mask_BL = self._places(attention_mask)
        embedding_BLD = self._embedded(input_ids, from_BL)
        new: Tensor = self.base_model.generate(inputs_embeds=embedding_BLD, attention_mask=mask_BL, **options)
        return torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), 0), new], 1)

    def _places(self, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each position is taken from, of P vectors and then S tokens (B, P + S), and the mask there."""
        count: int = self.active_peft_config.num_virtual_tokens
        mask_BL = nn.functional.pad(mask_BS, (count, 0), value=1)
        first_B1 = (mask_BS.cumsum(1) == 0).sum(1, keepdim=True)  # how much padding stands on the left
        place_1L = torch.arange(mask_BL.shape[1], device=mask_BS.device)[None]
        vectors_or_later_BL = torch.where(place_1L < first_B1 + count, place_1L - first_B1, place_1L)
        from_BL = torch.where(place_1L < first_B1, place_1L + count, vectors_or_later_BL)
        return from_BL, mask_BL.gather(1, from_BL)

    def _embedded(self, ids_BS: Tensor, from_BL: Tensor) -> Tensor:
        words_BSD: Tensor = self.word_embeddings(ids_BS)
        vectors_BPD: Tensor = self.get_prompt(len(ids_BS)).to(words_BSD.dtype)
        both_BLD = torch.cat([vectors_BPD, words_BSD], 1)
        return both_BLD.gather(1, from_BL[..., None].expand(-1, -1, both_BLD.shape[2]))
