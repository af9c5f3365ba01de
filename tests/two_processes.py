"""What test_training_run.py starts twice: a training run, then the sharded loss against the whole one.

torchrun --nproc_per_node=2 tests/two_processes.py train --model ...
"""

import sys
from types import SimpleNamespace

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mha2mla.cli.train import parse_arguments
from mha2mla.training import collate_packed, loss, make_losses, use_losses
from mha2mla.training.run import close, train
from pico import make_mla, make_source, tokens


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """What accelerate does with the settings of docs/examples/accelerate/fsdp2.yaml, which it does on GPUs only."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    return fsdp2_prepare_model(SimpleNamespace(state=state, mixed_precision="no", is_main_process=True), model)


def check_sharded_loss(tied: bool, checkpointing: bool) -> torch.nn.Module:
    """FSDP2 (a unit a layer, and the root) gives the loss and gradients of the whole model on both halves."""
    rank = distributed.get_rank()
    whole, sharded = (make_mla("shared", tie_word_embeddings=tied).train() for _ in range(2))
    if checkpointing:
        sharded.gradient_checkpointing_enable()
    for model in (whole, sharded):
        use_losses(model, make_losses(hidden_weight=1.0), make_source().requires_grad_(False))
    sharded = shard(sharded)
    batch = collate_packed([{"input_ids": ids, "lengths": [5, 7]} for ids in tokens(4, 12).tolist()])
    half = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch.items()}
    count = (batch["labels"] != -100).sum()
    mean = 2 * sharded(**half, num_items_in_batch=count).loss  # FSDP averages over processes
    mean.backward()
    expected = whole(**batch).loss
    expected.backward()
    mean = mean.detach().clone()
    distributed.all_reduce(mean)
    torch.testing.assert_close(mean / 2, expected.detach())
    for (name, parameter), (_, other) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        gradient = parameter.grad.full_tensor()
        torch.testing.assert_close(gradient, other.grad, msg=lambda text, name=name: f"{name}: {text}")
    return sharded


if __name__ == "__main__":
    trainer = train(*parse_arguments(sys.argv[2:]))
    loss.CHUNK_LOGITS = 2**9  # several chunks
    for tied, checkpointing in ((False, False), (True, True)):
        trainer.model = check_sharded_loss(tied, checkpointing)
    whole = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True))
    trainer._save(f"{trainer.args.output_dir}/sharded", whole)  # as with accelerate's FULL_STATE_DICT
    close(trainer)
