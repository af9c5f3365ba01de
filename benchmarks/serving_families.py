"""Random models of every family that the vLLM plugin serves, to run through `serving_quality.py` where no real one is:

    python benchmarks/serving_families.py olmo2 OUTPUT --tokenizer MODEL
    python benchmarks/serving_quality.py OUTPUT --text wikitext.jsonl

With sizes that are filled up to those of kernels, other rotary frequencies in each layer, and every part of use: norms
of queries and keys, experts, a dense layer among them.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from mha2mla.modeling import FAMILIES

EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256)
FIELDS: dict[str, dict] = {
    "llama": dict(attention_bias=True),
    "qwen3": {},
    "olmo2": dict(num_nope_key_heads=4),
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": dict(**EXPERTS, mlp_only_layers=[0], norm_topk_prob=True),
}


def random_model(family: str, vocab_size: int):
    """Four layers, eight heads of 64, a latent of 160 and a rotary key of 32."""
    model_class = FAMILIES[f"mla_{family}"]
    config = model_class.config_class(
        vocab_size=vocab_size,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        kv_lora_rank=160,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.06,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **FIELDS[family],
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "q_norm" in name or "k_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.rope_frequencies.copy_(torch.arange(16)[None] + index)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FIELDS)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="A model's folder.")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    random_model(args.family, len(tokenizer)).to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
