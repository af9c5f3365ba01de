"""Latent attention behind norms of queries and keys (Qwen3, OLMo 2): what differs from the families without norms."""

import json

import pytest
import torch
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mha2mla.cli.main import main
from mha2mla.conversion import Calibrated
from mha2mla.conversion.architectures import architecture_of
from mha2mla.conversion.attention_weights import NormalisedHeads, normalise
from mha2mla.conversion.cache_sizes import CacheSizes
from mha2mla.conversion.job import ConversionJob
from mha2mla.conversion.layerwise import embed, run_layers
from mha2mla.conversion.presets import preset_classes
from mha2mla.conversion.presets.calibrated.refine import RefineSettings, trainable_tensors
from mha2mla.conversion.presets.paper.closed_form import convert_attention
from pico import StateDict, assemble, attention_of, exact_model, make_mla, make_source, rotation_of, tokens

KINDS = ("qwen3", "qwen3-bias", "olmo2")
FORMS = ("mla_qwen3", "mla_olmo2")


def with_gain(norm, gain):
    norm.weight.data = gain.flatten()
    return norm


@pytest.mark.parametrize("together", [False, True])
def test_norms_are_those_of_transformers(together):
    torch.manual_seed(0)
    heads = torch.randn(2, 3, 5, 4) * 7  # [B, heads, T, d]
    gain = torch.rand(3, 4) if together else torch.rand(4)
    if together:
        flat = with_gain(Olmo2RMSNorm(12, eps=1e-3), gain)(heads.transpose(1, 2).flatten(2))
        expected = flat.unflatten(-1, (3, 4)).transpose(1, 2)
    else:
        expected = with_gain(Qwen3RMSNorm(4, eps=1e-3), gain)(heads)
    torch.testing.assert_close(normalise(heads, gain, 1e-3), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_keys_are_the_sources(kind):
    """Before rotation, against transformers' own attention, whose rotary table is set to no rotation."""
    source = make_source(kind)
    attention, seen = attention_of(source, 1), {}
    module = source.model.layers[1].self_attn
    for name in ("q_norm", "k_norm", "v_proj"):
        getattr(module, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    x = torch.randn(2, 5, 48)
    still = torch.ones(1, 5, attention.k.shape[1]), torch.zeros(1, 5, attention.k.shape[1])
    with torch.no_grad():
        module(x, position_embeddings=still, attention_mask=None)
        inputs = attention.inputs(x)
        got = attention.queries(x), attention.keys(inputs), torch.einsum("gdi,bti->bgtd", attention.v, inputs)
    for heads, name in zip(got, seen, strict=True):
        expected = seen[name].reshape(2, 5, heads.shape[1], heads.shape[3]).transpose(1, 2)
        torch.testing.assert_close(heads, expected)


@pytest.mark.parametrize("form", FORMS)
def test_an_entry_is_a_linear_map_of_normalised_keys_and_values(form):
    model = make_mla(form)
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 3, 48)
    latents, rope_keys = attention.make_entries(x)
    q_nope, q_rope = attention.make_queries(x)
    dim, heads = attention.head_dim, 4
    for t in range(3):
        keys, queries = attention.k_proj(x[0, t]).view(-1, dim), attention.q_proj(x[0, t]).view(heads, dim)
        if form == "mla_qwen3":
            keys = torch.stack([attention.k_norm(head) for head in keys]).flatten()
            queries = torch.stack([attention.q_norm(head) for head in queries])
        else:
            keys, queries = attention.k_norm(keys.flatten()), attention.q_norm(queries.flatten()).view(heads, dim)
        entry = attention.kv_a_proj.weight @ torch.cat((keys, attention.v_proj(x[0, t])))
        torch.testing.assert_close(torch.cat((latents[0, 0, t], rope_keys[0, :, t].flatten())), entry)
        for h in range(heads):
            expected = attention.q_b_proj.weight[h] @ queries[h]
            torch.testing.assert_close(torch.cat((q_nope[0, h, t], q_rope[0, h, t])), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["shared", "per-head"])
def test_calibrated_with_everything_kept_is_the_source(kind, layout, tmp_path):
    """Keys and values lie in 2 G d numbers, which may be more than the hidden size."""
    source = make_source(kind)
    config, dim = source.config, attention_of(source, 0).k.shape[1]
    groups = config.num_key_value_heads
    preset = Calibrated(refine_steps=0, score_samples=2, rope_layout=layout, rope_frequencies="per-layer")
    sizes = CacheSizes(kv_lora_rank=groups * dim, qk_rope_head_dim=groups * dim if layout == "shared" else dim)
    job = ConversionJob(architecture_of(config), StateDict(source.state_dict()), tokens(4, 16), "cpu", 0, tmp_path)
    plan = preset.plan(job.architecture, sizes)
    converted = assemble(source, [layer.attention for layer in preset.layers(job, preset.choose(job, plan))])
    ids = tokens(2, 20)
    with torch.no_grad():
        expected, got = source(ids).logits, converted(ids).logits
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_paper_takes_the_directions_of_the_weights():
    """The latent is the nearest to keys and values in what the low-rank method keeps of the weights that make them."""
    source = make_source("olmo2")
    attention = attention_of(source, 0)
    pairs = torch.tensor([[0, 2]]).repeat(4, 1)
    layer = convert_attention(attention, pairs, 20, "joint", rotation_of(source, 0))
    up = torch.cat((layer.k_up.flatten(0, 1), layer.v_up.flatten(0, 1)))  # [rows, R]
    nope = [1, 3, 4, 5, 7, 9, 10, 11]
    rows = torch.cat((attention.k[:, nope].flatten(0, 1), attention.v.flatten(0, 1)))
    heads = attention.normalised
    weights = torch.cat((heads.key_weights()[:, nope].flatten(0, 1), heads.v.flatten(0, 1)))
    basis = torch.linalg.svd(weights).U[:, :20]
    torch.testing.assert_close(up @ layer.latent, basis @ basis.T @ rows, rtol=1e-3, atol=1e-5)


def test_weights_of_keys_are_on_the_scale_of_normalised_keys():
    torch.manual_seed(0)
    k, gain = torch.randn(2, 64, 128) * torch.tensor([5.0, 0.1])[:, None, None], torch.rand(64)
    x = torch.randn(4000, 128)
    for gains in (gain, torch.stack((gain, 2 * gain))):
        heads = NormalisedHeads(k, k, k, gains, gains, 0.0)
        made = torch.einsum("gdi,ti->gtd", heads.key_weights(), x).square().mean(1).sqrt()
        normalised = heads.keys_values(x)[:, :128].unflatten(-1, (2, 64)).square().mean(0).sqrt()
        torch.testing.assert_close(made, normalised, rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_refinement_moves_what_is_before_and_after_the_norms(kind, tmp_path):
    source = make_source(kind)
    architecture = architecture_of(source.config)
    job = ConversionJob(architecture, StateDict(source.state_dict()), tokens(4, 16), "cpu", 0, tmp_path)
    preset = Calibrated(refine_steps=1, score_samples=2)
    plan = preset.choose(job, preset.plan(architecture, CacheSizes(kv_lora_rank=9, qk_rope_head_dim=4)))
    visit = next(run_layers(job, ""))
    passes = preset.passes(job)
    before, _ = passes.closed_form(visit, passes.state.load(0, "cpu"), plan)
    after = trainable_tensors(passes.steps.refine(before, visit, embed(job), RefineSettings(3, 2, 0.003), 0))
    expected = {"q_nope", "q_rope", "latent", "k_rope", "k_up", "v_up", "o"}
    expected |= {f"normalised.{name}" for name in ("q", "k", "v", "q_gain", "k_gain")}
    if kind == "qwen3-bias":
        expected |= {"o_bias"} | {f"normalised.{name}_bias" for name in "qkv"}
    assert after.keys() == expected
    assert all(not torch.equal(after[name], tensor) for name, tensor in trainable_tensors(before).items())


def test_olmo2_in_16_bits_rotates_as_its_source_does():
    source = make_source("olmo2").bfloat16()
    x = torch.randn(1, 6, 48).bfloat16()
    table = source.model.rotary_emb(x, torch.arange(6)[None] + 10_000)
    assert table[0].dtype == torch.float32
    converted = exact_model(make_source("olmo2"), "per-head").bfloat16()
    with torch.no_grad():
        kwargs = dict(position_embeddings=table, attention_mask=None)
        expected = source.model.layers[0].self_attn(x, **kwargs)[0]
        got = converted.model.layers[0].self_attn(x, **kwargs)[0]
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("form", FORMS)
def test_channel_factors_read_the_map_of_queries_and_the_gain(form):
    model = make_mla(form)
    attention = model.model.layers[0].self_attn
    _, before = attention.channel_factors(torch.float32)
    with torch.no_grad():
        attention.q_b_proj.weight[:, -4:][:, [0, 2]] *= 10  # the first of the two pairs
    _, after = attention.channel_factors(torch.float32)
    ratio = after / before
    assert ratio[0] == ratio[2] and ratio[1] == ratio[3] and ratio[0] > 2 * ratio[1]
    attention.q_norm.register_forward_hook(lambda *_: None)
    assert attention.channel_factors(torch.float32)[1].tolist() == [1.0] * 4


@pytest.mark.parametrize("preset", preset_classes())
@pytest.mark.parametrize("kind", ["qwen3", "olmo2"])
def test_convert_train_eval_and_push(kind, preset, save_source, calibration_file, tmp_path, capsys):
    """Through the command, from a source to what would be uploaded."""
    source, out, trained = save_source(kind), tmp_path / "out", tmp_path / "trained"
    text = ["--data", str(calibration_file), "--samples", "6", "--length", "16"]
    arguments = ["convert", str(source), str(out), "--preset", preset, "--cache-ratio", "0.3125", *text]
    assert main([*arguments, *(["--refine-steps", "2"] if preset == "calibrated" else [])]) == 0
    record = json.loads((out / "conversion.json").read_text())
    assert record["cache_width"] == round(0.3125 * record["source_cache_width"])
    train = ["train", "--model", str(out), "--data", str(calibration_file), "--output_dir", str(trained), "--length"]
    train += ["16", "--max_steps", "1", "--use_cpu", "true", "--trainable", "lora", "--merge", "true"]
    assert main(train) == 0
    merged = trained / "merged"
    assert main(["push", str(merged), "me/model", "--dry-run"]) == 0
    listed = {line.split()[-1] for line in capsys.readouterr().out.splitlines() if line}
    assert {f"modeling_mla_{kind}.py", f"configuration_mla_{kind}.py", "latent_qk_norm.py", "README.md"} <= listed
    assert "values per token and layer" in (merged / "README.md").read_text()
    sets = tmp_path / "sets"
    sets.mkdir()
    (sets / "texts.jsonl").write_text(json.dumps({"id": "0", "text": "w5 w6 w7 w8 w9 w10"}) + "\n")
    evaluate = ["eval", str(source), str(merged), "--tasks", "texts", "--data", str(sets), "--output"]
    sizes = ["--length", "16", "--prompt-length", "8", "--new-tokens", "4"]
    assert main([*evaluate, str(tmp_path / "report"), *sizes, "--caches", "dynamic,latent-int8"]) == 0
    assert main(["export", str(out), str(tmp_path / "deepseek")]) == 2
    assert "normalised (qk-norm)" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--serve", "transformers"]) == 2
    assert "normalised (qk-norm)" in capsys.readouterr().err
