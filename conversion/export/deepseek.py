"""Our model as a stock DeepSeek-V3 checkpoint, which transformers, vLLM and SGLang run with their own code.

DeepSeek's attention differs from ours in four things, and each is said by the weights, exactly:

- It normalises the latent c: c * w / sqrt(mean c^2 + eps). Where mean c^2 is far below eps that is a constant factor:
  the rows that make latents are scaled by a small power of two.
- eps of that norm is 1e-6 in transformers and `rms_norm_eps` in engines. Embedding, `o_proj` and `down_proj` times
  sqrt(1e-6 / eps) make 1e-6 right for all norms: each reads a residual stream that is smaller by this factor.
- It divides scores by the root of its own head size, padding included: `q_proj` makes up for it.
- Rotary pairs are interleaved and lie in the slots of one table for all layers (`rope_table.py`).

Rotary keys are written no larger than the queries that read them, which engines' fp8 caches need.

Shape letters: H query heads, N un-rotated key heads, G value heads, R latent, r rotary dims, D hidden size; primes for
exported sizes, which zeros fill up.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mha2mla.conversion.checkpoint import CheckpointReader

from .experts import FUSED, expert_fields, has_experts, shared_expert, single_experts
from .plan import ExportPlan, OurConfig

LATENT_NORM_EPS = 1e-6  # of `kv_a_layernorm` in transformers, whatever the config says
CHUNK_ROWS = 8192  # of a matrix, for which memory is taken in float64
# Fields that mean the same in our config and in DeepSeek's.
SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Gauge:
    """
    Powers by which an exported model's activations differ from ours, without a change to its output.

    Attributes:
        norm_eps (`float`): `rms_norm_eps` of the exported model.
        residual (`float`): Factor of the residual stream.
        latent (`float`): Factor of latents before their norm; a power of two.
        latent_norm (`float`): Weight of their norm; a power of two.
        latent_left (`float`): What our latents are of those behind the norm; about 1.
    """

    norm_eps: float
    residual: float
    latent: float
    latent_norm: float
    latent_left: float

    @classmethod
    def make(cls, eps: float, norm_eps: float, latent: float) -> "Gauge":
        """From the model's own eps; the norm's weight follows, so that engines cache latents of their natural size."""
        weight = 2.0 ** round(math.log2(math.sqrt(norm_eps) / latent))
        left = math.sqrt(norm_eps) / (latent * weight)
        return cls(norm_eps, math.sqrt(norm_eps / eps), latent, weight, left)


def tiny_gauge(eps: float) -> Gauge:
    """For transformers, vLLM and SGLang: the eps that all of them use for the latents' norm. Not for float16."""
    return Gauge.make(eps, LATENT_NORM_EPS, 2.0**-24)


def stock_config(
    config: OurConfig, plan: ExportPlan, gauge: Gauge, dtype: torch.dtype
) -> DeepseekV2Config | DeepseekV3Config:
    """The exported model's config: DeepSeek-V3 with dense layers, and fields of experts only where engines insist on
    them; or DeepSeek-V2 with Mixtral's experts."""
    theta, max_positions = config.rope_parameters["rope_theta"], config.max_position_embeddings
    shared = dict(
        **{name: getattr(config, name) for name in SAME_FIELDS},
        dtype=dtype,
        num_key_value_heads=config.num_attention_heads,
        rms_norm_eps=gauge.norm_eps,
        q_lora_rank=None,
        kv_lora_rank=plan.kv_lora_rank,
        qk_rope_head_dim=plan.qk_rope_head_dim,
        qk_nope_head_dim=plan.qk_nope_head_dim,
        v_head_dim=plan.v_head_dim,
        rope_parameters=plan.table.rope_parameters(theta, config.head_dim, plan.qk_rope_head_dim, max_positions),
        tie_word_embeddings=False,  # engines leave the head of a tied DeepSeek model random
    )
    if has_experts(config):
        return DeepseekV2Config(architectures=["DeepseekV2ForCausalLM"], **shared, **expert_fields(config))
    return DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"],
        **shared,
        rope_interleave=True,
        first_k_dense_replace=config.num_hidden_layers,
        moe_layer_freq=1,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=config.intermediate_size,
        num_nextn_predict_layers=0,
    )


def interleave(rows: torch.Tensor, slots: list[int], dims: int) -> torch.Tensor:
    """Rotary rows [..., r, D], pair j being (j, j + r/2), as [..., dims, D] with pair j in rows 2 s, 2 s + 1 of its
    slot s."""
    out = rows.new_zeros(*rows.shape[:-2], dims, rows.shape[-1])
    first, second = rows.chunk(2, dim=-2)
    at = torch.tensor(slots)
    out[..., 2 * at, :] = first
    out[..., 2 * at + 1, :] = second
    return out


def grow(rows: torch.Tensor, count: int) -> torch.Tensor:
    """[..., n, D] with zero rows up to `count`."""
    return pad(rows, (0, 0, 0, count - rows.shape[-2]))


