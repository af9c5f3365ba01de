"""Temporary folders that leave nothing behind: what a killed run could not remove, the next one does."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


def remove_leftovers(prefix: str, parent: Path) -> None:
    """Remove the folders of that prefix which no running process holds, with a line for each."""
    for lock_file in parent.glob(f"{escape(prefix)}*.lock"):
        lock = FileLock(lock_file)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # in use, or another user's
            continue
        folder = lock_file.with_suffix("")
        if folder.is_dir():
            logger.info("Removing %s, which a run that was killed left behind", folder)
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        lock_file.unlink(missing_ok=True)


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """
    A new folder that is removed in the end, unless it was moved away by then.

    Args:
        prefix (`str`): Its name begins so. Folders of this prefix that no running process holds are removed first.
        parent (`Path`, *optional*): Where it is made; by default the system's folder of temporary files.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(prefix, parent)
    # The lock is there before the folder, so that no folder in use is ever without one.
    with tempfile.NamedTemporaryFile(prefix=prefix, suffix=".lock", dir=parent, delete=False) as file:
        lock_file = Path(file.name)
    lock = FileLock(lock_file)
    folder = lock_file.with_suffix("")
    try:
        with lock:
            folder.mkdir()
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock_file.unlink(missing_ok=True)
