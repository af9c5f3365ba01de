"""The kinds of cache by their names, the same for `mha2mla eval` and `mha2mla bench`."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache, cache_utils
from transformers.cache_utils import QuantizedCache

from mha2mla.modeling import CACHE_ARGUMENT, LatentConfigMixin, quantized_cache
from mha2mla.modeling.latent_quantized_entries import MEAN_TOKENS

from .engine_cache import engine_fp8_cache

DYNAMIC_NAME, STATIC_NAME, COMPILED_NAME = "dynamic", "static", "static-compiled"
LATENT = "latent"  # this package's own format, for converted models
FP8 = "fp8"  # likewise for converted models; for others, transformers' own, from 5.23 on
VLLM, VLLM_NAME = "vllm", "vllm-fp8"  # what vLLM's fp8 cache gives back, for any model
# What each backend can do, and what has to be installed for it.
BACKEND_BITS = {LATENT: (8, 4), FP8: (8,), VLLM: (8,), "quanto": (4, 2), "hqq": (8, 4, 2)}
BACKEND_PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
BACKEND_MODULES = {"quanto": "optimum.quanto", "hqq": "hqq"}

RESIDUAL_LENGTH = 32  # recent tokens in full precision, for all backends
# Tokens that go through a model at a time where a text is read through a quantised cache: they see one another, and
# the window, in full precision, so a long piece would hide what quantising costs while decoding.
PIECE = 8


@dataclass(frozen=True)
class CacheKind:
    """
    Attributes:
        name (`str`): As the user gave it: "dynamic", which grows; "static", of one size; "static-compiled", the same
            with a compiled decoding step; "int4", or with the backend, "hqq-int4"; "static-int4",
            "static-compiled-fp8"; "vllm-fp8".
        nbits (`int`, *optional*): None where entries are in full precision.
        backend (`str`, *optional*): None for the model's own: "latent" for a converted one; for others "quanto",
            and "hqq" for 8 bits.
        layout (`str`): "dynamic", "static" or "static-compiled".
    """

    name: str = DYNAMIC_NAME
    nbits: int | None = None
    backend: str | None = None
    layout: str = DYNAMIC_NAME

    @classmethod
    def parse(cls, name: str) -> "CacheKind":
        """
        Raises:
            ValueError: If the name means nothing.
        """
        if name in (DYNAMIC_NAME, STATIC_NAME, COMPILED_NAME):
            return cls(name, layout=name)
        if name == VLLM_NAME:
            return cls(name, 8, VLLM)
        found = re.fullmatch(r"(?:(static|static-compiled)-)?(?:(?:(quanto|hqq|latent)-)?int([248])|fp8)", name)
        if found is None or (found[1] and found[2] in BACKEND_MODULES):
            raise ValueError(
                f"Unknown cache {name!r}: there are dynamic, static, static-compiled, int8, int4, int2, fp8 and "
                f"{VLLM_NAME}; the ints also with a backend before them (latent-, quanto-, hqq-), and all but "
                "quanto's, hqq's and vLLM's with static- or static-compiled- before that."
            )
        nbits, backend = (int(found[3]), found[2]) if found[3] else (8, FP8)
        if found[1] and backend is None:
            backend = LATENT  # no other is static
        if backend is not None and nbits not in BACKEND_BITS[backend]:
            has = " and ".join(f"int{bits}" for bits in BACKEND_BITS[backend])
            raise ValueError(f"There is no cache {name!r}: of {backend} there are {has}.")
        return cls(name, nbits, backend, found[1] or DYNAMIC_NAME)

    @property
    def is_static(self) -> bool:
        return self.layout != DYNAMIC_NAME

    @property
    def is_compiled(self) -> bool:
        return self.layout == COMPILED_NAME

    def backend_for(self, config: PreTrainedConfig) -> str | None:
        """The backend that holds the cache of a model; None where entries are in full precision."""
        if self.nbits is None or self.backend is not None:
            return self.backend
        if isinstance(config, LatentConfigMixin):
            return LATENT
        return "quanto" if self.nbits in BACKEND_BITS["quanto"] else "hqq"

    def suits(self, config: PreTrainedConfig) -> bool:
        """
        Whether a model's cache can be held so.

        Raises:
            ValueError: If it could, were the backend installed.
        """
        backend = self.backend_for(config)
        if backend is None:
            return True
        if backend == VLLM and not isinstance(config, LatentConfigMixin) and hasattr(config, "kv_lora_rank"):
            return False  # vLLM rounds the latents of stock MLA; what transformers caches depends on its version
        if self.nbits not in BACKEND_BITS[backend]:
            return False
        if not isinstance(config, LatentConfigMixin):
            if backend == LATENT or (
                backend == FP8 and (self.is_static or not hasattr(cache_utils, "Fp8QuantizedLayer"))
            ):
                return False
        if backend in BACKEND_MODULES and not is_installed(BACKEND_MODULES[backend]):
            package = BACKEND_PACKAGES[backend]
            hint = "" if self.backend else f" (latent-{self.name} leaves such models out)"
            raise ValueError(
                f"A {config.model_type} model's cache can be {self.name} after `pip install {package}`{hint}."
            )
        return True

    def can_select(self, config: PreTrainedConfig) -> bool:
        """Whether rows can be chosen from the cache; transformers' quantised ones forget how."""
        backend = self.backend_for(config)
        return backend in (None, LATENT, VLLM) or (backend == FP8 and isinstance(config, LatentConfigMixin))

    @property
    def has_window(self) -> bool:
        """Whether the newest tokens are held in full precision and the others are not."""
        return self.nbits is not None and self.backend != VLLM

    def exact_tokens(self, config: PreTrainedConfig) -> int:
        """Tokens up to which a text reads nothing rounded; 0 where there is no window. More are read rounded if the
        last of them, or a piece, goes through the model behind the others."""
        if not self.has_window:
            return 0
        if not isinstance(config, LatentConfigMixin):
            return 1  # transformers' caches round whatever is the first to be written
        if self.backend_for(config) in BACKEND_MODULES:
            return RESIDUAL_LENGTH
        return 1 + max(RESIDUAL_LENGTH, MEAN_TOKENS)

    def piece(self, chunk: int) -> int:
        """Tokens of a text that go through a model at a time, where they would be `chunk` in full precision."""
        return PIECE if self.has_window else chunk

    def generate_arguments(self, config: PreTrainedConfig) -> dict:
        """For `model.generate`."""
        if self.nbits is None:
            return {}
        if self.backend == VLLM:
            return {CACHE_ARGUMENT: engine_fp8_cache(config)}
        return dict(cache_implementation="quantized", cache_config=self._settings(config))

    def _settings(self, config: PreTrainedConfig) -> dict:
        settings: dict = dict(backend=self.backend_for(config))
        if settings["backend"] != FP8:
            settings["nbits"] = self.nbits
        elif not isinstance(config, LatentConfigMixin):
            return settings  # transformers' own, at its defaults
        return settings | dict(residual_length=RESIDUAL_LENGTH)

    def make(self, model: PreTrainedModel, length: int | None = None) -> Cache:
        """An empty cache; a static one needs the `length` that it shall have room for."""
        assert length is not None or not self.is_static
        if self.nbits is None and self.is_static:
            return StaticCache(config=model.config, max_cache_len=length)
        if self.nbits is None:
            return DynamicCache(config=model.config)
        if self.backend == VLLM:
            return engine_fp8_cache(model.config)
        settings = self._settings(model.config)
        if isinstance(model.config, LatentConfigMixin):
            return quantized_cache(model, max_cache_len=length if self.is_static else None, **settings)
        return QuantizedCache(config=model.config, **settings)


DYNAMIC = CacheKind()


def check_suited(caches: Sequence[CacheKind], configs: Iterable[PreTrainedConfig]) -> None:
    """Raise a `ValueError` if no model's cache can be held in any of the kinds, or a backend is not installed."""
    suited = [kind.suits(config) for config in configs for kind in caches]
    if not any(suited):
        raise ValueError(
            f"--caches {','.join(kind.name for kind in caches)}: no model's cache can be held so. Add dynamic, int8 "
            "or int4, which all have; int2 is for models that are not converted, latent- and static-int for others."
        )


def is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
