"""The shipped configurations of accelerate, on two processes of a CPU; DeepSpeed's where it is installed.

accelerate shards on GPUs only. The launched script tells it that the CPU is one, and gloo its backend.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import launch
from safetensors.torch import load_file
from test_training_run import arguments, folder, losses  # noqa: F401  # a fixture
from transformers.integrations import deepspeed as integration

from mha2mla.cli.main import main
from mha2mla.cli.train import parse_arguments
from mha2mla.training import run
from mha2mla.training.parameters import meta_model
from pico import make_mla

CONFIGURATIONS = Path(__file__).parents[1] / "docs" / "examples" / "accelerate"
ON_CPU = """
import sys
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
from mha2mla.cli.main import main
status = main(sys.argv[1:])
print(PartialState().distributed_type, flush=True)
sys.exit(status)
"""


@pytest.mark.xdist_group("several processes")
@pytest.mark.parametrize("configuration", ["fsdp2", "zero2", "zero3"])
def test_sharded_runs_give_the_curve_and_the_checkpoints_of_one_process(folder, configuration):  # noqa: F811
    if configuration != "fsdp2":
        pytest.importorskip("deepspeed")
    teacher = ("--teacher", folder / "source", "--attention_learning_rate", "3e-3")
    assert main(arguments(folder, "one", *teacher)) == 0
    script = folder / "on_cpu.py"
    script.write_text(ON_CPU)
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no"]
    accelerate += ["--config_file", CONFIGURATIONS / f"{configuration}.yaml", "--main_process_port"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    for resumed in (None, folder / "two" / "checkpoint-4", "true"):
        more = () if resumed is None else ("--resume_from_checkpoint", resumed)
        if resumed == "true":  # killed before the end was saved
            for name in ("trainer_state.json", "model.safetensors"):
                (folder / "two" / name).unlink()
        command = arguments(folder, "two", *teacher, "--per_device_train_batch_size", 1, *more)
        command.remove("--use_cpu")
        done = launch(lambda port, command=command: [*accelerate, port, script, *command], environment)
        assert done.returncode == 0, done.stderr
        assert ("FSDP" if configuration == "fsdp2" else "DEEPSPEED") in done.stdout
        assert losses(folder / "two") == pytest.approx(losses(folder / "one"), rel=1e-4)
    for place in ("", "checkpoint-4"):
        got, expected = (load_file(folder / name / place / "model.safetensors") for name in ("two", "one"))
        assert set(got) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_zero3_shards_neither_the_teacher_nor_the_look_at_the_model():
    """What `from_pretrained` and `from_config` would do while a configuration of stage 3 is in force."""

    class Stage3:
        def is_zero3(self):
            return True

    class Plugin:
        dschf = Stage3()

    *_, training = parse_arguments(["--model", "m", "--data", "d", "--output_dir", "o", "--use_cpu"])
    training.deepspeed_plugin = Plugin()
    integration.set_hf_deepspeed_config(Plugin.dschf)
    try:
        with run.load_whole(training):
            assert not integration.is_deepspeed_zero3_enabled()
        assert integration.is_deepspeed_zero3_enabled()
        assert all(parameter.is_meta for parameter in meta_model(make_mla().config).parameters())
    finally:
        integration.unset_hf_deepspeed_config()
