"""Methods that train inside the backbone, on texts with images: there the image tokens enter the source's stack, which is what they cost.

    source = [prompts ; text ; image tokens]      relative positions among prompts and text; images are always attended to

The word table's last rows, counted from the end, tell the tokens of an image apart (VL-T5's visual tokens); full fine-tuning trains them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import Family
from lst_scale.inputs.images import Images
from lst_scale.recipe.method import LstRecipe, PromptRecipe
from lst_scale.recipe.schema import Recipe
from lst_scale.side.vision import VisualEmbedding, beside_images
from lst_scale.side.vision_config import VisionConfig


def vision_config(recipe: Recipe) -> VisionConfig | None:
    """Return how images are read; None: the recipe has none."""
    vision, method = recipe.vision, recipe.method
    if vision is None:
        return None
    own = {"object_order": method.object_order, "scale_image_rows": method.scale_image_rows} if isinstance(method, LstRecipe) else {}
    counts = recipe.image_counts
    images = counts[0] if len(counts) == 1 else counts
    return VisionConfig(feature_dim=vision.feature_dim, pooled_grid=vision.pooled_grid, num_images=images, **own)  # type: ignore[arg-type]


class Prompts(nn.Module):
    """Vectors before the text, made by a small network (Li and Liang 2021; in the release an embedding of d, tanh of `hidden`, and d)."""

    def __init__(self, count: int, d_model: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, d_model)
        self.inner, self.outer = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)

    def forward(self, rows: int) -> Tensor:
        """Return the prompts of so many rows (B, P, D)."""
        numbers_P = torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)
        prompts_PD: Tensor = self.outer(torch.tanh(self.inner(self.embedding(numbers_P))))
        return prompts_PD.expand(rows, -1, -1)


class ReadingImages(nn.Module):
    """A whole model whose source's stack reads images after the text.

    Args:
        model: of transformers; a method may change it later, but must leave its position table in place.
        visual_embedding: trains in every method.
    """

    def __init__(self, model: Any, family: Family, visual_embedding: VisualEmbedding, prompts: Prompts | None = None) -> None:
        super().__init__()
        self._family, self._positions = family, family.positions_that_end(model)
        self.model, self.visual_embedding, self.prompts = model, visual_embedding, prompts

    def forward(
        self, input_ids_BS: Tensor, mask_BS: Tensor, images: Images, target_BT: Tensor, source: Any | None = None
    ) -> tuple[Tensor, Any]:
        """Return a target's logits (B, T, V) and, for other targets of these rows, the `source` that need not be run again."""
        mask_BS = self._laid_out(mask_BS, images)
        embedding_BSD = self._embedded(input_ids_BS, images) if source is None else input_ids_BS
        return self._family.whole_logits(self.model, embedding_BSD, mask_BS, target_BT, source)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, images: Images, **options: Any) -> Any:
        """Return generated ids (B, T), by transformers."""
        mask_BS = self._laid_out(attention_mask, images)
        return self.model.generate(inputs_embeds=self._embedded(input_ids, images), attention_mask=mask_BS, **options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.model.gradient_checkpointing_enable(**options)

    def _laid_out(self, mask_BS: Tensor, images: Images) -> Tensor:
        """Return the mask of prompts, text and image tokens, and say where the positions of the next pass end."""
        before = 0 if self.prompts is None else self.prompts.embedding.num_embeddings
        with_prompts = nn.functional.pad(mask_BS, (before, 0), value=1)
        self._positions.end = with_prompts.shape[1]
        return beside_images(with_prompts, with_prompts.shape[1] + self.visual_embedding.num_tokens(images))

    def _embedded(self, ids_BS: Tensor, images: Images) -> Tensor:
        words = self.model.get_input_embeddings()
        last = words.num_embeddings - 1
        order_N = torch.arange(last, last - self.visual_embedding.config.tokens_per_image, -1, device=ids_BS.device)
        text_BSD, tokens_BMD = words(ids_BS), self.visual_embedding(images, words(order_N))
        before = [] if self.prompts is None else [self.prompts(len(ids_BS)).to(text_BSD.dtype)]
        return torch.cat([*before, text_BSD, tokens_BMD.to(text_BSD.dtype)], 1)


def reading_images(
    model: Any, family: Family, config: VisionConfig, seed: int, prompt: PromptRecipe | None = None, vocab_size: int | None = None
) -> ReadingImages:
    """Return `model` reading images through a fresh visual embedding; the same seed gives the same one on every rank.

    Args:
        prompt: what stands before the text.
        vocab_size: of the word table with the rows for images; None: as it is.
    """
    if vocab_size is not None:
        family.lengthen(model, vocab_size, torch.Generator().manual_seed(seed))
    spec, device = family.spec(model.config), family.embedding(model).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prompts = None if prompt is None else Prompts(prompt.num_vectors, spec.d_model, prompt.hidden)
        visual_embedding = VisualEmbedding(spec, config)
    visual_embedding.draw(torch.Generator().manual_seed(seed))
    return ReadingImages(model, family, visual_embedding, prompts).to(device)
