"""`mha2mla bench` at sizes of a CPU: what it measures is there and true."""

import json

import pytest
import torch

from mha2mla.cli.main import main
from mha2mla.evaluation.caches import DYNAMIC, CacheKind
from mha2mla.evaluation.speed import measure, run
from mha2mla.evaluation.speed.measure import allocated_nbytes, fill, measure_speed, numbers_per_token
from mha2mla.modeling import cache_nbytes
from pico import make_mla, make_source


def test_random_weights_original_against_converted(tmp_path, capsys):
    command = "bench --random pico --kv-lora-rank 8 --qk-rope-head-dim 4 --batch-sizes 1,2 --contexts 16 --steps 2"
    assert main([*command.split(), "--caches", "dynamic,static,latent-int4", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Copy bandwidth" in printed and "% of it" in printed
    results = json.loads((tmp_path / "speed.json").read_text())
    found = {(m["model"], m["cache"], m["batch"]) for m in results["speed"]}
    assert found == {("original", c, b) for c in ("dynamic", "static") for b in (1, 2)} | {
        ("converted", c, b) for c in ("dynamic", "static", "latent-int4") for b in (1, 2)
    }
    for m in results["speed"]:
        assert m["step_ms"] > 0 and m["first_token_s"] > 0
        assert m["tokens_per_s"] == pytest.approx(m["batch"] / m["step_ms"] * 1000)
        assert m["cache_bytes"] <= m["allocated_bytes"]
        if m["cache"] != "latent-int4":
            assert m["cache_bytes"] == m["formula_bytes"]
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_saved_models(save_source, tmp_path):
    one, other = (tmp_path / parent / "converted" for parent in "ab")  # of one name
    for converted in (one, other):
        make_mla().save_pretrained(converted)
    arguments = ["bench", str(save_source()), str(one), str(other), "--steps", "1", "--contexts", "8"]
    assert main([*arguments, "--no-prefill", "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [m["first_token_s"] for m in results["speed"]] == [None, None, None]
    assert [m["model"] for m in results["speed"]] == ["source-gqa-default", "a/converted", "b/converted"]


def test_what_was_measured_is_kept_when_a_later_measurement_fails(tmp_path, monkeypatch):
    def fails_at_second_context(model, name, kind, batch, context, *args, **kwargs):
        if context == 16:
            raise KeyboardInterrupt
        return measure_speed(model, name, kind, batch, context, *args, **kwargs)

    monkeypatch.setattr(run, "measure_speed", fails_at_second_context)
    command = "bench --random pico --kv-lora-rank 8 --qk-rope-head-dim 4 --contexts 8,16 --steps 1"
    assert main([*command.split(), "--output", str(tmp_path)]) == 130
    results = json.loads((tmp_path / "speed.json").read_text())
    assert [m["context"] for m in results["speed"]] == [8]


def test_an_output_that_cannot_be_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "copy_bandwidth", lambda device: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    command = "bench --random pico --kv-lora-rank 8 --qk-rope-head-dim 4"
    assert main([*command.split(), "--output", str(tmp_path / "file")]) == 2
    assert "cannot be a folder of results" in capsys.readouterr().err


def test_the_first_token_is_the_median_of_prompts_behind_one_that_warms_up(monkeypatch):
    seconds = iter([9.0, 1.0, 8.0, 2.0])
    monkeypatch.setattr(measure, "read_prompt", lambda model, cache, ids: (ids[:, -1:].clone(), next(seconds)))
    assert measure_speed(make_mla(), "pico", DYNAMIC, 1, 8, steps=1).first_token_s == 2.0
    assert next(seconds, None) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--random", "huge"], "Dimensions are known for"),
        (["--random", "pico", "--caches", "paged"], "Unknown cache 'paged'"),
        (["--random", "pico", "--caches", "static-int2"], "no cache 'static-int2': of latent there are int8 and int4"),
        (["{source}", "--caches", "latent-int4,static-int8"], "no model's cache can be held so. Add dynamic, int8 or"),
        (["{source}", "--caches", "int8"], "pip install hqq"),
        (["--random", "pico", "--caches", "vllm-fp8"], "which `mha2mla eval` measures"),
        (["--random", "pico", "--batch-sizes", "1,0"], "must be above 0"),
        ([], "Name models, or dimensions"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, save_source, tmp_path, capsys):
    arguments = [word.format(source=save_source()) for word in arguments]
    assert main(["bench", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", [make_mla(), make_source()], ids=["converted", "original"])
def test_a_filled_cache_is_what_a_prompt_makes(model):
    cache = DYNAMIC.make(model)
    fill(model, cache, 3, 11)
    assert cache.get_seq_length() == 11
    assert cache_nbytes(cache) == numbers_per_token(model.config) * 11 * 3 * 2 * 4
    assert allocated_nbytes(cache) >= cache_nbytes(cache)


def test_compiled_steps_do_not_recompile(monkeypatch):
    """Graphs are counted; what a backend makes of them takes a minute on a CPU and is not at issue."""
    compile_graphs = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, mode, fullgraph: compile_graphs(model, fullgraph=fullgraph, backend="eager")
    )
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        measured = measure_speed(make_mla(), "pico", CacheKind.parse("static-compiled"), 2, 8, steps=4, repetitions=2)
    assert measured.step_ms > 0
    assert counters["stats"]["unique_graphs"] == 1
