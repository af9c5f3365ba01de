"""A folder of statistics that several conversions share, and that may be killed while it is written."""

from dataclasses import fields
from pathlib import Path
from threading import Thread

import pytest
import torch

from mha2mla.conversion.presets.calibrated import state as state_module
from mha2mla.conversion.presets.calibrated.closed_form import LayerStatistics
from mha2mla.conversion.presets.calibrated.pair_scores import PairMoments
from mha2mla.conversion.presets.calibrated.state import CalibrationState

IDENTITY = {"config": "a", "text": "b"}


def statistics() -> LayerStatistics:
    moments = PairMoments(**{field.name: torch.ones(1, 2) for field in fields(PairMoments)})
    return LayerStatistics(*(torch.ones(1, 2) for _ in range(4)), moments)


def test_two_conversions_may_write_the_same_layer(tmp_path, monkeypatch):
    first, second = CalibrationState(tmp_path, IDENTITY), CalibrationState(tmp_path, IDENTITY)
    save_file = state_module.save_file

    def save_and_be_overtaken(tensors, path):
        save_file(tensors, path)
        monkeypatch.setattr(state_module, "save_file", save_file)
        second.save(0, statistics())

    monkeypatch.setattr(state_module, "save_file", save_and_be_overtaken)
    first.save(0, statistics())
    written = {path.name for path in tmp_path.iterdir() if path.name != ".lock"}
    assert 0 in first and written == {"calibration.json", "layer-00000.safetensors"}


def test_of_two_conversions_with_other_options_one_gets_the_folder(tmp_path, monkeypatch):
    whole, refused = CalibrationState._whole, []

    def other():
        with pytest.raises(ValueError, match="was made with other values of: text"):
            CalibrationState(tmp_path, IDENTITY | {"text": "c"})
        refused.append(True)

    thread = Thread(target=other)

    def whole_while_another_begins(state, path):
        monkeypatch.setattr(CalibrationState, "_whole", whole)
        thread.start()
        thread.join(0.2)  # it has found no fingerprint, or waits
        return whole(state, path)

    monkeypatch.setattr(CalibrationState, "_whole", whole_while_another_begins)
    CalibrationState(tmp_path, IDENTITY)
    thread.join()
    assert refused


def test_a_run_that_was_killed_leaves_no_half_fingerprint(tmp_path, monkeypatch):
    write_text = Path.write_text

    def killed(path, text, **options):
        write_text(path, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_text", killed)
        CalibrationState(tmp_path, IDENTITY)
    (tmp_path / ".partial-1").mkdir()  # as of a run that was killed outright
    CalibrationState(tmp_path, IDENTITY)
    (tmp_path / "calibration.json").write_text("")
    with pytest.raises(ValueError, match=r"calibration\.json:1 is not JSON"):
        CalibrationState(tmp_path, IDENTITY)


def test_a_layer_that_lost_its_end_is_named(tmp_path):
    state = CalibrationState(tmp_path, IDENTITY)
    state.save(0, statistics())
    layer = tmp_path / "layer-00000.safetensors"
    layer.write_bytes(layer.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"layer-00000\.safetensors cannot be read .* measured again"):
        assert 0 in state
    layer.unlink()
    assert 0 not in state
