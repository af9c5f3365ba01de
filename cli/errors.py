"""What a command says of an error: a sentence where the user can mend it, everything where only we can."""

import sys
import traceback
from errno import EDQUOT, ENOSPC
from importlib.metadata import PackageNotFoundError, metadata

from mha2mla.common.errors import is_message, is_network_error

DISK_FULL = ("No space left on device", "inline_container.cc")  # as safetensors and torch.save say it


def explain(error: Exception) -> str | None:
    """
    A user's mistake, or what is wrong with their disk, memory or network, in a sentence or two; None for a bug.

    A `ValueError` is the user's if a `raise` statement of this package made it: these name the value and the remedy.
    Any other one, from deep inside of a library or from an `int(...)` of ours, is nobody's message to a user.
    """
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) in (ENOSPC, EDQUOT) or any(sign in text for sign in DISK_FULL):
        place = getattr(error, "filename", None)
        return f"The disk is full{f' ({place})' if place else ''}. Make room and run the command again."
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"Out of memory ({text.split('. ')[0] or 'of the CPU'}). Lower batch size, length or samples."
    if isinstance(error, ImportError) and error.name is None:  # a library's sentence about what it lacks
        return text
    if isinstance(error, PackageNotFoundError):  # whose name is a library's sentence, or a package's
        return " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("mha2mla"):
        return f"This needs the Python package {error.name!r}, which is not installed."
    if isinstance(error, OSError):
        from mha2mla.common.hub import of_cache  # which imports huggingface_hub, and --help waits for none

        remedy = " Set HF_HOME to a folder that you can write to." if of_cache(error.filename) else ""
        return f"{error.filename}: {error.strerror}.{remedy}" if error.filename and error.strerror else text
    if is_network_error(error):
        return f"The network failed: {text or type(error).__name__}."
    if isinstance(error, ValueError) and is_message(error):
        return str(error)
    # What a library made of an error, as datasets does of one in a function that it calls, is the error's.
    return explain(error.__cause__) if isinstance(error.__cause__, Exception) else None


def tell(error: Exception, command: str) -> int:
    """Print what there is to say on stderr; gives the exit status."""
    explanation = explain(error)
    if explanation is not None:
        print(f"{command}: error: {explanation}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    print(
        f"{command}: this is a bug of mha2mla, or something that it should have told you in a sentence. Please report "
        f"it with the lines above and your command{where_to_report()}.",
        file=sys.stderr,
    )
    return 1


def where_to_report() -> str:
    """The address of the issue tracker, where the package's metadata has it."""
    try:
        urls = dict(entry.split(", ", 1) for entry in metadata("mha2mla").get_all("Project-URL") or [])
    except PackageNotFoundError:  # in a source tree
        return ""
    return f": {urls['Issues']}" if "Issues" in urls else ""
