"""Every source architecture and the family it is converted to: what works for Llama works for all."""

import json
from pathlib import Path

import pytest
import torch

from mha2mla.cli.main import main
from mha2mla.conversion import Calibrated, Paper
from mha2mla.conversion.architectures import architecture_classes, architecture_of
from mha2mla.conversion.cache_sizes import CacheSizes
from mha2mla.conversion.job import ConversionJob
from mha2mla.conversion.layerwise import advance, embed, run_layers
from mha2mla.evaluation.speed.dimensions import DIMENSIONS
from mha2mla.modeling import FAMILIES
from mha2mla.training import make_losses, use_losses
from pico import SOURCES, StateDict, assemble, exact_model, make_source, tokens

PRESETS = {
    "calibrated": Calibrated(refine_steps=4, score_samples=2),
    "per-layer": Calibrated(refine_steps=0, score_samples=2, rope_frequencies="per-layer"),
    "per-head": Calibrated(refine_steps=0, score_samples=2, rope_layout="per-head"),
    "paper": Paper(),
}


@pytest.fixture
def job(request, tmp_path):
    source = make_source(request.param)
    return source, ConversionJob(
        architecture_of(source.config), StateDict(source.state_dict()), tokens(4, 16), "cpu", 0, tmp_path
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("job", SOURCES, indirect=True)
def test_conversion_at_31_percent(job, preset):
    """The residual stream that a conversion carries beside the source's, which refinement measures, is the converted
    model's."""
    source, job = job
    preset = PRESETS[preset]
    plan = preset.choose(job, preset.plan(job.architecture, CacheSizes(cache_ratio=0.3125)))
    layers = [layer.attention for layer in preset.layers(job, plan)]
    model = assemble(source, layers)
    assert model.config.latent_cache_dim == round(0.3125 * plan.source_width)
    assert len({layer.shape for layer in layers}) == 1
    stream = embed(job)
    for visit, layer in zip(run_layers(job, ""), layers, strict=True):
        advance(visit, layer, stream)
    with torch.no_grad():
        expected = model(job.blocks, output_hidden_states=True)
        got = model.lm_head(model.model.norm(torch.cat(stream)))
    assert (got - expected.logits).abs().max() <= 1e-4 * expected.logits.abs().max()
    assert expected.logits.isfinite().all()


@pytest.mark.parametrize(
    "kind, noise",
    [("seed_oss", "attention_dropout"), ("granite", "attention_dropout"), ("mixtral", "router_jitter_noise")],
)
def test_an_exact_conversion_has_no_noise_to_recover_from(kind, noise):
    source, ids = make_source(kind), tokens(2, 12)
    setattr(source.config, noise, 0.1)  # Seed-OSS has it by default
    model = exact_model(source, "shared").train()
    assert getattr(model.config, noise) == 0
    use_losses(model, make_losses(distillation_weight=1.0), source)
    assert model(input_ids=ids, labels=ids).loss < 1e-6


@pytest.mark.parametrize("kind", ["arcee", "granite-tied", "mixtral", "phi3-partial", "smollm3"])
def test_convert_train_eval_and_push(kind, save_source, calibration_file, tmp_path, capsys):
    """Through the command, from a source to what would be uploaded, with quantised caches on the way."""
    source, out, trained = save_source(kind), tmp_path / "out", tmp_path / "trained"
    text = ["--data", str(calibration_file), "--samples", "6", "--length", "16"]
    assert main(["convert", str(source), str(out), "--cache-ratio", "0.3125", "--refine-steps", "2", *text]) == 0
    family = json.loads((out / "config.json").read_text())["model_type"]
    train = ["train", "--model", str(out), "--data", str(calibration_file), "--output_dir", str(trained), "--length"]
    assert main([*train, "16", "--max_steps", "1", "--use_cpu", "true"]) == 0
    assert main(["push", str(trained), "me/model", "--dry-run"]) == 0
    listed = {line.split()[-1] for line in capsys.readouterr().out.splitlines() if line}
    assert {f"modeling_{family}.py", f"configuration_{family}.py", "README.md"} <= listed
    assert "values per token and layer" in (trained / "README.md").read_text()
    sets = tmp_path / "sets"
    sets.mkdir()
    (sets / "texts.jsonl").write_text(json.dumps({"id": "0", "text": "w5 w6 w7 w8 w9 w10"}) + "\n")
    evaluate = ["eval", str(source), str(trained), "--tasks", "texts", "--data", str(sets), "--output"]
    sizes = ["--length", "16", "--prompt-length", "8", "--new-tokens", "4"]
    assert main([*evaluate, str(tmp_path / "report"), *sizes, "--caches", "dynamic,latent-int8"]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_bench_knows_every_family(family, tmp_path, monkeypatch):
    model_type = family.removeprefix("mla_")
    assert model_type in {sizes["model_type"] for sizes in DIMENSIONS.values()}
    monkeypatch.setitem(DIMENSIONS, "pico", DIMENSIONS["pico"] | {"model_type": model_type})
    command = "bench --random pico --kv-lora-rank 8 --qk-rope-head-dim 4 --contexts 16 --steps 1"
    assert main([*command.split(), "--caches", "dynamic,latent-int4", "--output", str(tmp_path)]) == 0


def test_the_table_of_models_has_every_architecture():
    rows = [
        line for line in (Path(__file__).parents[1] / "docs" / "models.md").read_text().splitlines() if "| `" in line
    ]
    for architecture in architecture_classes():
        family = architecture.mla_config_class.model_type
        assert any(row.startswith(f"| `{architecture.model_type}` |") and f"| `{family}` |" in row for row in rows)