def key_factor(queries: torch.Tensor, keys: torch.Tensor) -> float:
    """
    What rotary keys are multiplied by, and the queries that read them divided, so that keys are about as large as
    these: engines round them to e4m3 with a scale of 1 and cut off what is beyond 448, and conversions made before
    weights were balanced (`conversion/balance.py`) leave most of a score's size to the keys. A power of two, at most
    1, so that weights keep their bits.

    Args:
        queries, keys (`torch.Tensor`): The rows that make them, [H, r, D] and [r, D].
    """
    ratio = (queries.square().mean() / keys.square().mean()).item()
    return min(1.0, 2.0 ** round(math.log2(ratio) / 4)) if 0 < ratio < math.inf else 1.0


def export_attention(
    tensors: dict[str, torch.Tensor], config: OurConfig, plan: ExportPlan, gauge: Gauge
) -> dict[str, torch.Tensor]:
    """
    One layer's attention in DeepSeek's terms, float64.

    Args:
        tensors (`dict`): Of `MLALlamaAttention` by name.
    """
    heads, nope, r, rank = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.kv_lora_rank,
    )
    slots = [plan.table.slots[index] for index in tensors["rope_frequencies"].flatten().tolist()]
    theta, rope_dim = config.rope_parameters["rope_theta"], plan.qk_rope_head_dim
    # Scores are divided by other numbers than ours; yarn's and longrope's factor on cosines is in no stock table.
    scale = math.sqrt((plan.qk_nope_head_dim + rope_dim) / config.head_dim)
    scale /= plan.table.score_factor(theta, config.head_dim)
    rope_scale = scale * LlamaRotaryEmbedding(config).attention_scaling ** 2

    query = tensors["q_proj.weight"].double().unflatten(0, (heads, nope + r))  # [H, nope + r, D]
    q_nope, q_rope = query.split([nope, r], dim=1)
    latent, k_rope = tensors["kv_a_proj.weight"].double().split([rank, r])
    factor = key_factor(q_rope, k_rope)
    rope_scale /= factor
    up = tensors["kv_b_proj.weight"].double()
    num_nope_heads, groups = config.num_nope_key_heads or heads, config.num_key_value_heads
    k_up, v_up = up.split([num_nope_heads * nope, groups * config.v_head_dim])
    k_up = k_up.view(num_nope_heads, nope, rank).repeat_interleave(heads // num_nope_heads, dim=0)  # [H, nope, R]
    v_up = v_up.view(groups, config.v_head_dim, rank).repeat_interleave(heads // groups, dim=0)  # [H, v, R]
    output = tensors["o_proj.weight"].double().unflatten(1, (heads, config.v_head_dim))  # [D, H, v]

    # What is left of the norm's factor goes where a factor goes anyway: `kv_b_proj` keeps its bits.
    q_nope = grow(q_nope * (scale * gauge.latent_left), plan.qk_nope_head_dim)
    up = torch.cat((grow(k_up, plan.qk_nope_head_dim), grow(v_up, plan.v_head_dim)), dim=1)
    return {
        "q_proj.weight": torch.cat((q_nope, interleave(q_rope * rope_scale, slots, rope_dim)), dim=1).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat(
            (grow(latent * gauge.latent, plan.kv_lora_rank), interleave(k_rope * factor, slots, rope_dim))
        ),
        "kv_a_layernorm.weight": latent.new_full((plan.kv_lora_rank,), gauge.latent_norm),
        "kv_b_proj.weight": pad(up, (0, plan.kv_lora_rank - rank)).flatten(0, 1),
        "o_proj.weight": pad(
            output * (gauge.residual * gauge.latent_left), (0, plan.v_head_dim - config.v_head_dim)
        ).flatten(1),
    }


def scaled(tensor: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """tensor * factor in float64, then as `dtype`; a few rows at a time."""
    return torch.cat([(rows.double() * factor).to(dtype) for rows in tensor.split(CHUNK_ROWS)])


def stock_tensors(
    reader: CheckpointReader, config: OurConfig, plan: ExportPlan, gauge: Gauge, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weights of the exported model, one by one."""
    embedding = reader.get("model.embed_tokens.weight")
    yield "model.embed_tokens.weight", scaled(embedding, gauge.residual, dtype)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        attention = export_attention(reader.with_prefix(f"{prefix}self_attn."), config, plan, gauge)
        for name, tensor in attention.items():
            yield f"{prefix}self_attn.{name}", tensor.to(dtype).contiguous()
        for name in reader.names(prefix):
            if name.startswith("self_attn."):
                continue
            factor = gauge.residual if name in ("mlp.down_proj.weight", "mlp.experts.down_proj") else 1.0
            tensor = reader.get(prefix + name)
            parts = single_experts(name, tensor) if name in FUSED else [(name, tensor)]
            for part, weight in parts:
                yield prefix + part, scaled(weight, factor, dtype)
        if has_experts(config):
            for name, tensor in shared_expert(config, dtype):
                yield prefix + name, tensor
    yield "model.norm.weight", reader.get("model.norm.weight").to(dtype)
    yield "lm_head.weight", (embedding if config.tie_word_embeddings else reader.get("lm_head.weight")).to(dtype)


def stock_names(config: DeepseekV2Config | DeepseekV3Config) -> set[str]:
    """Tensors that the stock class loads."""
    with torch.device("meta"):
        return set(AutoModelForCausalLM.from_config(config).state_dict())
