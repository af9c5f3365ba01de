"""Losses are files: found by their names, with options, checks and words of their own."""

import pytest
import torch

from mha2mla.cli.train import parse_arguments
from mha2mla.training import LossArguments, collate_packed, losses, make_losses, use_losses
from mha2mla.training.losses import Setting, find_losses, weigh
from pico import make_mla, make_source, tokens

REQUIRED = ["--model", "m", "--data", "d", "--output_dir", "o", "--use_cpu"]
ROWS = [{"input_ids": ids, "lengths": [5, 7]} for ids in tokens(2, 12).tolist()]

TOY = """
from dataclasses import dataclass, field
from mha2mla.training.losses.base import BatchLoss

@dataclass
class Toy(BatchLoss):
    toy_weight: float = field(default=0.0, metadata={"help": "Weight of a constant."})
    toy_constant: float = field(default=2.0, metadata={"help": "The constant."})

    @property
    def weight(self):
        return self.toy_weight

    def check(self, setting):
        if self.toy_constant < 0:
            raise ValueError(f"toy_constant={self.toy_constant} must be 0 or more.")

    def compute(self, batch):
        return self.toy_constant * batch.counted.sum()

    def describe(self, teacher):
        return f"the constant {self.toy_constant:g}"
"""


def setting(
    chosen, teacher="source", teacher_config=None, trained=("model.layers.0.self_attn.q_proj",), sharded=False
):
    config = make_mla().config
    arguments = LossArguments(teacher, losses=chosen)
    active = [loss for _, loss in arguments.weighed]
    return Setting(config, teacher, teacher_config or make_source().config, list(trained), sharded, active)


def test_every_loss_is_found_and_weighed():
    assert list(find_losses()) == ["attention", "distillation", "hidden", "language"]

    def weights(with_teacher, **options):
        chosen = make_losses(**options)
        names = {id(loss): name for name, loss in chosen.items()}
        return {names[id(loss)]: weight for weight, loss in weigh(chosen.values(), with_teacher)}

    assert weights(False) == weights(False, distillation_weight=0.9) == {"language": 1}
    assert weights(True) == {"distillation": 0.5, "language": 0.5}
    assert weights(True, distillation_weight=1.0, hidden_weight=4.0) == {"distillation": 1, "hidden": 4}
    assert weights(True, distillation_weight=0.0) == {"language": 1}
    assert weights(True, objective="attention") == {"attention": 1}


def test_a_file_is_enough_for_a_loss(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(tmp_path)])
    _, loss, *_ = parse_arguments([*REQUIRED, "--teacher", "t", "--toy_weight", "0.25", "--toy-constant", "8"])
    assert loss.describe() == "0.5 KL(t, model) at temperature 1 + 0.5 cross-entropy + 0.25 the constant 8"
    with pytest.raises(ValueError, match=r"toy_constant=-1 must be 0 or more"):
        make_losses(toy_constant=-1)["toy"].check(setting({}))
    batch, values = collate_packed(ROWS), []
    for options in ({}, {"toy_weight": 0.25, "toy_constant": 8.0}):
        model = make_mla().train()
        use_losses(model, make_losses(**options))
        values.append(model(**batch).loss)
    torch.testing.assert_close(values[1], values[0] + 2)


def test_the_sum_in_words():
    assert LossArguments().describe() == "cross-entropy"
    losses = make_losses(distillation_weight=0.7, temperature=2.0, hidden_weight=3.0)
    parts = "0.7 KL(t, model) at temperature 2", "3 relative error of the states after each layer", "0.3 cross-entropy"
    assert LossArguments("t", losses=losses).describe() == " + ".join(parts)
    assert LossArguments("t", teacher_int8=True, losses=losses).describe().startswith("0.7 KL(t in 8 bits, model)")
    with pytest.raises(ValueError, match="teacher_int8 needs --teacher"):
        LossArguments(teacher_int8=True)
    assert "attention outputs" in LossArguments("t", losses=make_losses(objective="attention")).describe()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(distillation_weight=1.5), r"distillation_weight=1\.5 must lie between 0 and 1"),
        (dict(distillation_weight=float("nan")), r"distillation_weight=nan must lie between 0 and 1"),
        (dict(temperature=0.0), r"temperature=0\.0 must be above 0"),
        (dict(hidden_weight=-1.0), r"hidden_weight=-1\.0 must be 0 or more"),
        (dict(objective="atention"), r"objective='atention' must be language or attention"),
        (dict(hiden_weight=1.0), r"There is no option hiden_weight of a loss"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_losses(**options)


def test_what_does_not_go_together_is_refused_before_weights_are_read():
    attention, hidden = make_losses(objective="attention"), make_losses(hidden_weight=1.0)
    attention["attention"].check(setting(attention))
    hidden["hidden"].check(setting(hidden))
    deeper, other_heads = make_source("mqa").config, make_source().config
    deeper.num_hidden_layers, other_heads.head_dim = 3, 24
    for loss, changed, message in (
        (attention["attention"], dict(sharded=True), "which sharding cannot follow"),
        (attention["attention"], dict(trained=["lm_head"]), "but lm_head would be trained too"),
        (attention["attention"], dict(teacher_config=other_heads), "has head_dim=24, the model 12"),
        (hidden["hidden"], dict(teacher_config=deeper), r"hidden_weight=1.0: .* num_hidden_layers=3, the model 2"),
        (hidden["hidden"], dict(teacher=None), "hidden_weight=1.0 adds to the distance to a teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            loss.check(setting(attention if loss is attention["attention"] else hidden, **changed))
    both = make_losses(objective="attention", hidden_weight=1.0)
    with pytest.raises(ValueError, match="and the objective language"):
        both["hidden"].check(setting(both))
    with pytest.raises(ValueError, match="nothing to minimise"):
        use_losses(make_mla(), {"distillation": make_losses()["distillation"]})
