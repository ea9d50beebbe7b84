"""The command ``dtpvit``: dispatch only. Help answers at once; torch is imported by what needs it."""

import argparse
import difflib
import importlib
import inspect
import io
import json
import logging
import os
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from dtpvit import __version__
from dtpvit._commands import COMMANDS
from dtpvit._shorthands import SHORTHANDS, expand_shorthands, missing_file, options
from dtpvit.errors import UserError, barred, chain, unwritten

__all__ = ["COMMANDS", "explain", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code, which are listed in :data:`dtpvit._shorthands.SHORTHANDS`.

    Args:
        argv: The arguments after the program's name; those of this process if None.

    Raises:
        Exception: Whatever is not the user's mistake, for its traceback; with ``DTPVIT_DEBUG=1`` everything.
    """
    _open_streams()
    code = None
    try:
        try:
            code = _run(sys.argv[1:] if argv is None else list(argv))
        finally:
            print(end="", flush=True)
        return code
    except BrokenPipeError:
        if not _silence_unread():
            raise  # the pipe of another process of ours
        return 141  # what a shell reports of a program that SIGPIPE has ended
    except OSError as error:
        if error.filename is not None or not (what := unwritten(error)):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains as it flushes at its end
        if code != 2:
            print(f"dtpvit: of the output, {what}; make room and start again", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        if any(isinstance(error, KeyboardInterrupt) for error in chain(stop)):
            return 130  # Lightning turns Ctrl-C into exit(1) once it has shut down
        if type(stop).__name__ == "SIGTERMException":  # Lightning's; without a code where it comes from Lightning
            return 143 if stop.code is None else int(stop.code)
        raise
    except Exception as error:
        sentence = explain(error)
        if sentence is None or os.environ.get("DTPVIT_DEBUG", "0") not in ("", "0"):
            raise
        print(f"dtpvit: {sentence}", file=sys.stderr)
        return 2


def _open_streams() -> None:
    """Let output go nowhere where it was closed, and let it be of letters that the terminal or the locale lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Or the next file to be opened would take its number, and what libraries print.
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _silence_unread() -> bool:
    """Whether nobody reads our output any more, as behind ``| head``; what is left of it then goes nowhere."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    unread = [stream for stream, event in poll.poll(0) if event & select.POLLERR]
    for stream in unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)  # or Python complains as it flushes at its end
    return bool(unread)


def _dispatch(arguments: list[str]) -> int:
    name, *rest = _join_words(arguments or ["help"])
    if name in ("help", "-h", "--help"):
        wanted = _join_words(rest)[:1]
        if wanted and wanted[0] in COMMANDS:
            return _dispatch([wanted[0], "--help"])
        print(_help())
        return 0
    if name in ("-V", "--version", "version"):
        print(f"dtpvit {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(_unknown_command(name))
    # Classes of the user's own project, named in a config by import path; last, so that they shadow nothing.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    rest = _with_config_of_run(name, [_underscores(argument) for argument in rest])
    _check_config_files(name, rest)
    _prepare_process()
    if COMMANDS[name].target is not None:
        return _call(name, rest)
    elif name == "tune":
        from dtpvit._tune_cli import TuneCLI

        TuneCLI(expand_shorthands(name, rest))
    else:
        from dtpvit._trainer_cli import TrainerCLI

        TrainerCLI(name, expand_shorthands(name, rest))
    return 0


class _Log(logging.Handler):
    """Prints to what ``sys.stderr`` is when something is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"dtpvit: {record.getMessage()}", file=sys.stderr)


def _prepare_process() -> None:
    """Settle threads and output, before torch is imported; what the user has set in the environment stays."""
    # By default OpenMP threads that wait keep their core busy. Beside the processes that decode images this
    # made a training on 2 shared cores 3 to 8 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # In a log file: wide tables, and bars that are rarely redrawn.
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "120")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")
    log = logging.getLogger("dtpvit")
    log.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING)
    if not log.handlers:
        log.addHandler(_Log())


def _join_words(arguments: list[str]) -> list[str]:
    """``["data", "count", ...]`` -> ``["data count", ...]``, for the commands of two words."""
    joined = " ".join(arguments[:2])
    return [joined, *arguments[2:]] if joined in COMMANDS else arguments


def _call(name: str, arguments: list[str]) -> int:
    """Run the function ``module:function``, its signature being the command's options; it may return an exit code."""
    from jsonargparse import ArgumentParser

    _, target, positional, repeated = COMMANDS[name]
    module, function = str(target).split(":")
    component = getattr(importlib.import_module(module), function)
    parser = ArgumentParser(
        prog=f"dtpvit {name}", description=(inspect.getdoc(component) or "").split("\n\nArgs:")[0], exit_on_error=False
    )
    taken = set[str | int]()
    if positional is not None:
        parameter, text = positional
        taken.add(parameter)
        many: dict[str, Any] = {"nargs": "+"} if parameter.endswith("s") else {}
        parser.add_argument(parameter, type=str, metavar=parameter.removesuffix("s").upper(), help=text, **many)
    if repeated is not None:
        parameter, text = repeated
        taken.add(parameter)
        parser.add_argument(f"--{parameter}", type=str, action="append", metavar="FILE", help=text)
    parser.add_function_arguments(component, as_group=False, skip=taken, fail_untyped=False)
    arguments = _gathered(component, arguments, repeated[0] if repeated else None)
    return component(**parser.parse_args(_switches(component, arguments)).as_dict()) or 0


