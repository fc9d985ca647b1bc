"""A small BERT with seeded random weights and a WordPiece tokenizer, saved as any pretrained model is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerFast

from shards.torchvision_import import make_torchvision_importable

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["red", "blue", "shampoo", "brush", "oil", "rose", "mint", "soap", "##s", "##y", "of", "and", "the"]
DIM = 32
MAX_POSITIONS = 48


def write_text_model(folder: Path) -> Path:
    """Save the model and its tokenizer in ``folder``; equal calls write equal files."""
    make_torchvision_importable()
    from transformers import BertModel  # imports torchvision where it is installed

    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    # Wide random weights: with the usual 0.02 every text would get nearly the same row.
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("Red soaps")["input_ids"] == [
        vocabulary[word] for word in ("[CLS]", "red", "soap", "##s", "[SEP]")
    ]
    return folder


def random_texts(count: int, longest: int = 30) -> list[str]:
    """``count`` texts of 1 to ``longest`` words."""
    generator = np.random.default_rng(3)
    words = np.array([word for word in WORDS if not word.startswith("##")])
    return [" ".join(generator.choice(words, generator.integers(1, longest + 1))) for _ in range(count)]
