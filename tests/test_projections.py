"""Absorbed attention serves every kind of up-projection, or leaves it to the expanded path."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import DynamicCache, StaticCache

from mha2mla.modeling import CACHE_ARGUMENT
from mha2mla.modeling.latent_config import PROJECTIONS
from mha2mla.modeling.latent_module import AttentionPath, MultiHeadLatentAttention
from mha2mla.modeling.latent_projection import as_matrix, is_linear_map, is_plain_linear
from pico import FORMS, LAYOUTS, make_mla, tokens


@pytest.fixture
def paths(monkeypatch) -> list[tuple[AttentionPath, str]]:
    """The paths taken, with the reasons, in turn."""
    taken, choose = [], MultiHeadLatentAttention.choose_path

    def watch(self, *arguments):
        taken.append(choose(self, *arguments))
        return taken[-1]

    monkeypatch.setattr(MultiHeadLatentAttention, "choose_path", watch)
    return taken


def cached_logits(model, ids, cache=None, **kwargs) -> torch.Tensor:
    """Of the last three tokens, one by one behind the rest."""
    cache = cache or DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-3], **{CACHE_ARGUMENT: cache}, **kwargs)
        steps = [model(ids[:, i : i + 1], **{CACHE_ARGUMENT: cache}, **kwargs).logits for i in range(-3, -1)]
        steps.append(model(ids[:, -1:], **{CACHE_ARGUMENT: cache}, **kwargs).logits)
    return torch.cat(steps, dim=1)


def assert_cache_changes_nothing(model, ids, cache=None, **kwargs) -> None:
    with torch.no_grad():
        expected = model(ids, use_cache=False, **kwargs).logits[:, -3:]
    torch.testing.assert_close(cached_logits(model, ids, cache, **kwargs), expected, rtol=1e-4, atol=1e-5)


class Int8Weight(torch.Tensor):
    """A weight as torchao makes it: integers with scales, of which a linear layer knows and a matrix product does
    not."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        made.scales = weight.abs().amax(1, keepdim=True) / 127
        made.codes = (weight / made.scales).round().to(torch.int8)
        return made

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight = arguments[:2]
            return torch.nn.functional.linear(x, weight.codes * weight.scales, *arguments[2:])
        return super().__torch_function__(function, types, arguments, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return arguments[0]
        raise NotImplementedError(function)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_no_matrix(layout, paths):
    """Of a plain nn.Linear: what torchao makes of a model, and other subclasses of tensors."""
    model = make_mla(layout)
    for layer in model.model.layers:
        projection = layer.self_attn.kv_b_proj
        projection.weight = torch.nn.Parameter(Int8Weight(projection.weight.detach()), requires_grad=False)
        assert type(projection) is torch.nn.Linear and not is_plain_linear(projection) and is_linear_map(projection)
    assert_cache_changes_nothing(model, tokens(2, 12))
    assert paths[-1][0] is AttentionPath.ABSORBED
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    quantised = model.generate(tokens(2, 12), cache_implementation="quantized", cache_config={"nbits": 8}, **settings)
    assert quantised.tolist() == model.generate(tokens(2, 12), use_cache=False, **settings).tolist()


def lora(model, **settings):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=list(PROJECTIONS), init_lora_weights=False, lora_alpha=16, **settings)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize(
    "settings, absorbed",
    [
        (dict(lora_dropout=0.3), True),
        (dict(use_dora=True), False),
        (dict(lora_bias=True), False),
    ],
    ids=["lora", "dora", "bias"],
)
def test_adapters(settings, absorbed, paths):
    model = lora(make_mla(), **settings)
    if settings.get("lora_bias"):
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    assert_cache_changes_nothing(model, tokens(2, 12))
    assert (paths[-1][0] is AttentionPath.ABSORBED) == absorbed


