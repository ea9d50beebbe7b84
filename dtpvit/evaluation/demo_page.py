"""The page of ``dtpvit demo``, in Gradio; imported by that command alone, for Gradio is an extra."""

# pyright: reportMissingImports=false
from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Mapping
from random import randrange
from typing import Any

import gradio as gr
import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from gradio.themes import Default

from dtpvit.datamodules.scenes import SEEN, draw_scene
from dtpvit.errors import UserError
from dtpvit.evaluation.demo_view import MAX_BYTES, DemoTower, DemoView, read_photo
from dtpvit.evaluation.picture_sheet import Panel

__all__ = ["build_app", "serve"]

# Whatever Gradio's own pages name, the browser fetches nothing from anywhere else.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:"
)
LEAST, MOST = 1.5, 16.0  # patches for each token
_AS_TRAINED = "as it was trained"


def serve(towers: Mapping[str, DemoTower], host: str, port: int) -> None:
    """Serve the page until the process is ended.

    Args:
        towers: What one may choose from, by name.
        host: Address to listen on.
        port: Port to listen on.
    """
    # What is loaded by now stays: left out of the collections between timed runs, which took most of a look.
    gc.collect()
    gc.freeze()
    # An open page holds a connection: without a limit Ctrl-C would wait for its browser.
    uvicorn.run(build_app(towers), host=host, port=port, log_level="warning", timeout_graceful_shutdown=3)


def build_app(towers: Mapping[str, DemoTower]) -> FastAPI:
    """The page as an application, at its root; see :func:`serve`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def stay_at_home(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        answer = await call_next(request)
        answer.headers["Content-Security-Policy"] = _POLICY
        return answer

    page = _page(towers)
    # Gradio (6.31) asks whether a file was uploaded only where launch() has run: a mounted page would open, and show to
    # whoever may reach it, any image of this machine that a request names.
    page.has_launched = True
    return gr.mount_gradio_app(
        app,
        page,
        "/",
        footer_links=[],
        run_history=False,
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_STYLE,
    )


_STYLE = """
th { white-space: nowrap }
footer { display: none !important }
"""


def _page(towers: Mapping[str, DemoTower]) -> gr.Blocks:
    names = list(towers)
    has_text = any(tower.has_text for tower in towers.values())
    with gr.Blocks(title="dtpvit", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("## dtpvit: the tokens of an image")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                photo = gr.Image(
                    label="image", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=260
                )
                drawn = gr.Button("draw shapes", size="sm")
                choice = gr.Radio(names, value=names[0], label="encoder", visible=len(names) > 1)
                own = gr.Checkbox(True, label=f"compression {_AS_TRAINED}")
                compression = gr.Slider(LEAST, MOST, value=4, step=0.5, label="compression: patches for each token")
                labels = gr.Textbox(label="labels, one a line or between commas", lines=3, visible=has_text)
                prompt = gr.Textbox("a photo of a {c}.", label="prompt, {c} is the label", visible=has_text)
            with gr.Column(scale=2, min_width=300):
                said = gr.Markdown("Drop an image, or let shapes be drawn.")
                with gr.Row():
                    segments = gr.Image(label="segments", visible=False, **_SHOWN)
                    heat = gr.Image(label="heat", visible=False, **_SHOWN)
                cost = gr.Markdown()
                scores = gr.Label(label="labels", show_heading=False, visible=False)
        inputs, outputs = [photo, choice, own, compression, labels, prompt], [said, segments, heat, cost, scores]
        look: dict[str, Any] = {"fn": _look(towers), "inputs": inputs, "outputs": outputs, "preprocess": False}
        look |= {"show_progress": "minimal", "trigger_mode": "always_last", "concurrency_id": "look"}
        photo.change(**look, api_name="look")
        look["api_visibility"] = "private"
        gr.on([own.input, choice.input, labels.submit, labels.blur, prompt.submit, prompt.blur], **look)
        # Moving the slider means it: the rate of the training is left.
        compression.release(lambda: False, None, own, api_visibility="private").then(**look)
        drawn.click(_draw, None, photo, api_visibility="private")
    return page


_SHOWN: dict[str, Any] = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
_SHOWN |= {"min_width": 240}


def _draw() -> np.ndarray:
    return np.asarray(draw_scene(f"demo {randrange(2**32)}", 448, SEEN).image)


def _look(towers: Mapping[str, DemoTower]) -> Callable[..., list[Any]]:
    """What fills the right-hand side: a message in place of everything else where something does not fit."""

    def look(
        photo: dict[str, Any] | None, choice: str, own: bool, compression: float, labels: str, prompt: str
    ) -> list[Any]:
        if photo is None:
            return _nothing("Drop an image, or let shapes be drawn.")
        names = (labels or "").replace(",", "\n").splitlines()
        rate = None if own else min(max(float(compression), LEAST), MOST)  # what is typed beside the slider may be more
        try:
            seen = towers[choice].view(read_photo(photo["path"]), rate, names, prompt or "")
        except UserError as mistake:
            return _nothing(f"**{str(mistake)[:1].upper()}{str(mistake)[1:]}.**")
        return [_said(seen, own), _picture(seen.segments), _picture(seen.heat), _table(seen), _scores(seen)]

    return look


def _nothing(message: str) -> list[Any]:
    hidden = gr.update(value=None, visible=False)
    return [message, hidden, hidden, "", hidden]


def _said(seen: DemoView, own: bool) -> str:
    how = _AS_TRAINED if own else "by the slider"
    if not seen.moved:
        how = f"{_AS_TRAINED}: this way of reducing tokens has no rate that can be set without training"
    return f"{seen.segments.caption}, {how}"


def _picture(panel: Panel | None) -> Any:
    if panel is None:
        return gr.update(value=None, visible=False)
    low, high = panel.scale or ("", "")
    label = f"{panel.caption}: {low} dark, {high} light" if panel.scale else "segments"
    return gr.update(value=panel.drawing.pixels(panel.zoom), label=label, visible=True)


def _table(seen: DemoView) -> str:
    columns = [("pooled", seen.cost)] + ([("dense", seen.dense)] if seen.dense is not None else [])
    rows = [
        ["", *(name for name, _ in columns)],
        ["---", *("---:" for _ in columns)],
        ["tokens", *(str(cost.tokens) for _, cost in columns)],
        ["GMACs", *(f"{cost.gmacs:.3g}" for _, cost in columns)],
        ["ms", *(f"{cost.milliseconds:.1f}" for _, cost in columns)],
    ]
    note = (
        "GMACs: 1e9 multiply-accumulates of the image tower, counted. Times: medians of a few runs, this image alone."
    )
    if seen.dense is not None and seen.speed_up is not None:
        share = seen.cost.gmacs / seen.dense.gmacs
        note = f"{share:.0%} of the GMACs of dense, {seen.speed_up:.2f} times as fast. {note}"
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{note}"


def _scores(seen: DemoView) -> Any:
    return gr.update(value=seen.scores or None, visible=bool(seen.scores))
