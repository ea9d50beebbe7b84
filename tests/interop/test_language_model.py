"""Which parts of a language model hold its weights."""

import pytest
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dtpvit.interop.language_model import added_adapters, large_parts

LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)),
    "adapters": lambda: added_adapters(MODELS["tied"](), {"r": 2}),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=8)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    ),
    "experts": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**LLAMA, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=16)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_embedding_and_head_hold_nearly_all_weights_and_share_none(name):
    model = MODELS[name]()
    groups = large_parts(model)
    held = [{id(p): p.numel() for part in group for p in part.parameters()} for group in groups]
    sizes = {id(p): p.numel() for p in model.parameters()}
    assert sum(map(len, held)) == len({key for group in held for key in group})
    assert sum(sum(group.values()) for group in held) > 0.95 * sum(sizes.values())
    assert [len(group) for group in groups] == ([1, 1, 1, 1] if name in ("untied", "experts") else [1, 1, 2])


def test_a_model_that_names_no_layers_has_its_longest_list():
    model = MODELS["tied"]()
    model._no_split_modules = None
    assert [group[0] for group in large_parts(model)[:2]] == list(reversed(model.model.layers))
