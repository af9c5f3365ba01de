"""The contract of an export: the stock DeepSeek class computes what our model computes, in a process without us."""

import json
import logging
import math
import subprocess
import sys

import pytest
import torch
from conftest import pico_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils.logging import warning_once

from mha2mla.cli.main import main
from mha2mla.common.exports import EXPORT_RECORD_NAME, WARNING
from mha2mla.common.loading import load_model
from mha2mla.conversion.export import ExportConfig, check, export
from mha2mla.conversion.export.deepseek import key_factor
from mha2mla.conversion.export.rope_table import STEP_NOTE
from mha2mla.training import ModelArguments, add_lora
from mha2mla.training.checks import check_model
from pico import BLOCK_PACKAGE, ROPES, exact_model, make_mla, make_source, tokens

LLAMA3 = {**ROPES["llama3"], "original_max_position_embeddings": 2048, "rope_theta": 1e5}
SLOW = {**ROPES["default"], "rope_theta": 1e8}


def exportable(frequencies, seed=0, **changes):
    """A random model with one rotary key whose layers use these frequencies, each layer in another order."""
    changes = {"rms_norm_eps": 1e-5, "max_position_embeddings": 128, **changes}
    model = make_mla("shared", seed, qk_rope_head_dim=2 * len(frequencies), **changes)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.rope_frequencies.copy_(torch.tensor(frequencies).roll(index)[None])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def save(tmp_path):
    """Save a model with its tokenizer; gives the folder."""

    def save(model, name="model"):
        model.save_pretrained(tmp_path / name)
        pico_tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def assert_same_model(model, folder, bound=2e-5):
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert type(exported) is DeepseekV3ForCausalLM
    ids = tokens(2, 96)
    with torch.no_grad():
        expected, got = model(ids).logits, exported(ids).logits
    assert (expected - got).abs().max() <= bound * expected.abs().max()
    return exported


@pytest.mark.parametrize("pad", [None, 256, 512])
@pytest.mark.parametrize("frequencies", [[0, 1, 2], [0, 1, 4, 5], [0, 2, 4], [2, 3], [5]])
def test_the_stock_class_gives_our_logits(frequencies, pad, save, tmp_path):
    model = exportable(frequencies)
    export(save(model), tmp_path / "out", ExportConfig(pad=pad))
    config = assert_same_model(model, tmp_path / "out").config
    if pad is not None:
        sizes = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)
        assert sizes == (pad, 64, 128, 128)
        assert config.rope_parameters["rope_type"] == "default"  # 32 slots hold all frequencies without a step


@pytest.mark.parametrize(
    "changes",
    [
        dict(tie_word_embeddings=True),
        dict(rms_norm_eps=1e-6),
        dict(qk_nope_head_dim=0),
        dict(num_nope_key_heads=2),
        dict(num_key_value_heads=4),
        dict(rope_parameters=ROPES["yarn"]),  # with a factor on cosines
        dict(rope_parameters=LLAMA3),
    ],
    ids=str,
)
def test_every_kind_of_our_models(changes, save, tmp_path):
    model = exportable([0, 1, 2], **changes)
    export(save(model), tmp_path / "out", ExportConfig(pad=256))
    exported = assert_same_model(model, tmp_path / "out")
    assert not exported.config.tie_word_embeddings and exported.config.rms_norm_eps == 1e-6


def test_a_converted_multi_query_model(save, tmp_path):
    """All pairs rotated, the values' rank kept: the source itself, with a real rotary key."""
    source = make_source("mqa")
    export(save(exact_model(source, "shared")), tmp_path / "out")
    assert_same_model(source, tmp_path / "out", bound=1e-4)


