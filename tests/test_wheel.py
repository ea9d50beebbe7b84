"""The wheel is complete: everything the product needs is inside, and works away from the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dtpvit

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]

USE = """
import dtpvit
from pathlib import Path
assert Path(dtpvit.__file__).is_relative_to(Path({wheel!r})), dtpvit.__file__
import open_clip, timm, torch
missing = {names!r} - set(open_clip.list_models())
assert not missing, missing
with torch.inference_mode():
    clip = dtpvit.create_clip("DTP-ViT-B-32-10x").eval()
    image = torch.zeros(1, 3, 224, 224)
    features = clip.encode_image(image)
    assert features.shape == (1, 512) and features.isfinite().all()
    twin = open_clip.create_model("DTP-ViT-B-32-10x")
    twin.load_state_dict(clip.state_dict())
    torch.testing.assert_close(twin.eval().encode_image(image), features)
"""

EXPORT = """
import torch
from dtpvit.interop.create import build_clip
from dtpvit.interop.export import export
vision = {"image_size": 32, "patch_size": 16, "dim": 32, "depth": 1, "num_heads": 2}
text = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
config = {"embed_dim": 16, "vision": vision, "text": text}
torch.save({"state_dict": build_clip(config).state_dict(), "hyper_parameters": {"model": config}}, "last.ckpt")
export("last.ckpt", "exported")
"""


def run(*command: str, cwd: Path, path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(REPOSITORY / "dtpvit", source / "dtpvit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), cwd=source)
    (file,) = folder.glob("dtpvit-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_what_the_package_holds(wheel: Path) -> None:
    def contents(root: Path) -> set[str]:
        kinds = ("*.py", "*.json", "py.typed")
        return {str(path.relative_to(root)) for kind in kinds for path in (root / "dtpvit").rglob(kind)}

    assert contents(wheel) == contents(REPOSITORY)
    assert any("model_configs/DTP-ViT-B-32-10x.json" in name for name in contents(wheel))
    assert {path.name for path in wheel.iterdir()} == {"dtpvit", f"dtpvit-{dtpvit.__version__}.dist-info"}


def test_the_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    assert run(sys.executable, "-m", "dtpvit", "--version", cwd=tmp_path, path=str(wheel)) == (
        f"dtpvit {dtpvit.__version__}"
    )
    configs = REPOSITORY / "dtpvit" / "interop" / "model_configs"
    names = {path.stem for path in configs.glob("*.json")}
    assert len(names) > 10
    run(sys.executable, "-c", USE.format(wheel=str(wheel), names=names), cwd=tmp_path, path=str(wheel))
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_has_the_licence_that_exported_folders_get(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-c", EXPORT, cwd=tmp_path, path=str(wheel))
    (inside,) = wheel.glob("dtpvit-*.dist-info/**/LICENSE")
    assert (tmp_path / "exported/LICENSE").read_text() == inside.read_text() == (REPOSITORY / "LICENSE").read_text()
