"""A checkpoint of another model type gives the tokens of its source."""

import json

import pytest
from huggingface_hub.utils import filter_repo_objects
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config

from mha2mla.common import tokenizer as tokenizer_module
from mha2mla.common.companions import COMPANION_PATTERNS, copy_companions, find_companions
from mha2mla.common.loading import copy_notices
from mha2mla.common.tokenizer import SAMPLES, check_same_tokens, token_ids, write_tokenizer
from mha2mla.modeling import MLALlamaConfig

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def byte_level() -> tuple[Tokenizer, dict]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special
    )
    tokenizer.train_from_iterator(SAMPLES, trainer)
    return tokenizer, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def metaspace() -> tuple[Tokenizer, dict]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(SAMPLES, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}


@pytest.fixture
def save_pair(tmp_path):
    """Folders of a source and of its conversion, which has the source's companions as they are."""

    def save(make=byte_level, config=Qwen2Config, declared="LlamaTokenizerFast"):
        source, output = tmp_path / "source", tmp_path / "output"
        config(vocab_size=600, hidden_size=32, num_hidden_layers=1).save_pretrained(source)
        MLALlamaConfig(vocab_size=600, hidden_size=32, num_hidden_layers=1).save_pretrained(output)
        tokenizer, special = make()
        tokenizer.save(str(source / "tokenizer.json"))
        settings = {"tokenizer_class": declared, "chat_template": TEMPLATE, **special}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        copy_companions(source, output)
        return source, output

    return save


@pytest.mark.parametrize("declared", ["LlamaTokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config])
@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_tokens_do_not_depend_on_the_model_type(make, config, declared, save_pair):
    """R1-Distill is of model type qwen2 and declares LlamaTokenizerFast: copied as it is, its tokens change."""
    source, output = save_pair(make, config, declared)
    wanted = token_ids(AutoTokenizer.from_pretrained(source))
    write_tokenizer(source, output)
    loaded = AutoTokenizer.from_pretrained(output)
    assert token_ids(loaded) == wanted
    assert sum("a chat in template" in title for title in wanted) == 2
    # Nor on the type of a stock model that it is exported as.
    for model_type in ("llama", "deepseek_v3", "mistral"):
        config_file = output / "config.json"
        config_file.write_text(json.dumps({"model_type": model_type}))
        assert token_ids(AutoTokenizer.from_pretrained(output)) == wanted, model_type


def test_a_tokenizer_that_was_only_copied_is_refused(save_pair, monkeypatch):
    source, output = save_pair()
    with pytest.raises(ValueError, match="gives other tokens than that of"):
        check_same_tokens(source, output)
    monkeypatch.setattr(tokenizer_module, "save_generic", lambda *_: None)
    with pytest.raises(ValueError, match="Nothing was written"):
        write_tokenizer(source, output)


@pytest.mark.parametrize("declared", ["LlamaTokenizer", "GemmaTokenizer"])
def test_what_the_class_decides_stays(declared, save_pair):
    """Both pad on the left, where the generic class would pad on the right: other tokens for every batch."""
    source, output = save_pair(metaspace, LlamaConfig, declared)
    write_tokenizer(source, output)
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in (source, output))
    assert first.padding_side == "left"
    for tokenizer in (first, second):
        tokenizer.pad_token = "<unk>"
    texts = ["one", "one two three"]
    assert second(texts, padding=True)["input_ids"] == first(texts, padding=True)["input_ids"]


def test_a_class_that_does_more_than_its_file_says_is_kept(save_pair):
    """CodeLlama's fills in: `<FILL_ME>` moves what is before and behind it."""
    source, output = save_pair(metaspace, LlamaConfig, "CodeLlamaTokenizer")
    write_tokenizer(source, output)
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in (source, output))
    text = "def f(x):<FILL_ME>return x"
    assert second(text)["input_ids"] == first(text)["input_ids"] and type(second) is type(first)


def test_a_tokenizer_that_does_not_load_is_said_so(save_pair):
    source, output = save_pair()
    (source / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(ValueError, match=r"source: the tokenizer of .* cannot be loaded"):
        write_tokenizer(source, output)


def test_own_code_is_copied_whole_and_not_run(save_pair, caplog):
    source, output = save_pair()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_own.Own", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "tokenization_own.py").write_text("from .own_tables import TABLE\nraise RuntimeError('was run')\n")
    (source / "own_tables.py").write_text("TABLE = {}\n")
    (source / "unrelated.py").write_text("")
    copy_companions(source, output)
    write_tokenizer(source, output)
    assert "was not checked" in caplog.text
    assert (output / "own_tables.py").is_file() and not (output / "unrelated.py").exists()


@pytest.mark.parametrize("content", ['{"model_max_length": 5', "[]"])
def test_malformed_settings_are_told_by_name(content, save_pair):
    source, output = save_pair()
    (source / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json(:1 is not JSON| must hold a JSON object)"):
        write_tokenizer(source, output)


def test_notices_are_found_in_any_case_whoever_looks(tmp_path):
    there = {"License.txt", "notice", "LICENSE", "Use_Policy.md", "COPYING.txt"}
    source, hub, trained = tmp_path / "source", tmp_path / "hub", tmp_path / "trained"
    for folder in (source, hub, trained):
        folder.mkdir()
    for name in (*there, "unlicensed.txt"):
        (source / name).write_text("")
    copy_companions(source, hub)
    copy_notices(str(source), trained)
    for folder in (hub, trained):
        assert {path.name for path in folder.iterdir()} == there
    names = [path.name for path in source.iterdir()]
    assert set(filter_repo_objects(names, allow_patterns=list(COMPANION_PATTERNS))) == there


def test_licences_templates_and_vocabularies_travel(tmp_path):
    names = ["LICENSE.txt", "NOTICE", "USE_POLICY.md", "spiece.model", "qwen.tiktoken", "tekken.json"]
    for name in (*names, "additional_chat_templates/rag.jinja", "model.safetensors", "README.md", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert {str(path) for path in find_companions(tmp_path)} == {*names, "additional_chat_templates/rag.jinja"}
