"""The time until a language model's first word, and what it keeps in memory for it, behind several encoders.

python -m benchmarks.prefill --data IMAGES --output docs/results/prefill.md
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.record import heading, pages, table
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.classifier import Precision, autocast
from dtpvit.evaluation.measuring import Quartiles, alternate, memory_of_step, speed_ups
from dtpvit.evaluation.towers import load_tower
from dtpvit.interop.chat import IMAGE_ID
from dtpvit.interop.image_models import image_model
from dtpvit.interop.splicing import splice
from dtpvit.interop.visual_language import VisualLanguageModel

# SmolLM2's sizes (Ben Allal et al. 2025): time and memory do not ask what the weights are.
SIZES: dict[str, dict[str, int]] = {
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "SmolLM2-360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15},
}

MIB = 2**20

_WHAT = """\
A language model of {size}'s shape behind each encoder: {batch} prompts of {words} words and one image each, from pixels
to the logits of the first answered word. The first encoder is dense, and the language model reads all of its patches.
Weights are random, boundaries are of real images, at each image's own quantile. Kept: keys and values of the language
model's layers; peak: torch's allocations beyond weights and inputs. Speed-ups are medians of the ratios within a round.
"""


def prefill(
    data: str | None = None,
    encoders: list[str] = [  # noqa: B006
        "vit_base_patch16_224",
        "dtp_vit_base_patch16_224_2x",
        "dtp_vit_base_patch16_224_4x",
        "dtp_vit_base_patch16_224_10x",
    ],
    language_model: str = "SmolLM2-135M",
    batch_size: int = 8,
    words: int = 32,
    precision: Precision = "fp32",
    rounds: int = 5,
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Measure prefills; the first encoder is the reference.

    Args:
        data: Images; None is random pixels.
        encoders: Names of ours or of timm's Vision Transformers.
        language_model: Whose shape.
        batch_size: Prompts at a time.
        words: Text tokens of a prompt.
        precision: Of the forward pass.
        rounds: Measured prefills of each.
        device: auto, cpu, cuda.
        output: Markdown file to write.
    """
    place = chosen_device(device)
    images, _ = load_tower(encoders[0]).pixels(data, batch_size)
    images = images.to(place)
    ids = torch.randint(100, 1000, (batch_size, words + 1), generator=torch.Generator().manual_seed(0)).to(place)
    ids[:, 4] = IMAGE_ID
    models = {name: _model(name, SIZES[language_model]).to(place) for name in encoders}
    runs = {name: _run(model, ids, images, place, precision) for name, model in models.items()}
    seconds = alternate(runs, place, rounds=rounds)
    ratios = speed_ups(seconds, encoders[0])
    rows = []
    for name, model in models.items():
        with torch.no_grad():
            counts = model.see(images)[1].float()
        kept = _cache_bytes(model, words + float(counts.mean()), 2 if precision == "bf16" else 4)
        peak = memory_of_step(runs[name], place, backward=False).peak
        ratio = ratios[name]
        rows.append(
            [
                name,
                f"{counts.mean():.1f} ({counts.min():.0f}-{counts.max():.0f})",
                f"{1e3 * Quartiles.of(seconds[name]).median / batch_size:.0f}",
                f"**{ratio.median:.2f}** ({ratio.low:.2f}-{ratio.high:.2f})",
                f"{kept / MIB:.1f}",
                f"{peak / MIB / batch_size:.0f}",
            ]
        )
    header = ["encoder", "visual tokens", "ms a prompt", "speed-up", "kept, MiB a prompt", "peak, MiB a prompt"]
    title = f"Prefill, batch {batch_size}, {precision}"
    what = _WHAT.format(size=language_model, batch=batch_size, words=words)
    pages([heading(title, place), what, table(header, rows)], output)


def _model(encoder: str, size: dict[str, int]) -> VisualLanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vision = image_model(encoder, 0)
    config = LlamaConfig(**size, num_key_value_heads=size["num_attention_heads"] // 3, vocab_size=49152)
    return VisualLanguageModel(vision, LlamaForCausalLM(config)).eval().requires_grad_(False)


def _run(
    model: VisualLanguageModel, ids: Tensor, images: Tensor, device: torch.device, precision: Precision
) -> Callable[[], Tensor]:
    length = torch.full((len(ids),), ids.shape[1], device=ids.device)
    nothing, words, embedding = torch.zeros_like(ids, dtype=torch.bool), model.language_model, model.embedding
    language: Any = words

    @torch.no_grad()
    def run() -> Tensor:
        with autocast(device, precision):
            visual, counts, _ = model.see(images)
            text = splice(ids, length, nothing, counts, max_length=4096, left=True)
            embeds = text.embedded(embedding(text.ids), visual)
            mask = None if bool(text.mask.all()) else text.mask
            return language(inputs_embeds=embeds, attention_mask=mask, use_cache=True, logits_to_keep=1).logits

    return run


def _cache_bytes(model: VisualLanguageModel, tokens: float, each: int) -> float:
    config: Any = model.language_model.config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * width * tokens * each


if __name__ == "__main__":
    auto_cli(prefill, as_positional=False)
