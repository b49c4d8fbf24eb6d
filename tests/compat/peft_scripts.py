"""Scripts as their authors write them for PEFT's LoRA, for test_peft_scripts.py to run.

Each finds ``llama`` and ``bert`` (folders of tiny models), ``folder`` (where to save) and the helpers of that test,
prints what it likes, and leaves what is to be compared in ``result``.
"""

from __future__ import annotations

CAUSAL_LM = """
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict

model = AutoModelForCausalLM.from_pretrained(llama)
config = LoraConfig(
    task_type=TaskType.CAUSAL_LM, inference_mode=False, r=4, lora_alpha=16, lora_dropout=0.0, bias="none",
    target_modules=["q_proj", "v_proj"], use_dora=False,
)
model = get_peft_model(model, config)
model.print_trainable_parameters()
fill(model)
losses = train(model, lambda m: m(input_ids=ids, labels=ids).loss)
model.eval()
with torch.no_grad():
    trained = model(input_ids=ids).logits
model.save_pretrained(folder)

stored = PeftConfig.from_pretrained(folder)
assert stored.base_model_name_or_path == llama
assert stored.task_type == TaskType.CAUSAL_LM
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stored.base_model_name_or_path), folder)
assert type(again).__name__ == "PeftModelForCausalLM" and isinstance(again, PeftModel)
again.print_trainable_parameters()
with torch.no_grad():
    reloaded = again(input_ids=ids).logits
    tokens = again.generate(input_ids=ids[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
    with again.disable_adapter():
        disabled = again(input_ids=ids).logits
    merged = again.merge_and_unload()
    merged_logits = merged(input_ids=ids).logits
assert type(merged).__name__ == "LlamaForCausalLM"
result = dict(
    losses=losses, trained=trained, reloaded=reloaded, tokens=tokens, disabled=disabled, merged=merged_logits,
    weight=merged.model.layers[0].self_attn.q_proj.weight,
    state=get_peft_model_state_dict(model), counts=model.get_nb_trainable_parameters(), training=again.training,
)
"""

SEQUENCE_CLASSIFICATION = """
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict

model = AutoModelForSequenceClassification.from_pretrained(bert)
config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, lora_alpha=4, target_modules=["query", "value"])
model = get_peft_model(model, config)
model.print_trainable_parameters()
fill(model)
labels = torch.tensor([0, 1])
losses = train(model, lambda m: m(input_ids=ids, labels=labels).loss)
model.save_pretrained(folder)
model.eval()
logits = model(input_ids=ids).logits

fresh = AutoModelForSequenceClassification.from_pretrained(bert)
again = PeftModel.from_pretrained(fresh, folder, is_trainable=True)
again.print_trainable_parameters()
again.eval()
reloaded = again(input_ids=ids).logits
again.add_adapter("second", LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
again.set_adapter("second")
again.print_trainable_parameters()
result = dict(
    losses=losses, logits=logits, reloaded=reloaded, state=get_peft_model_state_dict(model),
    second=sorted(get_peft_model_state_dict(again, adapter_name="second")),
    kind=type(again).__name__, head=model.base_model.model.classifier.modules_to_save["default"].weight,
)
"""

OTHER_HEADS = """
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

result = {}
for auto, task in (
    (AutoModelForTokenClassification, "TOKEN_CLS"), (AutoModelForQuestionAnswering, "QUESTION_ANS"),
):
    model = get_peft_model(
        auto.from_pretrained(bert), LoraConfig(task_type=task, r=2, target_modules=["query", "value"])
    )
    model.print_trainable_parameters()
    fill(model)
    model.eval()
    model.save_pretrained(folder + task)
    again = PeftModel.from_pretrained(auto.from_pretrained(bert), folder + task)
    result[task] = dict(
        before=model(input_ids=ids)[0], after=again(input_ids=ids)[0], state=get_peft_model_state_dict(again),
        kind=type(again).__name__,
    )
"""

PLAIN_MODULE = """
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

config = LoraConfig(r=4, target_modules=["seq.0", "seq.2"], modules_to_save=["seq.4"], use_rslora=True)
model = get_peft_model(MLP(), config)
model.print_trainable_parameters()
fill(model)
x, y = torch.linspace(-1, 1, 100).reshape(5, 20), torch.tensor([0, 1, 0, 1, 1])
losses = train(model, lambda m: nn.functional.cross_entropy(m(x), y))
state = get_peft_model_state_dict(model)
other = get_peft_model(MLP(), config)
set_peft_model_state_dict(other, state)
model.save_pretrained(folder)
again = PeftModel.from_pretrained(MLP(), folder)
result = dict(
    losses=losses, state=state, out=model(x), other=other(x), again=again(x), merged=model.merge_and_unload()(x),
)
"""

