"""A tokenizer of a few words, saved as models have theirs."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BYTES_END = "<|endoftext|>"
BYTES = 257
"""Tokens of `save_byte_tokenizer`."""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", *ascii_lowercase]


def save_encoder_tokenizer(folder: Path, max_length: int = 64) -> str:
    """Letters are words, between [CLS] and [SEP]. Returns the folder."""
    tokenizer = _letters()
    start, end = (WORDS.index(name) for name in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", start), ("[SEP]", end)]
    )
    return _save(tokenizer, folder, max_length, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def save_decoder_tokenizer(folder: Path, max_length: int = 64) -> str:
    """Letters are words; a start and an end token, and none to fill up with. Returns the folder."""
    return _save(_letters(), folder, max_length, bos_token="<s>", eos_token="</s>")


def save_byte_tokenizer(folder: Path) -> str:
    """Every byte is a token and none starts a text, as in Qwen's vocabulary. Returns the folder."""
    alphabet = [BYTES_END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=BYTES_END, pad_token=BYTES_END)
    fast.save_pretrained(folder)
    return str(folder)


def save_metaspace_tokenizer(folder: Path) -> str:
    """Letters, alone or with the blank before them, and every text begins with one, as with SentencePiece."""
    words = [f"▁{letter}" for letter in ascii_lowercase]
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "\n", "▁", *ascii_lowercase, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", letter) for letter in ascii_lowercase]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    return str(folder)


def _letters() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _save(tokenizer: Tokenizer, folder: Path, max_length: int, **special: str) -> str:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=max_length, **special
    )
    fast.save_pretrained(folder)
    return str(folder)
