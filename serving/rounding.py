"""Weights of our checkpoints made for caches that round entries to 8 bits as they come: the same attention.

Letters are those of `latent_shape.py`.
"""

from collections.abc import Iterable, Iterator

import torch

from mha2mla.modeling import LatentShape
from mha2mla.modeling.latent_quantization import key_factor, latent_basis

UP = "kv_b_proj.weight"


def settle(tensors: dict[str, torch.Tensor], shape: LatentShape) -> dict[str, torch.Tensor]:
    """
    Latents in the basis in which rounding costs them least, rotary keys as large as the queries that read them.

    Args:
        tensors: What makes queries (`q_...`) and entries (`kv_a_proj...`), weights and biases, and what reads latents
            (`kv_b_proj.weight`), by name; other sizes than those of `shape` are padding's.
    """
    rank, nope = shape.kv_lora_rank, shape.qk_nope_head_dim
    queries = {
        name: rows.double().reshape(shape.num_attention_heads, shape.qk_head_dim, -1)
        for name, rows in tensors.items()
        if name.startswith("q_")
    }  # [H, nope + r, inputs]
    entries = {name: rows.double() for name, rows in tensors.items() if name.startswith("kv_a")}  # [R + r, ...]
    key_rows = [rows[rank:].reshape(shape.qk_rope_head_dim, -1) for rows in entries.values()]
    factor = key_factor(torch.cat(list(queries.values()), -1)[:, nope:], torch.cat(key_rows, -1))
    to, back = latent_basis(tensors[UP])
    made = {UP: tensors[UP].double() @ back}
    made |= {name: torch.cat((rows[:, :nope], rows[:, nope:] / factor), 1) for name, rows in queries.items()}
    made |= {name: torch.cat((to @ rows[:rank], rows[rank:] * factor)) for name, rows in entries.items()}
    return {name: rows.reshape(tensors[name].shape).to(tensors[name].dtype) for name, rows in made.items()}


class Settling:
    """
    Tensors of attention on their way into an engine: those that [`settle`] changes are held back until all of them are
    there, as files may be cut in between.

    Args:
        names (`Iterable[str]`): Of these.
        shape (`LatentShape`): Of the checkpoint.
    """

    def __init__(self, names: Iterable[str], shape: LatentShape):
        self.names, self.shape = set(names), shape
        self.waiting: dict[str, torch.Tensor] = {}

    def __call__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            if name not in self.names:
                yield name, tensor
                continue
            self.waiting[name] = tensor
            if set(self.waiting) == self.names:
                yield from settle(self.waiting, self.shape).items()
                self.waiting = {}
