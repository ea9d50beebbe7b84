"""The commands of ``dtpvit``: one line of the help each, and where it is found."""

from typing import NamedTuple

__all__ = ["COMMANDS", "Command"]


class Command(NamedTuple):
    """One line of the help, and the function behind it; without a target, Lightning's Trainer runs it.

    ``positional`` is the function's parameter that takes the arguments without a name, and its help; ``repeated`` one
    whose option may be given several times.
    """

    summary: str
    target: str | None = None
    positional: tuple[str, str] | None = None
    repeated: tuple[str, str] | None = None


COMMANDS = {
    "fit": Command("train, or continue a run: --config FILE [--data DATA] [--init FILE] [--ckpt_path last]"),
    "validate": Command("validate a checkpoint: --ckpt_path FILE, or --config FILE --ckpt_path last"),
    "test": Command("the same on the test data"),
    "predict": Command("run the model over data and hand its outputs to the callbacks of the config"),
    "tune": Command("find a learning rate or batch size for fit: --config FILE [--find lr|batch_size|both]"),
    "zeroshot": Command(
        "zero-shot classification of a checkpoint: --data DATA --checkpoint FILE",
        "dtpvit.evaluation.zeroshot:zeroshot",
    ),
    "cost": Command(
        "GMACs, images/s, memory, and what became of the FLOPs: MODEL... [--images DATA] [--json FILE]",
        "dtpvit.evaluation.cost_command:cost",
        positional=(
            "models",
            "names of ours, of open_clip's or of timm's, YAMLs of a task, checkpoints, exported folders",
        ),
    ),
    "adapt": Command(
        "make a pretrained encoder cheaper, no labels: MODEL --images DIR [--compression C]",
        "dtpvit.tasks.adapt:adapt",
        positional=("model", "timm's or open_clip's name of a Vision Transformer"),
    ),
    "compare": Command(
        "ways of reducing the tokens of a pretrained model: FILE... --model MODEL --images DIR [--out DIR]",
        "dtpvit.tasks.compare:compare",
        positional=("reducers", "configs/reducers/*.yaml, or tables of several such rows"),
    ),
    "show": Command(
        "pictures of which patches became one token: IMAGE... [--checkpoint FILE...] [--reducers FILE...]",
        "dtpvit.evaluation.show:show",
        positional=("images", "image files, folders of images, or shards"),
    ),
    "report": Command(
        "runs beside each other, as a page and as Markdown: RUN... [--out report.html]",
        "dtpvit.evaluation.report:report",
        positional=("runs", "folders of fit, such as runs/*"),
    ),
    "demo": Command(
        "a local page for images of your own: [--checkpoint FILE...] [--reducers FILE...] [--port N]",
        "dtpvit.evaluation.demo:demo",
    ),
    "ask": Command(
        'answers about images: --checkpoint PATH [--image FILE]... "QUESTION"...',
        "dtpvit.evaluation.ask:ask",
        positional=("questions", "in quotes; each is asked apart, about all images"),
        repeated=("image", "a file; several times for several images, in their order"),
    ),
    "vqa": Command(
        "questions of a file: --checkpoint PATH --questions FILE --out FILE [--answers FILE --metric M]",
        "dtpvit.evaluation.vqa:vqa",
    ),
    "score": Command(
        "answers of a file: --predictions FILE --answers FILE --metric exact|vqa|pope|scienceqa",
        "dtpvit.evaluation.score:score",
    ),
    "data get": Command(
        "fetch the images of an address list, or check ImageNet: NAME [--out DIR] [--yes]",
        "dtpvit.datamodules.download:get",
        positional=("name", "cc12m, laion400m or imagenet"),
    ),
    "data count": Command(
        "how many addresses became usable samples, and why not the rest: SHARDS... [--deep]",
        "dtpvit.datamodules.shard_count:count",
        positional=("shards", "folders, brace lists or globs of .tar shards"),
    ),
    "data check": Command(
        "decode all, list what is broken or occurs twice: SHARDS... [--repair DIR] [--json FILE]",
        "dtpvit.datamodules.shard_check:check",
        positional=("shards", "folders, brace lists or globs of .tar shards"),
    ),
    "data show": Command(
        "a contact sheet of images with their captions: SHARDS... [--out sheet.png] [--count 48]",
        "dtpvit.datamodules.contact_sheet:show",
        positional=("shards", "folders, brace lists or globs of .tar shards"),
    ),
    "export": Command(
        "write a checkpoint as a folder that open_clip loads (--out), or as ONNX (--onnx)",
        "dtpvit.interop.export:export",
    ),
}
