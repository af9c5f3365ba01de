"""The stock Trainer, with what recovery adds: the length of the decay, exact perplexity, complete checkpoints."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    Trainer,
    TrainerCallback,
)

from mha2mla.common.perplexity import Perplexity
from mha2mla.modeling import LatentConfigMixin

from .arguments import LossArguments, ModelArguments
from .int8 import hold_in_int8
from .loss import use_losses
from .packing import IGNORED, collate_packed
from .parameters import ATTENTION, LORA, add_lora, describe_trainable, freeze_except
from .trainer_arguments import RecoveryTrainingArguments

logger = logging.getLogger(__name__)


def token_perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """
    Mean cross-entropy and perplexity over all labels that count, and the latter's standard error over rows. The loss
    takes the place of the Trainer's own, a mean of the batches' means, which hangs on how rows fall into batches.

    Args:
        prediction (`EvalPrediction`): Log-likelihoods and labels, [rows, T]; entry t is that of the label at t.
    """
    counted = prediction.label_ids != IGNORED
    counted[:, 0] = False  # nothing predicts it
    sums = -np.where(counted, prediction.predictions, 0).sum(1, dtype=np.float64)
    counts = counted.sum(1)
    result = Perplexity.from_sums(sums.tolist(), counts.tolist())
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "perplexity_stderr": result.stderr,
        "num_tokens": result.num_tokens,
    }


class KeepSpecialTokens(TrainerCallback):
    """The Trainer gives the model its tokenizer's special tokens as training begins. Recovery changes no vocabulary,
    and a token that was added without resizing the model lies beyond it."""

    def __init__(self, model: torch.nn.Module):
        configs = (model.config, getattr(model, "generation_config", None))
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        self.kept = [(config, name, getattr(config, name, None)) for config in configs if config for name in names]

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        for config, name, value in self.kept:
            setattr(config, name, value)


class RecoveryTrainer(Trainer):
    """[`~transformers.Trainer`] with a rate for attention of its own, that knows how long `warmup_stable_decay` decays
    once it knows how long the run is, and that evaluates by [`token_perplexity`]."""

    args: RecoveryTrainingArguments
    first_step: list[tuple[dict[str, Any], torch.Tensor | int | None, torch.Tensor]]  # batches, counts and losses

    def __init__(self, *args, compute_metrics=token_perplexity, **kwargs):
        super().__init__(*args, compute_metrics=compute_metrics, **kwargs)
        if not isinstance(self.args, RecoveryTrainingArguments):
            raise ValueError(
                f"RecoveryTrainer takes RecoveryTrainingArguments (mha2mla.training), which have all of transformers' "
                f"and more, got {type(self.args).__name__}."
            )
        self.first_step = []
        self.add_callback(KeepSpecialTokens(self.model))

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step == 0:
            self.first_step.append((inputs, num_items_in_batch, loss.detach()))
        return loss

    def first_step_losses(self) -> tuple[float, float] | None:
        """Loss of the rows of the first step, before that step and now; None in a run that went on from a checkpoint.
        To be called by all processes."""
        if not self.first_step:
            return None
        self.model.train()  # and with gradients: the graphs of training are compiled already
        losses = torch.zeros(2, device=self.args.device)
        for inputs, count, before in self.first_step:  # of each, its share of the step's loss
            with self.compute_loss_context_manager():
                now = self.compute_loss(self.model_wrapped, self._prepare_inputs(inputs), num_items_in_batch=count)
            losses += torch.stack((before, now.detach())).float()
        before_mean, now_mean = self.accelerator.reduce(losses, reduction="mean").tolist()
        return before_mean, now_mean

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        sum_in_full_precision(self.accelerator)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        created, rate = self.optimizer is None, self.args.attention_learning_rate
        optimizer = super().create_optimizer(model)
        if created and rate is not None:
            split_groups(optimizer, self.model if model is None else model, ATTENTION, rate)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            steps = round(self.args.decay_fraction * num_training_steps)
            decay = {"num_decay_steps": steps, "decay_type": "1-sqrt"}
            self.args.lr_scheduler_kwargs = decay | (self.args.lr_scheduler_kwargs or {})
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        # A run that goes on from its end would take one more step before it looks whether it is over.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if state_dict is not None:  # gathered: tied weights are in it under all their names
            tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {})
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        with own_class(self.model):
            super()._save(output_dir, state_dict)


def split_groups(optimizer: torch.optim.Optimizer, model: torch.nn.Module, pattern: str, rate: float) -> None:
    """Give the parameters in whose names the pattern is found a rate of their own. No group is left empty."""
    chosen = {id(parameter) for name, parameter in model.named_parameters() if re.search(pattern, name)}
    for group in list(optimizer.param_groups):
        apart = [parameter for parameter in group["params"] if id(parameter) in chosen]
        rest = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        if rest and apart:
            group["params"] = rest
            optimizer.add_param_group({**group, "params": apart, "lr": rate})
        elif apart:
            group["lr"] = rate


@contextmanager
def own_class(model: torch.nn.Module) -> Iterator[None]:
    """A model that FSDP2 shards is of a class that FSDP2 made: as its code, transformers would save torch's."""
    actual = type(model)
    if isinstance(model, FSDPModule):
        own: Any = next(base for base in actual.__mro__ if not issubclass(base, FSDPModule))
        model.__class__ = own
    try:
        yield
    finally:
        model.__class__ = actual


