"""Running the source model one layer at a time: memory holds one layer and the activations of the text."""

from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import AutoModel, PreTrainedConfig

from .checkpoint import CheckpointReader


def run_layers(
    reader: CheckpointReader, config: PreTrainedConfig, blocks: torch.Tensor, device: str
) -> Iterator[tuple[Any, list[torch.Tensor]]]:
    """
    Carry calibration text through the source, layer by layer, in fp32.

    Args:
        blocks (`torch.Tensor`): Token ids, [blocks, tokens].
        device (`str`): Where a layer lives while it is its turn; activations wait on the CPU.

    Yields:
        Each decoder layer with weights loaded, and the residual stream before it: one tensor [1, tokens, hidden] a
        block. After the caller is done with them, the layer is applied and dropped.
    """
    with torch.device("meta"):
        decoder = AutoModel.from_config(config, attn_implementation="sdpa")
    rotary = type(decoder.rotary_emb)(config).to(device)
    positions = torch.arange(blocks.shape[1], device=device)[None]
    position_embeddings = rotary(torch.empty(0, device=device), positions)

    embedding = reader.get("model.embed_tokens.weight")
    states = [embedding[block[None]].float() for block in blocks]
    del embedding
    layers = tqdm(decoder.layers, desc="Calibrating", unit="layer")
    for index, layer in enumerate(layers):
        tensors = reader.with_prefix(f"model.layers.{index}.")
        layer.load_state_dict({name: t.to(device, torch.float32) for name, t in tensors.items()}, assign=True)
        layer.eval()
        with torch.no_grad():
            yield layer, states
            for i, state in enumerate(states):
                output = layer(state.to(device), position_embeddings=position_embeddings)
                states[i] = output.to(state.device)
        layer.to("meta")
