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
IN_MEMORY = ("4 bits in memory", "2 bits")
STACKED = (
    *("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3", "granite-moe", "phimoe"),
    *("llama4-text", "gpt-oss", "jamba"),
)
READ_PAST = ("mamba", "falcon-mamba", "jamba")
LEFT_OUT = "all-linear leaves such modules out and says so; named, they are refused or take part"

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
        ("all-linear",),
        ("attention", "siglip"),
        AssertionError,
        "nn.MultiheadAttention's out_proj is adapted, whose weight is read past it",
        LEFT_OUT,
    ),
    Fault(("all-linear",), READ_PAST, AssertionError, "dt_proj is adapted, whose weight is read past it", LEFT_OUT),
    Fault(
        ("named",),
        ("attention", "siglip", *READ_PAST),
        RuntimeError,
        "the adapter is taken, and no gradient reaches it",
        LEFT_OUT,
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
    # -- what is read past an adapter
    Fault(
        ("merge in memory",),
        ("attention",),
        AssertionError,
        "in eval, nn.TransformerEncoderLayer reads linear1's and linear2's weights past their adapters",
        "the adapters take part in eval as they do in training",
    ),
    # -- few bits in memory
    Fault(
        IN_MEMORY,
        ("t5", "t5-gated", "mt5", "switch"),
        RuntimeError,
        "wo is quantized, whose weight's dtype transformers computes in: garbage in eval, a crash in training",
        "wo stays dense, or has a dtype that can be computed in",
    ),
    Fault(
        IN_MEMORY,
        ("attention", "siglip", *READ_PAST),
        RuntimeError,
        "a linear is quantized whose weight is read past it, and the forward crashes",
        "such modules stay dense",
    ),
    Fault(
        ("4 bits", "4 bits in memory", LOFTQ_4),
        ("rwkv",),
        KeyError,
        "in eval transformers puts a new weight into its output layers, which an adapter layer can't take",
        "such modules are left out, or the weight reaches the layer below",
    ),
    Fault(
        ("2 bits",),
        ("rwkv",),
        RuntimeError,
        "in eval transformers divides the codes of its output layers",
        "such modules stay dense",
    ),
    Fault(
        ("prepared",),
        ("blip2",),
        RuntimeError,
        "its forward takes a norm's dtype for that of what follows, so the prepared model can't run",
        "such norms stay as they are, or answer with the dtype that they give",
    ),
    # -- from folder to folder
    Fault(
        ("files on disk",),
        ("qwen2-vl", "qwen2.5-vl", "llava", "gemma3"),
        AssertionError,
        "some tensors are written under the modules' names, where the base and transformers have older ones",
        "all under the names that save_pretrained writes",
    ),
    Fault(
        (LOFTQ_4, LOFTQ_2),
        ("roberta", "electra", "ast", "qwen2-moe"),
        ConfigError,
        "a linear smaller than the rank stops the run in the middle",
        "the rank is capped there and the report says so, or the layer stays dense",
    ),
    Fault(
        (LOFTQ_4,),
        ("falcon", "siglip"),
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
    Fault(
        (LOFTQ_4, LOFTQ_2),
        ("mamba",),
        RuntimeError,
        "dt_proj is quantized, whose weight is read past it, and the loaded model can't run",
        "it stays dense",
    ),
    Fault(
        (LOFTQ_2,),
        ("t5", "t5-gated", "mt5"),
        AssertionError,
        "wo is quantized at 2 bits, and the loaded model computes garbage",
        "it stays dense, as at 4 bits",
    ),
    Fault(
        (LOFTQ_4, LOFTQ_2),
        ("switch",),
        AssertionError,
        "wo of the experts is quantized, and the loaded model computes garbage",
        "it stays dense",
    ),
    Fault((LOFTQ_2,), ("siglip",), RuntimeError, "out_proj is quantized; the forward crashes", "it stays dense"),
    Fault((LOFTQ_2,), ("rwkv",), IndexError, "transformers' loader can't start the packed layers", "they stay dense"),
)
