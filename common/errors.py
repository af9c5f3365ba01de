"""Whose error it is."""

import linecache
import traceback

PACKAGE = __name__.split(".")[0] + "."
NETWORK = ("httpx", "httpx2", "requests", "urllib3")  # what huggingface_hub and datasets talk through


def raised_in_package(error: BaseException) -> bool:
    """Whether an error comes out of a line of this package, rather than from inside of a library."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith(PACKAGE)


def is_message(error: BaseException) -> bool:
    """Whether a `raise` statement of this package made an error. These name what is wrong and the remedy, where one
    from an `int(...)` of ours does not."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    statement = linecache.getline(frame.f_code.co_filename, line).lstrip()
    return raised_in_package(error) and statement.startswith("raise ")


def is_network_error(error: BaseException) -> bool:
    """Whether the network failed, rather than a program."""
    return type(error).__module__.split(".")[0] in NETWORK
