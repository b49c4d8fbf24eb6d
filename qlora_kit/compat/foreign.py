"""PEFT's other methods by name: importable, and refused when used.

A script imports every configuration that it can be asked for, and uses one. What isn't LoRA can be imported here,
compared with, and asked about by ``isinstance`` (nothing is one); made or called, it says what this toolkit has.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn

from ..errors import ConfigError, closest

#: A method of PEFT's on each line, as ``PeftType`` names it, then the names that PEFT exports for it.
METHODS = """
PROMPT_TUNING: PromptTuningConfig PromptEmbedding PromptTuningInit
MULTITASK_PROMPT_TUNING: MultitaskPromptTuningConfig MultitaskPromptEmbedding MultitaskPromptTuningInit
P_TUNING: PromptEncoderConfig PromptEncoder PromptEncoderReparameterizationType
PREFIX_TUNING: PrefixTuningConfig PrefixEncoder
ADALORA: AdaLoraConfig AdaLoraModel
ADAMSS: AdamssConfig AdamssModel
BOFT: BOFTConfig BOFTModel
ADAPTION_PROMPT: AdaptionPromptConfig AdaptionPromptModel
IA3: IA3Config IA3Model
BEFT: BeftConfig BeftModel
LILY: LilyConfig LilyModel
LOHA: LoHaConfig LoHaModel
LOKR: LoKrConfig LoKrModel
OFT: OFTConfig OFTModel
POLY: PolyConfig PolyModel
LN_TUNING: LNTuningConfig LNTuningModel
VERA: VeraConfig VeraModel
FROD: FrodConfig FrodModel
PVERA: PveraConfig PveraModel
FOURIERFT: FourierFTConfig FourierFTModel
GLORA: GloraConfig GloraModel
XLORA: XLoraConfig XLoraModel
HRA: HRAConfig HRAModel
VBLORA: VBLoRAConfig VBLoRAModel
UNILORA: UniLoraConfig UniLoraModel
CPT: CPTConfig CPTEmbedding
MISS: MissConfig MissModel
RANDLORA: RandLoraConfig RandLoraModel
ROAD: RoadConfig RoadModel
TRAINABLE_TOKENS: TrainableTokensConfig TrainableTokensModel
HIRA: HiraConfig HiraModel
SHIRA: ShiraConfig ShiraModel
C3A: C3AConfig C3AModel
WAVEFT: WaveFTConfig WaveFTModel
OSF: OSFConfig OSFModel
DELORA: DeloraConfig DeloraModel
GRALORA: GraloraConfig GraloraModel
CARTRIDGE: CartridgeConfig CartridgeEncoder
TINYLORA: TinyLoraConfig TinyLoraModel
PSOFT: PsoftConfig PsoftModel
PEANUT: PeanutConfig PeanutModel
SHADOW: ShadowConfig ShadowModel
SUPERTUNING: SupertuningConfig SupertuningModel
DEFT: DeftConfig DeftModel
"""
#: What PEFT has beside its methods: variants of LoRA, further starts, and the bases of what isn't LoRA.
OTHERS = """
    ArrowConfig BdLoraConfig CordaConfig DoraCaching EvaConfig GPTQLoraLinear KappaTuneSelector KasaConfig
    LoraGAConfig MixedModel MontecloraConfig MontecloraTrainerMixin ParamWrapper PromptLearningConfig
    TrainableTokensWrapper VeloraConfig
    bloom_model_postprocess_past_key_value cast_mixed_precision_params compose_cartridge_adapters convert_to_lora
    create_arrow_model create_riemannian_optimizer find_kappa_target_modules get_eva_state_dict hotswap_adapter
    initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text initialize_lora_eva_weights
    preprocess_corda preprocess_loraga prepare_model_for_compiled_hotswap prompt_embeddings_from_past_key_values
    register_peft_method save_as_lora shift_tokens_right
"""

#: The names of each method by its ``PeftType``.
NAMES_OF = {kind: names.split() for kind, _, names in (line.partition(":") for line in METHODS.strip().splitlines())}
FOREIGN = (*(name for names in NAMES_OF.values() for name in names), *OTHERS.split())
_KIND_OF = {name: kind for kind, names in NAMES_OF.items() for name in names}


def refuse(name: str) -> NoReturn:
    """Say that ``name`` is PEFT's and not here.

    Raises:
        ConfigError: always.
    """
    part = f"{_KIND_OF[name]}, a method" if name in _KIND_OF else "a part"
    raise ConfigError(
        f"{name}: expected LoRA, the one method that this toolkit has, found {part} of PEFT that isn't implemented "
        "here; use LoraConfig (starts: True, False, 'gaussian', 'loftq', or your own by register_initializer), or "
        "PEFT itself"
    )


class _Foreign(type):
    """The type of the stand-ins: none can be made, and reading one of their attributes is using them."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(cls.__name__)

    def __getattr__(cls, attribute: str) -> NoReturn:
        if attribute.startswith("_"):  # what Python itself asks of a class, "_partialmethod" for its signature say
            raise AttributeError(attribute)
        refuse(cls.__name__)


@cache
def foreign(name: str, module: str) -> Any:
    """The stand-in for PEFT's ``name``, a class or a function, for the ``__getattr__`` of ``module``.

    Raises:
        AttributeError: PEFT has no such name either, as far as is known here.
    """
    if name not in FOREIGN:
        raise AttributeError(f"module {module!r} has no attribute {name!r}; closest: {closest(name, FOREIGN)}")
    if name[0].isupper():
        return _Foreign(name, (), {"__module__": module, "__doc__": "Of PEFT, and not implemented here."})

    def call(*args: Any, **kwargs: Any) -> NoReturn:
        refuse(name)

    call.__name__ = call.__qualname__ = name
    return call
