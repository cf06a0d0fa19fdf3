"""Train the embedded T5's tokenizer: sentencepiece unigram, 3,996 pieces and the 100 sentinels that span corruption needs.

Digits are split, so that a number is made of digit pieces and every number can be written.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizerBase, T5Tokenizer

NUM_PIECES = 3_996
NUM_SENTINELS = 100


def train(texts: list[str], output: Path) -> PreTrainedTokenizerBase:
    """Train on a sample of the lines of `texts`, save to `output`, and return the tokenizer as AutoTokenizer would load it."""
    lines = [line for text in texts for line in text.split("\n")]
    random.Random(0).shuffle(lines)
    with tempfile.TemporaryDirectory() as folder:
        corpus, prefix = Path(folder) / "lines.txt", Path(folder) / "spiece"
        corpus.write_text("\n".join(lines[:150_000]))
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(prefix),
            vocab_size=NUM_PIECES,
            model_type="unigram",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            split_digits=True,
            character_coverage=1.0,
            required_chars="0123456789",
            normalization_rule_name="nfkc",
            num_threads=2,
            minloglevel=1,
        )
        output.mkdir(parents=True, exist_ok=True)
        (output / "spiece.model").write_bytes(prefix.with_suffix(".model").read_bytes())
    tokenizer = T5Tokenizer.from_pretrained(output, extra_ids=NUM_SENTINELS)
    tokenizer.save_pretrained(output)
    return tokenizer
