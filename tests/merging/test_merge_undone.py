"""Whatever goes wrong in a merge, and wherever, the model is bit for bit as it was, and a good merge still succeeds."""

from __future__ import annotations

import errno
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny_llama
import torch
from merge_nets import assert_same_bits, bits

from qlora_kit import LoraConfig, LoraModel, MergeError, StorageError, apply_lora, merge
from qlora_kit import hf_quantizer as hf_quantizer_module
from qlora_kit.checkpoints.spill import Spill
from qlora_kit.codecs.bnb import Codec4bit, CodecInt8
from qlora_kit.codecs.packed import PackedCodec
from qlora_kit.hf_quantizer import record_quantization_
from qlora_kit.merging import in_memory as merging
from qlora_kit.merging import layer as merge_layer
from qlora_kit.training.preparation.quantize import quantize_

IDS = torch.randint(1, 128, (2, 6), generator=torch.Generator().manual_seed(2))
HERE = Path(merging.__file__).parents[1]  # the whole package


class CutError(Exception):
    pass


def adapted(storage: str, state: str = "") -> LoraModel:
    """A Llama of one layer with two adapters on overlapping layers, one of which has a trained head."""
    model = tiny_llama.llama(num_hidden_layers=1, attention_bias=True).eval()
    if storage != "dense":
        quantize_(model, quant_type=storage)
        record_quantization_(model)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, modules_to_save=["lm_head"], bias="all"
    )
    lora = apply_lora(model, config, "a")
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1)
    if "merged" in state:
        lora.merge_adapter(["b"])
    if "disabled" in state:
        lora.disable_adapter_layers()
    return lora


def everything(lora: LoraModel) -> dict[str, Any]:
    """What a merge could change, beside ``bits``."""
    found: dict[str, Any] = {"config": lora.model.config.to_json_string(), "marks": {}}
    for mark in ("is_quantized", "is_loaded_in_4bit", "hf_quantizer", "quantization_method", "memory_bill"):
        found["marks"][mark] = repr(vars(lora.model).get(mark))
    for record in ("configs", "active", "trainable", "disabled", "set_aside", "backbones"):
        found[record] = repr(getattr(lora.adapted, record))
    found["plan"] = lora.plan
    found["biases"] = {path: value.tolist() for path, value in lora.adapted.kept_biases.values.items()}
    for path, layer in lora.adapter_layers().items():
        found[path] = dict(layer.scaling), layer.merged_adapters, layer._unmerged is None
    return found


def attempt(lora: LoraModel, error: type[BaseException], match: str, **options: Any) -> None:
    """Merge, see it fail so, and see nothing changed."""
    before, more = bits(lora), everything(lora)
    with pytest.raises(error, match=match):
        merge(lora, **options)
    assert_same_bits(lora, before)
    assert everything(lora) == more


class Cut:
    """Raises KeyboardInterrupt at the ``nth`` line that the package runs; with None it counts them."""

    def __init__(self, nth: int | None = None) -> None:
        self.nth, self.lines = nth, 0

    def __enter__(self) -> Cut:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        name = frame.f_code.co_filename
        return self._line if str(HERE) in name and frame.f_code.co_name != "undo" else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.nth:
                sys.settrace(None)
                raise KeyboardInterrupt("cut here")
        return self._line


