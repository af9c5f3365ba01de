"""Our checkpoints in vLLM, by model classes of our own: all families, biases, norms of queries and keys, and rotary
frequencies that differ from layer to layer, which the stock DeepSeek form (`mha2mla export`) cannot say.

vLLM finds [`register`] by the entry point `vllm.general_plugins`. Attention and cache are vLLM's own, and so are all
layers but latent attention's projections; sizes that its kernels do not take are filled up with zeros.
"""

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Tell vLLM of our models. It calls this in each of its processes, whatever it serves."""
    try:
        from vllm import ModelRegistry
        from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

        from .config import LatentConfigConvertor
    except ImportError as error:  # must not keep vLLM from other models
        logger.warning("This vLLM cannot serve models of mha2mla, which knows versions 0.25 to 0.33: %s", error)
        return

    from mha2mla.modeling import FAMILIES  # which registers their configs with transformers

    for model_type, model in FAMILIES.items():
        ModelRegistry.register_model(model.__name__, f"{__name__}.models:{model.__name__}")
        MODEL_ARCH_CONFIG_CONVERTORS[model_type] = LatentConfigConvertor
