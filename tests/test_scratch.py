"""Temporary folders: what a killed run leaves, the next one removes, and nobody else's."""

import signal
import subprocess
import sys
import time

import pytest

from mha2mla.common.outputs import atomic_folder
from mha2mla.common.records import RECORD_NAME
from mha2mla.common.scratch import scratch_folder

PREFIX = ".out[1].partial-"  # as of an output out[1], which is no pattern
HOLD = """
import sys, time
from pathlib import Path
from mha2mla.common.scratch import scratch_folder
with scratch_folder(sys.argv[2], Path(sys.argv[1])) as folder:
    (folder / "half").write_text("a model")
    print(folder.name, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that uses a folder, and the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), PREFIX], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, tmp_path / process.stdout.readline().strip()
    process.kill()
    process.wait()


def names(folder):
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_killed_run_is_cleaned_up_by_the_next_and_a_running_one_is_left_alone(holder, tmp_path, caplog):
    process, held = holder
    with caplog.at_level("INFO", logger="mha2mla"):
        with scratch_folder(PREFIX, tmp_path) as own:
            assert names(tmp_path) == {held.name, own.name}
        assert "Removing" not in caplog.text
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.1)
        with scratch_folder(PREFIX, tmp_path) as own:
            assert names(tmp_path) == {own.name}
    assert f"Removing {held}, which a run that was killed left behind" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_other_prefixes_are_nobodys_business(tmp_path):
    (tmp_path / ".other.partial-1").mkdir()
    (tmp_path / ".out.partial-mine").mkdir()  # without a lock: not ours
    with scratch_folder(".out.partial-", tmp_path):
        pass
    assert names(tmp_path) == {".other.partial-1", ".out.partial-mine"}


def test_it_may_be_moved_away_and_goes_with_an_error(tmp_path):
    with scratch_folder("x-", tmp_path) as folder:
        folder.rename(tmp_path / "kept")
    with pytest.raises(RuntimeError), scratch_folder("x-", tmp_path):
        raise RuntimeError
    assert names(tmp_path) == {"kept"}


def write_output(out, overwrite, meanwhile=None):
    with atomic_folder(out, overwrite) as partial:
        (partial / RECORD_NAME).write_text("{}")
        if meanwhile is not None:
            out.mkdir(exist_ok=True)
            (out / meanwhile).write_text("mine")


def test_what_appears_in_the_output_during_the_work_is_not_deleted(tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        write_output(tmp_path / "new", False, "notes.txt")
    write_output(tmp_path / "old", False)
    with pytest.raises(ValueError, match=r"will not delete it: notes\.txt"):
        write_output(tmp_path / "old", True, "notes.txt")
    for name in ("new", "old"):
        assert (tmp_path / name / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == {"new", "old"}
