"""The whole CLIP step, both towers, loss, backward and optimizer, against open_clip's at the same batch.

python -m benchmarks.clip_step --data SHARDS --output docs/results/clip_step.md
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import auto_cli
from open_clip import ClipLoss
from torch import Tensor, nn

from benchmarks.record import heading, pages, table
from dtpvit.errors import UserError
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.classifier import Precision, autocast
from dtpvit.evaluation.measuring import Quartiles, alternate, speed_ups
from dtpvit.evaluation.towers import Tower, load_tower

_WHAT = """\
One step: image tower, text tower, contrastive loss, backward, AdamW. Images and captions are real; captions of
{shortest} to {longest} tokens, {mean:.1f} on average. open_clip's text tower works through all {context} positions;
ours, packed, stops at the end-of-text token, which changes no feature (causal attention). Speed-ups are medians of the
ratios within a round.
"""


def clip_step(
    data: str,
    models: list[str] = ["ViT-B-32", "DTP-ViT-B-32-1x", "DTP-ViT-B-32-2x", "DTP-ViT-B-32-4x", "DTP-ViT-B-32-10x"],  # noqa: B006
    batch_size: int = 64,
    precision: Precision = "fp32",
    rounds: int = 5,
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Measure training steps of dual encoders; the first model is the reference.

    Args:
        data: Image-text shards.
        models: Names of ours or of open_clip's.
        batch_size: Pairs a step.
        precision: Of the forward pass.
        rounds: Measured steps of each.
        device: auto, cpu, cuda.
        output: Markdown file to write.
    """
    place = chosen_device(device)
    torch.manual_seed(0)
    towers = [load_tower(name) for name in models]
    images, captions = towers[0].pixels(data, batch_size)
    if len(captions) < batch_size or towers[0].tokenize is None:
        raise UserError(f"{data} has captions for {len(captions)} of {batch_size} images; give image-text shards")
    images = images.to(place)
    text = towers[0].tokenize(captions).to(place)
    steps = {tower.name: _step(tower, images, text, place, precision) for tower in towers}
    seconds = alternate(steps, place, rounds=rounds)
    ratios = speed_ups(seconds, models[0])
    rows = []
    for name, times in seconds.items():
        middle = Quartiles.of(times).median
        ratio = ratios[name]
        speed = f"**{ratio.median:.2f}** ({ratio.low:.2f}-{ratio.high:.2f})"
        rows.append([name, f"{middle:.2f}", f"{batch_size / middle:.1f}", speed])
    length = (text.argmax(dim=1) + 1).tolist()
    what = _WHAT.format(
        shortest=min(length), longest=max(length), mean=sum(length) / len(length), context=text.shape[1]
    )
    title = f"The whole CLIP step, batch {batch_size}, {precision}"
    pages([heading(title, place), what, table(["model", "s a step", "pairs/s", "speed-up"], rows)], output)


def _step(tower: Tower, images: Tensor, text: Tensor, device: torch.device, precision: Precision) -> Callable[[], None]:
    model: Any = tower.whole.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.2, fused=True)
    loss: nn.Module = ClipLoss(cache_labels=True)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(device, precision):
            image_features, text_features, scale = model(images, text)[:3]
            value = loss(image_features.float(), text_features.float(), scale)
        value.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    auto_cli(clip_step, as_positional=False)