@pytest.mark.parametrize(
    ("storage", "state", "options"),
    [
        ("dense", "merged, disabled", {"into": "nf3", "adapters": ["a", "b"], "text": IDS}),
        ("dense", "", {"into": "bfloat16", "adapters": ["b"]}),
        ("nf4", "merged", {"into": "bfloat16", "text": IDS}),
        ("nf4", "", {"residual_rank": 2, "adapters": ["a", "b"], "weights": [1, -0.5], "text": IDS}),
        ("int8", "disabled", {"into": "nf4", "residual_rank": 2}),
        ("nf3", "", {"rounding": "error-feedback", "statistics": IDS}),
    ],
)
@pytest.mark.slow
def test_an_interrupt_at_any_line(storage: str, state: str, options: dict[str, Any]) -> None:
    lora = adapted(storage, state)
    with Cut() as counted:
        merge(lora, force=True, **options)
    lora = adapted(storage, state)
    for nth in sorted(random.Random(3).sample(range(1, counted.lines * 49 // 50), 10)):
        before, more = bits(lora), everything(lora)
        with pytest.raises(KeyboardInterrupt, match="cut here"), Cut(nth):
            merge(lora, force=True, **options)
        assert_same_bits(lora, before)
        assert everything(lora) == more, nth
    assert len(merge(lora, force=True, **options).layers) >= 2


def failing(function: Callable[..., Any], nth: int = 1, error: BaseException | None = None) -> Callable[..., Any]:
    """``function``, which does its work and then fails from its ``nth`` call on."""
    calls = [0]

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        result = function(*args, **kwargs)
        if calls[0] >= nth:
            raise error or CutError("it fails")
        return result

    return fails


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "storage", "nth"), [(Codec4bit, "nf4", 2), (CodecInt8, "int8", 1), (PackedCodec, "nf3", 2)]
)
def test_codes_that_are_not_taken(monkeypatch: pytest.MonkeyPatch, codec: Any, storage: str, nth: int) -> None:
    lora = adapted(storage, "merged")
    with monkeypatch.context() as patch:
        patch.setattr(codec, "take_", failing(codec.take_, nth))
        attempt(lora, CutError, "it fails", rounding="scale-search", force=True)
    merge(lora, rounding="scale-search", force=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["records", "residual", "memory", "another module"])
def test_a_late_failure(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    holder, name = {
        "records": (hf_quantizer_module, "record_quantization_"),
        "residual": (merging, "attach_residual_"),
        "memory": (PackedCodec, "release_"),
        "another module": (merge_layer, "linear_holding"),
    }[part]
    storage = "nf3" if part == "memory" else "dense"
    lora = adapted(storage)
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, failing(getattr(holder, name), 2 if part == "memory" else 1))
        attempt(lora, CutError, "it fails", into="nf4", residual_rank=2, force=True)
    model = merge(lora, into="nf4", residual_rank=2, force=True).model
    assert model.active_adapters == ["residual"]


def test_a_text_that_the_merged_model_fails_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = adapted("nf4")
    handle = lora.model.lm_head.register_forward_hook(failing(lambda *_: None, 3))
    attempt(lora, CutError, "it fails", text=IDS.repeat(10, 1), into="bfloat16")
    handle.remove()
    report = merge(lora, text=IDS, into="float32")
    assert report.agreement is not None


@pytest.mark.parametrize("nth", [1, 4, 25])
def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.writes = file, 0

        def write(self, data: Any) -> None:
            self.writes += 1
            if self.writes >= nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    enter = Spill.__enter__

    def entered(spill: Spill) -> Spill:
        spill._file, spill._room = Full(spill._file), 0  # type: ignore[assignment]
        return enter(spill)

    lora = adapted("nf4", "merged")
    with monkeypatch.context() as patch:
        patch.setattr(Spill, "__enter__", entered)
        match = r"expected room for [\d,]+ more bytes.*No space left on device.*scratch=FOLDER"
        attempt(lora, StorageError, match, into="bfloat16", text=IDS)
    merge(lora, into="bfloat16", text=IDS)


@pytest.mark.parametrize(("storage", "options"), [("nf3", {}), ("nf4", {"into": "nf2"})])
def test_a_refusal(storage: str, options: dict[str, Any]) -> None:
    lora = adapted(storage, "merged")
    with torch.no_grad():
        for layer in lora.adapter_layers().values():
            for name in layer.r:
                layer.factors(name)[0].mul_(1e-3)
    attempt(lora, MergeError, r"expected at least 50% of the delta to survive rounding", adapters=["a"], **options)
    assert merge(lora, adapters=["a"], into="bfloat16").retained > 0.9


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    lora = adapted("nf4")
    with pytest.raises(StorageError, match=r"nowhere: expected a folder that can be written to.*scratch=FOLDER"):
        merge(lora, scratch=tmp_path / "nowhere")
    merge(lora, scratch=tmp_path, force=True)
    assert list(tmp_path.iterdir()) == []
