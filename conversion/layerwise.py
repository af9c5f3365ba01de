"""Running a model one layer at a time: memory holds one layer and the activations of the text.

The source is what runs; the residual stream of a converted model can be carried beside it, layer by layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn

from mha2mla.modeling.latent_attention import (
    expand_keys_values,
    repeat_heads,
    rotary_table,
    rotate,
    select_frequencies,
)

from .architectures import Architecture
from .attention_weights import LatentAttention, SourceAttention, project
from .job import ConversionJob
from .rotary import Rotation, layer_rotation


@dataclass
class LayerVisit:
    """
    One layer of the source while it is its turn.

    Attributes:
        index (`int`): Its place.
        architecture (`Architecture`): Knows how the layer runs.
        layer: The decoder layer, fp32, on the device.
        states (`list[torch.Tensor]`): Residual stream before the layer, one [1, T, hidden] a block, on the CPU.
        position_embeddings: cos and sin of the source, [1, T, dims that rotate] each.
        frequencies (`torch.Tensor`): Radians per position of each pair of a head, [d/2]; 0 where it stands still.
        rotation (`Rotation`): Which pairs turn.
    """

    index: int
    architecture: Architecture
    layer: Any
    states: list[torch.Tensor]
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    frequencies: torch.Tensor
    rotation: Rotation

    @property
    def source(self) -> SourceAttention:
        """The weights of its attention."""
        return self.architecture.layer_attention(self.layer)

    def attention_input(self, state: torch.Tensor) -> torch.Tensor:
        """What attention reads of a residual stream, on the layer's device: [1, T, hidden]."""
        return self.architecture.attention_input(self.layer, state.to(self.frequencies.device))

    def layer_output(self, state: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Residual stream after the layer, given the one before it and what attention adds; on the layer's device."""
        return self.architecture.layer_output(self.layer, state.to(attention.device), attention)

    @cached_property
    def outputs(self) -> list[torch.Tensor]:
        """Residual stream after the layer, as `states`; computed once."""
        outputs = []
        with torch.no_grad():
            for state in self.states:
                x = self.attention_input(state)
                attention = self.architecture.attention_output(self.layer, x, self.position_embeddings)
                outputs.append(self.layer_output(state, attention).to(state.device))
        return outputs


@torch.no_grad()
def run_layers(job: ConversionJob, title: str) -> Iterator[LayerVisit]:
    """
    Carry the calibration text through the source, layer by layer, in fp32.

    Args:
        title (`str`): Of the progress bar.

    Yields:
        A visit for each layer. When the caller is done with it, the layer is dropped, and its outputs are the next
        one's states.
    """
    assert job.blocks is not None
    architecture, device = job.architecture, job.device
    decoder = architecture.decoder()
    rotary = type(decoder.rotary_emb)(job.config).to(device)
    positions = torch.arange(job.blocks.shape[1], device=device)[None]
    position_embeddings = rotary(torch.empty(0, device=device), positions)
    states = embed(job)
    for index, layer in enumerate(tqdm(decoder.layers, desc=title, unit="layer")):
        tensors = architecture.layer_tensors(job.tensors, index)
        layer.load_state_dict({name: t.to(device, torch.float32) for name, t in tensors.items()}, assign=True)
        # Without this, whatever is computed with the layer keeps its graph, and refinement differentiates the MLP.
        layer.eval().requires_grad_(False)
        rotation = layer_rotation(job.config, index)
        frequencies = rotation.frequencies(rotary.inv_freq)
        visit = LayerVisit(index, architecture, layer, states, position_embeddings, frequencies, rotation)
        yield visit
        states = visit.outputs
        layer.to("meta")


def embed(job: ConversionJob) -> list[torch.Tensor]:
    """Residual stream of the calibration text before the first layer, one [1, T, hidden] a block, fp32 on the CPU."""
    assert job.blocks is not None
    embedding = job.architecture.embedding(job.tensors)
    return [embedding[block[None]].float() for block in job.blocks]


def attend(
    layer: LatentAttention, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """
    The converted layer's causal attention, expanded.

    Args:
        x (`torch.Tensor`): Attention inputs, [B, T, D].
        position_embeddings: The source's cos and sin, [1, T, d] each.

    Returns:
        The attention output [B, T, D].
    """
    head_dim = layer.shape.v_head_dim
    cos, sin = select_frequencies(rotary_table(*position_embeddings), layer.rope_frequencies)
    q_nope, q_rope = layer.queries(x)
    inputs = layer.inputs(x)
    up = torch.cat((layer.k_up.flatten(0, 1), layer.v_up.flatten(0, 1)))
    expanded = nn.functional.linear(nn.functional.linear(inputs, layer.latent), up)
    q_rope, k_rope = rotate(q_rope, cos, sin), rotate(project(inputs, layer.k_rope, layer.k_rope_bias), cos, sin)
    # Rotated in the tables' fp32, and not joined in it: under autocast all of the keys would be widened and narrowed.
    q_rope, k_rope = q_rope.to(expanded.dtype), k_rope.to(expanded.dtype)
    keys, values = expand_keys_values(expanded, k_rope, layer.shape)
    num_heads = layer.shape.num_attention_heads
    # Fused attention wants one width; padded, it runs twice as fast on a CPU as unfused.
    values = nn.functional.pad(values, (0, keys.shape[-1] - head_dim))
    output = nn.functional.scaled_dot_product_attention(
        torch.cat((q_nope, q_rope), dim=-1),
        repeat_heads(keys, num_heads),
        repeat_heads(values, num_heads),
        is_causal=True,
        scale=head_dim**-0.5,
    )[..., :head_dim]
    return nn.functional.linear(output.transpose(1, 2).flatten(2), layer.o, layer.o_bias)


@torch.no_grad()
def advance(visit: LayerVisit, layer: LatentAttention, stream: list[torch.Tensor]) -> None:
    """Carry a converted model's residual stream through its layer, in place."""
    for i, state in enumerate(stream):
        attention = attend(layer, visit.attention_input(state), visit.position_embeddings)
        stream[i] = visit.layer_output(state, attention).to(state.device)


@torch.no_grad()
def language_loss(job: ConversionJob, states: list[torch.Tensor]) -> float:
    """Mean cross-entropy per token, in nats, of residual streams of the calibration text after the last layer."""
    assert job.blocks is not None
    weight = job.architecture.head(job.tensors).to(job.device, torch.float32)
    norm = nn.RMSNorm(job.config.hidden_size, eps=job.config.rms_norm_eps).to(job.device)
    norm.weight.data = job.architecture.norm(job.tensors).to(job.device, torch.float32)
    losses = []
    for state, block in zip(states, job.blocks, strict=True):
        logits = norm(state[0, :-1].to(job.device)) @ weight.T
        losses.append(nn.functional.cross_entropy(logits, block[1:].to(job.device)))
    return torch.stack(losses).mean().item()
