"""The check of an export: the engine's class, built from what was written, against the model it was made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedConfig

from mha2mla.common.loading import load_tokenizer
from mha2mla.common.tokenizer import has_own_code, has_tokenizer

from .experts import causal_model

CHECK_LENGTH = 192  # tokens
# Largest root mean square difference of logits, over the logits' own spread. Rounding a second time is all that may
# differ; a wrong table, layout or scale gives about 1.
BOUNDS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1, "q8_0": 2e-1}

TEXT = """The harbour master kept two clocks in the office above the quay. One showed the time of the town, and the
other the time of the tide, which comes about fifty minutes later every day. "If they ever agree," she used to say,
"check both." In the winter of 1987 a storm took the roof of the fish market, broke 14 of the 23 moorings and put the
pilot boat on the steps of the customs house. The insurance paid for the roof. The moorings were paid for by the
fishermen themselves, who met on the first Monday of each month and wrote down what each of them had given:

def total(payments):
    return sum(amount for _, amount in payments)

By spring the boats were out again. Water expands when it freezes, so a pipe that is full in December is often open
in March; the plumber, who knew this, had drained the pipes of every house that he could get into, and was never
thanked for what had not happened."""


class TensorSource(Protocol):
    """What weights are read from: a checkpoint, or a file in another format under the same names."""

    def get(self, name: str) -> torch.Tensor: ...

    def with_prefix(self, prefix: str) -> dict[str, torch.Tensor]: ...


def check_ids(folder: Path, config: PreTrainedConfig) -> torch.Tensor:
    """Token ids [T] of a text, or, without a tokenizer that needs no code of its own and knows no more tokens than the
    model, drawn at random."""
    length = min(CHECK_LENGTH, config.max_position_embeddings)
    if has_tokenizer(folder) and not has_own_code(folder):
        ids = torch.tensor(load_tokenizer(str(folder))(TEXT)["input_ids"][:length])
        if ids.max() < config.vocab_size:
            return ids
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def streamed_logits(
    config: PreTrainedConfig,
    tensors: TensorSource,
    ids: torch.Tensor,
    title: str,
    latent_norm_eps: float | None = None,
) -> torch.Tensor:
    """
    Logits [T, vocabulary] of token ids [T], fp32, by the class that transformers has for the config. Memory holds one
    layer at a time.

    Args:
        title (`str`): Of the progress bar.
        latent_norm_eps (`float`, *optional*): For engines whose latents' norm has another eps than transformers'.
    """
    with torch.device("meta"):
        model = causal_model(config, attn_implementation="sdpa", dtype=torch.float32)
    positions = torch.arange(len(ids))[None]
    position_embeddings = type(model.model.rotary_emb)(config)(torch.empty(0), positions)
    hidden = tensors.get("model.embed_tokens.weight")[ids].float()[None]  # [1, T, D]
    for index, layer in enumerate(tqdm(model.model.layers, desc=title, unit="layer")):
        state = tensors.with_prefix(f"model.layers.{index}.")
        layer.load_state_dict(
            {name: t.float() if t.is_floating_point() else t for name, t in state.items()}, assign=True
        )
        layer.eval()
        if latent_norm_eps is not None:
            layer.self_attn.kv_a_layernorm.variance_epsilon = latent_norm_eps
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=position_embeddings)
        layer.to("meta")
    norm = model.model.norm
    norm.load_state_dict({"weight": tensors.get("model.norm.weight").float()}, assign=True)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return torch.nn.functional.linear(norm(hidden)[0], tensors.get(head).float())


@dataclass(frozen=True)
class Agreement:
    """
    Attributes:
        largest (`float`): Largest difference of two logits.
        relative (`float`): Root mean square difference, over the logits' standard deviation.
        kl (`float`): Mean KL divergence of the predictions, nats a token.
        same_choice (`float`): Share of tokens at which the likeliest next token is the same.
        tokens (`int`): Tokens compared.
    """

    largest: float
    relative: float
    kl: float
    same_choice: float
    tokens: int

    def describe(self) -> str:
        return (
            f"logits differ by at most {self.largest:.1e} ({self.relative:.1e} of their spread), predictions by "
            f"{self.kl:.1e} nats per token, likeliest token the same at {100 * self.same_choice:.1f} % of "
            f"{self.tokens}"
        )


def compare_logits(ours: torch.Tensor, exported: torch.Tensor) -> Agreement:
    """Two sets of logits, [T, vocabulary]."""
    ours, exported = ours.double(), exported.double()
    difference = exported - ours
    p, q = ours.log_softmax(-1), exported.log_softmax(-1)
    return Agreement(
        largest=difference.abs().max().item(),
        relative=(difference.square().mean().sqrt() / ours.std()).item(),
        kl=(p.exp() * (p - q)).sum(-1).mean().item(),
        same_choice=(ours.argmax(-1) == exported.argmax(-1)).double().mean().item(),
        tokens=len(ours),
    )


def check_agreement(agreement: Agreement, dtype: str) -> None:
    """
    Raises:
        ValueError: If the exported model is not the model, up to the rounding of its weights.
    """
    if not agreement.relative <= BOUNDS[dtype]:  # so that NaN does not pass
        raise ValueError(
            f"The export does not compute what the model computes: {agreement.describe()}; in {dtype} at most "
            f"{BOUNDS[dtype]:.0e} of the spread may differ. Nothing was written. Either {dtype} cannot hold these "
            "weights (try --dtype float32), or the model's latents are too large for DeepSeek's norm on them."
        )