@pytest.mark.parametrize("batch", [2, 10])  # 10 is R: unit vectors pass for a batch
def test_an_adapter_for_each_row(batch, paths):
    model = lora(make_mla())
    torch.manual_seed(2)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False))
    ids, names = tokens(batch, 12), ["default", "other"] * (batch // 2)
    got = cached_logits(model, ids, adapter_names=names)
    assert paths[-1] == (AttentionPath.EXPANDED, "kv_b_proj may do something else to each row")
    for name in ("default", "other"):
        model.set_adapter(name)
        rows = [i for i, of in enumerate(names) if of == name]
        torch.testing.assert_close(got[rows], cached_logits(model, ids[rows]), rtol=1e-4, atol=1e-5)


def test_hooks_are_run_on_rows_of_the_batch_only(paths):
    """One that depends on the row: what it would do to unit vectors says nothing."""
    model = make_mla()
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(
            lambda _, inputs, out: out * torch.arange(1.0, 1.0 + out.shape[0])[:, None, None]
        )
    assert_cache_changes_nothing(model, tokens(2, 12))
    assert paths[-1][0] is AttentionPath.EXPANDED


class RowScaled(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * torch.arange(1.0, 1.0 + x.shape[0])[:, None, None]


def gate(out: torch.Tensor) -> torch.Tensor:
    return out * out.sum(-1, keepdim=True).sigmoid()


class Gate(ModelHook):
    def post_forward(self, module, output):
        return gate(output)


def row_scaled(plain):
    made = RowScaled(plain.in_features, plain.out_features, bias=False)
    made.load_state_dict(plain.state_dict())
    return made


def replaced(plain):
    plain.forward = lambda x, forward=plain.forward: gate(forward(x))
    return plain


def biased(plain):
    made = torch.nn.Linear(plain.in_features, plain.out_features)
    made.load_state_dict(plain.state_dict() | {"bias": torch.linspace(-1, 1, plain.out_features)})
    return made


@pytest.mark.parametrize("batch", [1, 2, 10])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "change",
    [row_scaled, replaced, biased, lambda plain: add_hook_to_module(plain, Gate()), torch.nn.Sequential],
    ids=["subclass", "forward", "bias", "accelerate", "wrapper"],
)
def test_a_forward_of_somebodys_own_is_called_on_the_rows(change, layout, cache, batch, paths):
    model = make_mla(layout)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = change(layer.self_attn.kv_b_proj)
    made = StaticCache(config=model.config, max_cache_len=16) if cache == "static" else None
    assert_cache_changes_nothing(model, tokens(batch, 12), cache=made)
    assert paths[-1][0] is AttentionPath.EXPANDED


@pytest.mark.parametrize("batch", [1, 10])
def test_offloaded_weights_stay_absorbed(batch, paths):
    model = cpu_offload(make_mla(), execution_device=torch.device("cpu"))
    assert_cache_changes_nothing(model, tokens(batch, 12))
    assert paths[-1][0] is AttentionPath.ABSORBED


def test_what_is_a_matrix():
    plain = torch.nn.Linear(3, 5, bias=False)
    assert is_plain_linear(plain) and as_matrix(plain, 3, torch.float32, "cpu") is plain.weight
    parametrised = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 5, bias=False))
    assert not is_plain_linear(parametrised) and is_linear_map(parametrised)
    torch.testing.assert_close(as_matrix(parametrised, 3, torch.float32, "cpu"), parametrised.weight)
    assert not is_linear_map(torch.nn.Linear(3, 5).register_forward_hook(lambda *_: None) and torch.nn.ReLU())


@pytest.mark.parametrize("form", FORMS)
def test_default_targets_of_lora(form):
    plain = make_mla(form)
    projections = plain.config.attention_projections
    assert TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[plain.config.model_type] == list(projections)
    attention = plain.model.layers[0].self_attn
    linear = {name for name, module in attention.named_children() if type(module) is torch.nn.Linear}
    assert linear == set(projections)
    model = get_peft_model(plain, LoraConfig(r=2))
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == linear


def test_targets_that_are_not_there_are_named(monkeypatch, caplog):
    """The usual recipe; peft adapts q and o, and says nothing."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    make_mla().add_adapter(LoraConfig(r=2, target_modules=list(PROJECTIONS)))
    assert not caplog.text
    make_mla().add_adapter(LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert "no layer k_proj or v_proj" in caplog.text and "kv_a_proj, kv_b_proj" in caplog.text
