"""Files for llama.cpp: what is in them computes what our model computes, and says what llama.cpp asks for."""

import json
import re
import signal
import subprocess
import sys

import gguf
import pytest
import torch
from conftest import pico_tokenizer
from test_export import exportable
from tokenizers import Regex, normalizers, pre_tokenizers

from mha2mla.cli.main import main
from mha2mla.conversion.export import ExportConfig, export, run
from mha2mla.conversion.export.gguf_vocab import CONTRACTIONS, REST, pre_tokenizer_name, sentencepiece_scores
from pico import ROPES, byte_pair_tokenizer


@pytest.fixture
def save(tmp_path):
    def save(model, tokenizer=None):
        model.save_pretrained(tmp_path / "model")
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def field(path, name):
    return gguf.GGUFReader(path).get_field(name).contents()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "q8_0"])
def test_a_file_holds_the_model(dtype, save, tmp_path, caplog):
    tokenizer = byte_pair_tokenizer()
    model = exportable([0, 1, 4], vocab_size=len(tokenizer) + 4, hidden_size=64)
    path = tmp_path / "out" / "model.gguf"
    with caplog.at_level("INFO", logger="mha2mla"):
        export(save(model, tokenizer), path, ExportConfig(format="gguf", dtype=dtype))
    assert "Check: logits differ" in caplog.text  # read back from the file, against our model
    sizes = ("attention.kv_lora_rank", "rope.dimension_count", "attention.key_length", "attention.key_length_mla")
    # Slots 2 and 3 hold zeros: llama.cpp knows no step.
    assert [field(path, f"deepseek2.{name}") for name in sizes] == [10, 10, 20, 18]
    assert field(path, "deepseek2.attention.head_count_kv") == 1
    assert field(path, "deepseek2.leading_dense_block_count") == 2
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 3 + 2 * 11
    assert tensors["blk.0.attn_k_b.weight"].shape.tolist() == [8, 10, 4]  # nope, R, heads: absorbed
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert field(path, "tokenizer.ggml.pre") == "gpt-2" and field(path, "tokenizer.chat_template")
    assert len(field(path, "tokenizer.ggml.tokens")) == len(tokenizer) + 4
    assert field(path, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]


def test_padding_fills_whole_blocks(save, tmp_path, caplog):
    """What llama.cpp's CPU code would take number by number; 8 bits hold the up-projection of values then, too."""
    folder, path = save(exportable([0, 1, 4], vocab_size=128, hidden_size=64)), tmp_path / "model.gguf"
    with caplog.at_level("INFO", logger="mha2mla"):
        export(folder, path, ExportConfig(format="gguf", dtype="q8_0"))
        assert "with --pad 32 a cache of 64 values is read faster" in caplog.text
        caplog.clear()
        export(folder, path, ExportConfig(format="gguf", dtype="q8_0", pad=32, overwrite=True))
    assert "Check: logits differ" in caplog.text and "--pad" not in caplog.text
    sizes = ("attention.kv_lora_rank", "rope.dimension_count", "attention.key_length", "attention.key_length_mla")
    assert [field(path, f"deepseek2.{name}") for name in sizes] == [32, 32, 64, 40]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["blk.0.attn_v_b.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0


def test_llama3_scaling_and_float16_sources(save, tmp_path):
    rope = {**ROPES["llama3"], "original_max_position_embeddings": 2048, "rope_theta": 1e5}
    model = exportable([0, 1, 2], rope_parameters=rope).half()
    assert main(["export", str(save(model)), str(tmp_path / "a.gguf"), "--format", "gguf"]) == 0
    assert field(tmp_path / "a.gguf", "deepseek2.rope.freq_base") == pytest.approx(1e5**0.5)
    assert field(tmp_path / "a.gguf", "tokenizer.ggml.model") == "none"


def test_what_a_file_cannot_hold_is_refused(save, tmp_path):
    out = tmp_path / "out.gguf"
    with pytest.raises(ValueError, match=r"must end in \.gguf"):
        export(save(exportable([0, 1])), tmp_path / "out", ExportConfig(format="gguf"))
    with pytest.raises(ValueError, match=r"pad=80 must be a multiple of 32 with format='gguf'"):
        ExportConfig(format="gguf", pad=80)
    with pytest.raises(ValueError, match=r"kv_lora_rank=40 is more than pad=32"):
        export(save(exportable([0, 1], kv_lora_rank=40)), out, ExportConfig(format="gguf", pad=32))
    with pytest.raises(ValueError, match=r"WordLevel tokenizer .* known are gpt-2, smollm, llama-bpe"):
        export(save(exportable([0, 1]), pico_tokenizer()), out, ExportConfig(format="gguf"))
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    stepped = {**ROPES["llama3"], "original_max_position_embeddings": 2048, "rope_theta": 1e5}
    model = exportable([0, 1, 4], rope_parameters=stepped)  # frequency 4 is scaled: expressible with a step only
    with pytest.raises(ValueError, match=r"in no table that llama.cpp knows: .* moves \[4\]"):
        export(save(model), out, ExportConfig(format="gguf"))
    model = exportable([0, 1])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 100.0
    with pytest.raises(ValueError, match=r"down_proj.weight has values beyond float16.*--dtype bfloat16"):
        export(save(model), out, ExportConfig(format="gguf", dtype="float16"))
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_only_files_of_ours_are_overwritten(save, tmp_path):
    folder, out = save(exportable([0, 1])), tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"exists already"):
        export(folder, out, ExportConfig(format="gguf"))
    with pytest.raises(ValueError, match=r"is no earlier output of the export"):
        export(folder, out, ExportConfig(format="gguf", overwrite=True))
    assert out.read_text() == "mine"
    out.unlink()
    export(folder, out, ExportConfig(format="gguf"))
    whole = out.read_bytes()
    for size in (0, 3, 30, 1000, len(whole) // 2):
        out.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"is no earlier output of the export"):
            export(folder, out, ExportConfig(format="gguf", overwrite=True))
    out.unlink()
    (tmp_path / "disk").mkdir()
    out.symlink_to("disk/model.gguf")  # which is followed
    for _ in range(2):
        export(folder, out, ExportConfig(format="gguf", overwrite=True))
    assert out.is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == ["model.gguf"]


