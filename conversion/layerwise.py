"""Running the source model one layer at a time: memory holds one layer and the activations of the text."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from .checkpoint import CheckpointReader


@dataclass
class LayerVisit:
    """
    One layer of the source while it is its turn.

    Attributes:
        layer: The decoder layer, fp32, on the device.
        states (`list[torch.Tensor]`): Residual stream before the layer, one [1, T, hidden] a block, on the CPU.
        position_embeddings: cos and sin of the source, [1, T, head_dim] each.
        frequencies (`torch.Tensor`): Radians per position, [head_dim / 2].
    """

    layer: Any
    states: list[torch.Tensor]
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    frequencies: torch.Tensor

    def attention_input(self, state: torch.Tensor) -> torch.Tensor:
        """What attention reads of a residual stream, on the layer's device: [1, T, hidden]."""
        return self.layer.input_layernorm(state.to(self.frequencies.device))

    def after_mlp(self, state: torch.Tensor) -> torch.Tensor:
        """Residual stream behind the MLP, given the one behind attention; on the layer's device."""
        return state + self.layer.mlp(self.layer.post_attention_layernorm(state))

    @cached_property
    def outputs(self) -> list[torch.Tensor]:
        """Residual stream behind the layer, as `states`; computed once."""
        outputs = []
        with torch.no_grad():
            for state in self.states:
                attention = self.layer.self_attn(
                    hidden_states=self.attention_input(state),
                    position_embeddings=self.position_embeddings,
                    attention_mask=None,
                )[0]
                outputs.append(self.after_mlp(state.to(attention.device) + attention).to(state.device))
        return outputs


@torch.no_grad()
def run_layers(
    reader: CheckpointReader, config: PreTrainedConfig, blocks: torch.Tensor, device: str, title: str
) -> Iterator[LayerVisit]:
    """
    Carry text through the source, layer by layer, in fp32.

    Args:
        blocks (`torch.Tensor`): Token ids, [blocks, T].
        device (`str`): Where a layer lives while it is its turn; activations wait on the CPU.
        title (`str`): Of the progress bar.

    Yields:
        A visit for each layer. When the caller is done with it, the layer is dropped, and its outputs are the next
        one's states.
    """
    with torch.device("meta"):
        decoder = AutoModel.from_config(config, attn_implementation="sdpa")
    rotary = type(decoder.rotary_emb)(config).to(device)
    positions = torch.arange(blocks.shape[1], device=device)[None]
    position_embeddings = rotary(torch.empty(0, device=device), positions)
    states = embed(reader, blocks)
    for index, layer in enumerate(tqdm(decoder.layers, desc=title, unit="layer")):
        tensors = reader.with_prefix(f"model.layers.{index}.")
        layer.load_state_dict({name: t.to(device, torch.float32) for name, t in tensors.items()}, assign=True)
        # Without this, whatever is computed with the layer keeps its graph, and refinement differentiates the MLP.
        layer.eval().requires_grad_(False)
        visit = LayerVisit(layer, states, position_embeddings, rotary.inv_freq)
        yield visit
        states = visit.outputs
        layer.to("meta")


def embed(reader: CheckpointReader, blocks: torch.Tensor) -> list[torch.Tensor]:
    """Residual stream before the first layer, one [1, T, hidden] a block, fp32 on the CPU."""
    embedding = reader.get("model.embed_tokens.weight")
    return [embedding[block[None]].float() for block in blocks]


@torch.no_grad()
def language_loss(
    reader: CheckpointReader, config: PreTrainedConfig, states: list[torch.Tensor], blocks: torch.Tensor, device: str
) -> float:
    """Mean cross-entropy per token, in nats, of residual streams behind the last layer."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    weight = reader.get(head).to(device, torch.float32)
    norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps).to(device)
    norm.weight.data = reader.get("model.norm.weight").to(device, torch.float32)
    losses = []
    for state, block in zip(states, blocks, strict=True):
        logits = norm(state[0, :-1].to(device)) @ weight.T
        losses.append(nn.functional.cross_entropy(logits, block[1:].to(device)))
    return torch.stack(losses).mean().item()
