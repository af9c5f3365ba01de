"""Pico source models, made on the spot, and their exact conversion into both layouts."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from mha2mla.conversion.architectures import architecture_classes, architecture_of
from mha2mla.conversion.attention_weights import LatentAttention, SourceAttention
from mha2mla.conversion.cache_plan import unrotated_rows
from mha2mla.conversion.export.check import TEXT
from mha2mla.conversion.presets.paper.closed_form import convert_attention
from mha2mla.conversion.rotary import Rotation, layer_rotation, num_rotary_pairs
from mha2mla.modeling import FAMILIES, MLALlamaForCausalLM

# Begins a script in which the package cannot be imported, as on a machine of a checkpoint's user. An editable install
# resolves it through a finder and a wheel through site-packages: this blocks both.
BLOCK_PACKAGE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mha2mla":
            raise ImportError("mha2mla is blocked")
sys.meta_path.insert(0, Block())
"""

# What a checkpoint carries for `trust_remote_code`.
CODE_FILES = [
    "configuration_mla_llama.py",
    "latent_attention.py",
    "latent_cache.py",
    "latent_config.py",
    "latent_decode.py",
    "latent_generation.py",
    "latent_kernels.py",
    "latent_module.py",
    "latent_norm.py",
    "latent_packed_kernel.py",
    "latent_projection.py",
    "latent_quantization.py",
    "latent_quantized_cache.py",
    "latent_quantized_entries.py",
    "latent_rotary.py",
    "latent_shape.py",
    "latent_static_quantized_cache.py",
    "latent_store_kernel.py",
    "latent_tiles.py",
    "latent_wide_kernel.py",
    "modeling_mla_llama.py",
]

VOCAB = 96
BASE = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    initializer_range=0.2,  # large enough for attention to matter
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

# What the pico config of an architecture needs beside BASE.
MULTIPLIERS = dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=4.0)
ARCHITECTURE_FIELDS = {
    "granite": MULTIPLIERS,
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "ministral3": dict(head_dim=12),
    "mistral": dict(sliding_window=None),
    "olmo2": dict(num_key_value_heads=4),
    "qwen3": dict(head_dim=16),
    "qwen3_moe": dict(
        head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[0]
    ),
    "seed_oss": dict(head_dim=12),
    "smollm3": dict(no_rope_layer_interval=2),
}
# Forms of an architecture, and one source of every other that is found.
SOURCES = {
    "mha": LlamaConfig(**BASE, num_key_value_heads=4),
    "gqa": LlamaConfig(**BASE, num_key_value_heads=2),
    "mqa": LlamaConfig(**BASE, num_key_value_heads=1, tie_word_embeddings=True),
    "head-dim": LlamaConfig(**BASE, num_key_value_heads=2, head_dim=16),
    "llama-bias": LlamaConfig(**BASE, num_key_value_heads=2, attention_bias=True),
    "granite-tied": GraniteConfig(
        **BASE, **MULTIPLIERS, num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "qwen3-bias": Qwen3Config(**BASE, num_key_value_heads=2, head_dim=12, attention_bias=True),
    "phi3-partial": Phi3Config(**BASE, num_key_value_heads=2, partial_rotary_factor=2 / 3),
} | {
    name: AutoConfig.for_model(name, **{**BASE, "num_key_value_heads": 2, **ARCHITECTURE_FIELDS.get(name, {})})
    for name in (architecture.model_type for architecture in architecture_classes())
    if name != "llama"
}

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1000.0},
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(6)],
        "long_factor": [1.5 + 0.3 * i for i in range(6)],
        "original_max_position_embeddings": 16,
        "factor": 2.0,
    },
}


