"""Causal language models of transformers: from a folder or hub name, whole or with low-rank adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from dtpvit.errors import UserError

__all__ = [
    "LORA",
    "added_adapters",
    "answer_logits",
    "checkpoint_activations",
    "large_parts",
    "load_language_model",
    "merged",
]

LORA = {"r": 128, "lora_alpha": 256, "lora_dropout": 0.05}  # of LLaVA-1.5's finetune_lora.sh

# Models whose logits are nothing but the head on the last hidden state, so that the head may run on some of them only.
_PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3")
_MISSING = "instruction tuning needs transformers and peft; pip install dtpvit[instruct]"


def load_language_model(source: str | Path, dtype: str = "float32", **options: Any) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer.

    Args:
        source: A folder as transformers writes it, or a name on the hub.
        dtype: Of the weights: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for that in the file.
        **options: Of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        UserError: If transformers is not installed, or there is no such model.
    """
    try:
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(_MISSING) from error
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"the language model's dtype is {dtype!r}; expected auto, float32, bfloat16 or float16")
    path = Path(source).expanduser()
    if not path.is_dir() and (path.is_absolute() or str(source).count("/") > 1 or str(source).startswith(".")):
        raise UserError(f"there is no language model in {source}; expected a folder as transformers writes it")
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path if path.is_dir() else source), dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(str(path if path.is_dir() else source))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"there is no language model under {source} ({reason}); expected a folder as transformers writes it, or a "
            "name on the hub"
        ) from error
    # Penalties and beams that come with some models would make greedy answers others than the most likely words.
    model.generation_config = GenerationConfig()
    return model, tokenizer


def added_adapters(model: nn.Module, options: Mapping[str, Any] | None = None) -> nn.Module:
    """The model with low-rank adapters beside its linear layers, which alone learn.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; the adapters of peft.

    Args:
        model: A causal language model.
        options: Of ``peft.LoraConfig``, over the defaults of LLaVA-1.5 (rank 128, alpha 256, dropout 0.05, every linear
            layer but the head).

    Raises:
        UserError: If peft is not installed, or an option does not fit.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(_MISSING) from error
    given = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **LORA, **(options or {})}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5 by a name of before
            return get_peft_model(cast("Any", model), LoraConfig(**given))
    except (TypeError, ValueError) as error:
        raise UserError(f"the adapters cannot be made: {error}") from error


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each layer in the backward pass, which transformers does in training mode only."""
    words: Any = model
    enable = getattr(words, "activation_checkpointing_enable", None) or words.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def merged(model: nn.Module) -> nn.Module:
    """The model with its adapters, if it has any, added to the weights; changes ``model``."""
    return cast("Any", model).merge_and_unload() if hasattr(model, "merge_and_unload") else model


def large_parts(model: nn.Module) -> list[list[nn.Module]]:
    """Nearly all weights: the decoder layers, inner ones first, then the embedding and the head, together if tied.

    Layers are what transformers keeps on one device; the longest list of modules in models that name none.

    Args:
        model: A causal language model, with adapters or without.

    Returns:
        Groups of modules that share no parameter.
    """
    inner = _without_adapters(model)
    named = set(inner._no_split_modules or ())
    layers = [module for module in inner.modules() if type(module).__name__ in named]
    if not layers:
        lists = [list(module) for module in inner.modules() if isinstance(module, nn.ModuleList)]
        layers = max(lists, key=len, default=[])
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    tied = not set(embedding.parameters()).isdisjoint(head.parameters())
    return [*([layer] for layer in reversed(layers)), *([[embedding, head]] if tied else [[embedding], [head]])]


def answer_logits(
    model: nn.Module, embeds: Tensor, mask: Tensor, chosen: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Logits at some positions only; the head, which is large in small models, runs on no others where that is exact.

    Args:
        model: A causal language model, with adapters or without.
        embeds: Shape (B, S, D).
        mask: Where there is something to attend to, bool, shape (B, S); or what each position attends to, (B, 1, S, S).
        chosen: Positions whose next token is asked for, bool, shape (B, S).
        positions: Numbers of the positions, int64, shape (B, S); None counts them.

    Returns:
        float32, shape (n, vocabulary), n positions in order.
    """
    inner = _without_adapters(model)
    given = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    if inner.config.model_type in _PLAIN_HEADS:
        return inner.lm_head(inner.model(**given).last_hidden_state[chosen]).float()
    return inner(**given).logits[chosen].float()


def _without_adapters(model: nn.Module) -> Any:
    """The model that adapters were added to; itself without any."""
    return cast("Any", model).get_base_model() if hasattr(model, "get_base_model") else model
