"""Caches that `generate` did not make: by users, by peft, for export, and by another copy of the code."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.executorch import register_dynamic_cache_export_support

from mha2mla.modeling import CACHE_ARGUMENT, LatentDynamicLayer
from pico import BASE, BLOCK_PACKAGE, LAYOUTS, make_mla, tokens


@pytest.fixture(params=LAYOUTS)
def model(request):
    return make_mla(request.param)


def logits_behind(model, cache, ids, pieces=(6, 1, 3, 1)) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part, **{CACHE_ARGUMENT: cache}).logits for part in ids.split(pieces, dim=1)], dim=1)


def assert_like_no_cache(model, cache) -> None:
    ids = tokens(2, 11)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits_behind(model, cache, ids), expected, rtol=1e-4, atol=1e-5)


def test_a_dynamic_cache_made_without_a_config(model):
    cache = DynamicCache()
    assert_like_no_cache(model, cache)
    assert [type(layer) for layer in cache.layers] == [LatentDynamicLayer] * 2
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    expected = model.generate(tokens(2, 6), **settings)
    assert model.generate(tokens(2, 6), **{CACHE_ARGUMENT: DynamicCache()}, **settings).tolist() == expected.tolist()


def test_layers_of_transformers(model):
    cache = DynamicCache(config=LlamaConfig(**BASE))
    assert_like_no_cache(model, cache)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2


def test_a_static_cache_that_is_initialised_early(model):
    cache = StaticCache(config=model.config, max_cache_len=16)
    cache.early_initialization(2, 1, model.config.latent_cache_dim, torch.float32, model.device)
    address = cache.layers[0].keys.data_ptr()
    assert_like_no_cache(model, cache)
    assert cache.layers[0].keys.data_ptr() == address


@pytest.mark.parametrize("heads", [2, 1])
def test_early_initialisation_with_the_sizes_of_the_source_says_what_to_write(model, heads):
    """The sizes that transformers would take from the config."""
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match=r"\(batch_size, 1, config.latent_cache_dim, dtype, device\)"):
        cache.early_initialization(2, heads, 12, torch.float32, model.device)
        logits_behind(model, cache, tokens(2, 11))


def test_prefix_tuning_is_refused_and_prompt_tuning_works(model):
    peft = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="Prefix tuning makes keys and values"):
        peft(tokens(2, 6))
    peft = get_peft_model(make_mla(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    peft(tokens(2, 6), labels=tokens(2, 6)).loss.backward()
    assert peft.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


class Step(torch.nn.Module):
    """What can be exported: tokens and positions in, logits out; the cache is state."""

    def __init__(self, model, batch: int, length: int):
        super().__init__()
        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=length)
        self.cache.early_initialization(batch, 1, model.config.latent_cache_dim, model.dtype, model.device)
        for i, layer in enumerate(self.cache.layers):
            self.register_buffer(f"entries_{i}", layer.keys, persistent=False)
            self.register_buffer(f"length_{i}", layer.cumulative_length, persistent=False)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(ids, position_ids=positions, **{CACHE_ARGUMENT: self.cache}).logits


def test_export_with_a_static_cache(model):
    ids = tokens(2, 6)
    position = torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        program = torch.export.export(Step(model, 2, 16), (ids[:, :1], position), strict=True)
        step = program.module()
        got = torch.cat([step(ids[:, i : i + 1], position + i) for i in range(6)], dim=1)
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_export_with_a_dynamic_cache(model):
    """A prefill, and a step behind any number of tokens; layers of transformers, as no others leave a graph."""
    register_dynamic_cache_export_support()
    ids = tokens(2, 12)

    def export(part, cache, cache_shape):
        arguments = {"input_ids": part, CACHE_ARGUMENT: cache, "use_cache": True}
        shapes = {"input_ids": None, CACHE_ARGUMENT: cache_shape, "use_cache": None}
        return torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=False).module()

    prefill = export(ids[:, :8], DynamicCache(), [[], []])
    out = prefill(input_ids=ids[:, :8], **{CACHE_ARGUMENT: DynamicCache()}, use_cache=True)
    logits = [out.logits]
    step = export(ids[:, 8:9], copy.deepcopy(out[CACHE_ARGUMENT]), [[{2: torch.export.Dim.DYNAMIC}] * 2] * 2)
    for i in range(8, 12):
        out = step(input_ids=ids[:, i : i + 1], **{CACHE_ARGUMENT: out[CACHE_ARGUMENT]}, use_cache=True)
        logits.append(out.logits)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-5)


TWO_COPIES = (
    BLOCK_PACKAGE
    + """
import torch
from transformers import AutoModelForCausalLM, DynamicCache
first, second = (AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in sys.argv[1:])
assert type(first) is not type(second)
ids = torch.arange(3, 12)[None]
for model in (first, second):
    module = sys.modules[type(model.model.layers[0].self_attn).__module__]
    calls, decode = [], module.decode_attention
    module.kernel_can_run = lambda *_: True
    module.decode_attention = lambda *a: calls.append(a) or decode(*a)
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    expected = model.generate(ids, use_cache=False, **settings)
    out = model.generate(ids, return_dict_in_generate=True, **settings)
    assert out.sequences.tolist() == expected.tolist()
    layer = next(value for value in out.values() if isinstance(value, DynamicCache)).layers[0]
    assert type(layer).__module__.split(".")[:-1] == type(second).__module__.split(".")[:-1]
    assert len(calls) == 2 * 2, len(calls)
"""
)


def test_two_copies_of_the_code_keep_their_kernels(tmp_path):
    """transformers gives both models the cache layers of the copy that was loaded last."""
    pytest.importorskip("triton")
    make_mla().save_pretrained(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    for path in (tmp_path / "second").glob("*.py"):
        path.write_text(path.read_text() + "# another version\n")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", TWO_COPIES, str(tmp_path / "first"), str(tmp_path / "second")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
