"""What README shows is what happens."""

import re
from pathlib import Path

import pytest
import torch

from dtpvit.cli import COMMANDS

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run_and_print_what_they_say(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    names: dict[str, object] = {}
    exec(block, names)
    assert capsys.readouterr().out.strip() == re.search(r"print\(.*\)  # (.*)", block)[1]
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        ours, theirs = names["clip"].eval(), names["model"].eval()
        torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), rtol=0, atol=1e-5)


def test_commands_and_configs_exist():
    for command in re.findall(r"`dtpvit ((?:data )?\w+)[ `]", README):
        assert command in COMMANDS, command
    for config in re.findall(r"`(?:configs/)?(\w+\.yaml)`", README):
        if config != "config.yaml":
            assert (REPOSITORY / "configs" / config).is_file(), config
    listed = set(re.findall(r"`(\w+\.yaml)`", README))
    assert {path.name for path in (REPOSITORY / "configs").glob("*.yaml")} <= listed


def test_every_way_of_reducing_tokens_has_its_line():
    for path in (REPOSITORY / "configs").glob("*/*.yaml"):
        assert f"`{path.stem}`" in README or f"`configs/{path.parent.name}/{path.name}`" in README, path


def test_the_pages_of_results_that_are_cited_exist():
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("configs/**/*.yaml")]
    for page in pages:
        for cited in re.findall(r"docs/results/\w+\.(?:md|png)", page.read_text(encoding="utf-8")):
            assert (REPOSITORY / cited).is_file(), (page, cited)


@pytest.mark.parametrize("target", ["install", "demo", "test", "test-all"])
def test_make_targets_exist(target):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
