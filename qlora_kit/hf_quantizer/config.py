"""The configuration that names quantized modules one by one, and what it says of each.

A folder's config.json holds it:

    "quantization_config": {
      "quant_method": "qlora_kit",
      "version": 1,
      "groups": [{"quant_type": "signed2", "blocksize": 64, "double_quant": true, "modules": ["model.layers.0.", ...]}]
    }

A blocksize of null means rows. Modules are full paths, so bits may differ from layer to layer. A group of
bitsandbytes' modules has ``"storage": "bitsandbytes"`` besides, and int8 modules their outliers' ``"threshold"`` if it
isn't 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..codecs.packed import PackedLinear
from ..errors import ConfigError

METHOD = "qlora_kit"
VERSION = 1
BITSANDBYTES = "bitsandbytes"
_FIELDS = {"quant_type", "blocksize", "double_quant", "modules"}
_OPTIONAL = {"storage", "threshold"}


@dataclass(frozen=True)
class Stored:
    """How one linear layer is stored.

    Attributes:
        quant_type: of ``qlora_kit.codecs.codebooks``, or "int8".
        blocksize: weights that share a scale; None for rows.
        double_quant: the scales are kept in 8 bits.
        bitsandbytes: in one of its modules; else packed by us.
        threshold: of int8: the bound above which an activation column stays in half precision.
    """

    quant_type: str
    blocksize: int | None
    double_quant: bool
    bitsandbytes: bool = False
    threshold: float = 0.0

    @classmethod
    def of(cls, module: Any) -> Stored:
        """How ``module``, a ``PackedLinear``, ``Linear4bit`` or ``Linear8bitLt``, is stored."""
        if isinstance(module, PackedLinear):
            return cls(module.quant_type, module.blocksize, module.double_quant)
        if type(module).__name__ == "Linear8bitLt":
            return cls("int8", None, False, True, module.state.threshold)
        weight = module.weight
        return cls(weight.quant_type, weight.blocksize, bool(weight.compress_statistics), True)

    def to_group(self, modules: Sequence[str]) -> dict[str, Any]:
        """The configuration's group of ``modules``, which are stored so."""
        group = {"quant_type": self.quant_type, "blocksize": self.blocksize, "double_quant": self.double_quant}
        own: dict[str, Any] = {"storage": BITSANDBYTES} if self.bitsandbytes else {}
        if self.threshold:
            own["threshold"] = self.threshold
        return {**group, **own, "modules": list(modules)}

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> Stored:
        """What a group says of its modules."""
        packed, threshold = group.get("storage") != BITSANDBYTES, group.get("threshold", 0.0)
        return cls(group["quant_type"], group["blocksize"], group["double_quant"], not packed, threshold)


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Which modules hold quantized weights, and of what type; see the module's text.

    Raises:
        ConfigError: a version or field that this release doesn't know.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]] = (), version: int = VERSION, **others: Any) -> None:
        others.pop("quant_method", None)
        if version != VERSION or others:
            found = f"version {version!r}" + (f" and {sorted(others)}" if others else "")
            raise ConfigError(
                f"quantization_config: expected version {VERSION} with 'groups' alone, found {found}; "
                "update qlora-kit, or quantize the model again"
            )
        for group in groups:
            if set(group) - _OPTIONAL != _FIELDS or group.get("storage", BITSANDBYTES) != BITSANDBYTES:
                raise ConfigError(
                    f"quantization_config.groups: expected the fields {sorted(_FIELDS)}, and {sorted(_OPTIONAL)} for "
                    f"bitsandbytes' modules, found {sorted(group)}; the file is damaged or from another release"
                )
        self.quant_method = METHOD  # type: ignore[assignment]  # the enum knows built-in methods only
        self.version = version
        self.groups = [dict(group) for group in groups]

    @classmethod
    def of(cls, modules: Mapping[str, Any]) -> PackedConfig:
        """The configuration of a model that holds these modules."""
        return cls.of_stored({path: Stored.of(module) for path, module in modules.items()})

    @classmethod
    def of_stored(cls, stored: Mapping[str, Stored]) -> PackedConfig:
        """The configuration of a model whose modules are stored so, by path."""
        groups: dict[Stored, list[str]] = defaultdict(list)
        for path, kind in stored.items():
            groups[kind].append(path)
        return cls([kind.to_group(paths) for kind, paths in groups.items()])