def make_source(kind: str = "gqa", rope: str = "default", seed: int = 0, **rope_changes) -> torch.nn.Module:
    """A random source model, biases and norms included."""
    fields = SOURCES[kind].to_dict()
    fields["rope_parameters"] |= ROPES[rope] | rope_changes
    if "original_max_position_embeddings" in fields:  # Phi-3's own, which goes before
        fields["original_max_position_embeddings"] = 16
    config = type(SOURCES[kind])(**fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


class StateDict(dict):
    """Weights of a model that is in memory, as the conversion reads them."""

    def with_prefix(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name[len(prefix) :]: tensor for name, tensor in self.items() if name.startswith(prefix)}


def attention_of(model: torch.nn.Module, layer: int) -> SourceAttention:
    architecture = architecture_of(model.config)
    return architecture.source_attention(architecture.attention_tensors(StateDict(model.state_dict()), layer))


def rotation_of(model: torch.nn.Module, layer: int) -> Rotation:
    return layer_rotation(model.config, layer)


def shared_layout(source: SourceAttention, rotation: Rotation, nope_dims: int = 0) -> LatentAttention:
    """All pairs of all key heads that turn in one rotary key; a query head is zero outside its group's slots. What
    stands still is in the latent, beside the values. Exact."""
    num_heads, dim, _ = source.q.shape
    groups = source.k.shape[0]
    half = dim // 2
    turning = rotation.turning[:, None]  # [d/2, 1]
    scale = rotation.score_factors[:, None]  # [d, 1]
    # [G, d] -> [2, G, d/2]: first halves of all heads, then second halves
    keys = (source.k.unflatten(1, (2, half)) * turning).transpose(0, 1).flatten(0, 2)[None]
    slots = torch.eye(groups).repeat_interleave(num_heads // groups, dim=0)  # [H, G]
    queries = torch.einsum("hsix,hg->hsgix", source.q.unflatten(1, (2, half)) * turning, slots)
    still = ~turning.repeat(2, 1)[:nope_dims]  # [nope, 1]
    latent = torch.cat(((source.k[:, :nope_dims] * still).flatten(0, 1), source.v.flatten(0, 1)))
    up = torch.eye(len(latent)).split([groups * nope_dims, groups * dim])
    layer = LatentAttention(
        q_nope=(source.q * scale)[:, :nope_dims] * still,
        q_rope=queries.flatten(1, 3),
        latent=latent,
        k_rope=keys,
        k_up=torch.einsum("gdr,hg->hdr", up[0].view(groups, nope_dims, len(latent)), slots),
        v_up=up[1].view(groups, dim, len(latent)),
        o=source.o,
        rope_frequencies=torch.arange(half).remainder(max(rotation.num_turning, 1)).repeat(groups)[None],
        o_bias=source.output_bias() if source.has_bias else None,
        normalised=source.normalised,
    )
    if source.has_bias and source.normalised is None:
        turning, scale, still = turning[:, 0], scale[:, 0], still[:, 0]
        q_bias = torch.einsum("hsi,hg->hsgi", source.q_bias.view(num_heads, 2, half) * turning, slots)
        layer.q_nope_bias = (source.q_bias * scale)[:, :nope_dims] * still
        layer.q_rope_bias = q_bias.reshape(num_heads, -1)
        layer.k_rope_bias = (source.k_bias.view(groups, 2, half) * turning).transpose(0, 1).reshape(1, -1)
    return layer


def assemble(source: torch.nn.Module, layers: list[LatentAttention]) -> MLALlamaForCausalLM:
    """An MLA model with the source's weights and these attention layers."""
    first, architecture = layers[0], architecture_of(source.config)
    config = architecture.mla_config(
        kv_lora_rank=first.latent.shape[0],
        qk_rope_head_dim=first.k_rope.shape[1],
        qk_nope_head_dim=first.q_nope.shape[1],
        num_rope_key_heads=first.k_rope.shape[0],
        num_nope_key_heads=first.k_up.shape[0],
        attention_bias=first.o_bias is not None,
    )
    model = architecture.mla_model_class(config).eval()
    state = dict(architecture.converted_tensors(StateDict(source.state_dict()), layers))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= set(model.all_tied_weights_keys)
    return model


def exact_model(source: torch.nn.Module, layout: str) -> MLALlamaForCausalLM:
    """Every pair rotated that the source rotates, full rank kept: the source in MLA form."""
    config = source.config
    layers = []
    for index in range(config.num_hidden_layers):
        attention, rotation = attention_of(source, index), rotation_of(source, index)
        groups, dim, _ = attention.k.shape
        turning = num_rotary_pairs(config)
        still_rows = unrotated_rows(config, groups * 2 * turning)
        if layout == "shared":
            layers.append(shared_layout(attention, rotation, dim if still_rows else 0))
        else:
            pairs = torch.arange(turning).repeat(groups, 1)
            rank = min(still_rows + groups * dim, config.hidden_size)
            layers.append(convert_attention(attention, pairs, rank, "joint", rotation, still_rows // groups))
    return assemble(source, layers)


def make_mla(form: str = "per-head", seed: int = 0, **changes) -> MLALlamaForCausalLM:
    """A random MLA model with un-rotated dims and non-default frequencies, in one of [`FORMS`]."""
    sizes = dict(kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=12, head_dim=12)
    heads = dict(num_rope_key_heads=2, num_nope_key_heads=2) if form == "per-head" else dict(num_rope_key_heads=1)
    model_class = FAMILIES.get(form, FAMILIES["mla_llama"])
    own = ARCHITECTURE_FIELDS.get(form.removeprefix("mla_"), {})
    config = model_class.config_class(**{**BASE, "num_key_value_heads": 2, **own, **sizes, **heads, **changes})
    torch.manual_seed(seed)
    model = model_class(config).eval()
    for layer in model.model.layers:
        frequencies = layer.self_attn.rope_frequencies
        frequencies.copy_(torch.randint(0, 6, frequencies.shape))
    return model


LAYOUTS = ("per-head", "shared")
# Llama in both layouts, and every other family, with a shared rotary key.
FORMS = (*LAYOUTS, *(family for family in FAMILIES if family != "mla_llama"))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_pair_tokenizer(kind: str = "byte-level") -> PreTrainedTokenizerFast:
    """A tokenizer trained on a few lines, of a kind that engines know: "byte-level" (GPT-2's) or "sentencepiece"
    (Llama 2's, byte pairs with single bytes to fall back on)."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special, alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))], []
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    pad, bos, eos = special[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, chat_template=CHAT_TEMPLATE
    )
