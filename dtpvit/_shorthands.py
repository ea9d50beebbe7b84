"""The short options of the commands that Lightning's Trainer runs, and what they stand for."""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dtpvit.errors import UserError
from dtpvit.yaml_input import parse_yaml

__all__ = ["SHORTHANDS", "expand_shorthands", "missing_file", "naming_file", "options"]

SHORTHANDS = """\
Shorthands of fit, validate, test, predict and tune:
  --data DATA        a folder, a brace list or a list of shards, or a file of conversations:
                     --data.init_args.train (fit, tune) or .val
  --init FILE        start from these weights: --model.init_args.init
  --reducers FILE    reduce tokens so, whatever the config says: configs/reducers/NAME.yaml
  --encoder FILE     another encoder than a plain Vision Transformer: configs/encoders/NAME.yaml
  --precision P      --trainer.precision (unless given: bf16-mixed on a GPU, 32-true on a CPU)
  --name NAME        the run's folder, runs/NAME (unless given: after --config, --encoder and --reducers)

`dtpvit COMMAND --help` lists all options of a command. DTPVIT_DEBUG=1 shows tracebacks.
Exit codes: 0 done, 1 a fault of ours, 2 something you can put right, 3 bad data, 130 interrupted,
143 ended on request (SIGTERM, SIGUSR1), with everything saved if it trained."""

_LONG = {
    "--data": "--data.init_args.train",
    "--init": "--model.init_args.init",
    "--precision": "--trainer.precision",
}


def options(arguments: list[str]) -> Iterator[tuple[int, int, str, str]]:
    """Each option with a value, as (index, arguments it takes up, option, value)."""
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not option.startswith("-"):
            continue
        if equals:
            yield index, 1, option, value
        elif index + 1 < len(arguments):
            yield index, 2, option, arguments[index + 1]


def expand_shorthands(command: str, arguments: list[str]) -> list[str]:
    """Replace the shorthands by what they stand for, moved to the end, where no config overrides them.

    Raises:
        UserError: If a fragment is no YAML file that holds a mapping.
    """
    moved, skip, named = list[str](), set[int](), dict[str, str]()
    vision, configs = dict[str, Any](), list[str]()
    for index, width, option, value in options(arguments):
        if index in skip:
            continue
        if option in ("-c", "--config") and Path(value).is_file():
            configs.append(value)
            named["--config"] = naming_file(configs).stem
        elif option in ("--encoder", "--reducers") and Path(value).is_file():
            named[option] = Path(value).stem
        if option in ("--encoder", "--reducers"):
            vision[option.removeprefix("--")] = _fragment(option, value)
        elif option in _LONG and not (option == "--data" and _names_a_class(value)):
            at_val = option == "--data" and command not in ("fit", "tune")
            moved.append(f"{'--data.init_args.val' if at_val else _LONG[option]}={value}")
        else:
            continue
        skip |= set(range(index, index + width))
    kept = [argument for index, argument in enumerate(arguments) if index not in skip]
    if set(named) > {"--config"} and not any(option == "--name" for _, _, option, _ in options(kept)):
        parts = [named[option] for option in ("--config", "--encoder", "--reducers") if option in named]
        kept += ["--name", "-".join(parts)]
    if vision:
        moved.append(f"--model.init_args.vision={json.dumps(vision)}")
    return kept + moved


def naming_file(configs: list[str]) -> Path:
    """The config after which a run is called: the last, those left out that set the trainer alone.

    ``configs/launch/ddp.yaml`` says where a run happens, not what it is. Without any config it is called ``run``.
    """
    for path in reversed(configs):
        try:
            found = parse_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):  # an address, say; the parser has its own words
            return Path(path)
        if not isinstance(found, dict) or set(found) != {"trainer"}:
            return Path(path)
    return Path(configs[-1] if configs else "run")


def missing_file(kind: str, value: str, usual: str) -> UserError:
    """What to say of a YAML file that is not there, with the one that may have been meant."""
    path = Path(value)
    there = {file.name: file for folder in (Path(usual), path.parent) for file in sorted(folder.glob("*.yaml"))}
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.4)
    advice = f"did you mean {there[near[0]]}?" if near else f"{usual}/ holds those that come with dtpvit."
    return UserError(f"there is no {kind} {value!r}; {advice}")


def _fragment(option: str, value: str) -> dict[Any, Any]:
    """A part of a config, from its file or written out."""
    inline = value.startswith("{")
    if not inline and not Path(value).is_file():
        raise missing_file(f"file of {option}", value, f"configs/{option.removeprefix('--').removesuffix('s')}s")
    try:
        found = parse_yaml(value if inline else Path(value).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {value} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{option} {value} holds {type(found).__name__}; expected a mapping like configs/reducers/*.yaml"
        )
    return found


def _names_a_class(value: str) -> bool:
    """Whether the value of ``--data`` is what LightningCLI takes: a class, a sub-config or inline JSON."""
    if Path(value).is_file() and value.endswith(".json"):  # LLaVA's records are a list, a config is a mapping
        with Path(value).open(encoding="utf-8", errors="replace") as file:
            return file.read(64).lstrip().startswith("{")
    if Path(value).exists():
        return value.endswith((".yaml", ".yml"))
    dotted_class = re.fullmatch(r"([A-Za-z_]\w*\.)*[A-Z]\w*", value)
    return dotted_class is not None or value.startswith('{"')