def test_an_export_needs_nothing_of_ours(save, tmp_path):
    """`from_pretrained` without remote code, where our package cannot be imported; generation and tokenizer too."""
    model = exportable([0, 1, 4, 5])
    folder = save(model)
    (folder / "LICENSE").write_text("as is")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: someone/llama\n---\n# model\n")
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "deepseek-v3"]) == 0
    ids = tokens(1, 7)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    script = BLOCK_PACKAGE + (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "import torch\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / 'out')!r})\n"
        "assert tokenizer('w5 w6')['input_ids'] == [5, 6] and tokenizer.chat_template\n"
        f"print(model.generate(torch.tensor({ids.tolist()}), max_new_tokens=12, do_sample=False)[0].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert not any(name.endswith(".py") for name in files) and "LICENSE" in files
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config and config["num_nextn_predict_layers"] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "base_model: someone/llama" in card
    assert "--pad 512" in card  # the way to kernel sizes
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["agreement"]["relative"] < 1e-5


def test_the_card_has_the_commands_that_serve_it(save, tmp_path):
    export(save(exportable([0, 1, 2])), tmp_path / "served", ExportConfig(pad=512))
    card = (tmp_path / "served" / "README.md").read_text()
    assert "vllm serve served" in card and "sglang.launch_server --model-path served" in card
    assert "576 values per token and layer**, of which 560 are zeros" in card
    assert "--kv-cache-dtype fp8" in card
    export(save(exportable([0, 1, 2])), tmp_path / "small", ExportConfig(pad=256))
    card = (tmp_path / "small" / "README.md").read_text()
    assert "vllm serve small" in card and "fp8" not in card  # vLLM has no such kernel


def test_bfloat16_and_shards(save, tmp_path):
    model = exportable([0, 1, 2], hidden_size=64, dtype="bfloat16").to(torch.bfloat16)
    export(save(model), tmp_path / "out", ExportConfig(pad=256, max_shard_size="100KB"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == torch.bfloat16
    ids = tokens(2, 64)
    with torch.no_grad():
        exact, ours, theirs = model.float()(ids).logits, model.to(torch.bfloat16)(ids).logits, exported(ids).logits
    assert (theirs - exact).square().mean() <= 2 * (ours - exact).square().mean()  # as near to fp32 as our own class


def test_rotary_keys_fit_an_fp8_cache(save, tmp_path):
    """vLLM rounds them to e4m3 with a scale of 1, and cuts off what is beyond 448."""
    model = exportable([0, 1, 2])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_a_proj.weight[10:] *= 2000
            layer.self_attn.rope_query_rows().div_(2000)
    export(save(model), tmp_path / "out")
    exported, largest = assert_same_model(model, tmp_path / "out"), []
    for layers in (model.model.layers, exported.model.layers):
        for layer in layers:
            maker = getattr(layer.self_attn, "kv_a_proj", None) or layer.self_attn.kv_a_proj_with_mqa
            maker.register_forward_hook(lambda *args: largest.append(args[2][..., 10:].abs().max()))
    model(tokens(2, 64)), exported(tokens(2, 64))
    assert min(largest[:2]) > 448 > 100 > max(largest[2:])
    ones = torch.ones(3, 2, 4, dtype=torch.float64)
    sizes = [(1, 100), (100, 1), (1, 0), (0, 1), (1, math.inf), (1, math.nan)]
    assert [key_factor(ones * query, ones[0] * key) for query, key in sizes] == [1 / 8, 1, 1, 1, 1, 1]


def test_float16_is_written_as_bfloat16(save, tmp_path, caplog):
    export(save(exportable([0, 1, 2]).half()), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert "Weights are float16; the export has them in bfloat16" in caplog.text
    with pytest.raises(ValueError, match="too small for float16"):
        ExportConfig(dtype="float16")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_mla("per-head"), r"num_rope_key_heads=2.* has one for all heads"),
        (lambda: exportable([0, 1], attention_bias=True), r"attention_bias=True.*Qwen2"),
        (lambda: exportable([0, 1], mlp_bias=True), r"mlp_bias=True"),
        (lambda: exportable([0, 1], hidden_act="gelu"), r"hidden_act='gelu'"),
        (lambda: exportable([0, 1], rms_norm_eps=0.0), r"rms_norm_eps=0\.0: .* must be above 0\. .* set a small one"),
        (lambda: exportable([0, 1], rope_parameters=ROPES["dynamic"]), r"rope_type='dynamic'.*length of the text"),
        (lambda: exportable([0, 1], rope_parameters=ROPES["longrope"]), r"rope_type='longrope'"),
        (lambda: exportable([0, 3, 3]), r"Layer 0 uses the rotary frequencies \[3\] more than once"),
        (lambda: exportable([1, 3, 4], rope_parameters=LLAMA3), r"moves \[3, 4\] of them. It leaves \[0, 1, 2\]"),
        (
            lambda: exportable([1, 2, 3, 4], rope_parameters=LLAMA3),
            r"\[0, 1, 2\] only.*--qk-rope-head-dim 6 or",
        ),
        (lambda: exportable([0, 1], rope_parameters=ROPES["linear"]), r"'linear' moves \[0, 1\].* It leaves none"),
        (lambda: make_source("gqa"), r"model_type='llama': it is not converted. Convert it first: `mha2mla convert"),
    ],
)
def test_what_cannot_be_said_is_refused_before_the_work(make, message, save, tmp_path, capsys, monkeypatch):
    folder = save(make())
    monkeypatch.setattr(check, "check_ids", None)  # nothing may be computed
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert not (tmp_path / "out").exists()


def test_lists_that_differ_are_refused_with_the_command(save, tmp_path):
    model = exportable([0, 1, 2])
    model.model.layers[1].self_attn.rope_frequencies.copy_(torch.tensor([[0, 1, 3]]))
    folder = save(model)
    record = {"source": "someone/llama", "options": {"data": "my text.jsonl"}}
    (folder / "conversion.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"\[0, 1, 2\]; layer 1: \[0, 1, 3\].*`mha2mla convert someone/llama "):
        export(folder, tmp_path / "out")


def test_sizes_beyond_the_kernels_are_refused(save, tmp_path):
    with pytest.raises(ValueError, match=r"kv_lora_rank=300 is more than pad=256"):
        export(save(exportable([0, 1], kv_lora_rank=300)), tmp_path / "out", ExportConfig(pad=256))
    with pytest.raises(ValueError, match=r"v_head_dim=160 is more than the 128"):
        export(save(exportable([0, 1], v_head_dim=160)), tmp_path / "out", ExportConfig(pad=256))
    with pytest.raises(ValueError, match=r"head_dim=12 and rope_theta=1e\+08: the last slots turn too slowly"):
        export(save(exportable([0, 1], rope_parameters=SLOW)), tmp_path / "out", ExportConfig(pad=256))
    many = exportable([0, 1, 40], head_dim=96)
    with pytest.raises(ValueError, match=r"need a table of"):
        export(save(exportable(list(range(34)), head_dim=96)), tmp_path / "out", ExportConfig(pad=256))
    export(save(many), tmp_path / "out", ExportConfig(pad=256))  # far apart, but with a step in the table
    assert assert_same_model(many, tmp_path / "out").config.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize(
    "pad, changes, more",
    [
        (None, {}, "vLLM on a GPU (--pad 256: 320 values, 667% of the original's), vLLM on a CPU (--pad 512: "),
        (256, {}, ""),
        (None, dict(v_head_dim=160, head_dim=160), ""),
    ],
)
def test_what_padding_would_open_is_said(pad, changes, more, save, tmp_path, caplog):
    with caplog.at_level("INFO", logger="mha2mla"):
        export(save(exportable([0, 1], **changes)), tmp_path / "out", ExportConfig(pad=pad))
    start = "Engines that padding would add: "
    said = "".join(text.removeprefix(start) for text in caplog.messages if text.startswith(start))
    assert said.startswith(more) and bool(said) == bool(more)


@pytest.mark.parametrize("frequencies, step", [([0, 1, 4, 5], True), ([0, 1, 2], False)])
def test_what_transformers_says_of_a_step_is_explained_instead(frequencies, step, save, tmp_path):
    """In a process of its own, as transformers says it once."""
    folder, program = (
        save(exportable(frequencies)),
        "import sys; from mha2mla.cli.main import main; main(sys.argv[1:])",
    )
    command = [sys.executable, "-c", program, "export", str(folder), str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert said.count(WARNING) == said.count(STEP_NOTE) == step
    assert (f"\n\n{STEP_NOTE}." in (tmp_path / "out" / "README.md").read_text()) == step
    load = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", load, str(tmp_path / "out")]
    assert (WARNING in subprocess.run(command, capture_output=True, text=True).stderr) == step  # still to be explained


def test_our_commands_hold_that_back_for_exports_only(save, tmp_path, monkeypatch, caplog):
    export(save(exportable([0, 1, 4, 5])), tmp_path / "out")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for is_export in (True, False):  # a folder without our record is somebody else's
        if not is_export:
            (tmp_path / "out" / EXPORT_RECORD_NAME).unlink()
        warning_once.cache_clear()
        caplog.clear()
        load_model(str(tmp_path / "out"))
        assert (WARNING in caplog.text) == (not is_export)


def test_adapters_and_exports_are_named(save, tmp_path):
    folder = tmp_path / "adapter"
    peft = add_lora(exportable([0, 1]), 2, 4, 0.0, ["q_proj"])
    peft.peft_config["default"].base_model_name_or_path = "base"
    peft.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"is an adapter of base.*Merge it first \(peft"):
        export(folder, tmp_path / "out")
    export(save(exportable([0, 1])), tmp_path / "out")
    with pytest.raises(ValueError, match=r"is a DeepSeek checkpoint already.*--format mla-llama"):
        export(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ValueError, match=r"out is an export .*`mha2mla export .*out OUTPUT --format mla-llama`"):
        check_model(ModelArguments(model=str(tmp_path / "out")), 8)
    with pytest.raises(ValueError, match=r"There is no folder"):
        export(tmp_path / "nowhere", tmp_path / "again")


def test_an_export_that_computes_something_else_is_refused(save, tmp_path, monkeypatch):
    """Latents too large for the norm to be neutral: found by the comparison, and nothing is left."""
    folder = save(exportable([0, 1]))
    state = load_file(folder / "model.safetensors")
    for name in state:
        if name.endswith("kv_a_proj.weight"):
            state[name][:10] *= 1e6
        if name.endswith("kv_b_proj.weight"):
            state[name] *= 1e-6
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not compute what the model computes.*Nothing was written"):
        export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_exports_are_overwritten(save, tmp_path):
    folder, out = save(exportable([0, 1])), tmp_path / "out"
    export(folder, out)
    with pytest.raises(ValueError, match=r"exists already"):
        export(folder, out)
    export(folder, out, ExportConfig(pad=256, overwrite=True))
    assert json.loads((out / "config.json").read_text())["kv_lora_rank"] == 256
    with pytest.raises(ValueError, match=r"has no export\.json, so it is not an earlier output of the export"):
        export(out, folder, ExportConfig(format="mla-llama", overwrite=True))
    with pytest.raises(ValueError, match=r"out is the model, which would be lost\. Choose another output"):
        export(out, out / "." / ".." / "out", ExportConfig(format="mla-llama", overwrite=True))
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds what the export did not write, .*: mine\.txt\. Choose"):
        export(folder, out, ExportConfig(overwrite=True))


@pytest.mark.parametrize("record", ["ours", None, {"source": "a model"}, {"source": {"name": "a model"}}])
@pytest.mark.parametrize(
    "frequencies, pad, changes",
    [
        ([0, 1, 2], None, {}),
        ([0, 1, 4, 5], None, {}),  # yarn with a step
        ([0, 2, 4], 512, dict(num_nope_key_heads=2)),
        ([2, 3], 256, dict(rope_parameters=ROPES["yarn"])),
    ],
)
def test_the_way_back(frequencies, pad, changes, record, save, tmp_path):
    """The same function, in our family and without the padding; then the export of that is the first export again."""
    model = exportable(frequencies, **changes)
    export(save(model), tmp_path / "stock", ExportConfig(pad=pad))
    if record is None:  # any other DeepSeek checkpoint
        (tmp_path / "stock" / "export.json").unlink()
    elif record != "ours":  # another program's
        (tmp_path / "stock" / "export.json").write_text(json.dumps(record))
    assert main(["export", str(tmp_path / "stock"), str(tmp_path / "back"), "--format", "mla-llama"]) == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    config = back.config
    assert (config.kv_lora_rank, config.v_head_dim, config.num_key_value_heads) == (10, 12, 2)
    assert config.qk_rope_head_dim == 2 * len(frequencies)
    assert config.num_nope_key_heads == model.config.num_nope_key_heads
    if record == "ours":
        assert config.rope_parameters == model.config.rope_parameters and config.head_dim == 12
        assert sorted(back.model.layers[0].self_attn.rope_frequencies[0].tolist()) == frequencies
    ids = tokens(2, 96)
    with torch.no_grad():
        expected, got = model(ids).logits, back(ids).logits
    assert (expected - got).abs().max() <= 2e-5 * expected.abs().max()
    assert {"modeling_mla_llama.py", "tokenizer.json", "README.md"} <= {p.name for p in (tmp_path / "back").iterdir()}

    export(tmp_path / "back", tmp_path / "again", ExportConfig(pad=pad))
    assert_same_model(model, tmp_path / "again", bound=4e-5)


def test_a_real_norm_does_not_come_back(save, tmp_path):
    config = DeepseekV3Config(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=2,
    )  # fmt: skip
    folder = save(DeepseekV3ForCausalLM(config))
    with pytest.raises(ValueError, match=r"Layer 0: the norm on the latents .* more than a constant"):
        export(folder, tmp_path / "out", ExportConfig(format="mla-llama"))
    for name, value, message in [
        ("first_k_dense_replace", 1, "mixtures of experts"),
        ("q_lora_rank", 8, "q_lora_rank=8"),
        ("attention_bias", True, "attention_bias=True"),
    ]:
        data = json.loads((folder / "config.json").read_text())
        changed = save(DeepseekV3ForCausalLM(config), "changed")
        (changed / "config.json").write_text(json.dumps({**data, name: value}))
        with pytest.raises(ValueError, match=message):
            export(changed, tmp_path / "out", ExportConfig(format="mla-llama"))
    with pytest.raises(ValueError, match=r"model_type='mla_llama'; format='mla-llama' is the way back"):
        export(save(exportable([0, 1]), "ours"), tmp_path / "out", ExportConfig(format="mla-llama"))


@pytest.mark.parametrize("fault", ["own code", "unknown tokens"])
def test_a_tokenizer_that_cannot_tell_the_check_its_text_does_not_stop_an_export(fault, save, tmp_path):
    folder = save(exportable([0, 1, 2]))
    if fault == "own code":  # may not run here
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
        (folder / "own.py").write_text("raise SystemExit('was run')")
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"<{i}>" for i in range(200)] + ["harbour"])
        tokenizer.save_pretrained(folder)
    export(folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
