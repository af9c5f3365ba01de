"""Names on the Hub, and a short answer where what they stand for cannot be had: libraries try for half a minute."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .errors import is_network_error

PAUSES = (1, 2)  # seconds between tries, for networks that fail now and then
TIMEOUT = 5  # seconds of a try


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of one on the Hub, OWNER/NAME. A folder of that name goes before it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def on_hub(name: str) -> bool:
    """Whether a name stands for a repository on the Hub: it has the form, and there is no file or folder of it."""
    return is_hub_name(name) and not Path(name).exists()


def in_cache(name: str, filename: str, revision: str | None = None) -> bool:
    """Whether a file of a checkpoint on the Hub was downloaded before."""
    return isinstance(try_to_load_from_cache(name, filename, revision=revision), str)


def of_cache(path: Any) -> bool:
    """Whether a path, as an `OSError` has it, lies in huggingface's caches, or is a folder above them."""
    homes = (constants.HF_HOME, constants.HF_HUB_CACHE, os.environ.get("HF_DATASETS_CACHE", constants.HF_HOME))
    pairs = ((Path(path), Path(home).absolute()) for home in homes if isinstance(path, str))
    return any(one.is_relative_to(home) or home.is_relative_to(one) for one, home in pairs)


@contextmanager
def data_sets_offline() -> Iterator[None]:
    """As if HF_HUB_OFFLINE were set: `datasets` takes what is in its cache, at once."""
    import datasets  # slow to import

    places: tuple[Any, ...] = constants, datasets.config
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def ask(url: str) -> None:
    """Ask for a file on the Hub, with fewer and shorter tries than libraries make; their errors."""
    for pause in PAUSES:
        try:
            get_hf_file_metadata(url, timeout=TIMEOUT)
            return
        except Exception as error:
            if not is_network_error(error):
                raise
        time.sleep(pause)
    get_hf_file_metadata(url, timeout=TIMEOUT)


def hub_trouble(name: str, filename: str, revision: str | None = None, repo_type: str = "model") -> str | None:
    """
    For a person: why nothing can be downloaded of a repository, and what to do; None if the Hub answers. Once it has,
    libraries try as often as they always do.

    Args:
        filename (`str`): A file to ask for; it need not be there.
    """
    url = hf_hub_url(name, filename, revision=revision, repo_type=repo_type)
    try:
        ask(url)
    except OfflineModeIsEnabled:
        return f"{name} would have to be downloaded, and HF_HUB_OFFLINE is set. Unset it, or give a local copy."
    except GatedRepoError:
        page = url.partition("/resolve/")[0]
        return f"{name} is gated. Ask for access at {page}, then log in with `hf auth login`."
    except RepositoryNotFoundError:
        return f"{name} is not on the Hub, or private. Check the name, or log in with `hf auth login`."
    except RevisionNotFoundError:
        return f"{name} has no revision {revision!r} on the Hub. Give a branch, tag or commit that it has."
    except HfHubHTTPError:  # the file is not there, or the Hub is busy: whoever downloads will say so
        return None
    except Exception as error:
        if not is_network_error(error):
            raise
        reason = f"the Hub is out of reach ({str(error) or type(error).__name__})"
        return f"{name} cannot be downloaded: {reason}. Check the network, or give a local copy."
    return None


def check_on_hub(name: str, role: str, filename: str = "config.json", revision: str | None = None) -> None:
    """
    Raise a `ValueError` if a name stands for a checkpoint on the Hub that can neither be downloaded nor was before.

    Args:
        role (`str`): What it is to be, for the message: "model", "teacher", "source".
        filename (`str`): A file that it has.
    """
    if on_hub(name) and not in_cache(name, filename, revision):
        trouble = hub_trouble(name, filename, revision)
        if trouble is not None:
            raise ValueError(f"{role}: {trouble}")
