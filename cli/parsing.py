"""The dialect of all commands: the fields of dataclasses are the options, and a YAML file may hold them too."""

from argparse import (
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentError,
    ArgumentParser,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
)
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import fields
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from mha2mla.common.extras import EXAMPLES
from mha2mla.common.files import no_file, read_yaml

from .fields import add_options, truth_value

Positionals = Mapping[str, dict[str, Any]]  # arguments without a name, and what `add_argument` is told of each
COMPARED_MODELS: Positionals = {
    "models": dict(
        nargs="+",
        help="The original, then its conversions: folders, or names on the Hub. The original may be left out if it is "
        "where it was when it was converted.",
    )
}


class Names(tuple[str, ...]):
    """Value of an option that takes several names: `a,b` on the command line, a list in a file."""

    def __new__(cls, names: str | Iterable[str]) -> "Names":
        values = [name.strip() for name in (names.split(",") if isinstance(names, str) else map(str, names))]
        if not all(values):
            raise ArgumentTypeError(f"must be names with commas between them, got {str(names)!r}")
        return super().__new__(cls, values)

    def __str__(self) -> str:
        return ",".join(self)


class Sizes(tuple[int, ...]):
    """Value of an option that takes several numbers above 0."""

    def __new__(cls, sizes: str | int | Iterable[int]) -> "Sizes":
        values = [int(size) for size in (str(sizes).split(",") if isinstance(sizes, str | int) else sizes)]
        if min(values) < 1:
            raise ArgumentTypeError(f"must be above 0, got {min(values)}")
        return super().__new__(cls, values)

    def __str__(self) -> str:
        return ",".join(map(str, self))


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Descriptions as they are written, defaults that say something, and one of an option's two spellings."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.default is None or action.default is False or isinstance(action.default, list):
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        shown = copy(action)
        shown.option_strings = [option for option in action.option_strings if "_" not in option]
        if action.type is truth_value:  # a flag
            shown.nargs = 0
        return super()._format_action_invocation(shown)


class CommandParser(ArgumentParser):
    """
    Parser of one command.

    Args:
        command (`str`): Its name, for messages.
        dataclasses (`tuple[type, ...]`): Their fields are the options, with dashes or underscores.
        description (`str`, *optional*): The text of --help.
        positionals (`Mapping[str, dict]`, *optional*): Arguments without a name, with what argparse's `add_argument`
            is told of each.
    """

    def __init__(
        self,
        command: str,
        dataclasses: tuple[type, ...],
        description: str | None = None,
        positionals: Positionals | None = None,
    ):
        self.positionals = dict(positionals or {})
        hints = {name: hint for each in dataclasses for name, hint in get_type_hints(each).items()}
        self.plain = {name for name, hint in hints.items() if takes_one_value(hint)}
        words = [name.upper() + ("..." if "nargs" in given else "") for name, given in self.positionals.items()]
        usage = " ".join([command, *words, "[options]"])
        self.dataclasses = dataclasses
        super().__init__(
            prog=command,
            usage=usage,
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        for each in dataclasses:
            add_options(self, each)
        for name, options in self.positionals.items():
            self.add_argument(name, **options)
        self.add_argument("--config", type=Path, help="YAML file of these options; the command line overrules it.")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.rstrip('.')}. `{self.prog} --help` tells the options.")

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        """See [`parse`]."""
        path = peek(argv, "config")
        if path is not None:
            self.use_file(Path(path))
        namespace, rest = self.parse_known_args(self.mark_flags(argv))
        if rest:
            unknown = next((word for word in rest if word.startswith("--")), None)
            if unknown is None:
                self.error(f"there is no place for {' '.join(rest)}")
            self.error(f"there is no option {unknown}{suggest(unknown.split('=')[0], self._option_string_actions)}")
        values = vars(namespace)
        try:
            made = [each(**{f.name: values.pop(f.name) for f in fields(each) if f.init}) for each in self.dataclasses]
        except ValueError as error:  # of a dataclass that checks its values, transformers' own among them
            raise ValueError(str(error)) from error
        return (*made, namespace) if self.positionals else tuple(made)

    def mark_flags(self, argv: list[str]) -> list[str]:
        """`--flag WORD` with `--flag=true`, where WORD is no truth value: flags take one, and would take a positional
        argument for it."""
        flags = {name for name, action in self._option_string_actions.items() if action.type is truth_value}
        return [
            f"{word}=true" if word in flags and not is_truth_value(after) else word
            for word, after in zip_longest(argv, argv[1:], fillvalue="")
        ]

    def use_file(self, path: Path) -> None:
        """Make the values of a YAML file the defaults, checked as those of the command line are."""
        actions = {
            name.lstrip("-").replace("-", "_"): action
            for action in self._actions  # argparse has no public list of them
            if action.nargs != 0 and action.dest != "config"  # not --help, nor --no-X beside --X
            for name in action.option_strings or [action.dest]
        }
        defaults = {}
        for name, value in read_options(path).items():
            action = actions.get(str(name).replace("-", "_"))
            if action is None:
                hint = suggest(str(name), actions)
                raise ValueError(f"{path}: there is no argument {name!r}{hint}; `{self.prog} --help` tells them.")
            place = f"{path}: {name}"
            if action.dest in self.plain and isinstance(value, list | dict):
                raise ValueError(f"{place}: {value!r} does not fit: it takes one value.")
            defaults[action.dest] = as_given(action, value, place)
            action.required = False
        self.set_defaults(**defaults)


