"""Every source architecture and the family it is converted to: what works for Llama works for all."""

import pytest
import torch

from mha2mla.conversion import Calibrated, Paper
from mha2mla.conversion.architectures import architecture_of
from mha2mla.conversion.cache_plan import CacheSizes
from mha2mla.conversion.job import ConversionJob
from mha2mla.conversion.layerwise import advance, embed, run_layers
from pico import SOURCES, StateDict, assemble, make_source, tokens

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
    plan = preset.choose(job, preset.plans(job.architecture, CacheSizes(cache_ratio=0.3125)))
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
