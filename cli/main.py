"""Entry point of the `mha2mla` command."""

import ast
import logging
import sys
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

import mha2mla

from .errors import tell

COMMANDS = ("plan", "convert", "export", "chat", "eval", "bench", "write", "train", "push")


def summary(command: str) -> str:
    """First line of the command's docstring, without its imports: these take seconds."""
    source = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def usage() -> str:
    lines = [f"  {command:10} {summary(command)}" for command in COMMANDS]
    hint = "mha2mla COMMAND --help tells the options, mha2mla --version the version."
    return "usage: mha2mla COMMAND ...\n\n" + "\n".join(lines) + "\n\n" + hint


def main(argv: list[str] | None = None) -> int:
    """
    Run a sub-command.

    Returns:
        Exit status: 0; 2 for what the user can mend, told in a sentence or two; 1 for a bug, told with its traceback;
        130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--version"]:
        print(f"mha2mla {mha2mla.__version__}")
        return 0
    if argv[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    if not argv or argv[0] not in COMMANDS:
        problem = f"mha2mla: error: there is no command {argv[0]!r}.\n\n" if argv else ""
        print(problem + usage(), file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):  # a terminal without "±" gets a question mark
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("mha2mla").setLevel(logging.INFO)
    for library in ("datasets", "huggingface_hub"):  # which print by themselves, and would do it twice
        logging.getLogger(library).propagate = False
    try:
        import_module(f"mha2mla.cli.{argv[0]}").main(argv[1:])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return tell(error, f"mha2mla {argv[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
