"""The chunked losses against the plain ones, and what of the model they move."""

import math

import pytest
import torch
from conftest import pico_tokenizer
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.models.llama.modeling_llama import repeat_kv

from mha2mla.common.robust_error import robust_errors
from mha2mla.training import (
    LossArguments,
    ModelArguments,
    RecoveryTrainingArguments,
    collate_packed,
    freeze_except,
    make_losses,
    recover,
    use_losses,
)
from mha2mla.training.int8 import hold_in_int8, quantize_rows
from mha2mla.training.loss import token_losses
from mha2mla.training.losses.attention import attention_errors
from mha2mla.training.losses.distillation import Distillation, forward_kl
from mha2mla.training.losses.hidden import hidden_errors
from mha2mla.training.losses.language import Language
from mha2mla.training.trainer import token_perplexity
from pico import SOURCES, exact_model, make_mla, make_source, tokens

ROWS = [
    {"input_ids": ids, "lengths": lengths}
    for ids, lengths in zip(
        tokens(8, 12).tolist(),
        [[12], [5, 7], [1, 1, 10], [3, 3, 3, 3], [11, 1], [6, 6], [12], [2, 10]],
        strict=True,
    )
]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def plain_losses(model, teacher, batch, temperature):
    """Cross-entropy and KL from whole logits, without chunks, shifts by hand."""
    keys = dict(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    logits, wanted = model(**keys).logits[:, :-1], teacher(**keys).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    counted = targets != -100
    cross_entropy = nn.functional.cross_entropy(logits[counted], targets[counted], reduction="sum")
    p = (wanted[counted] / temperature).softmax(-1)
    kl = (p * (p.log() - (logits[counted] / temperature).log_softmax(-1))).sum() * temperature**2
    return cross_entropy, kl, counted.sum()


def test_forward_kl_against_a_loop():
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = [4 * sum(p[i, v] * (p[i, v] / q[i, v]).log() for v in range(5)) for i in range(3)]
    torch.testing.assert_close(forward_kl(student, teacher, 2.0), torch.stack(expected))
    assert forward_kl(teacher, teacher, 2.0).abs().max() < 1e-6


@pytest.mark.parametrize("chunk, compiled", [(1, False), (5, False), (7, False), (64, False), (5, True)])
def test_chunks_give_what_whole_logits_give(chunk, compiled):
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(6, 11), nn.Linear(4, 11)
    hidden, teacher_hidden = torch.randn(14, 6, requires_grad=True), torch.randn(14, 4)
    targets = torch.randint(11, (14,)).index_fill(0, torch.tensor([0, 6, 13]), -100)
    losses = [Language(), Distillation(temperature=1.5)]
    teacher = (teacher_head, teacher_hidden)
    cross_entropy, distance = token_losses(losses, head, hidden, targets, *teacher, chunk, compiled)
    (cross_entropy.sum() + distance.sum()).backward()
    assert teacher_head.weight.grad is None
    got = [hidden.grad, head.weight.grad]
    hidden.grad = head.weight.grad = None
    logits = head(hidden)
    expected = nn.functional.cross_entropy(logits, targets, reduction="none")
    kl = forward_kl(logits, teacher_head(teacher_hidden), 1.5) * (targets != -100)
    (expected.sum() + kl.sum()).backward()
    torch.testing.assert_close(cross_entropy, expected)
    torch.testing.assert_close(distance, kl)
    for gradient, wanted in zip(got, (hidden.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_no_tensor_of_the_whole_vocabulary_is_kept():
    """What autograd keeps for the backward pass grows with the hidden size, not with the vocabulary."""
    head, hidden = nn.Linear(4, 1000), torch.randn(64, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        (loss,) = token_losses([Language()], head, hidden, torch.zeros(64, dtype=torch.long), chunk=16)
    loss.sum().backward()
    assert max(kept, default=0) <= 64 * 4


@pytest.mark.parametrize("tied", [False, True])
def test_mixed_loss_and_its_gradient_against_whole_logits(tied):
    model, teacher = make_mla(tie_word_embeddings=tied).train(), make_source(seed=1).requires_grad_(False)
    batch = collate_packed(ROWS)
    cross_entropy, kl, count = plain_losses(model, teacher, batch, 2.0)
    expected = (0.3 * cross_entropy + 0.7 * kl) / count
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    use_losses(model, make_losses(distillation_weight=0.7, temperature=2.0), teacher)
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert_equal(gradients(model), wanted)
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(10)).loss, expected * count / 10)


def test_hidden_errors_against_a_loop():
    states, wanted = [torch.randn(2, 3, 4) for _ in range(2)], [torch.randn(2, 3, 4) for _ in range(2)]
    for i in range(2):
        for t in range(3):
            errors = [
                ((a[i, t] - b[i, t]).square().sum() / b[i, t].square().sum()).item()
                for a, b in zip(states, wanted, strict=True)
            ]
            expected = sum(0.3 * math.log1p(error / 0.3) for error in errors) / 2
            assert hidden_errors(states, wanted)[3 * i + t].item() == pytest.approx(expected, rel=1e-5)
    assert hidden_errors(states, states).abs().max() == 0


def test_states_behind_each_layer_join_the_loss():
    model, teacher = make_mla().train(), make_source(seed=1).requires_grad_(False)
    batch = collate_packed(ROWS)
    keys = dict(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    ends = [m.model.layers[-1].register_forward_hook(lambda m, a, o: last.append(o)) for m in (model, teacher)]
    last: list[torch.Tensor] = []  # the last of `hidden_states` comes behind the final norm
    states, wanted = (m(**keys, output_hidden_states=True).hidden_states[1:-1] for m in (model, teacher))
    for end in ends:
        end.remove()
    hidden = hidden_errors([*states, last[0]], [*wanted, last[1]]).view(len(ROWS), 12)[:, :-1]
    hidden = hidden[batch["labels"][:, 1:] != -100].sum()
    cross_entropy, kl, count = plain_losses(model, teacher, batch, 1.0)
    expected = (0.3 * cross_entropy + 0.7 * kl + 2.0 * hidden) / count
    expected.backward()
    before = gradients(model)
    model.zero_grad()
    use_losses(model, make_losses(distillation_weight=0.7, hidden_weight=2.0), teacher)
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert_equal(gradients(model), before)


def reference_flash_attention(
    module, query, key, value, attention_mask, dropout, scaling,
    cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **kwargs,
):  # fmt: skip
    """What flash attention makes of a batch that it is told the documents of: sdpa in each of them."""
    sizes = cu_seq_lens_q.diff()
    assert attention_mask is None and dropout == 0 and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert type(max_length_q) is int and max_length_q == max_length_k == sizes.max()
    states = query, *(repeat_kv(each, query.shape[1] // key.shape[1]) for each in (key, value))
    documents = zip(*(each.transpose(1, 2).flatten(0, 1).split(sizes.tolist()) for each in states), strict=True)
    outputs = [
        nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in each), is_causal=True, scale=scaling)
        for each in documents
    ]
    return torch.cat(outputs, 1).transpose(0, 1).unflatten(0, (len(query), -1)), None  # [B, T, H, v]


@pytest.mark.parametrize("objective", ["language", "attention"])
def test_flash_attention_is_told_where_documents_begin(objective):
    AttentionInterface.register("flash_reference", reference_flash_attention)
    AttentionMaskInterface.register("flash_reference", flash_attention_mask)
    losses, gradients = [], []
    for implementation in ("sdpa", "flash_reference"):
        model, teacher = make_mla().train(), make_source()
        for each in (model, teacher):
            each.config._attn_implementation = implementation  # set_attn_implementation looks for a real one
        options = dict(hidden_weight=1.0) if objective == "language" else dict(objective=objective)
        use_losses(model, make_losses(**options), teacher)
        losses.append(model(**collate_packed(ROWS)).loss)
        losses[-1].backward()
        gradients.append(model.model.layers[0].self_attn.kv_a_proj.weight.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_evaluation_gives_the_likelihood_of_each_label():
    model, batch = make_mla(), collate_packed(ROWS)
    cross_entropy, _, count = plain_losses(model, model, batch, 1.0)
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits.log_softmax(-1)
    use_losses(model, make_losses(), make_source())
    with torch.no_grad():
        output = model(**batch)
    torch.testing.assert_close(output.loss, cross_entropy / count)
    for row in range(len(ROWS)):
        for t in range(1, 12):
            label = batch["labels"][row, t]
            expected = torch.tensor(0.0) if label == -100 else logits[row, t - 1, label]
            torch.testing.assert_close(output.log_likelihoods[row, t], expected)
    prediction = type("P", (), dict(predictions=output.log_likelihoods.numpy(), label_ids=batch["labels"].numpy()))
    metrics = token_perplexity(prediction)
    assert metrics["num_tokens"] == count
    assert metrics["perplexity"] == pytest.approx((cross_entropy / count).exp().item(), rel=1e-5)


def one_step(folder, model, batch_size, accumulation, loss=None, teacher=None, **options):
    arguments = RecoveryTrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        use_cpu=True,
        save_strategy="no",
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        warmup_steps=0,
        disable_tqdm=True,
        **options,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = ModelArguments(model="")
    recover(model, pico_tokenizer(), ROWS, None, settings, loss or LossArguments(), arguments, teacher)
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("distil", [None, {"hidden_weight": 0.0}, {"hidden_weight": 1.0}, {"objective": "attention"}])
def test_accumulated_gradients_are_those_of_one_large_batch(distil, tmp_path):
    """Rows differ in how many labels count; each label must weigh the same wherever it falls."""
    moves = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        loss, teacher = LossArguments(), None
        if distil is not None:
            loss, teacher = LossArguments("source", losses=make_losses(**distil)), make_source()
        moves.append(one_step(tmp_path, make_mla(), batch_size, accumulation, loss, teacher))
    assert max(move.abs().max() for move in moves[0].values()) > 1e-3
    assert_equal(moves[1], moves[0])
    assert_equal(moves[2], moves[0])


def test_gradient_checkpointing_changes_nothing(tmp_path):
    distil = (LossArguments("source", losses=make_losses(hidden_weight=1.0)), make_source())
    plain = one_step(tmp_path, make_mla(), 8, 1, *distil)
    assert_equal(one_step(tmp_path, make_mla(), 8, 1, *distil, gradient_checkpointing=True), plain)


def test_attention_errors_against_running_each_layer_by_hand():
    model, teacher = make_mla().train(), make_source()
    batch = collate_packed(ROWS)
    keys = dict(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    with torch.no_grad():
        states = teacher(**keys, use_cache=False, output_hidden_states=True).hidden_states[:2]
        rotary = teacher.model.rotary_emb(states[0], keys["position_ids"])
        document = (keys["position_ids"] == 0).cumsum(1)
        mask = (document[:, None, :, None] == document[:, None, None, :]) & torch.ones(12, 12).bool().tril()
        errors = []
        for layer, original, state in zip(model.model.layers, teacher.model.layers, states, strict=True):
            x = original.input_layernorm(state)
            errors.append(robust_errors(layer.self_attn(x, rotary, mask)[0], original.self_attn(x, rotary, mask)[0]))
    expected = torch.stack(errors).mean(0)
    torch.testing.assert_close(attention_errors(model, teacher, **keys), expected.flatten())
    use_losses(model, make_losses(objective="attention"), teacher)
    loss = model(**batch).loss
    counted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    torch.testing.assert_close(loss, expected[counted].mean())
    loss.backward()
    assert all((p.grad is not None) == (".self_attn." in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", SOURCES)
def test_an_exact_conversion_is_at_no_distance(kind):
    """Also of Granite, which multiplies what its attention and its head give."""
    teacher = make_source(kind).requires_grad_(False)
    model = exact_model(teacher, "shared")
    ids, positions = tokens(2, 12), torch.arange(12).expand(2, 12)
    assert attention_errors(model, teacher, ids, positions).max() < 1e-6
    model.train()
    cross_entropy, both = [], dict(distillation_weight=0.5, hidden_weight=1.0)
    for losses, divisor in ((make_losses(distillation_weight=0.0), 1), (make_losses(**both), 2)):
        use_losses(model, losses, teacher)
        cross_entropy.append(divisor * model(input_ids=ids, position_ids=positions, labels=ids).loss)
        del model.forward
    torch.testing.assert_close(*cross_entropy)


def test_dropout_of_an_older_conversion_is_left_out(tmp_path, caplog):
    plain = one_step(tmp_path, make_mla(), 8, 1)
    assert "attention_dropout" not in caplog.text
    older = make_mla(attention_dropout=0.5)
    assert_equal(one_step(tmp_path, older, 8, 1), plain)
    assert older.config.attention_dropout == 0 and "config has attention_dropout=0.5" in caplog.text


def test_matching_attention_brings_it_nearer(tmp_path):
    model, teacher = make_mla("shared"), make_source().requires_grad_(False)
    batch = collate_packed(ROWS)
    use_losses(model.train(), make_losses(objective="attention"), teacher)
    freeze_except(model, "self_attn")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_teacher_in_8_bits_takes_half_and_says_the_same():
    codes, scales = quantize_rows(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert ((codes * scales - weight).abs() <= scales / 2 + 1e-6).all() and codes.dtype == torch.int8
    assert quantize_rows(torch.zeros(2, 3))[0].eq(0).all()  # a row of zeros has no scale of its own
    for kind in ("gqa", "llama-bias"):
        teacher = make_source(kind).bfloat16()
        with torch.no_grad():
            expected = teacher(tokens(2, 9)).logits.float()
            before = sum(p.numel() * p.element_size() for p in teacher.model.layers.parameters())
            hold_in_int8(teacher)
            found = teacher(tokens(2, 9)).logits.float()
        held = [*teacher.model.layers.parameters(), *teacher.model.layers.buffers()]
        assert sum(t.numel() * t.element_size() for t in held) < 0.6 * before
        p, q = expected.log_softmax(-1), found.log_softmax(-1)
        assert (p.exp() * (p - q)).sum(-1).mean() < 2e-3
        assert not torch.equal(expected, found)


def test_a_model_with_a_loss_still_writes():
    """A callback that looks at samples during training."""
    model, ids = make_mla().eval(), tokens(2, 6)
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(ids, **options)
    use_losses(model, make_losses())
    assert model.generate(ids, **options).equal(expected)
