"""Latent attention made of vLLM's layers: its projections are split over GPUs by heads, and latents, which all heads
share, are made on each. Shapes are those of one GPU: T tokens, h heads; primes for kernels' sizes (`padding.py`)."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from mha2mla.modeling import LatentShape

from .padding import pad_entries, pad_headwise_queries, pad_output, pad_queries, pad_up_projection
from .rotary import LayerRotary


class LatentAttention(nn.Module):
    """
    Multi-head latent attention over vLLM's own, for a config in which [`use_kernel_sizes`] has been. Takes the place
    of vLLM's `LlamaAttention`, and gets its arguments.
    """

    def __init__(self, config: Any, quant_config: Any, cache_config: Any, prefix: str, **_: Any):
        super().__init__()
        self.shape, self.target = LatentShape(**config.checkpoint_sizes), config.latent_shape
        # What is done to tensors of the checkpoint before they are split over GPUs.
        self.padding: dict[str, Callable] = {
            "kv_a_proj.weight": pad_entries,
            "kv_a_proj.bias": pad_entries,
            "kv_b_proj.weight": pad_up_projection,
            "o_proj.weight": pad_output,
        }
        heads, hidden = self.target.num_attention_heads, config.hidden_size
        self.num_heads = heads // get_tensor_model_parallel_world_size()
        make = partial(self._make, quant_config=quant_config, prefix=prefix)
        self.make_projections(config, make)
        up_width = heads * (self.target.qk_nope_head_dim + self.target.v_head_dim)
        self.kv_b_proj = make("kv_b_proj", ColumnParallelLinear, self.target.kv_lora_rank, up_width, False)
        output_width = heads * self.target.v_head_dim
        self.o_proj = make("o_proj", RowParallelLinear, output_width, hidden, config.attention_bias)
        max_model_len = get_current_vllm_config().model_config.max_model_len
        self.rotary = LayerRotary(config, self.shape, self.target.qk_rope_head_dim // 2, max_model_len)
        self.attention = MLAAttention(
            num_heads=self.num_heads,
            scale=config.head_dim**-0.5,
            qk_nope_head_dim=self.target.qk_nope_head_dim,
            qk_rope_head_dim=self.target.qk_rope_head_dim,
            v_head_dim=self.target.v_head_dim,
            q_lora_rank=None,
            kv_lora_rank=self.target.kv_lora_rank,
            kv_b_proj=self.kv_b_proj,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    @staticmethod
    def _make(name: str, layer: Any, inputs: int, outputs: int, bias: bool, quant_config: Any, prefix: str) -> Any:
        return layer(inputs, outputs, bias=bias, quant_config=quant_config, prefix=f"{prefix}.{name}")

    def make_projections(self, config: Any, make: Callable) -> None:
        """Build what makes queries and entries, by `make(name, layer, inputs, outputs, bias)`."""
        hidden, bias = config.hidden_size, config.attention_bias
        query_width = self.target.num_attention_heads * self.target.qk_head_dim
        self.q_proj = make("q_proj", ColumnParallelLinear, hidden, query_width, bias)
        self.kv_a_proj = make("kv_a_proj", ReplicatedLinear, hidden, self.target.width, bias)
        self.padding |= {"q_proj.weight": pad_queries, "q_proj.bias": pad_queries}

    def make_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, h, nope' + r'], rotary dims still to be turned."""
        return self.q_proj(hidden_states)[0].unflatten(-1, (self.num_heads, -1))

    def make_entries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Latents and rotary keys [T, R' + r'], the latter still to be turned."""
        return self.kv_a_proj(hidden_states)[0]

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to [T, hidden]."""
        nope, rope = self.target.qk_nope_head_dim, self.target.qk_rope_head_dim
        q_nope, q_rope = self.make_queries(hidden_states).split([nope, rope], dim=-1)
        latents, rope_keys = self.make_entries(hidden_states).split([self.target.kv_lora_rank, rope], dim=-1)
        output = self.attention(
            torch.cat((q_nope, self.rotary(positions, q_rope)), dim=-1),
            latents.contiguous(),
            self.rotary(positions, rope_keys.unsqueeze(1)),
            output_shape=(hidden_states.shape[0], self.num_heads * self.target.v_head_dim),
        )
        return self.o_proj(output)[0]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """What vLLM's loader calls with tensors of the checkpoint, by their names in attention; says which it took."""
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if name == "rope_frequencies":
                self.rotary.choose(tensor)
                continue
            if name in self.padding:
                tensor = self.padding[name](tensor, self.shape, self.target)
            load = getattr(parameters[name], "weight_loader", default_weight_loader)
            load(parameters[name], tensor)
            loaded.add(name)
        return loaded


