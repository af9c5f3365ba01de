"""Latent attention as a module, and what the models of every family of it share.

A family is what differs from its model in transformers: it builds its decoder layers with [`MultiHeadLatentAttention`]
and puts [`LatentModelMixin`] before its `PreTrainedModel`.
"""

import logging
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .latent_attention import (
    MAX_ABSORBED_QUERY_TOKENS,
    absorb_query,
    absorbed_attention,
    absorbed_costs_less,
    default_rope_frequencies,
    expand_keys_values,
    expand_output,
    rotary_table,
    rotate_both,
    select_frequencies,
)
from .latent_cache import CACHE_ARGUMENT, LatentLayer, latent_layer
from .latent_decode import decode_attention, decode_attention_in_graph, kernel_can_run
from .latent_projection import HeadwiseLinear, as_matrix, is_linear_map, is_plain_linear
from .latent_quantization import importance, pair_norms, round_fp8
from .latent_quantized_cache import cache_for_generation

logger = logging.getLogger(__name__)


class AttentionPath(Enum):
    """How a step attends."""

    EXPANDED = "keys and values are expanded, and transformers' attention interface works on them"
    ABSORBED = "torch works on latents and rotary keys"
    KERNEL = "the decode kernel works on the cache as it lies"


class MultiHeadLatentAttention(nn.Module):
    """
    Multi-head latent attention over a cache of latents and rotary keys.

    Where queries or entries are not plain projections of the hidden states (norms of queries and keys), a subclass
    overrides [`make_queries`] and [`make_entries`], and [`rope_query_rows`]. All else works on what those return.
    """

    rope_frequencies: torch.Tensor
    fp8_entries = False  # train on entries as an engine's fp8 cache gives them back

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.shape = shape = config.latent_shape
        # The attention interface repeats keys and values by this factor.
        self.num_key_value_groups = shape.num_attention_heads // shape.num_nope_key_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, shape.num_attention_heads * shape.qk_head_dim, bias=bias)
        self.kv_a_proj = nn.Linear(hidden, shape.width, bias=bias)
        self.kv_b_proj = nn.Linear(shape.kv_lora_rank, shape.expanded_width, bias=False)
        self.o_proj = nn.Linear(shape.num_attention_heads * shape.v_head_dim, hidden, bias=bias)
        self.register_buffer("rope_frequencies", default_rope_frequencies(shape, config.head_dim))

    def make_queries(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries for un-rotated keys [B, H, T, nope], and those that are still to be rotated [B, H, T, r]."""
        return self.shape.split_queries(self.q_proj(hidden_states))

    def make_entries(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, 1, T, R], and rotary keys that are still to be rotated [B, n, T, r]."""
        return self.shape.split(self.kv_a_proj(hidden_states).unsqueeze(1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor`): [B, T, hidden_size].
            position_embeddings: For all frequencies, the [`rotary_table`] that this model's `rotary_emb` makes,
                [B, T, 4, head_dim/2], or the cos and sin of transformers, each [B, T, head_dim].
            attention_mask (*optional*): In the form of the attention implementation in use.
            cache (`Cache`, *optional*): Built from this model's config, so that its layers are latent ones.
            past_key_values (`Cache`, *optional*): Its name before transformers 5.24.

        Returns:
            Output [B, T, hidden_size] and, where the implementation gives them, probabilities [B, H, T, S].
        """
        cache = past_key_values if cache is None else cache
        # Project.
        if not isinstance(position_embeddings, torch.Tensor):
            position_embeddings = rotary_table(*position_embeddings)
        cos, sin = select_frequencies(position_embeddings, self.rope_frequencies)
        q_nope, q_rope = self.make_queries(hidden_states)
        latents, rope_keys = self.make_entries(hidden_states)
        # OLMo 2 rotates in fp32, whatever the model's type is; autocast may have another one for the latents.
        dtype = latents.dtype
        if dtype != hidden_states.dtype:
            dtype = torch.promote_types(hidden_states.dtype, dtype)
        q_rope, rope_keys = rotate_both(q_rope, rope_keys, cos, sin)
        q_rope, rope_keys = q_rope.to(dtype), rope_keys.to(dtype)
        if self.fp8_entries and self.training:
            latents, rope_keys = round_fp8(latents), round_fp8(rope_keys)

        # Store.
        path = AttentionPath.EXPANDED
        if cache is not None:
            layer = latent_layer(cache, self.layer_idx, self.shape.width)
            entries = self.shape.join(latents, rope_keys)  # [B, 1, T, W]
            if hasattr(layer, "place_sinks"):
                layer.place_sinks(cache, attention_mask, entries)
            path, _ = self.choose_path(cache, layer, entries, attention_mask, kwargs.get("output_attentions"))
            if path is AttentionPath.KERNEL:
                layer.append(entries)
            else:
                history, _ = cache.update(entries, latents, self.layer_idx)  # [B, 1, S, W]

        # Attend: [B, T, H*v].
        if path is AttentionPath.KERNEL:
            output, weights = self._attend_in_place(q_nope, q_rope, layer, attention_mask), None
        elif path is AttentionPath.ABSORBED:
            matrix = self._kv_b_matrix(history.dtype, history.device)
            output, weights = absorbed_attention(
                q_nope, q_rope, history, matrix, self.shape, self.scaling, attention_mask
            )
        else:
            if cache is not None:
                latents, rope_keys = self.shape.split(history)
            output, weights = self._attend_expanded(q_nope, q_rope, latents, rope_keys, attention_mask, **kwargs)
        return self.o_proj(output), weights

    def choose_path(
        self, cache: Cache, layer: LatentLayer, entries: torch.Tensor, attention_mask, probabilities: bool | None
    ) -> tuple[AttentionPath, str]:
        """
        The path of a step, and why it is not the next faster one.

        Args:
            layer (`LatentLayer`): The layer of `cache`, which does not hold the new entries yet.
            entries (`torch.Tensor`): The new ones, [B, 1, T, W].
            probabilities (`bool`, *optional*): Whether they are asked for.
        """
        implementation, num_queries = self.config._attn_implementation, entries.shape[2]
        num_cached, _ = layer.get_mask_sizes(num_queries)
        if self.training:
            return AttentionPath.EXPANDED, "training"
        if num_queries == num_cached:
            return AttentionPath.EXPANDED, "nothing is cached yet"
        if num_queries > MAX_ABSORBED_QUERY_TOKENS:
            return AttentionPath.EXPANDED, "too many queries for scores to be held"
        if attention_mask is None and num_queries > 1 and "flash" not in implementation:
            return AttentionPath.EXPANDED, "no mask for several queries is how sdpa is told of a prefill"
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            return AttentionPath.EXPANDED, "the mask is one of blocks, for flex attention"
        if not is_linear_map(self.kv_b_proj):
            return AttentionPath.EXPANDED, "kv_b_proj may do something else to each row"
        if not absorbed_costs_less(num_queries, num_cached, self.shape):
            return AttentionPath.EXPANDED, "absorbed attention costs more"

        if not hasattr(layer, "parts"):
            return AttentionPath.ABSORBED, "the cache has layers of transformers"
        if cache.offloading:
            return AttentionPath.ABSORBED, "an offloaded layer is on the device during its update only"
        if not kernel_can_run(entries, self.shape.kv_lora_rank, layer.packed):
            return AttentionPath.ABSORBED, "no kernel for this device, dtype or size"
        if layer.packed and num_queries > max(1, layer.residual_length // 2):
            return AttentionPath.ABSORBED, "new entries may leave the window at once, and would be read rounded"
        if torch.is_grad_enabled():
            return AttentionPath.ABSORBED, "a backward pass may follow"
        if implementation == "eager" or probabilities:
            return AttentionPath.ABSORBED, "probabilities may be asked for"
        if attention_mask is not None and attention_mask.dim() != 4:
            return AttentionPath.ABSORBED, "the mask is one of padding, for flash attention"
        if attention_mask is None and num_queries > 1 and layer.packed:
            return AttentionPath.ABSORBED, "packed entries do not tell where the queries are"
        return AttentionPath.KERNEL, ""

    def _attend_in_place(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, layer: LatentLayer, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The kernel over a cache layer, which holds the new entries; gives [B, T, H*v]."""
        w_uk, w_uv = self.shape.split_up_projection(self._kv_b_matrix(q_nope.dtype, q_nope.device))
        batch, num_heads, num_queries, _ = q_nope.shape
        query = layer.to_basis(absorb_query(q_nope, q_rope, w_uk, self.shape).flatten(1, 2))  # [B, H*T, W]
        rank = self.shape.kv_lora_rank
        attend = decode_attention_in_graph if torch.compiler.is_compiling() else decode_attention
        context = attend(query, layer.parts(mask), rank, num_queries, self.scaling)
        return expand_output(layer.from_basis(context).view(batch, num_heads, num_queries, rank), w_uv)

    def _attend_expanded(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latents: torch.Tensor,
        rope_keys: torch.Tensor,
        attention_mask,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """transformers' attention interface over expanded latents [B, 1, S, R] and rotary keys [B, n, S, r]; gives
        [B, T, H*v]."""
        key, value = expand_keys_values(self.kv_b_proj(latents.squeeze(1)), rope_keys, self.shape)
        implementation = self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        padding = self.shape.qk_head_dim - self.shape.v_head_dim
        # Flash attention wants queries, keys and values of one width, and so do sdpa's fused kernels.
        padded = padding > 0 and implementation not in ("eager", "flex_attention")
        output, weights = attend(
            self,
            torch.cat((q_nope, q_rope), dim=-1),
            key,
            nn.functional.pad(value, (0, padding)) if padded else value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return (output[..., : self.shape.v_head_dim] if padded else output).flatten(2), weights

    def _kv_b_matrix(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The up-projection as a matrix [N*nope + G*v, R]."""
        return as_matrix(self.kv_b_proj, self.shape.kv_lora_rank, dtype, device)

    def channel_factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """
        How finely a quantised cache tells apart the channels of an entry, see [`importance`]; ones if that is unknown.

        Args:
            dtype (`torch.dtype`): In which the model computes.

        Returns:
            Factors of the latent [R] and of the rotary keys [n*r].
        """
        n, rank, device = self.shape.num_rope_key_heads, self.shape.kv_lora_rank, self.rope_frequencies.device
        made = torch.ones(self.shape.width, device=device)  # squared norms of what makes each channel
        if is_plain_linear(self.kv_a_proj):
            made = self.kv_a_proj.weight.detach().float().square().sum(1)
        latent, rope = torch.ones_like(made[:rank]), torch.ones_like(made[rank:])
        if is_linear_map(self.kv_b_proj):
            latent = importance(self._kv_b_matrix(dtype, device).detach().float().norm(dim=0), made[:rank].sqrt())
        rows = self.rope_query_rows()
        if rows is not None:
            read = rows.float().square().unflatten(0, (n, -1)).sum((1, 3))  # [n, r]
            rope = importance(pair_norms(read), pair_norms(made[rank:].view(n, -1)))
        return latent, rope

    def rope_query_rows(self) -> torch.Tensor | None:
        """What makes the queries that read rotary keys, [H, r, inputs]; None where it cannot be read."""
        if not is_plain_linear(self.q_proj):
            return None
        heads = self.q_proj.weight.detach().unflatten(0, (-1, self.shape.qk_head_dim))
        return heads[:, self.shape.qk_nope_head_dim :]


class LatentModelMixin:
    """What `generate`, loading and adapters ask of a model. Goes before the family's `PreTrainedModel`."""

    config: Any

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, MultiHeadLatentAttention):
            init.copy_(module.rope_frequencies, default_rope_frequencies(module.shape, self.config.head_dim))
        elif isinstance(module, HeadwiseLinear):
            init.normal_(module.weight, std=self.config.initializer_range)

    def add_adapter(self, adapter_config: Any, *args, **kwargs) -> None:
        """The usual recipe for LoRA names projections that are not here, of which peft does not tell while it finds
        one of them."""
        targets = getattr(adapter_config, "target_modules", None)
        names = {name.rsplit(".", 1)[-1] for name, _ in self.named_modules()}  # type: ignore[attr-defined]
        missing = set() if targets is None or isinstance(targets, str) else set(targets) - names
        if missing:
            logger.warning(
                "target_modules: there is no layer %s, so it gets no adapter. Attention's layers are %s.",
                " or ".join(sorted(missing)),
                ", ".join(self.config.attention_projections),
            )
        super().add_adapter(adapter_config, *args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
    ) -> None:
        """`generate` would build a cache that quantises keys and values; ours quantises latents."""
        cache = None
        if generation_config.use_cache is not False and model_kwargs.get(CACHE_ARGUMENT) is None:
            cache = cache_for_generation(self, generation_config, batch_size, max_cache_length)
        if cache is not None:
            model_kwargs[CACHE_ARGUMENT] = cache
        else:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )

    @staticmethod
    def create_masks_for_generate(
        config: Any,
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
