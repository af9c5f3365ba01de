"""What trains and how fast: parameters, rates, and what is summed in which precision."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from test_training_loss import ROWS
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from mha2mla.training import (
    RecoveryTrainer,
    RecoveryTrainingArguments,
    add_lora,
    collate_packed,
    describe_trainable,
    freeze_except,
    make_losses,
    use_losses,
)
from mha2mla.training.trainer import round_entries, sum_in_full_precision
from pico import make_mla, make_source


@pytest.mark.parametrize(
    "trainable, expected",
    [
        ("all", lambda name: True),
        ("attention", lambda name: "self_attn" in name or "norm" in name),
        (r"kv_[ab]_proj|layers\.1\.mlp", lambda name: "kv_" in name or "layers.1.mlp" in name),
    ],
)
def test_what_trains_moves_and_nothing_else_is_in_the_optimizer(trainable, expected, tmp_path):
    model = make_mla()
    freeze_except(model, trainable)
    use_losses(model, make_losses())
    arguments = RecoveryTrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True)
    arguments.set_save(strategy="no")
    trainer = RecoveryTrainer(model, arguments, data_collator=collate_packed, train_dataset=ROWS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == expected(name) == (id(parameter) in in_optimizer), name


def test_lora_trains_adapters_of_the_latent_projections():
    model = add_lora(make_mla(), rank=2, alpha=4, dropout=0.0, targets=["q_proj", "kv_a_proj", "kv_b_proj", "o_proj"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 2 and all(".lora_" in name for name in trained)
    text = describe_trainable(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"Training {count:,} of" in text and "layers.*.self_attn.kv_b_proj.lora_A" in text


def test_errors_name_what_there_is():
    model = make_mla()
    with pytest.raises(ValueError, match=r"'k_proj' is found in no parameter's name.*kv_a_proj.*lora"):
        freeze_except(model, "k_proj")
    with pytest.raises(ValueError, match="is not a regular expression"):
        freeze_except(model, "(")
    with pytest.raises(ValueError, match=r"'k_proj' is no linear layer; there are .*kv_a_proj"):
        add_lora(model, 2, 4, 0.0, ["q_proj", "k_proj"])
    with pytest.raises(ValueError, match="which LlamaForCausalLM has not: run `mha2mla convert`"):
        round_entries(make_source())


def test_schedule_is_warm_up_stable_and_one_minus_root(tmp_path):
    arguments = RecoveryTrainingArguments(
        output_dir=str(tmp_path), max_steps=100, learning_rate=2.0, warmup_steps=0.05, decay_fraction=0.2, use_cpu=True
    )
    assert isinstance(arguments, TrainingArguments)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.max_grad_norm) == (0.9, 0.95, 1.0)
    trainer = RecoveryTrainer(make_mla(), arguments, train_dataset=ROWS)
    trainer.create_optimizer_and_scheduler(100)
    rates = []
    for _ in range(101):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    expected = [2 * i / 5 for i in range(5)] + [2.0] * 75 + [2 * (1 - (i / 20) ** 0.5) for i in range(21)]
    assert rates == pytest.approx(expected)


def test_attention_has_a_rate_of_its_own(tmp_path):
    arguments = RecoveryTrainingArguments(
        output_dir=str(tmp_path), max_steps=10, learning_rate=1.0, attention_learning_rate=3.0, use_cpu=True
    )
    model = make_mla()
    trainer = RecoveryTrainer(model, arguments, train_dataset=ROWS)
    trainer.create_optimizer_and_scheduler(10)
    assert trainer.create_optimizer() is trainer.optimizer  # and it is not split again
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates == {id(p): 3.0 if ".self_attn." in name else 1.0 for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"attention_learning_rate=0\.0 must be above 0"):
        RecoveryTrainingArguments(output_dir=str(tmp_path), attention_learning_rate=0.0)


def test_fsdp2_neither_rounds_losses_nor_sums_gradients_in_16_bits():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_mixed_precision("bf16")
    sum_in_full_precision(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.output_dtype, policy.reduce_dtype) == (torch.bfloat16, None, torch.float32)


def test_the_trainer_sees_to_it_by_itself(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("mha2mla.training.trainer.sum_in_full_precision", seen.append)
    trainer = RecoveryTrainer(make_mla(), RecoveryTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    assert seen == [trainer.accelerator]


def test_stock_arguments_are_refused_at_once(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"RecoveryTrainer takes RecoveryTrainingArguments.* got TrainingArguments"):
        RecoveryTrainer(make_mla(), arguments, data_collator=collate_packed, train_dataset=ROWS)


@pytest.mark.parametrize("with_teacher", [False, True])
def test_the_held_out_loss_does_not_hang_on_the_batch(with_teacher, tmp_path):
    """Rows differ in how many labels count. It is the cross-entropy with a teacher, too."""
    model, rows = make_mla(), ROWS[:5]
    losses = []
    for row in rows:
        for document in torch.tensor(row["input_ids"]).split(row["lengths"]):
            with torch.no_grad():
                logits = model(document[None], use_cache=False).logits[0, :-1]
            losses.append(cross_entropy(logits, document[1:], reduction="none"))
    expected = torch.cat(losses).mean().item()
    use_losses(model, make_losses(), make_source() if with_teacher else None)
    for size in (1, 2, 5):
        arguments = RecoveryTrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=size, use_cpu=True, disable_tqdm=True
        )
        trainer = RecoveryTrainer(model, arguments, data_collator=collate_packed, eval_dataset=rows)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
