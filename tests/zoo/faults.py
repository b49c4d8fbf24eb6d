"""Where the toolkit is known to fail on the zoo: a table that is to become empty."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_kit import ConfigError


@dataclass(frozen=True)
class Fault:
    """Stages of some members' lives that fail today.

    Attributes:
        stages, members: which; each of these stages of each of these members.
        error: the type of error that is met there.
        what: what happens. right: what should.
    """

    stages: tuple[str, ...]
    members: tuple[str, ...]
    error: type[BaseException]
    what: str
    right: str


LOFTQ_4, LOFTQ_2 = "loftq init, 4 bits", "loftq init, 2 bits"
STACKED = (
    *("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3", "granite-moe", "phimoe"),
    *("llama4-text", "gpt-oss", "jamba"),
)

FAULTS: tuple[Fault, ...] = (
    # -- which modules
    Fault(
        ("all-linear",),
        ("roberta", "electra", "ast", "segformer"),
        AssertionError,
        "linears inside of a new head are adapted, as it isn't one linear at the root",
        "the head is left out whole, whatever it is made of",
    ),
    Fault(
        ("all-linear",),
        ("resnet",),
        AssertionError,
        "the linear inside of its head is adapted, the only one it has",
        "a TargetError that says so; it then belongs into the member's refusals",
    ),
    Fault(
        ("left out",),
        (*STACKED, "mamba", "falcon-mamba", "attention", "siglip", "weight-norm"),
        AssertionError,
        "the plan is silent about modules that can't be adapted, stacked experts among them",
        "it names them, with their share of the weights",
    ),
    Fault(
        ("default targets",),
        ("jamba", "recurrent-gemma", "nemotron-h", "bamba", "lfm2"),
        AssertionError,
        "the attention layers of a hybrid are adapted and no others",
        "all layers, or an error",
    ),
    # -- what training moves beside the adapter
    Fault(
        ("two steps", "save and reload"),
        ("cnn", "resnet", "segformer"),
        AssertionError,
        "batch norm's statistics move with training, stay when adapters are off, and aren't stored",
        "buffers that training moved belong to the adapter: switched, stored, restored; or a warning says so",
    ),
    # -- few bits
    Fault(
        ("4 bits",),
        ("rwkv",),
        AssertionError,
        "in eval transformers quantizes its 4-bit output layers anew, in another type: a merge before that differs",
        "the layers keep the values that they were loaded with",
    ),
    # -- from folder to folder
    Fault(
        (LOFTQ_4, LOFTQ_2),
        ("roberta", "electra", "ast", "qwen2-moe"),
        ConfigError,
        "a linear smaller than the rank stops the run in the middle",
        "the rank is capped there and the report says so, or the layer stays dense",
    ),
    Fault(
        (LOFTQ_4,),
        ("falcon",),
        RuntimeError,
        "subclasses of nn.Linear are stored in 4 bits, which transformers can't load",
        "they stay dense, or are packed by us",
    ),
    Fault(
        (LOFTQ_4,),
        ("llama4-text",),
        NotImplementedError,
        "loading 4 bits, transformers splits its experts and finds none of them",
        "what transformers can't load is packed by us, or refused before the work begins",
    ),
)
