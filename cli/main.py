"""Entry point of the `mha2mla` command."""

import ast
import logging
import sys
from importlib import import_module
from pathlib import Path

COMMANDS = ("convert", "export", "report", "eval", "bench", "train", "push")


def summary(command: str) -> str:
    """First line of the command's docstring, without its imports: these take seconds."""
    source = Path(__file__).with_name(f"{command}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; what the user can mend is told in one line, without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        lines = [f"  {command:10} {summary(command)}" for command in COMMANDS]
        print("usage: mha2mla COMMAND ...\n\n" + "\n".join(lines) + "\n\nmha2mla COMMAND --help tells the options.")
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("mha2mla").setLevel(logging.INFO)
    try:
        import_module(f"mha2mla.cli.{argv[0]}").main(argv[1:])
    except (ValueError, OSError) as error:
        print(f"mha2mla {argv[0]}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
