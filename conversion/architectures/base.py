"""What the conversion knows of a source architecture: names in its checkpoint, its decoder layer, its MLA family."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from transformers import AutoModel, PreTrainedConfig

from mha2mla.modeling import MLALlamaConfig, MLALlamaForCausalLM

from ..attention_weights import LatentAttention, SourceAttention
from ..checkpoint import TensorSource
from ..rotary import head_dim, num_rotary_pairs, pairs_first, whole_head_table
from .refusals import (
    refuse_empty_sizes,
    refuse_experts,
    refuse_normalised_heads,
    refuse_odd_heads,
    refuse_partial_rotation,
    refuse_quantised_weights,
    refuse_rotary_tables,
    refuse_sliding_window,
)

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER, ATTENTION = "model.layers.{}.", "self_attn."
# Fields of the source's config that say how it is trained, served or stored, not what it computes; and those that the
# converted attention has of its own.
NOT_INHERITED = (
    "architectures",
    "attention_bias",
    "attention_dropout",
    "dtype",
    "head_dim",
    "pretraining_tp",
    "router_jitter_noise",
    "sliding_window",
)


class Architecture:
    """
    A source architecture, as Llama has it; a subclass says what differs.

    Its methods translate: from the names and shapes of the source's checkpoint to those of the converted one. Fused
    matrices are taken apart there, and multipliers folded into weights. `tensors` is always a whole checkpoint, of
    which a tensor is read when it is asked for, so that nothing holds more than a layer.

    Args:
        config (`PreTrainedConfig`): Of the source; one that the architecture accepts.

    Raises:
        ValueError: If the conversion would not be right for this config; the message names the field and the remedy.
    """

    model_type: ClassVar[str]
    # The family that the converted model belongs to.
    mla_config_class: ClassVar[Any] = MLALlamaConfig
    mla_model_class: ClassVar[Any] = MLALlamaForCausalLM
    # Whether transformers' class rotates a part of a head where `partial_rotary_factor` says so.
    rotates_parts: ClassVar[bool] = False
    # Whether the family has experts.
    has_experts: ClassVar[bool] = False
    refusals: ClassVar[tuple[Callable[[PreTrainedConfig], None], ...]] = (
        refuse_empty_sizes,
        refuse_sliding_window,
        refuse_quantised_weights,
        refuse_odd_heads,
        refuse_rotary_tables,
    )

    def __init__(self, config: PreTrainedConfig):
        for refuse in self.refusals:
            refuse(config)
        if not self.rotates_parts:
            refuse_partial_rotation(config)
        if not self.has_experts:
            refuse_experts(config)
        self.config = config
        self.head_dim = head_dim(config)

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        return config.model_type == cls.model_type

    # What the source's checkpoint holds.

    def check_tensors(self, tensors: TensorSource) -> None:
        """Raise a `ValueError` for weights that must not be there."""
        refuse_normalised_heads(tensors, LAYER.format(0) + ATTENTION)

    def embedding(self, tensors: TensorSource) -> torch.Tensor:
        """Token embeddings, [vocabulary, hidden]."""
        return tensors.get(EMBEDDING)

    def norm(self, tensors: TensorSource) -> torch.Tensor:
        """Weight of the last norm, [hidden]."""
        return tensors.get(NORM)

    def head(self, tensors: TensorSource) -> torch.Tensor:
        """Language model head, [vocabulary, hidden]."""
        return tensors.get(EMBEDDING if self.config.tie_word_embeddings else HEAD)

    def has_own_head(self, tensors: TensorSource) -> bool:
        """Whether the checkpoint holds a head that is not its embedding, whatever the config's flag says."""
        return HEAD in tensors and not torch.equal(tensors.get(HEAD), tensors.get(EMBEDDING))

    @property
    def latent_inputs(self) -> int:
        """Size of what the latent is a linear map of."""
        return self.config.hidden_size

    @property
    def ties_embeddings(self) -> bool:
        """Whether the converted model's head is its embedding."""
        return self.config.tie_word_embeddings

    def layer_tensors(self, tensors: TensorSource, index: int) -> dict[str, torch.Tensor]:
        """A decoder layer as transformers' own class loads it."""
        return tensors.with_prefix(LAYER.format(index))

    def attention_tensors(self, tensors: TensorSource, index: int) -> dict[str, torch.Tensor]:
        """A layer's attention as transformers' own class loads it."""
        return tensors.with_prefix(LAYER.format(index) + ATTENTION)

    def has_attention_bias(self, tensors: TensorSource) -> bool:
        return any(name.endswith(".bias") for name in self.attention_tensors(tensors, 0))

    def source_attention(self, attention: Mapping[str, torch.Tensor]) -> SourceAttention:
        """The attention of a layer from its tensors (see [`attention_tensors`]), in any float type."""

        def by_head(name: str) -> Any:
            if name not in attention:
                return None
            heads = attention[name].float().unflatten(0, (-1, self.head_dim))
            return heads if name.startswith("v_proj") else pairs_first(heads, num_rotary_pairs(self.config))

        o_bias = attention.get("o_proj.bias")
        return SourceAttention(
            q=by_head("q_proj.weight"),
            k=by_head("k_proj.weight"),
            v=by_head("v_proj.weight"),
            o=attention["o_proj.weight"].float(),
            q_bias=by_head("q_proj.bias"),
            k_bias=by_head("k_proj.bias"),
            v_bias=by_head("v_proj.bias"),
            o_bias=None if o_bias is None else o_bias.float(),
        )

    # How the source's decoder runs, in transformers' own classes.

    def decoder(self) -> Any:
        """The decoder without weights (on the meta device): its `layers`, and its `rotary_emb`."""
        with torch.device("meta"):
            return AutoModel.from_config(self.config, attn_implementation="sdpa")

    def layer_attention(self, layer: Any) -> SourceAttention:
        """The weights of the attention of a layer of the decoder."""
        return self.source_attention(layer.self_attn.state_dict())

    def attention_input(self, layer: Any, state: torch.Tensor) -> torch.Tensor:
        """What a layer's attention reads of the residual stream, [B, T, hidden]."""
        return layer.input_layernorm(state)

    def attention_output(
        self, layer: Any, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """What a layer's attention makes of its input x, [B, T, hidden]."""
        return layer.self_attn(hidden_states=x, position_embeddings=position_embeddings, attention_mask=None)[0]

    def layer_output(self, layer: Any, state: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """The residual stream after a layer, given the one before it and the output of its attention, which may be
        that of the converted one."""
        state = state + attention
        return state + layer.mlp(layer.post_attention_layernorm(state))

    # What the converted model holds.

    def mla_config(self, **latent: Any) -> MLALlamaConfig:
        """The converted model's config: what the family shares with the source, and the fields of its attention."""
        inherited = {field.name for field in fields(self.mla_config_class)} - set(NOT_INHERITED)
        values = {name: value for name, value in self.config.to_dict().items() if name in inherited}
        values |= {"tie_word_embeddings": self.ties_embeddings, "rope_parameters": whole_head_table(self.config)}
        return self.mla_config_class(
            **values,
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            architectures=[self.mla_model_class.__name__],
            **latent,
        )

    def passed_on(self, tensors: TensorSource, index: int) -> dict[str, torch.Tensor]:
        """What the converted layer takes over: all but attention."""
        layer = self.layer_tensors(tensors, index)
        return {name: tensor for name, tensor in layer.items() if not name.startswith(ATTENTION)}

    def mla_attention(self, latent: LatentAttention) -> dict[str, torch.Tensor]:
        """The converted layer's attention as the family's class loads it."""
        attention = {
            "q_proj.weight": torch.cat((latent.q_nope, latent.q_rope), dim=1).flatten(0, 1),
            "kv_a_proj.weight": torch.cat((latent.latent, latent.k_rope.flatten(0, 1))),
            "kv_b_proj.weight": torch.cat((latent.k_up.flatten(0, 1), latent.v_up.flatten(0, 1))),
            "o_proj.weight": latent.o,
            "rope_frequencies": latent.rope_frequencies.clone(),  # layers may share it, which safetensors refuses
        }
        if latent.o_bias is not None:
            assert latent.q_nope_bias is not None and latent.q_rope_bias is not None and latent.k_rope_bias is not None
            latent_bias = latent.latent.new_zeros(latent.latent.shape[0])
            attention |= {
                "q_proj.bias": torch.cat((latent.q_nope_bias, latent.q_rope_bias), dim=1).flatten(),
                "kv_a_proj.bias": torch.cat((latent_bias, latent.k_rope_bias.flatten())),
                "o_proj.bias": latent.o_bias,
            }
        return attention

    def converted_tensors(
        self, tensors: TensorSource, layers: Iterable[LatentAttention]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors of the converted model by name, one after another, given the attention of each layer."""
        yield EMBEDDING, self.embedding(tensors)
        for index, latent in enumerate(layers):
            for name, tensor in self.passed_on(tensors, index).items():
                yield LAYER.format(index) + name, tensor
            for name, tensor in self.mla_attention(latent).items():
                yield LAYER.format(index) + ATTENTION + name, tensor
        yield NORM, self.norm(tensors)
        if not self.ties_embeddings:
            yield HEAD, self.head(tensors)
