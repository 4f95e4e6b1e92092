"""A byte-level BPE tokenizer, trained on the training captions only and kept with the run as one JSON file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

PAD, START, END = "[PAD]", "[START]", "[END]"
PAD_ID = 0


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level, so that no caption holds an unknown token; lower-cased, since captions differ in case by chance."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, START, END],  # PAD first, hence PAD_ID
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Each once and sorted: what is learned must not depend on the order of the samples.
    tokenizer.train_from_iterator(sorted(set(captions)), trainer)
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
    )
    return tokenizer


class Tokenize:
    """Captions → (n, length) int64 token ids, cut or padded with PAD_ID. A caption that spells a special token is text:
    otherwise a "[PAD]" in it would hide it from the tower, and an "[END]" would end it."""

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        tokenizer.encode_special_tokens = True
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=PAD_ID, pad_token=PAD)
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, captions: Sequence[str]) -> Tensor:
        encodings = self.tokenizer.encode_batch(list(captions))
        return torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64).view(-1, self.length)
