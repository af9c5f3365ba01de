"""Entry point of the `mha2mla` command."""

import logging
import sys

from . import bench, convert, eval, push, report, train

COMMANDS = {"convert": convert, "report": report, "eval": eval, "bench": bench, "train": train, "push": push}


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; what the user can mend is told in one line, without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        lines = [f"  {name:10} {(module.__doc__ or '').splitlines()[0]}" for name, module in COMMANDS.items()]
        print("usage: mha2mla COMMAND ...\n\n" + "\n".join(lines) + "\n\nmha2mla COMMAND --help tells the options.")
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("mha2mla").setLevel(logging.INFO)
    try:
        COMMANDS[argv[0]].main(argv[1:])
    except (ValueError, OSError) as error:
        print(f"mha2mla {argv[0]}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
