"""What made tests/checkpoints: for each layout a tiny checkpoint of the newest format version with what it answers,
and the code that was saved beside the weights. To be run for a new format version; those that are there stay.

    PYTHONPATH=src python tests/make_checkpoints.py
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from mha2mla.modeling import MLALlamaForCausalLM
from mha2mla.modeling.latent_config import FORMAT_VERSION
from pico import LAYOUTS, make_mla

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SIZES = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=8,
    head_dim=8,
    kv_lora_rank=6,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
)
DIFFERENT = {
    "shared": dict(attention_bias=True, rope_parameters={"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0}),
    "per-head": dict(tie_word_embeddings=True),
}


@torch.no_grad()
def expected(model: MLALlamaForCausalLM) -> dict[str, torch.Tensor]:
    """A prompt, its logits, and the greedy tokens that follow."""
    ids = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    out = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return {"ids": ids, "logits": model(ids).logits, "tokens": out}


def main() -> None:
    code = CHECKPOINTS / f"v{FORMAT_VERSION}-code"
    for layout in LAYOUTS:
        folder = CHECKPOINTS / f"v{FORMAT_VERSION}-{layout}"
        for path in (folder, code):
            shutil.rmtree(path, ignore_errors=True)
        model = make_mla(layout, **(SIZES | DIFFERENT[layout]))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        for layer in model.model.layers:
            layer.self_attn.rope_frequencies.remainder_(4)  # make_mla drew them for a larger head
        model.save_pretrained(folder)
        save_file(expected(model), folder / "expected.safetensors")
        code.mkdir()
        for path in folder.glob("*.py"):
            path.rename(code / path.name)


if __name__ == "__main__":
    main()