class HeadwiseColumns(nn.Module):
    """A matrix for each head, of which a GPU has those of its own heads, [h, out, in]."""

    def __init__(self, num_heads: int, in_features: int, out_features: int):
        super().__init__()
        self.parts, self.part = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        weight = torch.empty(num_heads // self.parts, out_features, in_features)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight.weight_loader = self._load  # type: ignore[attr-defined]  # where vLLM looks for it

    def _load(self, parameter: nn.Parameter, weight: torch.Tensor) -> None:
        default_weight_loader(parameter, weight.chunk(self.parts)[self.part])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, h, in] to [T, h, out]."""
        return x.transpose(0, 1).bmm(self.weight.transpose(1, 2)).transpose(0, 1)


class NormalisedLatentAttention(LatentAttention):
    """Latent attention behind norms of queries and keys (`modeling/latent_qk_norm.py`), one for each head (Qwen3)."""

    def make_projections(self, config: Any, make: Callable) -> None:
        self.head_dim = dim = config.head_dim
        hidden, bias, heads = config.hidden_size, config.attention_bias, self.target.num_attention_heads
        keys = self.target.num_key_value_heads * dim
        self.q_proj = make("q_proj", ColumnParallelLinear, hidden, heads * dim, bias)
        self.q_b_proj = HeadwiseColumns(heads, dim, self.target.qk_head_dim)
        self.k_proj = make("k_proj", ReplicatedLinear, hidden, keys, bias)
        self.v_proj = make("v_proj", ReplicatedLinear, hidden, keys, bias)
        self.kv_a_proj = make("kv_a_proj", ReplicatedLinear, 2 * keys, self.target.width, False)
        self.make_norms(heads * dim, keys, config.rms_norm_eps)
        self.padding["q_b_proj.weight"] = pad_headwise_queries

    def make_norms(self, query_width: int, key_width: int, eps: float) -> None:
        """Norms of projections that wide."""
        self.q_norm, self.k_norm = RMSNorm(self.head_dim, eps=eps), RMSNorm(self.head_dim, eps=eps)

    def normalised_queries(self, projected: torch.Tensor) -> torch.Tensor:
        """Heads [T, h, d] of a projection [T, h * d]."""
        return self.q_norm(projected.unflatten(-1, (-1, self.head_dim)))

    def normalised_keys(self, projected: torch.Tensor) -> torch.Tensor:
        """[T, G * d] of a projection of that shape."""
        return self.k_norm(projected.unflatten(-1, (-1, self.head_dim))).flatten(1)

    def make_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.q_b_proj(self.normalised_queries(self.q_proj(hidden_states)[0]))

    def make_entries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        keys = self.normalised_keys(self.k_proj(hidden_states)[0])
        return self.kv_a_proj(torch.cat((keys, self.v_proj(hidden_states)[0]), dim=-1))[0]


class JointlyNormalisedLatentAttention(NormalisedLatentAttention):
    """The same with norms over all heads (OLMo 2), for which queries of all GPUs are gathered."""

    def make_norms(self, query_width: int, key_width: int, eps: float) -> None:
        self.q_norm, self.k_norm = RMSNorm(query_width, eps=eps), RMSNorm(key_width, eps=eps)

    def normalised_queries(self, projected: torch.Tensor) -> torch.Tensor:
        queries = self.q_norm(tensor_model_parallel_all_gather(projected.contiguous()))  # [T, H * d]
        own = queries.chunk(get_tensor_model_parallel_world_size(), dim=-1)[get_tensor_model_parallel_rank()]
        return own.unflatten(-1, (-1, self.head_dim))

    def normalised_keys(self, projected: torch.Tensor) -> torch.Tensor:
        return self.k_norm(projected)
