"""Llama with Multi-head Latent Attention.

- Everything but attention is Llama's own code; weights outside attention keep Llama's names.
- Per layer: `q_proj` (x -> un-rotated and rotary queries), `kv_a_proj` (x -> latent and rotary keys, what is cached),
  `kv_b_proj` (latent -> un-rotated keys and values), `o_proj`, and the integer buffer `rope_frequencies`.
- No norm on the latent. An un-rotated key needs no bias (the softmax does not feel it) and a value bias is one of
  `o_proj`, so `kv_b_proj` has none.
- Training and prefill expand keys and values and go through transformers' attention interface; a decoding step works
  on the cache as it lies (absorbed) where that costs fewer operations.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)

from .configuration_mla_llama import MLALlamaConfig
from .latent_attention import (
    MAX_ABSORBED_QUERY_TOKENS,
    absorb_query,
    absorbed_attention,
    absorbed_costs_less,
    default_rope_frequencies,
    expand_keys_values,
    expand_output,
    rotate,
    select_frequencies,
)
from .latent_cache import CACHE_ARGUMENT, LatentDynamicLayer, LatentStaticLayer, cache_nbytes
from .latent_decode import Part, decode_attention, decode_attention_op, kernel_can_run
from .latent_quantization import importance
from .latent_quantized_cache import LatentQuantizedLayer, quantized_cache


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling the module is `x @ module.weight.T` and nothing else: no adapter, quantised or offloaded weight,
    parametrisation or hook."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


class MLALlamaAttention(nn.Module):
    """Multi-head latent attention over a cache of latents and rotary keys."""

    rope_frequencies: torch.Tensor

    def __init__(self, config: MLALlamaConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        assert config.num_nope_key_heads is not None  # set by the config
        self.num_heads = config.num_attention_heads
        self.num_nope_key_heads = config.num_nope_key_heads
        # The attention interface repeats keys and values by this factor.
        self.num_key_value_groups = config.num_attention_heads // self.num_nope_key_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        hidden, bias = config.hidden_size, config.attention_bias
        up_dim = self.num_nope_key_heads * config.qk_nope_head_dim + config.num_key_value_heads * config.v_head_dim
        self.q_proj = nn.Linear(hidden, self.num_heads * config.qk_head_dim, bias=bias)
        self.kv_a_proj = nn.Linear(hidden, config.latent_cache_dim, bias=bias)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, up_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * config.v_head_dim, hidden, bias=bias)
        self.register_buffer("rope_frequencies", default_rope_frequencies(config))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor`): [B, T, hidden_size].
            position_embeddings (`tuple`): cos and sin for all frequencies, each [B, T, head_dim].
            attention_mask (*optional*): In the form of the attention implementation in use.
            cache (`Cache`, *optional*): Built from this model's config, so that its layers are latent ones.
            past_key_values (`Cache`, *optional*): Its name before transformers 5.24.

        Returns:
            Output [B, T, hidden_size] and, where the implementation gives them, probabilities [B, H, T, S].
        """
        config = self.config
        cache = past_key_values if cache is None else cache
        num_queries = hidden_states.shape[1]
        cos, sin = select_frequencies(*position_embeddings, self.rope_frequencies)

        query = self.q_proj(hidden_states).unflatten(-1, (-1, config.qk_head_dim)).transpose(1, 2)  # [B, H, T, nope+r]
        q_nope, q_rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_rope = rotate(q_rope, cos, sin)

        latent, k_rope = self.kv_a_proj(hidden_states).split(
            [config.kv_lora_rank, config.num_rope_key_heads * config.qk_rope_head_dim], dim=-1
        )
        k_rope = rotate(
            k_rope.unflatten(-1, (config.num_rope_key_heads, -1)).transpose(1, 2), cos, sin
        )  # [B, n, T, r]

        if cache is not None:
            entry = torch.cat((latent, k_rope.transpose(1, 2).flatten(2)), dim=-1).unsqueeze(1)  # [B, 1, T, W]
            layer = cache.layers[self.layer_idx]
            if self._use_kernel(layer, entry, attention_mask, kwargs):
                kv_b_weight = self._kv_b_weight(entry.dtype)
                query = absorb_query(q_nope, q_rope, kv_b_weight, config.num_rope_key_heads, self.num_nope_key_heads)
                context = self._attend_in_kernel(cache, layer, entry, query, num_queries, attention_mask)
                output = expand_output(
                    context,
                    kv_b_weight,
                    self.num_heads,
                    config.num_key_value_heads,
                    config.num_key_value_heads * config.v_head_dim,
                )
                return self.o_proj(output.flatten(2)), None
            entries, _ = cache.update(entry, entry[..., : config.kv_lora_rank], self.layer_idx)
            entries = entries.squeeze(1)  # [B, S, W]
            if self._use_absorbed(num_queries, entries.shape[1], attention_mask):
                output, weights = absorbed_attention(
                    q_nope,
                    q_rope,
                    entries,
                    self._kv_b_weight(entries.dtype),
                    config.num_rope_key_heads,
                    self.num_nope_key_heads,
                    config.num_key_value_heads,
                    self.scaling,
                    attention_mask,
                )
                return self.o_proj(output.flatten(2)), weights
            latent, k_rope = entries.split([config.kv_lora_rank, entries.shape[-1] - config.kv_lora_rank], dim=-1)
            k_rope = k_rope.unflatten(-1, (config.num_rope_key_heads, -1)).transpose(1, 2)  # [B, n, S, r]

        key, value = expand_keys_values(
            self.kv_b_proj(latent), k_rope, self.num_nope_key_heads, config.qk_nope_head_dim, config.v_head_dim
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
        padding = config.qk_head_dim - config.v_head_dim
        # Flash attention wants queries, keys and values of one width, and so do sdpa's fused kernels.
        padded = padding > 0 and config._attn_implementation not in ("eager", "flex_attention")
        output, weights = attend(
            self,
            torch.cat((q_nope, q_rope), dim=-1),
            key,
            nn.functional.pad(value, (0, padding)) if padded else value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # [B, T, H, v]
        if padded:
            output = output[..., : config.v_head_dim]
        return self.o_proj(output.flatten(2)), weights

    def _use_absorbed(self, num_queries: int, num_cached: int, attention_mask) -> bool:
        """Absorbed attention serves steps behind a history. It cannot read flex attention's block masks, and sdpa's
        missing mask for several queries means a prefill from an empty cache."""
        if self.training or num_queries > MAX_ABSORBED_QUERY_TOKENS or num_queries == num_cached:
            return False
        if attention_mask is None and num_queries > 1 and "flash" not in self.config._attn_implementation:
            return False
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            return False
        config = self.config
        return absorbed_costs_less(
            num_queries,
            num_cached,
            config.num_attention_heads,
            self.num_nope_key_heads,
            config.num_key_value_heads,
            config.kv_lora_rank,
            config.latent_cache_dim,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )

    def _use_kernel(self, layer, entry: torch.Tensor, attention_mask, kwargs: dict) -> bool:
        """The decode kernel serves steps on a GPU that absorbed attention would serve, unless probabilities are asked
        for (transformers then switches to eager attention) or a backward pass may follow."""
        static, num_queries = isinstance(layer, LatentStaticLayer), entry.shape[2]
        if attention_mask is None and num_queries > 1 and isinstance(layer, LatentQuantizedLayer):
            return False  # flash attention's missing mask; the packed part alone does not say where the queries are
        num_cached = layer.max_cache_len if static else layer.get_seq_length() + num_queries
        return (
            kernel_can_run(entry, self.config.kv_lora_rank, isinstance(layer, LatentQuantizedLayer))
            and not torch.is_grad_enabled()
            and self.config._attn_implementation != "eager"
            and not kwargs.get("output_attentions")
            and isinstance(layer, (LatentDynamicLayer, LatentStaticLayer, LatentQuantizedLayer))
            and (attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4))
            and self._use_absorbed(num_queries, num_cached, attention_mask)
        )

    def _attend_in_kernel(
        self,
        cache: Cache,
        layer,
        entry: torch.Tensor,
        query: torch.Tensor,
        num_queries: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Put the new entries [B, 1, T, W] in the cache; what the absorbed queries [B, H*T, W] see of its latents,
        [B, H*T, R]."""
        rank = self.config.kv_lora_rank
        if isinstance(layer, LatentQuantizedLayer):
            layer.append(entry)
            context = decode_attention(layer.meet(query), layer.parts(mask), rank, num_queries, self.scaling)
            return layer.leave(context)
        entries, _ = cache.update(entry, entry[..., :rank], self.layer_idx)
        entries = entries.squeeze(1)
        length = layer.cumulative_length if isinstance(layer, LatentStaticLayer) else None
        if torch.compiler.is_compiling():
            return decode_attention_op(query, entries, mask, length, rank, num_queries, self.scaling)
        return decode_attention(query, [Part(entries, mask, length)], rank, num_queries, self.scaling)

    def channel_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How finely a quantised cache has to tell apart the channels of an entry, from the weights that read them:
        [R] and [n*r], see [`importance`]. The two dims of a rotary pair share a factor, as rotation mixes them."""
        config = self.config
        r, n = config.qk_rope_head_dim, config.num_rope_key_heads
        latent = importance(self._kv_b_weight(self.o_proj.weight.dtype).detach().float().norm(dim=0))
        rope = torch.ones(n * r, device=latent.device)
        if is_plain_linear(self.q_proj):
            rows = self.q_proj.weight.detach().unflatten(0, (n, -1, config.qk_head_dim))[:, :, -r:]  # [n, H/n, r, hid]
            pairs = rows.float().square().sum((1, 3)).view(n, 2, r // 2).sum(1, keepdim=True).sqrt()
            rope = importance(pairs.expand(-1, 2, -1).flatten())
        return latent, rope

    def _kv_b_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The up-projection as a matrix [N*nope + G*v, R]. Reading `.weight` of a wrapped layer would skip its LoRA
        adapter without a word, so anything but a plain `nn.Linear` is asked what it does to the unit vectors."""
        if is_plain_linear(self.kv_b_proj):
            return self.kv_b_proj.weight
        unit = torch.eye(self.config.kv_lora_rank, dtype=dtype, device=self.rope_frequencies.device)
        return self.kv_b_proj(unit).T


class MLALlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: MLALlamaConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)  # LlamaDecoderLayer.__init__ would build Llama's attention
        self.hidden_size = config.hidden_size
        self.self_attn = MLALlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MLALlamaPreTrainedModel(LlamaPreTrainedModel):
    config: MLALlamaConfig
    config_class = MLALlamaConfig
    _no_split_modules = ["MLALlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": MLALlamaDecoderLayer, "attentions": MLALlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MLALlamaAttention):
            init.copy_(module.rope_frequencies, default_rope_frequencies(self.config))

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        """`generate` would build a cache that quantises keys and values; ours quantises latents."""
        wanted = generation_config.cache_implementation == "quantized" and generation_config.use_cache is not False
        if wanted and model_kwargs.get(CACHE_ARGUMENT) is None:
            model_kwargs[CACHE_ARGUMENT] = quantized_cache(self, **(generation_config.cache_config or {}))
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        config: MLALlamaConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ):
        """`generate` asks for masks per layer type, of which it does not know ours: all layers share a causal one."""
        return create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_ARGUMENT: kwargs[CACHE_ARGUMENT]},
        )


class MLALlamaModel(MLALlamaPreTrainedModel, LlamaModel):
    """Llama's decoder with latent attention. `forward` is Llama's: it hands every layer the full rotary table, from
    which the layer picks its own frequencies."""

    def __init__(self, config: MLALlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)  # LlamaModel.__init__ would build Llama's layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([MLALlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class MLALlamaForCausalLM(MLALlamaPreTrainedModel, LlamaForCausalLM):
    """Causal language model with latent attention; `forward` (logits_to_keep, num_items_in_batch, ...) is Llama's."""

    def __init__(self, config: MLALlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = MLALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


MLALlamaModel.register_for_auto_class("AutoModel")
MLALlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "CACHE_ARGUMENT",
    "LatentDynamicLayer",
    "LatentStaticLayer",
    "MLALlamaForCausalLM",
    "MLALlamaModel",
    "MLALlamaPreTrainedModel",
    "cache_nbytes",
]
