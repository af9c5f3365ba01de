"""`mha2mla train` as a function: check, read the text, load the models, train, and write what was done."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, SchedulerType, set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from mha2mla.common.adapters import MERGED
from mha2mla.common.files import open_weights
from mha2mla.common.loading import copy_notices, load_model, load_tokenizer
from mha2mla.common.records import copy_record
from mha2mla.common.text_sources import hub_datasets
from mha2mla.common.tokenizer import check_known
from mha2mla.modeling import LatentConfigMixin

from .arguments import DataArguments, LossArguments, ModelArguments
from .checks import check_losses, check_model, check_run
from .data import data_sources, load_rows, reading_rows
from .model_card import TrainingRecord, write_model_card
from .parameters import LORA, describe_trainable
from .publish import push_folder
from .resume import (
    all_steps_taken,
    check_order,
    check_settings,
    check_whole,
    describe_order,
    describe_settings,
    describe_text,
    find_checkpoint,
    is_finished,
    wants_resume,
    write_settings,
)
from .saved_dtype import restore_dtype
from .trainer import RecoveryTrainer, mend_generation_config, recover
from .trainer_arguments import RecoveryTrainingArguments

logger = logging.getLogger(__name__)

WORSE = 1.01  # times the loss that the rows of the first step had: more than rounding in 16 bits does


def train(
    model: ModelArguments, loss: LossArguments, data: DataArguments, arguments: RecoveryTrainingArguments
) -> RecoveryTrainer | None:
    """
    Recovery fine-tuning of a converted checkpoint.

    Everything that the user can get wrong is looked at before the model's weights are read. The output folder gets
    `checkpoint-N`s, and at the end the trained model (or adapter), its tokenizer, code and model card.

    Returns:
        The Trainer after training; None if the output folder holds the finished run already.

    Raises:
        ValueError: If the checkpoint, the data or the options do not fit; the message names the value and the remedy.
    """
    check_run(model, loss, data, arguments)
    checkpoint = find_checkpoint(arguments)
    tell = logger.info if arguments.process_index == 0 else logger.debug
    if wants_resume(arguments):
        if is_finished(arguments, checkpoint, model):
            tell("%s holds the finished run: there is nothing left to do", arguments.output_dir)
            return None
        if checkpoint is not None:
            check_whole(checkpoint)
        if checkpoint is not None and all_steps_taken(checkpoint, arguments):
            tell("%s is the end of the run: nothing is left to train, the model will be saved", checkpoint)
        else:
            tell("Going on from %s", checkpoint or "the start: there is no complete checkpoint yet")
    if Path(model.model).is_dir():
        model.model = str(Path(model.model).resolve())  # an adapter names its base, and must find it from anywhere
    config, trained = check_model(model, data.length)
    settings = describe_settings(model, arguments, config)
    order = describe_order(data, arguments)
    check_settings(checkpoint, settings)
    check_order(checkpoint, order, arguments)
    tokenizer = load_tokenizer(model.model, "model", model.trust_remote_code)
    check_losses(loss, config, trained, tokenizer, arguments, model.trust_remote_code)
    with arguments.main_process_first(desc="tokenising"):
        train_rows, eval_rows = load_rows(data, tokenizer, arguments.seed)
    if not data.streaming:
        check_tokens([rows for rows in (train_rows, eval_rows) if rows is not None], tokenizer, config)
    order["text"] = describe_text(data, train_rows)
    check_order(checkpoint, order, arguments)

    set_seed(arguments.seed)
    student = load_weights(model.model, "model", model, model.dtype)
    teacher = None
    if loss.teacher is not None:
        with load_whole(arguments):
            teacher = load_weights(loss.teacher, "teacher", model, "bfloat16" if arguments.bf16 else model.dtype)
    if arguments.process_index == 0:
        write_settings(Path(arguments.output_dir), settings | order)
    with reading_rows(data):
        trainer = recover(student, tokenizer, train_rows, eval_rows, model, loss, arguments, teacher, checkpoint)

    if trainer.is_world_process_zero():
        folder = Path(arguments.output_dir)
        record = describe_run(trainer, model, loss, data, arguments)
        title = arguments.hub_model_id or folder.resolve().name
        finish(folder, title, record, model, config, adapter=model.trainable == LORA)
        if model.merge:
            save_merged(folder, tokenizer, model)
            finish(folder / MERGED, f"{title}-merged", record, model, config, adapter=False)
        logger.info("Wrote %s", folder)
        if arguments.push_to_hub:
            logger.info("Pushed to %s", push_folder(folder, trainer.hub_model_id, bool(arguments.hub_private_repo)))
    losses = trainer.first_step_losses()  # when everything is written: it takes as much memory as a step
    if losses is not None and trainer.is_world_process_zero():
        tell_change(losses, arguments)
    trainer.accelerator.wait_for_everyone()
    trainer.save_state()  # last: it says that the run is finished
    return trainer


def check_tokens(
    parts: Sequence[Iterable[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> None:
    """Raise a `ValueError` for a token that was added to the tokenizer and not to the model. Others of that kind, such
    as `[PAD]`, may never be met."""
    if len(tokenizer) > config.vocab_size:
        check_known("The text", max(max(row["input_ids"]) for rows in parts for row in rows), config.vocab_size)


def tell_change(losses: tuple[float, float], arguments: RecoveryTrainingArguments) -> None:
    """Adam takes steps of the same size whether much is to be mended or nothing: at a rate that brings a bad start
    forward, a good one first gets worse, and a short run ends there."""
    before, now = losses
    if now <= WORSE * before:
        logger.info("Loss of the first step's rows: %.3g before it, %.3g now", before, now)
        return
    rates = f"--learning_rate (now {arguments.learning_rate:g})"
    if arguments.attention_learning_rate is not None:
        rates += f" and --attention_learning_rate ({arguments.attention_learning_rate:g})"
    logger.warning(
        "The loss of the first step's rows rose from %.3g to %.3g: training made this model worse. Take more steps, "
        "or lower %s to a tenth; what lost little by its conversion may need no recovery at all.",
        before,
        now,
        rates,
    )


def close(trainer: RecoveryTrainer) -> None:
    """Call it last: closes the process group, which NCCL warns about otherwise, and waits for gloo's threads. DDP and
    FSDP2 keep a closed group, so these live on, and one that still frees a tensor as Python ends aborts the process:
    it asks for the interpreter's lock in a destructor (pytorch/pytorch issue 190489). They are done long before this
    is."""
    gloo = distributed.is_initialized() and "gloo" in distributed.get_backend_config()
    trainer.accelerator.end_training()
    if gloo:
        time.sleep(1)


def load_weights(name: str, role: str, model: ModelArguments, dtype: str) -> PreTrainedModel:
    return load_model(
        name,
        role,
        model.trust_remote_code,
        dtype=getattr(torch, dtype),
        attn_implementation=model.attn_implementation,
    )


def finish(
    folder: Path, title: str, record: TrainingRecord, model: ModelArguments, config: LatentConfigMixin, adapter: bool
) -> None:
    """What goes beside trained weights: their type, the card, and what comes from the converted checkpoint."""
    if not adapter:
        restore_dtype(folder, getattr(config, "dtype", None))
    write_model_card(folder, title, record, config, adapter)
    copy_record(model.model, folder)
    copy_notices(model.model, folder)
    open_weights(folder)


@contextmanager
def load_whole(arguments: RecoveryTrainingArguments) -> Iterator[None]:
    """Where a model is loaded whole: `from_pretrained` would shard it for DeepSpeed ZeRO-3, whose engine gathers the
    student's weights only. (The plugin's own context manager for this no longer tells transformers.)"""
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(getattr(arguments, "hf_deepspeed_config", None) or plugin.dschf)


def save_merged(folder: Path, tokenizer: PreTrainedTokenizerBase, model: ModelArguments) -> None:
    """Merge the adapter that was saved into the converted checkpoint, whatever the trained copy was sharded by."""
    from peft import PeftModel  # an optional dependency

    base = load_weights(model.model, "model", model, model.dtype)  # peft's own loading would resize the vocabulary
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    mend_generation_config(merged)
    merged.save_pretrained(folder / MERGED)
    tokenizer.save_pretrained(folder / MERGED)


def describe_run(
    trainer: RecoveryTrainer,
    model: ModelArguments,
    loss: LossArguments,
    data: DataArguments,
    arguments: RecoveryTrainingArguments,
) -> TrainingRecord:
    """What was done, for the model card, from the arguments and the Trainer's log."""
    sources, _ = data_sources(data)
    total = sum(source.weight for source in sources)
    shares = [f"{source} {100 * source.weight / total:.3g} %" for source in sources]
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry for entry in history if "eval_perplexity" in entry]
    last = held_out[-1] if held_out else None
    batch = trainer.state.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    rate = f"rate {arguments.learning_rate:g}"
    if arguments.attention_learning_rate is not None:
        rate += f" (attention {arguments.attention_learning_rate:g})"
    rows = f"{batch} rows x {data.length} tokens a step"
    if data.short_lengths:
        sizes = ", ".join(map(str, data.short_lengths))
        rows += f", in turn with documents cut to {sizes} and whole"
    return TrainingRecord(
        base=model.model,
        data=shares,
        datasets=hub_datasets(data.data),
        trained=f"{model.trainable}: " + describe_trainable(trainer.model).splitlines()[0].removeprefix("Training "),
        objective=loss.describe() + (", entries rounded to fp8" if model.kv_cache_dtype == "fp8" else ""),
        schedule=(
            f"AdamW {arguments.adam_beta1:g}/{arguments.adam_beta2:g}, {rate}, "
            f"{SchedulerType(arguments.lr_scheduler_type).value}, {rows}"
        ),
        steps=trainer.state.global_step,
        tokens=trainer.state.num_input_tokens_seen,
        loss=losses[-1] if losses else None,
        held_out=None
        if last is None
        else f"perplexity {last['eval_perplexity']:.3f} ± {last['eval_perplexity_stderr']:.3f} "
        f"({last['eval_num_tokens']:,} tokens)",
    )
