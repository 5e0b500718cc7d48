"""One small tokenizer of every kind there is, and texts that are hard for them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from folovllm.tales import EMBEDDED_MODEL

CORPUS = [
    "the fox's den isn't far . 中文 言语 🦊🦊 naïve cafe\u0301 , we 've 'm ! \n\n x=1;",
    "a ab abc 中中 🦊 don't",
] * 3
WORDS = ["the", "fox", "is", "n't", "'", "s", "'s", "n", "t", "v", "'ve", ".", ",", "?", "!", "a", "##a", "##n", "中"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]


def _wrap(tokenizer: Tokenizer, **config: Any) -> PreTrainedTokenizerFast:
    """What transformers makes of it, with end and unknown tokens and one that was added but is not special."""
    config = {"clean_up_tokenization_spaces": False, "unk_token": "<unk>", "eos_token": "</s>", **config}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<|end|>"], **config)
    fast.add_tokens([AddedToken("<tool>", special=False)])
    return fast


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: some tokens hold parts of two characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer)


def byte_fallback(**config: Any) -> PreTrainedTokenizerFast:
    """As Llama 2's: words with a metaspace, everything else in byte tokens, ``<s>`` in front."""
    words = ["▁", "a", "b", "c", "x", "▁a", "▁b", "ab", ".", "'", "s", "n", "t", "\ufffd"]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *BYTES, *words])}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _fallback_decoder()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(tokenizer, bos_token="<s>", **config)


def _fallback_decoder() -> decoders.Sequence:
    space = decoders.Replace("▁", " ")
    return decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def unigram(**config: Any) -> PreTrainedTokenizerFast:
    """As T5's."""
    pieces = [*SPECIAL, "▁", "▁the", "▁fox", "the", "fox", "a", "b", "s", "n", "t", "'", ".", "中", "文", "🦊"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer, **config)


def unigram_with_bytes() -> PreTrainedTokenizerFast:
    """As Gemma's or XLM's: no unknown tokens, but bytes."""
    pieces = [*SPECIAL, *BYTES, "▁", "▁the", "fox", "a", "b", ".", "中", "🦊"]
    model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = _fallback_decoder()
    return _wrap(tokenizer)


def word_piece(cleanup: bool = True, **config: Any) -> PreTrainedTokenizerFast:
    """As BERT's."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return _wrap(tokenizer, **config)


def word_level(**config: Any) -> PreTrainedTokenizerFast:
    """Whole words and no decoder: a space between any two."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrap(tokenizer, **config)


def word_ends() -> PreTrainedTokenizerFast:
    """As GPT-1's or CLIP's: the last token of a word is marked."""
    words = ["a", "b", "t", "h", "e", "a</w>", "b</w>", "e</w>", "the</w>", "th", "中</w>", "</w>", ".</w>"]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *words])}
    model = models.BPE(vocab, [("t", "h"), ("th", "e</w>")], unk_token="<unk>", end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    return _wrap(tokenizer)


FAST: dict[str, PreTrainedTokenizerBase] = {
    "embedded": AutoTokenizer.from_pretrained(EMBEDDED_MODEL),
    "byte-level": byte_level(),
    "byte fallback": byte_fallback(),
    "Unigram": unigram(),
    "Unigram with bytes": unigram_with_bytes(),
    "WordPiece": word_piece(),
    "WordPiece, no cleanup": word_piece(cleanup=False),
    "WordLevel": word_level(),
    "word ends": word_ends(),
}
"""Tokenizers that the library's own stream can decode."""

CLEAN_UP: dict[str, PreTrainedTokenizerBase] = {
    "WordPiece": word_piece(cleanup=False, clean_up_tokenization_spaces=True),
    "WordLevel": word_level(clean_up_tokenization_spaces=True),
    "Unigram": unigram(clean_up_tokenization_spaces=True),
    "BPE, told twice": byte_fallback(
        clean_up_tokenization_spaces=True, clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True
    ),
    "BPE, told once": byte_fallback(clean_up_tokenization_spaces=True),
}
"""Tokenizers whose text loses spaces in transformers."""

SLOW: dict[str, PreTrainedTokenizerBase] = {"ByT5": ByT5Tokenizer()}
"""Tokenizers in Python."""

PIECES = ["a", "b", "ab", " ", "  ", "the", " fox", "n't", " n't", "'", " ' ", " 's", ".", " .", ",", "x", "\n"]
HARD = ["中", "文言", "🦊", "👩‍👩‍👧", "🇩🇪", "e\u0301", "\u0301", "é", "\ufffd", "\u200b", "\x00", "▁", "##", "</w>"]
TEXTS = st.lists(st.sampled_from(PIECES + HARD) | st.text(max_size=3), max_size=12).map("".join)
"""Words, spaces and punctuation, Chinese, emoji of several characters, combining marks, and anything."""


def token_ids(tokenizer: PreTrainedTokenizerBase) -> st.SearchStrategy[list[int]]:
    """The tokens of a text, or any tokens in a row, special ones and parts of characters among them."""
    spelled = TEXTS.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    return spelled | st.lists(st.integers(0, len(tokenizer) - 1), max_size=16)
