"""Checks of options that are dataclass fields, as the command line and the Python API both make them."""

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

SEEDS = (0, 2**32 - 1)  # that numpy takes


def check_choices(options: Any) -> None:
    """Raise a `ValueError` for a field that is not among its choices: those of a `Literal`, or, for what is found in a
    folder, the `choices` of its metadata."""
    hints = get_type_hints(type(options))
    for field in fields(options):
        choices = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
        choices = field.metadata.get("choices", choices)
        value = getattr(options, field.name)
        left_open = value is None and field.default is None
        if choices and value not in choices and not left_open:
            raise ValueError(f"{field.name}={value!r} must be one of {', '.join(choices)}.")


def check_least(options: Any, **least: float) -> None:
    """Raise a `ValueError` for a field that is given and not at least the value given for its name."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name}={value} must be at least {bound}.")


def check_between(options: Any, **bounds: tuple[float, float]) -> None:
    """Raise a `ValueError` for a field that is given and does not lie between the two values given for its name."""
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name}={value} must lie between {least} and {most}.")
