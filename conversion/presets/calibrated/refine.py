"""Layer-local refinement: a few gradient steps on one converted layer against its original, with no labels.

The closed form looks at keys and values one by one; what counts is the attention output they make
together, after layers that are converted already. So each layer in turn is given the residual stream of the
*converted* prefix, and its attention weights are moved so that the stream after the layer comes back to the original
model's. Nothing is differentiated but this one layer.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from mha2mla.common.robust_error import robust_error
from mha2mla.conversion.attention_weights import LatentAttention
from mha2mla.conversion.layerwise import LayerVisit, attend

COMPARED_BLOCKS = 8  # by which a refined layer is judged
HEADS = "normalised."  # before the names of what makes normalised heads


@dataclass(frozen=True)
class RefineSettings:
    """
    Attributes:
        steps (`int`): Adam steps per layer; 0 leaves the closed form as it is.
        batch_size (`int`): Blocks of text a step.
        learning_rate (`float`): Relative to the root mean square of each weight matrix.
        warmup (`float`): Share of the steps with rising rate; a cosine to zero follows.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; a gradient step needs no more precision than that."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # No public question for this yet; three times as fast as fp32 where the answer is yes.
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def trainable_tensors(layer: LatentAttention) -> dict[str, torch.Tensor]:
    """The layer's weights and biases by name, those that make normalised heads as `normalised.NAME`; not its
    frequencies."""
    tensors = dict(vars(layer))
    if layer.normalised is not None:
        tensors |= {f"{HEADS}{name}": value for name, value in vars(layer.normalised).items()}
    found = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor) and value.numel() > 0}
    del found["rope_frequencies"]
    return found


def with_tensors(layer: LatentAttention, tensors: dict[str, torch.Tensor]) -> LatentAttention:
    """The layer with other tensors, named as [`trainable_tensors`] does."""
    own: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEADS)}
    if layer.normalised is not None:
        heads = {name.removeprefix(HEADS): tensor for name, tensor in tensors.items() if name not in own}
        own["normalised"] = replace(layer.normalised, **heads)  # type: ignore[arg-type]  # eps is no tensor
    return replace(layer, **own)


def rate_factor(step: int, settings: RefineSettings) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


@torch.enable_grad()
def refine_layer(
    layer: LatentAttention, visit: LayerVisit, stream: list[torch.Tensor], settings: RefineSettings, seed: int
) -> LatentAttention:
    """
    Move a converted layer's weights so that the residual stream after the layer is the original's.

    Args:
        layer (`LatentAttention`): The closed form.
        visit (`LayerVisit`): The layer of the source: its norms and MLP, which stay as they are, and its outputs.
        stream (`list[torch.Tensor]`): Residual stream of the converted prefix, one [1, T, D] a block.
        seed (`int`): Of the order of blocks.

    Returns:
        A new layer, or the closed form where no less is wrong after the steps: they only disturb one that loses
        nothing, and diverge at too high a rate.
    """
    device = layer.o.device
    weights = {name: t.detach().clone().requires_grad_() for name, t in trainable_tensors(layer).items()}
    # A rate relative to each tensor's rms; biases, which may be zero, move on the scale of the weights.
    scales = {name: w.detach().square().mean().sqrt().item() for name, w in weights.items()}
    floor = sorted(scales.values())[len(scales) // 2]
    groups = [
        {"params": [w], "scale": max(scales[n], floor) if "bias" in n else scales[n]} for n, w in weights.items()
    ]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-12, fused=True)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(settings.steps):
        while len(order) < settings.batch_size:
            order += torch.randperm(len(stream), generator=generator).tolist()
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        # Moved before they are joined: joining on the CPU would keep all its cores waiting between the steps of a GPU.
        before = torch.cat([stream[i].to(device) for i in chosen])
        wanted = torch.cat([visit.outputs[i].to(device) for i in chosen])
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * group["scale"] * rate_factor(step, settings)
        optimizer.zero_grad()
        x = visit.attention_input(before)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device)):
            attention = attend(with_tensors(layer, weights), x, visit.position_embeddings)
            output = visit.layer_output(before, attention)
        robust_error(output, wanted).backward()
        optimizer.step()
    refined = with_tensors(layer, {name: w.detach() for name, w in weights.items()})
    return refined if stream_error(refined, visit, stream) < stream_error(layer, visit, stream) else layer


@torch.no_grad()
def stream_error(layer: LatentAttention, visit: LayerVisit, stream: list[torch.Tensor]) -> float:
    """What refinement minimises, over a few blocks and in full precision. Arguments as in [`refine_layer`]."""
    device, errors = layer.o.device, []
    for before, wanted in zip(stream[:COMPARED_BLOCKS], visit.outputs, strict=False):
        before = before.to(device)
        attention = attend(layer, visit.attention_input(before), visit.position_embeddings)
        errors.append(robust_error(visit.layer_output(before, attention), wanted.to(device)).item())
    return sum(errors) / len(errors)