def test_a_killed_export_is_cleaned_up_by_the_next(save, tmp_path, caplog):
    folder, out = save(exportable([0, 1])), tmp_path / "out.gguf"
    program = (  # killed when the file is written, and not checked yet
        "import os, signal, sys\n"
        "from mha2mla.conversion.export import ExportConfig, export, run\n"
        "run.compare_logits = lambda *logits: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export(sys.argv[1], sys.argv[2], ExportConfig(format='gguf'))\n"
    )
    command = [sys.executable, "-c", program, str(folder), str(out)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".out.gguf.partial-*/out.gguf")
    with caplog.at_level("INFO", logger="mha2mla"):
        export(folder, out, ExportConfig(format="gguf"))
    assert f"Removing {left.parent}, which a run that was killed left behind" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "out.gguf"}


def describe(*steps):
    sequence = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer = byte_pair_tokenizer().backend_tokenizer
    tokenizer.pre_tokenizer = sequence
    return json.loads(tokenizer.to_str())


def test_ways_of_cutting_text_by_name():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    llama3 = pre_tokenizers.Split(Regex(CONTRACTIONS + r"\p{N}{1,3}" + REST), "isolated")
    assert pre_tokenizer_name(describe(byte_level)) == "gpt-2"
    assert pre_tokenizer_name(describe(pre_tokenizers.Digits(individual_digits=True), byte_level)) == "smollm"
    assert pre_tokenizer_name(describe(llama3, pre_tokenizers.ByteLevel(False, use_regex=False))) == "llama-bpe"
    assert pre_tokenizer_name(describe(pre_tokenizers.Split("x", "isolated"), byte_level)) is None
    assert pre_tokenizer_name(describe(pre_tokenizers.Whitespace())) is None
    assert pre_tokenizer_name(describe(pre_tokenizers.ByteLevel(add_prefix_space=True))) is None
    assert pre_tokenizer_name(describe(pre_tokenizers.ByteLevel(False, use_regex=False))) is None
    assert pre_tokenizer_name(describe(llama3, pre_tokenizers.ByteLevel(False))) is None


PREPEND, REPLACE = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")


@pytest.mark.parametrize(
    "normalizer, pre_tokenizer, prefix",
    [
        (normalizers.Sequence([PREPEND, REPLACE]), None, True),
        (REPLACE, None, False),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
    ],
)
def test_a_file_says_whether_a_space_goes_before_text(normalizer, pre_tokenizer, prefix, save, tmp_path):
    tokenizer = byte_pair_tokenizer("sentencepiece")
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    path = tmp_path / "model.gguf"
    export(save(exportable([0, 1], vocab_size=len(tokenizer)), tokenizer), path, ExportConfig(format="gguf"))
    assert field(path, "tokenizer.ggml.model") == "llama"
    assert field(path, "tokenizer.ggml.add_space_prefix") is prefix


@pytest.mark.parametrize(
    "kind, part, step, message",
    [
        ("sentencepiece", "normalizer", normalizers.Lowercase(), "normaliser {'type': 'Lowercase'}"),
        ("sentencepiece", "normalizer", PREPEND, "leaves spaces as they are"),
        ("sentencepiece", "pre_tokenizer", pre_tokenizers.Digits(), "pre-tokenizer {'type': 'Digits'"),
        ("sentencepiece", "pre_tokenizer", pre_tokenizers.Metaspace(), "known is Metaspace with split=false"),
        ("byte-level", "normalizer", normalizers.Lowercase(), "the normaliser Lowercase"),
    ],
)
def test_steps_that_llama_cpp_has_not_are_refused_before_the_work(
    kind, part, step, message, save, tmp_path, monkeypatch
):
    tokenizer = byte_pair_tokenizer(kind)
    setattr(tokenizer.backend_tokenizer, part, step)
    monkeypatch.setattr(run, "streamed_logits", None)
    folder = save(exportable([0, 1], vocab_size=len(tokenizer)), tokenizer)
    with pytest.raises(ValueError, match=re.escape(message)):
        export(folder, tmp_path / "out.gguf", ExportConfig(format="gguf"))


def test_tokens_without_a_row_are_left_out_or_refused(save, tmp_path, caplog, monkeypatch):
    tokenizer = byte_pair_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    path = tmp_path / "model.gguf"
    export(save(exportable([0, 1], vocab_size=size), tokenizer), path, ExportConfig(format="gguf"))
    assert f"without the tokens '[PAD]' of {tmp_path / 'model' / 'tokenizer.json'}" in caplog.text
    assert len(field(path, "tokenizer.ggml.tokens")) == size
    assert field(path, "tokenizer.ggml.padding_token_id") < size
    monkeypatch.setattr(run, "streamed_logits", None)  # before the work
    with pytest.raises(ValueError, match=rf"vocab_size={size - 2} rows: it is another model's"):
        export(save(exportable([0, 1], vocab_size=size - 2)), tmp_path / "b.gguf", ExportConfig(format="gguf"))


def test_scores_keep_the_order_of_merges():
    description = {"model": {"merges": ["a b", ["ab", "c"]]}}
    assert sentencepiece_scores(description, ["abc", "ab", "x"]) == [-1.0, 0.0, -2.0]
