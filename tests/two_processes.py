"""What test_training_run.py starts twice: a training run, then the sharded loss against the whole one.

torchrun --nproc_per_node=2 tests/two_processes.py train --model ...
"""

import sys

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mha2mla.cli.main import main
from mha2mla.training import Distillation, PackedCollator, use_language_loss
from pico import make_mla, make_source, tokens


def check_sharded_loss(tied: bool, checkpointing: bool) -> None:
    """FSDP2 (a unit a layer, and the root) gives the loss and gradients of the whole model on both halves."""
    rank = distributed.get_rank()
    whole, sharded = (make_mla("shared", tie_word_embeddings=tied).train() for _ in range(2))
    if checkpointing:
        sharded.gradient_checkpointing_enable()
    for model in (whole, sharded):
        use_language_loss(model, Distillation(make_source().requires_grad_(False)))
    mesh = init_device_mesh("cpu", (2,))
    for unit in (*sharded.model.layers, sharded):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    batch = PackedCollator()([{"input_ids": ids, "lengths": [5, 7]} for ids in tokens(4, 12).tolist()])
    half = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch.items()}
    count = (batch["labels"] != -100).sum()
    loss = 2 * sharded(**half, num_items_in_batch=count).loss  # FSDP averages over processes
    loss.backward()
    expected = whole(**batch).loss
    expected.backward()
    mean = loss.detach().clone()
    distributed.all_reduce(mean)
    torch.testing.assert_close(mean / 2, expected.detach())
    for (name, parameter), (_, other) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        gradient = parameter.grad.full_tensor()
        torch.testing.assert_close(gradient, other.grad, msg=lambda text, name=name: f"{name}: {text}")


if __name__ == "__main__":
    status = main(sys.argv[1:])
    for tied, checkpointing in ((False, False), (True, True)):
        check_sharded_loss(tied, checkpointing)
    distributed.destroy_process_group()
    sys.exit(status)
