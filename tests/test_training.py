"""The stock Trainer, gradient checkpointing and peft work on the model as on any other."""

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mha2mla.modeling import CACHE_ARGUMENT
from pico import FORMS, make_mla, tokens

PROJECTIONS = ["q_proj", "kv_a_proj", "kv_b_proj", "o_proj"]


def train_one_step(model, folder, **kwargs):
    ids = tokens(4, 12).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=0,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        save_steps=1,
        **kwargs,
    )
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))
    trainer.train()
    return trainer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_step_moves_every_parameter_and_saves_a_loadable_checkpoint(form, checkpointing, tmp_path):
    model = make_mla(form)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_one_step(model, tmp_path, gradient_checkpointing=checkpointing)
    for name, parameter in model.named_parameters():
        assert not torch.equal(before[name], parameter), f"{name} did not move"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert type(loaded) is type(model)
    ids = tokens(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = tokens(2, 8)
    gradients = []
    for checkpointing in (False, True):
        model = make_mla().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_lora_attached_merged_saved_and_reloaded(tmp_path):
    model = make_mla("shared")
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = tokens(2, 9)
    with torch.no_grad():
        untouched = model(ids).logits
    torch.manual_seed(0)
    peft = get_peft_model(
        model,
        LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False, lora_alpha=32, task_type="CAUSAL_LM"),
    )
    peft.eval()
    with torch.no_grad():
        expected = peft(ids).logits
        assert (expected - untouched).abs().max() > 0.1  # the adapter does something
        # The absorbed path reads kv_b_proj as a matrix: behind a cache it must see the adapter too.
        past = peft(ids[:, :8], use_cache=True).past_key_values
        torch.testing.assert_close(
            peft(ids[:, 8:], **{CACHE_ARGUMENT: past}).logits, expected[:, 8:], rtol=1e-4, atol=1e-4
        )
        greedy = peft.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        uncached = peft.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=False)
        assert greedy.tolist() == uncached.tolist()

        peft.save_pretrained(tmp_path / "adapter")
        for loaded in (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"),
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        ):
            torch.testing.assert_close(loaded.eval()(ids).logits, expected)
        merged = peft.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(reloaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_lora_training_step_moves_adapters_and_nothing_else(tmp_path):
    peft = get_peft_model(make_mla(), LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False))
    before = {name: p.detach().clone() for name, p in peft.named_parameters()}
    train_one_step(peft, tmp_path)
    for name, parameter in peft.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name


def test_outputs_that_users_ask_for():
    model = make_mla()
    model.set_attn_implementation("eager")
    ids = tokens(2, 7)
    with torch.no_grad():
        full = model(ids, output_attentions=True, output_hidden_states=True)
        assert len(full.hidden_states) == 3 and len(full.attentions) == 2
        assert full.attentions[0].shape == (2, 4, 7, 7)
        last = model(ids, logits_to_keep=2).logits
        torch.testing.assert_close(last, full.logits[:, -2:])
        # A decoding step (absorbed) gives attentions as well.
        past = model(ids[:, :6], use_cache=True).past_key_values
        step = model(ids[:, 6:], **{CACHE_ARGUMENT: past}, output_attentions=True)
    torch.testing.assert_close(step.attentions[0], full.attentions[0][:, :, -1:], rtol=1e-4, atol=1e-5)


def test_num_items_in_batch_reaches_the_loss():
    model, ids = make_mla(), tokens(2, 7)
    mean = model(ids, labels=ids).loss
    summed = model(ids, labels=ids, num_items_in_batch=torch.tensor(2)).loss
    torch.testing.assert_close(summed, mean * 12 / 2)  # 2 x 6 predicted tokens


def test_packed_documents_do_not_see_each_other():
    """Positions that start again mark a document border, as for Llama."""
    model, ids = make_mla(), tokens(1, 10)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        first, second = model(ids[:, :4]).logits, model(ids[:, 4:]).logits
    torch.testing.assert_close(packed, torch.cat((first, second), dim=1), rtol=1e-4, atol=1e-5)