TWO_ADAPTERS = """
from peft import LoraConfig, PeftModel, get_peft_model

model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=2, target_modules=["q_proj"]))
fill(model, 1)
model.add_adapter("other", LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"]))
trainable_before = sorted({n.split("lora_")[1] for n, p in model.named_parameters() if p.requires_grad})
model.set_adapter("other")
trainable_after = sorted({n.split("lora_")[1] for n, p in model.named_parameters() if p.requires_grad})
fill(model, 2)
model.eval()
run = lambda: model(input_ids=ids).logits
second = run()
model.set_adapter("default")
first = run()
model.base_model.set_adapter(["default", "other"])
both = run()
assert model.active_adapters == ["default", "other"]
model.set_adapter("default")
model.save_pretrained(folder)
model.load_adapter(folder + "/other", adapter_name="copy")
model.set_adapter("copy")
copy = run()
frozen = model.load_adapter(folder, "frozen") is not None and model.get_nb_trainable_parameters()
model.load_adapter(folder, "trainable", is_trainable=True)
trainable = model.get_nb_trainable_parameters()
model.set_requires_grad("trainable", False)
model.delete_adapter("other")
model.set_adapter("default")
names = sorted(model.peft_config)
after_delete = run()
merged = model.merge_and_unload(adapter_names=["default", "copy"])(input_ids=ids).logits
result = dict(
    before=trainable_before, after=trainable_after, first=first, second=second, both=both, copy=copy, names=names,
    after_delete=after_delete, merged=merged, frozen=frozen, trainable=trainable,
)
"""

MERGE_UNMERGE_DISABLE = """
from peft import LoraConfig, get_peft_model

model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=2, target_modules="all-linear"))
model.print_trainable_parameters()
fill(model)
model.eval()
run = lambda: model(input_ids=ids).logits
layer = model.base_model.model.model.layers[0].self_attn.q_proj
adapted = run()
model.merge_adapter()
merged, merged_names, weight = run(), list(layer.merged_adapters), layer.base_layer.weight.clone()
with model.disable_adapter():
    disabled = run()
model.unmerge_adapter()
unmerged = run()
model.disable_adapter_layers()
off = run()
model.enable_adapter_layers()
on = run()
base = model.unload()
result = dict(
    adapted=adapted, merged=merged, names=merged_names, weight=weight, disabled=disabled, unmerged=unmerged, off=off,
    on=on, base=base(input_ids=ids).logits, kind=type(base).__name__,
)
"""

ATTRIBUTES = """
from peft import LoraConfig, LoraModel, PeftModel, PeftType, TaskType, get_peft_model

model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(llama),
    LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 6},
        alpha_pattern={"q_proj": 2}, task_type="CAUSAL_LM", lora_dropout=0.1,
    ),
    adapter_name="mine",
)
layers = {
    name.split("layers.")[1]: module for name, module in model.named_modules()
    if hasattr(module, "lora_A") and hasattr(module, "base_layer")
}
config = model.peft_config["mine"]
result = dict(
    base=[isinstance(model.base_model, LoraModel), type(model.base_model.model).__name__],
    tables={
        name: [
            layer.r, layer.lora_alpha, layer.scaling, layer.merged_adapters, list(layer.active_adapters),
            layer.in_features, layer.out_features, layer.lora_A["mine"].weight.shape,
            layer.lora_B["mine"].weight.shape, layer.lora_dropout["mine"].p, layer.merged, layer.use_rslora["mine"],
            type(layer.get_base_layer()).__name__, layer.disable_adapters,
        ]
        for name, layer in layers.items()
    },
    active=[model.active_adapter, model.active_adapters, model.active_peft_config is config, model.modules_to_save],
    config=[
        config.peft_type == PeftType.LORA, model.peft_type == PeftType.LORA, config.task_type == TaskType.CAUSAL_LM,
        config.r, config.lora_alpha, sorted(config.target_modules), config.base_model_name_or_path == llama,
    ],
    forwarded=[model.config.hidden_size, str(model.device), str(model.dtype), model.num_parameters()],
    names=sorted(n.removeprefix("base_model.").removeprefix("model.") for n, _ in model.named_parameters()),
)
"""

