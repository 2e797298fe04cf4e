"""``retinar VERB ...``: finds the verb's dataclass in ``retinar.commands``, fills it with tyro, runs it.

Exit codes: 0 done; 2 bad input or a refusing file system, told in one sentence on stderr; 130 stopped with Ctrl-C.
Only the verb's own module is imported, so that ``--help`` answers at once and never loads torch.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import json
import os
import re
import sys
import traceback
import warnings
from importlib.util import find_spec
from typing import Any

from retinar import __version__, ui
from retinar.failures import sentence

# In the order of the work; a verb is offered when its module is there.
VERBS = (
    "doctor",
    "demo",
    "prepare",
    "train",
    "encode",
    "generate",
    "evaluate",
    "reproduce",
    "convert",
    "serve",
    "bench",
)
EVERYWHERE = {
    "--json": "print one machine-readable JSON line at the end, on stdout",
    "--traceback": "show the whole traceback of an error (for developers)",
    "--version": "print the version",
    "--help": "explain a verb: retinar VERB --help",
}
EXAMPLE = "retinar demo --out retinar-demo"


class Usage(Exception):
    """The command line cannot be read; the message is the sentence to print."""


def verbs() -> list[str]:
    """The verbs of this version."""
    return [verb for verb in VERBS if find_spec(f"retinar.commands.{verb}") is not None]


def command(verb: str) -> Any:
    """The dataclass (or the union of dataclasses) behind a verb."""
    module = importlib.import_module(f"retinar.commands.{verb}")
    return getattr(module, verb.capitalize())


def help_text() -> str:
    """What ``retinar --help`` prints."""
    about = [(verb, (command(verb).__doc__ or "").strip().split("\n")[0]) for verb in verbs()]
    width = max(len(name) for name, _ in [*about, *EVERYWHERE.items()]) + 2
    return "\n".join(
        [
            "usage: retinar VERB [options]",
            "",
            "Synthesis of colour fundus photographs with an autoregressive transformer.",
            "",
            "verbs:",
            *(f"  {name:<{width}}{text}" for name, text in about),
            "",
            "everywhere:",
            *(f"  {name:<{width}}{text}" for name, text in EVERYWHERE.items()),
            "",
            f"example: {EXAMPLE}",
        ]
    )


def take_flags(argv: list[str]) -> tuple[list[str], set[str]]:
    """Remove the flags that hold everywhere; returns (the rest, the flags found)."""
    end = argv.index("--") if "--" in argv else len(argv)
    flags = {token for token in argv[:end] if token in ("--json", "--traceback")}
    return [token for token in argv[:end] if token not in flags] + argv[end:], flags


def gather_set(argv: list[str]) -> list[str]:
    """All ``--set key=value ...`` of a line as one, at its end: repeated flags add up and never eat a positional."""
    rest: list[str] = []
    values: list[str] = []
    index = 0
    while index < len(argv):
        token = argv[index]
        index += 1
        if token.startswith("--set="):
            values.append(token.removeprefix("--set="))
        elif token == "--set":
            first = index
            while index < len(argv) and not argv[index].startswith("--") and (index == first or "=" in argv[index]):
                values.append(argv[index])
                index += 1
        else:
            rest.append(token)
    return [*rest, "--set", *values] if values else rest


def plain_text(box: str) -> str:
    """tyro's framed message as one sentence: its parts joined, without the frame, the colours and the help on help."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        content = line.strip().strip("│┃|").strip()
        if re.match(r"^[╭╰┌└┏┗+]", content):
            continue
        if re.fullmatch(r"[─━=-]{4,}", content):
            parts.append([])
        elif content != "(required)":
            parts[-1].append(content)
    sentences = [" ".join(" ".join(part).split()) for part in parts]
    aside = ("For full helptext", "Argument helptext", "Perhaps you meant")
    return "; ".join(part for part in sentences if part and not part.startswith(aside))


def parse(verb: str, argv: list[str]) -> Any:
    """Fill the verb's dataclass. Raises Usage with a sentence; SystemExit(0) after printing help."""
    import tyro

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                command(verb), prog=f"retinar {verb}", args=gather_set(argv), config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as stop:
        if not stop.code:
            print("everywhere: " + ", ".join(EVERYWHERE))
            raise
        message = plain_text(told.getvalue()).rstrip(".") or "the options could not be read"
        raise Usage(f"{message}: see `retinar {verb} --help`.") from None


def find_verb(argv: list[str]) -> str:
    """The verb of a line. Raises Usage for an unknown one."""
    if argv[0] in verbs():
        return argv[0]
    kind = "option" if argv[0].startswith("-") else "verb"
    near = difflib.get_close_matches(argv[0], verbs(), n=1)
    guess = f"did you mean `retinar {near[0]}`?" if near else "see `retinar --help`."
    raise Usage(f"Expected a verb ({', '.join(verbs())}), found the {kind} {argv[0]!r}: {guess}")


def execute(argv: list[str], json_line: bool) -> int:
    """Parse and run one line; exceptions are the caller's."""
    verb = find_verb(argv)
    task = parse(verb, argv[1:])
    summary = task.run(ui.progress()) or {}
    # A training that Ctrl-C stopped has saved itself and returns; its exit code still says so.
    code = int(summary.pop("exit_code", 130 if summary.get("ended") == "interrupted" else 0))
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":  # torchrun's first one tells
        return code
    if json_line:
        tell(json.dumps(ui.jsonable(summary), ensure_ascii=False, allow_nan=False))
    elif hasattr(task, "render"):
        tell(task.render(summary))
    elif summary:
        tell("\n".join(ui.lines(summary)))
    return code


def tell(text: str) -> None:
    """Print the result. Names of files need not be UTF-8: what is not becomes an escape, in JSON too."""
    print(text.encode("utf-8", "backslashreplace").decode("utf-8"), flush=True)


def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    print(f"retinar: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run one command line (``sys.argv`` without the program by default); returns the exit code."""
    argv, flags = take_flags(list(sys.argv[1:] if argv is None else argv))
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] == "--version":
        print(f"retinar {__version__}")
        return 0
    try:
        with warnings.catch_warnings():
            if "--traceback" not in flags:  # ours are for people, those of libraries for developers
                warnings.simplefilter("ignore")
                warnings.filterwarnings("default", module=r"retinar")
                warnings.showwarning = show_warning
            return execute(argv, "--json" in flags)
    except SystemExit as stop:  # help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("retinar: stopped; run the same command again to go on where it stopped.", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # `retinar ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Usage as error:
        print(f"retinar: {error}", file=sys.stderr, flush=True)
        return 2
    except BaseException as error:  # torch's CheckpointException is no Exception
        told = None if "--traceback" in flags else sentence(error)
        if told is None:
            traceback.print_exc()
            return 2 if sentence(error) else 1
        if not getattr(error, "elsewhere", False):  # else the process that found it tells
            print(f"retinar: {told}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
