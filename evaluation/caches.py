"""The kinds of cache by their names, the same for `mha2mla eval` and `mha2mla bench`."""

import re
from dataclasses import dataclass
from importlib.util import find_spec

from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import QuantizedCache

from mha2mla.modeling import LatentConfigMixin, quantized_cache

DYNAMIC_NAME, STATIC_NAME, COMPILED_NAME = "dynamic", "static", "static-compiled"
LATENT = "latent"  # this package's own format, for converted models
# What each backend can do, and what has to be installed for it.
BACKEND_BITS = {LATENT: (8, 4), "quanto": (4, 2), "hqq": (8, 4, 2)}
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
            with a compiled decoding step; "int4", or with the backend, "hqq-int4".
        nbits (`int`, *optional*): None where entries are in full precision.
        backend (`str`, *optional*): None for the model's own: "latent" for a converted one; for others "quanto",
            and "hqq" for 8 bits.
    """

    name: str = DYNAMIC_NAME
    nbits: int | None = None
    backend: str | None = None

    @classmethod
    def parse(cls, name: str) -> "CacheKind":
        """
        Raises:
            ValueError: If the name means nothing.
        """
        if name in (DYNAMIC_NAME, STATIC_NAME, COMPILED_NAME):
            return cls(name)
        found = re.fullmatch(r"(?:(quanto|hqq|latent)-)?int([248])", name)
        if found is None:
            raise ValueError(
                f"Unknown cache {name!r}: there are dynamic, static, static-compiled, int8, int4 and int2, the last "
                "three also with a backend before them (latent-, quanto-, hqq-)."
            )
        return cls(name, int(found[2]), found[1])

    @property
    def is_static(self) -> bool:
        return self.name in (STATIC_NAME, COMPILED_NAME)

    @property
    def is_compiled(self) -> bool:
        return self.name == COMPILED_NAME

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
        if self.nbits not in BACKEND_BITS[backend]:
            return False
        if backend == LATENT and not isinstance(config, LatentConfigMixin):
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
        return self.backend_for(config) in (None, LATENT)

    def piece(self, chunk: int) -> int:
        """Tokens of a text that go through a model at a time, where they would be `chunk` in full precision."""
        return chunk if self.nbits is None else PIECE

    def generate_arguments(self, config: PreTrainedConfig) -> dict:
        """For `model.generate`."""
        if self.nbits is None:
            return {}
        settings = dict(backend=self.backend_for(config), nbits=self.nbits, residual_length=RESIDUAL_LENGTH)
        return dict(cache_implementation="quantized", cache_config=settings)

    def make(self, model: PreTrainedModel, length: int | None = None) -> Cache:
        """An empty cache; a static one needs the `length` that it shall have room for."""
        if self.is_static:
            assert length is not None
            return StaticCache(config=model.config, max_cache_len=length)
        if self.nbits is None:
            return DynamicCache(config=model.config)
        backend = self.backend_for(model.config)
        assert backend is not None
        if isinstance(model.config, LatentConfigMixin):
            return quantized_cache(model, backend, nbits=self.nbits, residual_length=RESIDUAL_LENGTH)
        return QuantizedCache(backend, model.config, nbits=self.nbits, residual_length=RESIDUAL_LENGTH)


DYNAMIC = CacheKind()


def is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
