"""A language model small enough for a laptop: a tokenizer made from given texts, and random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dtpvit.errors import UserError

__all__ = ["make_tiny_language_model"]

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # as in SmolLM2


def make_tiny_language_model(
    texts: Iterable[str],
    folder: str | Path,
    *,
    vocab_size: int = 512,
    dim: int = 128,
    depth: int = 4,
    num_heads: int = 4,
    mlp_dim: int | None = None,
    max_length: int = 2048,
    tied: bool = True,
    seed: int = 0,
) -> Path:
    """Write a Llama with random weights and a byte-level tokenizer to a folder that transformers' Auto classes load.

    The same texts, sizes and seed give the same files; the global generators stay as they are.

    Args:
        texts: What the tokenizer's words are learned from (Sennrich et al., "Neural machine translation of rare words
            with subword units", 2016); any other text is spelled in bytes.
        folder: Made if it is not there.
        vocab_size: Most words, with the 256 bytes and three control tokens; few texts give fewer.
        dim: Width.
        depth: Layers.
        num_heads: Attention heads, dividing ``dim`` into even parts.
        mlp_dim: Hidden width of the MLPs; None is ``8 / 3 * dim``, as in Llama.
        max_length: Positions.
        tied: Whether the head is the embedding.
        seed: Of the weights.

    Returns:
        The folder.

    Raises:
        UserError: If a size does not fit, or transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("language models need transformers; pip install dtpvit[instruct]") from error
    if vocab_size < 256 + len(_SPECIAL):
        raise UserError(f"vocab_size is {vocab_size}; the bytes and control tokens alone are {256 + len(_SPECIAL)}.")
    if dim % (2 * num_heads):
        raise UserError(f"dim is {dim} with {num_heads} heads; give a multiple of {2 * num_heads}, twice the heads.")
    tokenizer = _tokenizer(texts, vocab_size, max_length)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=mlp_dim or 8 * dim // 3,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()  # without it decoding shows the letters that stand for bytes
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