def mend_generation_config(model: PreTrainedModel) -> None:
    """Unset what transformers ignores when it generates and refuses when it saves, such as a temperature without
    `do_sample`: the first checkpoint would end the run."""
    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError as error:
        ignored = re.findall(r"^- `(\w+)`", str(error), re.MULTILINE)  # no attribute of the error has them
        for name in ignored:
            setattr(config, name, getattr(GenerationConfig(), name))
        config.validate(strict=True)
        logger.warning(
            "generation_config: %s cannot be saved, as other settings there switch it off (sampling asks for "
            "do_sample: true). What is saved will be without it.",
            ", ".join(ignored),
        )


def leave_out_dropout(model: PreTrainedModel) -> None:
    """Conversions once took the source's attention dropout over, which keeps even an exact one from its teacher."""
    config = model.config
    converted = isinstance(config, LatentConfigMixin)
    if not converted or not config.attention_dropout:
        return
    dropout, config.attention_dropout = config.attention_dropout, 0.0
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    logger.warning(
        "The model's config has attention_dropout=%g, which conversions no longer take over from the source. It is "
        "trained and saved with 0.",
        dropout,
    )


def compile_layers(model: PreTrainedModel, on: bool = True) -> None:
    """Compile the forward pass of each decoder layer, not its hooks: one graph serves all. Names and weights stay."""
    for layer in model.model.layers:
        layer.__dict__.pop("forward", None)
        if on:
            layer.forward = torch.compile(layer.forward)


def round_entries(model: PreTrainedModel) -> None:
    """
    Let attention read in training what an engine's fp8 cache would give back, see [`round_fp8`]; not in evaluation.

    Rounded as the weights make them: of what is larger than 448 an export may make smaller numbers, and a conversion,
    whose weights are balanced, has none.

    Raises:
        ValueError: If there is no latent attention.
    """
    attentions = [module for module in model.modules() if hasattr(module, "fp8_entries")]
    if not attentions:
        raise ValueError(
            f"kv_cache_dtype='fp8' rounds the entries of latent attention, which {type(model).__name__} has not: run "
            "`mha2mla convert` first."
        )
    for attention in attentions:
        attention.fp8_entries = True


def sum_in_full_precision(accelerator: Accelerator) -> None:
    """FSDP2 computes in 16 bits; accelerate would also round what modules return, here each token's loss, to them, and
    sum gradients over processes in them."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def prepare_model(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    model_arguments: ModelArguments,
    loss: LossArguments,
    compiled: bool = False,
) -> torch.nn.Module:
    """Bind the loss to the model and leave a gradient to what is trained; returns the model, wrapped if by LoRA."""
    use_losses(model, loss.losses, teacher, compiled)
    if model_arguments.kv_cache_dtype == "fp8":
        round_entries(model)
    if model_arguments.trainable == LORA:
        rank, alpha, dropout = model_arguments.lora_rank, model_arguments.lora_alpha, model_arguments.lora_dropout
        return add_lora(model, rank, alpha, dropout, model_arguments.lora_targets)
    freeze_except(model, model_arguments.trainable)
    return model


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    eval_rows: Dataset | None,
    model_arguments: ModelArguments,
    loss: LossArguments,
    arguments: RecoveryTrainingArguments,
    teacher: PreTrainedModel | None = None,
    checkpoint: str | None = None,
) -> RecoveryTrainer:
    """
    Train a model and save it, complete, in `arguments.output_dir`.

    Args:
        model (`PreTrainedModel`): The student: any causal language model with the parts of Llama's.
        tokenizer (`PreTrainedTokenizerBase`): Saved with every checkpoint.
        train_rows, eval_rows (`Dataset`): Rows of [`pack_documents`]; any map-style or iterable data set of such.
        teacher (`PreTrainedModel`, *optional*): The original model; it is moved to the student's device.
        checkpoint (`str`, *optional*): Folder of the checkpoint to go on from.

    Returns:
        The Trainer after training; `trainer.state.log_history` tells the run.
    """
    mend_generation_config(model)
    leave_out_dropout(model)
    use_cache = model.config.use_cache
    if teacher is not None:
        if loss.teacher_int8:
            hold_in_int8(teacher)
        teacher.requires_grad_(False).eval().to(arguments.device)
    if arguments.compile_layers:
        compile_layers(model)
        if teacher is not None:
            compile_layers(teacher)
    prepared = prepare_model(model, teacher, model_arguments, loss, arguments.compile_layers)
    if arguments.process_index == 0:
        logger.info(describe_trainable(prepared))
    trainer = RecoveryTrainer(
        prepared,
        arguments,
        data_collator=collate_packed,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )
    # The Trainer turns the config's use_cache off, and every checkpoint would carry that to its users. The loss calls
    # the model without a cache whatever the config says.
    model.config.use_cache = use_cache
    trainer.train(resume_from_checkpoint=checkpoint)
    last = trainer.state.global_step
    measured = any(line["step"] == last and "eval_loss" in line for line in trainer.state.log_history)
    if eval_rows is not None and not measured:
        trainer.evaluate()
    trainer.save_model(_internal_call=True)  # what goes to the Hub goes there whole, by `push_folder`
    return trainer