STATUS = """
from dataclasses import asdict
from peft import LoraConfig, get_layer_status, get_model_status, get_peft_model

model = get_peft_model(
    AutoModelForSequenceClassification.from_pretrained(bert),
    LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]),
)
model.add_adapter("other", LoraConfig(r=2, target_modules=["query", "key"], task_type="SEQ_CLS"))

def found():
    layers = [asdict(status) for status in model.get_layer_status()]
    for layer in layers:
        del layer["module_type"]  # class names are each library's own
    return [sorted(layers, key=lambda status: status["name"]), asdict(get_model_status(model))]

fresh = found()
model.set_adapter("other")
model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A["other"].weight.requires_grad_(False)
irregular = found()
model.merge_adapter(["other"])
model.disable_adapter_layers()
assert len(get_layer_status(model)) == len(fresh[0])
result = dict(fresh=fresh, irregular=irregular, enabled=get_model_status(model).enabled)
"""

INJECTED = """
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

config = LoraConfig(r=3, target_modules=["seq.0", "seq.2"])
model = MLP()
assert inject_adapter_in_model(config, model) is model
fill(model)
x = torch.linspace(-1, 1, 100).reshape(5, 20)
state = get_peft_model_state_dict(model)
other = inject_adapter_in_model(config, MLP(), adapter_name="elsewhere")
set_peft_model_state_dict(other, state, adapter_name="elsewhere")
out = model(x)
inject_adapter_in_model(config, model, adapter_name="second")
result = dict(
    state=state, out=out, other=other(x), names=sorted(n for n, p in model.named_parameters()),
    trainable=sorted(n for n, p in other.named_parameters() if p.requires_grad), configs=sorted(model.peft_config),
    scaling=model.seq[0].scaling, active=list(model.seq[0].active_adapters),
)
"""

AUTO = """
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model

model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(llama), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
)
fill(model)
model.save_pretrained(folder)
auto = AutoPeftModelForCausalLM.from_pretrained(folder, adapter_name="mine")
config = PeftConfig.from_pretrained(folder)
assert isinstance(config, PeftConfig) and isinstance(config, LoraConfig)
config.lora_alpha = 32
louder = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), folder, config=config)
result = dict(
    auto=auto(input_ids=ids).logits, names=list(auto.peft_config), kind=type(auto).__name__,
    louder=louder(input_ids=ids).logits,
)
"""

BIASES = """
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

result = {}
for bias in ("lora_only", "all"):
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(bert), LoraConfig(r=2, target_modules=["query"], bias=bias)
    )
    model.print_trainable_parameters()
    fill(model)
    model.save_pretrained(folder + bias)
    model.eval()
    again = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(bert), folder + bias)
    result[bias] = [model(input_ids=ids).logits, again(input_ids=ids).logits, get_peft_model_state_dict(again)]
"""

FOUR_BIT = """
import bitsandbytes
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, prepare_model_for_kbit_training

class Quantized(nn.Module):
    is_loaded_in_4bit = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        dense = [nn.Linear(64, 128), nn.Linear(128, 64)]
        for i, linear in enumerate(dense):
            quantized = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4",
                compress_statistics=False,
            )
            quantized.load_state_dict(linear.state_dict())
            self.add_module(f"fc{i}", quantized.to("cpu"))
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.fc1(torch.relu(self.fc0(x))))

model = prepare_model_for_kbit_training(Quantized(), use_gradient_checkpointing=False)
frozen = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
model = get_peft_model(model, LoraConfig(r=4, target_modules=["fc0", "fc1"]))
model.print_trainable_parameters()
fill(model)
x, y = torch.linspace(-1, 1, 256).reshape(4, 64), torch.tensor([0, 1, 2, 3])
losses = train(model, lambda m: nn.functional.cross_entropy(m(x), y))
result = dict(
    frozen=frozen, losses=losses, out=model(x), state=get_peft_model_state_dict(model),
    kind=type(model.model.fc0.base_layer).__name__, merged=model.merge_and_unload()(x),
)
"""

SCRIPTS = {
    name.lower(): source
    for name, source in globals().items()
    if name.isupper() and isinstance(source, str) and "from peft import" in source
}
