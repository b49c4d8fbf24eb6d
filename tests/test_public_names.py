"""What users write stays: names where they are taken from, the order of parameters, the commands and their options.

The lists are those of the first release. A later one may add names, keyword-only parameters, commands and options, so
it adds to the lists; it takes nothing out of them and moves nothing.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]

NAMES = {
    "qlora_kit": """
        AdapterError AdapterLayer Codec CodecError ConfigError LoftQConfig LoraConfig LoraModel MergeError MergeReport
        Plan QLoRAKitError StorageError TargetError UnsupportedModuleError apply_lora check_gradients codec_for
        make_plan merge prepare_model_for_int8_training prepare_model_for_kbit_training quantize_ register_codec
        register_initializer register_layer
    """,
    "loftq": """
        Allocation LayerReport LoftQResult Problem Quantized Report allocate collect_statistics factorize
        register_method start_report
        Distillation SoftLabels distill soft_labels
    """,
    "qlora_kit.compat.peft": """
        AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering
        AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification
        LoftQConfig LoraConfig LoraLayer LoraModel MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftConfig PeftMixedModel PeftModel
        PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM
        PeftModelForSequenceClassification PeftModelForTokenClassification PeftType TaskType TunerLayerStatus
        TunerModelStatus get_layer_status get_model_status get_peft_config get_peft_model get_peft_model_state_dict
        inject_adapter_in_model load_peft_weights prepare_model_for_int8_training prepare_model_for_kbit_training
        replace_lora_weights_loftq set_peft_model_state_dict
        AutoPeftModel LoraRuntimeConfig NoMatchingPeftModuleError PEFT_TYPE_TO_CONFIG_MAPPING
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PeftError PeftWarning get_base_model_state_dict
        set_base_model_state_dict
    """,
    "qlora_kit.codecs": """
        Codec codec_for dense find_codec packed protect_storage_ register_codec shielded_storage
    """,
    "qlora_kit.layers": """
        AdapterLayer ConvAdapter EmbeddingAdapter LinearAdapter ModulesToSave find_layer_family layer_family_for
        register_layer
    """,
    "qlora_kit.initializers": """
        Request Start gaussian_start planned prepared random_start register_initializer start_for zero_start
    """,
    "qlora_kit.lowrank": """
        SOLVERS add_product_ check_matrix delta factor_pair norm pick_solver truncated_svd
    """,
    "qlora_kit.hf_quantizer": """
        PackedConfig PackedQuantizer Stored bitsandbytes_config forget_gathering_ record_quantization_ skipped_modules
        storage_config
    """,
    "qlora_kit.folders": "combine_folders compress_folder extract_folders merge_folders",
    "qlora_kit.training": "ChunkedLoss Offload chunked_cross_entropy offload_activations optimizers use_chunked_loss",
    "qlora_kit.training.optimizers": "lora_fa_ lora_plus lora_plus_groups optimizer optimizer_class",
    "qlora_kit.compat.peft.optimizers": "create_lorafa_optimizer create_loraplus_optimizer",
}

# A parameter after a * is keyword-only.
PARAMETERS = {
    "qlora_kit.apply_lora": "model config adapter_name * adapter_dtype",
    "qlora_kit.LoraModel": "model config adapter_name * adapter_dtype",
    "qlora_kit.LoraConfig": """
        r target_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights
        layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core loftq_config
        exclude_modules task_type inference_mode base_model_name_or_path revision auto_mapping peft_type
    """,
    "qlora_kit.LoftQConfig": """
        loftq_bits loftq_iter quant_type blocksize double_quant weights method seed calibration calibration_rows
        calibration_tokens damping scale_search adapter_aware bits_pattern
    """,
    "qlora_kit.merge": """
        model * adapters weights into base original rounding residual_rank residual_dtype statistics force text
        blocksize double_quant least_retained scratch progressbar
    """,
    "qlora_kit.make_plan": "model config",
    "qlora_kit.quantize_": "model bits * quant_type blocksize double_quant target_modules",
    "qlora_kit.prepare_model_for_kbit_training": """
        model use_gradient_checkpointing gradient_checkpointing_kwargs auto_clear_cache * cast_embeddings
        cast_head
    """,
    "qlora_kit.check_gradients": "model **inputs",
    "qlora_kit.codec_for": "module path",
    "qlora_kit.register_codec": "*types",
    "qlora_kit.register_layer": "*types",
    "qlora_kit.register_initializer": "name * prepare bounded",
    "loftq.factorize": """
        weight rank * bits quant_type steps scaling statistics blocksize double_quant method solver seed cross damping
        scale_search half adapter_aware
    """,
    "loftq.allocate": "model config * bits memory ranks rule",
    "loftq.collect_statistics": "model batches paths * diagonal",
    "loftq.start_report": "lora adapter_name",
    "loftq.register_method": "name * statistics sequential",
    "qlora_kit.training.use_chunked_loss": "model * chunk batch",
    "qlora_kit.training.chunked_cross_entropy": """
        hidden head target * chunk ignore_index reduction label_smoothing
    """,
    "qlora_kit.training.offload_activations": "model * least_bytes",
    "qlora_kit.training.optimizers.optimizer": "name model **settings * lr weight_decay",
    "qlora_kit.training.optimizers.lora_plus": "model name **settings * lr ratio weight_decay lr_embedding",
    "qlora_kit.training.optimizers.lora_plus_groups": "model * lr ratio weight_decay lr_embedding",
    "qlora_kit.training.optimizers.lora_fa_": "model name **settings * lr weight_decay",
    "qlora_kit.folders.merge_folders": """
        base adapters out * weights into rounding blocksize double_quant shard_bytes check_backbone force
        least_retained device tokenizer allow_pickle progressbar
    """,
    "qlora_kit.folders.combine_folders": """
        folders weights out combination_type svd_rank * density majority_sign_method svd_clamp energy seed
        check_backbone allow_pickle
    """,
    "qlora_kit.folders.compress_folder": "folder out rank * energy allow_pickle",
    "qlora_kit.folders.extract_folders": """
        base tuned out rank * energy target_modules exclude_modules whole dtype device
    """,
}

COMMANDS = {
    "qlora-kit demo": "--model --out --steps --rank --learning-rate --seed --device",
    "qlora-kit combine": "sources --out --type --rank --energy --density --majority-sign --seed --any-base",
    "qlora-kit compress": "folder --out --rank --energy",
    "qlora-kit merge": """
        --base --adapter --out --weight --into --rounding --blocksize --double-quant --single-quant --shard-size
        --any-base --force --tokenizer --device
    """,
    "qlora-kit extract": "--base --tuned --out --rank --energy --targets --whole --dtype --device",
    "loftq init": """
        --model --out --bits --rank --steps --alpha --rslora --no-rslora --quant-type --blocksize --double-quant
        --no-double-quant --targets --memory --ranks --allocation --method --calibration --calibration-rows
        --calibration-tokens --activations --scale-search --no-scale-search --seed --device --workers --shard-size
    """,
    "loftq report": "out",
    "loftq verify": "out --against --layers",
}
SCRIPTS = {"qlora-kit": "qlora_kit.cli:app", "loftq": "loftq.cli:app"}


def named(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_users_take_them(module: str) -> None:
    found, names = importlib.import_module(module), NAMES[module].split()
    assert [name for name in names if not hasattr(found, name)] == []
    listed = getattr(found, "__all__", names)
    assert set(names) <= set(listed), f"{module}.__all__ leaves out {sorted(set(names) - set(listed))}"


def parameters(function: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """Names of those that may be given by position, and of those by keyword alone."""
    ordered, keywords = [], []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            keywords.append(parameter.name)
        else:
            stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
            ordered.append(stars + parameter.name)
    return ordered, keywords


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_keep_their_names_and_order(name: str) -> None:
    before, _, after = PARAMETERS[name].partition("* ")
    ordered, keywords = parameters(named(name))
    assert ordered == before.split()
    assert set(after.split()) <= set(keywords)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_keep_their_options(command: str) -> None:
    script, name = command.split()
    assert f'{script} = "{SCRIPTS[script]}"' in (ROOT / "pyproject.toml").read_text()
    group: Any = typer.main.get_command(named(SCRIPTS[script].replace(":", ".")))
    known = group.commands[name].params
    options = {option for parameter in known for option in (*parameter.opts, *parameter.secondary_opts)}
    assert set(COMMANDS[command].split()) <= options


def bound(source: str) -> set[str]:
    """Names that a package's ``__init__`` binds to something else than its own modules."""
    tree = ast.parse(source)
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


ROOMS = [file.parent for name in ("qlora_kit", "loftq") for file in sorted((ROOT / name).rglob("__init__.py"))]


@pytest.mark.parametrize("package", [room.relative_to(ROOT).as_posix() for room in ROOMS])
def test_no_name_hides_a_module(package: str) -> None:
    """``import loftq.factorize`` and then ``loftq.factorize.x`` would meet the function."""
    folder = ROOT / package
    modules = {file.stem for file in folder.glob("*.py")} | {file.parent.name for file in folder.glob("*/__init__.py")}
    hidden = bound((folder / "__init__.py").read_text()) & modules
    assert not hidden, f"{package}: {sorted(hidden)} are both modules and names of something else"


def test_a_hidden_module_would_be_seen() -> None:
    source = "from . import dense\nfrom .factorize import factorize\nfrom .x import y as z\ndef f(): ...\nmerge = 1"
    assert bound(source) == {"factorize", "z", "f", "merge"}
