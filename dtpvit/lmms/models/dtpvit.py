"""The class that lmms-eval runs; imported by it alone, for it is no dependency of ours."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from dtpvit.interop.assistant import load_assistant
from dtpvit.lmms.requests import Request, answer_requests

__all__ = ["DTPViT"]


class DTPViT(lmms):
    """A checkpoint of the instruction task, or an exported folder.

    Args:
        checkpoint: Its path.
        batch_size: Questions at a time.
        device: auto, cpu, cuda, ...; each of several processes takes a GPU of its own.
        max_batch_size: Not used.
    """

    is_simple = True

    def __init__(
        self, checkpoint: str, batch_size: int | str = 1, device: str | None = None, max_batch_size: int | None = None
    ) -> None:
        super().__init__()
        if device in (None, "auto", "cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.batch_size = int(batch_size)
        self.assistant = load_assistant(checkpoint, device)

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers counts there."""
        return self.assistant.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The text that the model says to each request."""
        asked = list[Request]()
        for request in requests:
            context, options, to_visual, number, task, split = request.args
            images = partial(lambda to, *place: to(self._document(*place)), to_visual, task, split, number)
            asked.append(Request(context, options, images))
        with tqdm(total=len(asked), desc="dtpvit", disable=self.rank != 0) as bar:
            texts = answer_requests(self.assistant, asked, batch_size=self.batch_size, progress=bar.update)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return texts

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not offered."""
        raise NotImplementedError("dtpvit generates answers and gives no likelihoods; take a task of generate_until")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("dtpvit answers one round; take a task of generate_until")