def parse(
    argv: list[str],
    command: str,
    *dataclasses: type,
    description: str | None = None,
    positionals: Positionals | None = None,
) -> tuple[Any, ...]:
    """
    Options from the command line and, with `--config FILE`, from a YAML file of the same names; what is said on the
    command line wins.

    Returns:
        An object of each dataclass, in their order, and a namespace of the positional arguments, if there are any.

    Raises:
        ValueError: If an option is unknown, missing or has a wrong value; the file and the name are in the message.
    """
    return CommandParser(command, dataclasses, description, positionals).parse(argv)


def peek(argv: list[str], name: str) -> Any:
    """One option's value, from the command line or the file, before it is known which other options there are; None
    where it is not given."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in {name, "config"}:
        spellings = {f"--{option}", f"--{option.replace('_', '-')}"}
        parser.add_argument(*sorted(spellings), dest=option)
    try:
        given = vars(parser.parse_known_args(argv)[0])
    except ArgumentError:  # an option without its value, which parsing it all will tell
        return None
    if given[name] is None and given["config"] is not None:
        values = read_options(Path(given["config"]))
        return {str(key).replace("-", "_"): value for key, value in values.items()}.get(name)
    return given[name]


def read_options(path: Path) -> dict[str, Any]:
    """A YAML file of options; a `ValueError` if it is anything else."""
    if not path.exists():  # the commands of the docs are for a checkout
        raise ValueError(f"{no_file(path)} This project's recipes are at {EXAMPLES}.")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got {type(values).__name__}.")
    return values


def as_given(action: Action, value: Any, place: str) -> Any:
    """A YAML value as the command line would have given it; lists and mappings stay what they are, but for the
    elements' types."""
    if value is None and (action.required or action.default is not None):
        raise ValueError(f"{place} has no value.")
    if value is None or isinstance(value, dict):
        return value
    make: Any = action.type
    try:
        if isinstance(value, list):
            if make in (Names, Sizes):
                return make(value)
            return [make(str(entry)) for entry in value] if action.nargs in ("+", "*") and make else value
        converted = make(str(value)) if callable(make) else value
    except (ValueError, ArgumentTypeError) as error:
        raise ValueError(f"{place}: {value!r} does not fit ({error}).") from None
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"{place}: {value!r} must be one of {', '.join(map(str, action.choices))}.")
    return [converted] if action.nargs in ("+", "*") else converted


def is_truth_value(word: str) -> bool:
    try:
        truth_value(word)
    except ArgumentTypeError:
        return False
    return True


def takes_one_value(hint: Any) -> bool:
    """Whether an option of this annotation takes one value, or none: a number, a flag, a word."""
    one = {str, int, float, bool, Path, NoneType}
    return hint in one or (get_origin(hint) in (Union, UnionType) and set(get_args(hint)) <= one)


def suggest(name: str, known: Iterable[str]) -> str:
    """A name that looks like it, in words."""
    close = get_close_matches(name.replace("_", "-"), [other.replace("_", "-") for other in known], n=1)
    return f" (is it {close[0]}?)" if close else ""