def _switches(component: Callable[..., Any], arguments: list[str]) -> list[str]:
    """Let ``--deep`` stand for ``--deep=true`` where the parameter is a bool."""
    parameters = inspect.signature(component).parameters.values()
    switches = {f"--{parameter.name}" for parameter in parameters if parameter.annotation in (bool, "bool")}
    following = [*arguments, ""][1:]
    return [
        f"{argument}=true" if argument in switches and after not in ("true", "false") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


def _gathered(component: Callable[..., Any], arguments: list[str], apart: str | None) -> list[str]:
    """The arguments, with all values behind an option that takes several texts as one list: ``--reducers A B``.

    Not behind the option ``apart``, which is given once for each.
    """
    hints = get_type_hints(component)
    several = {f"--{name}" for name, hint in hints.items() if hint == list[str] | None and name != apart}
    found, values = list[str](), list[str]()
    for argument in reversed(arguments):
        option, equals, first = argument.partition("=")
        if option in several:
            values += [first] if equals else []
            one_list = len(values) == 1 and values[0].startswith("[")
            found += [values[0] if one_list else json.dumps(values[::-1]), option]
            values = []
        elif argument.startswith("-"):
            found += [*values, argument]
            values = []
        else:
            values.append(argument)
    return [*values[::-1], *found[::-1]]


def _help() -> str:
    lines = [
        f"dtpvit {__version__}: Vision Transformers that spend tokens only where an image needs them",
        "",
    ]
    lines += ["usage: dtpvit COMMAND [options]", ""]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "  help       this text; also --version", "", SHORTHANDS])


def _unknown_command(name: str) -> str:
    if name.startswith("-"):
        return f"found the option {name!r} where a command was expected; write `dtpvit COMMAND {name} ...`."
    if family := [command for command in COMMANDS if command.startswith(f"{name} ")]:
        return f"{name} is the first word of a command; write one of `dtpvit {'`, `dtpvit '.join(family)}`."
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    advice = f"did you mean `dtpvit {near[0]}`?" if near else "`dtpvit help` lists the commands."
    return f"there is no command {name!r}; {advice}"


def _underscores(argument: str) -> str:
    """Spell ``--batch-size`` as the parameter is spelt, ``--batch_size``; values and blocks, 0-11, stay as they are."""
    match = re.match(r"--[A-Za-z][\w.-]*", argument)
    if match is None:
        return argument
    return "--" + re.sub(r"(?<!\d)-|-(?!\d)", "_", match[0][2:]) + argument[match.end() :]


def _with_config_of_run(command: str, arguments: list[str]) -> list[str]:
    """The arguments, with the ``config.yaml`` of a run where its checkpoint is all that says what to do."""
    if COMMANDS[command].target is not None or any(re.match(_SAYS_WHAT_TO_DO, a) for a in arguments):
        return arguments
    for _, _, option, value in options(arguments):
        config = Path(value).parent.parent / "config.yaml"
        if option == "--ckpt_path" and config.is_file():
            return ["--config", str(config), *arguments]
    return arguments


def _check_config_files(command: str, arguments: list[str]) -> None:
    if COMMANDS[command].target is None and not any(re.match(_SAYS_WHAT_TO_DO, a) for a in arguments):
        raise UserError(f"{command} needs to know what to run; write `dtpvit {command} --config FILE`.")
    for _, _, option, value in options(arguments):
        path = Path(value)
        if option not in ("-c", "--config") or "\n" in value or "://" in value:
            continue
        if path.is_file():
            _check_text(path)
            continue
        raise missing_file("config file", value, "configs")


def _check_text(path: Path) -> None:
    """Refuse what jsonargparse would end with a traceback at."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = "is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise UserError(f"the config file {path} {what}; give a YAML file.") from None
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise UserError(f"the config file {path} is nested more than {_DEEPEST} deep; no option is.")
        yaml.safe_load(text)
    except UserError:
        raise
    except yaml.YAMLError:
        return  # jsonargparse says where
    except ValueError as error:  # a number of thousands of digits, a day that is in no calendar
        raise UserError(f"the config file {path} holds a value that is none ({error}); correct it.") from None


def explain(error: BaseException) -> str | None:
    """The sentence for the user behind ``error``, wherever it was raised; None if no mistake of theirs."""
    links = list(chain(error))
    for link in links:
        # A worker process hands over its traceback as text.
        if told := re.findall(r"^dtpvit\.errors\.UserError: (.+)$", str(link), re.MULTILINE):
            return told[-1].strip()
    for link in links:
        if isinstance(link, UserError):
            return _one_line(str(link))
    if what := unwritten(error):
        return f"{what}; make room and start again"
    if what := barred(error):
        return f"{what}; correct its permissions, or give another place"
    if type(error).__name__ == "MisconfigurationException":  # Lightning's own word for a mistake of its user
        return _one_line(str(error))
    return _one_line(_without_types(str(error))) if isinstance(error, argparse.ArgumentError) else None


def _without_types(message: str) -> str:
    """jsonargparse's message without its report on the other types that the value might have had."""
    lines = [line for line in message.splitlines() if not re.match(_REPORT_ON_TYPES, line)]
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", "\n".join(lines))
    text = re.sub(r"Option '(train|val|init)' is", r"Option '\1' (which --data or --init stands for) is", text)
    return re.sub(r'^Parser key "([\w.]+)":', r"\1:", text) + "; --help lists the options."


_DEEPEST = 50
_SAYS_WHAT_TO_DO = r"(-c|--config|--model|--model\.class_path|-h|--help|--print_config)(?![a-z.])"
_REPORT_ON_TYPES = (
    r"[\s-]*(Does not validate against any of the Union|Subtypes:|Errors:|Given value|"
    r"Expected a <class 'NoneType'>|Expected a path but)"
)


def _one_line(text: str) -> str:
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    return " ".join(line for line in lines if line)
