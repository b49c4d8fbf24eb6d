"""A merge that can't be carried out says why, and leaves the model bit for bit as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from merge_nets import IN_PLACE, PATHS, adapted, assert_same_bits, bits, net, output
from tiny_net import TinyNet, randomize_trainable_
from torch import Tensor, nn

from qlora_kit import AdapterError, LoraConfig, LoraModel, MergeError, apply_lora, merge
from qlora_kit.codecs import Codec, codec_for


def hooked(lora: LoraModel) -> list[str]:
    """Hooks on a base module, an adapter layer and a factor; returns the list they write to."""
    calls: list[str] = []
    layer = lora.adapter_layers()["0"]
    for name, module in (("base", layer.base_layer), ("layer", layer), ("factor", layer.lora_A["a"])):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def assert_untouched(lora: LoraModel, attempt: Callable[[], object], error: type[Exception], match: str) -> None:
    before, expected, active = bits(lora), output(lora), lora.active_adapter
    configs = dict(lora.peft_config)
    with pytest.raises(error, match=match):
        attempt()
    assert_same_bits(lora, before)
    assert (lora.peft_config, lora.active_adapter) == (configs, active)
    assert torch.equal(output(lora), expected)


class BrokenError(Exception):
    pass


def break_write_(monkeypatch: pytest.MonkeyPatch, kind: type, nth: int, half_written: bool) -> None:
    """From the ``nth`` on, every write of codec ``kind`` fails, with the weight half changed or not."""
    write, count = kind.write_, [0]  # type: ignore[attr-defined]

    def write_(self: Any, module: Any, weight: Tensor) -> None:
        count[0] += 1
        if count[0] < nth:
            write(self, module, weight)
            return
        if half_written:
            module.weight.data.view(torch.uint8).zero_()
        raise BrokenError("the write")

    monkeypatch.setattr(kind, "write_", write_)
    monkeypatch.setattr(kind, "take_over_", Codec.take_over_)  # so that all is written


@pytest.mark.slow
@pytest.mark.parametrize("half_written", [False, True])
@pytest.mark.parametrize("into", ["same", "float32", "bfloat16"])
@pytest.mark.parametrize("storage", IN_PLACE)
def test_a_write_that_fails_at_the_third_layer(
    monkeypatch: pytest.MonkeyPatch, storage: str, into: str, half_written: bool
) -> None:
    lora = adapted(storage).train()
    calls = hooked(lora)
    destination = codec_for(net(storage if into == "same" else into)[0])
    break_write_(monkeypatch, type(destination), 3, half_written)
    assert_untouched(lora, lambda: merge(lora, into=into), BrokenError, "the write")
    assert all(p.requires_grad == ("lora_" in name) for name, p in lora.named_parameters())
    assert all(module.training for module in lora.modules())
    assert calls == ["base", "factor", "layer"] * 2  # one forward before, one after


@pytest.mark.parametrize("storage", ["float32", "nf4-double", "int8"])
@pytest.mark.parametrize(
    ("state", "into", "nth"),
    [
        ("merged", "same", 3),
        ("merged", "float32", 3),
        ("disabled", "same", 3),
        ("disabled", "float32", 3),
        # Switching on writes the three earlier merges again: the failing write is among these, or after them.
        ("merged and disabled", "same", 3),
        ("merged and disabled", "same", 6),
        ("merged and disabled", "float32", 3),
    ],
)
@pytest.mark.slow
def test_a_failure_over_an_earlier_merge_or_a_switched_off_adapter(
    monkeypatch: pytest.MonkeyPatch, storage: str, state: str, into: str, nth: int
) -> None:
    lora = adapted(storage, ("a", "b"))
    if "merged" in state:
        lora.merge_adapter(["b"])
    merged = output(lora)
    if "disabled" in state:
        lora.disable_adapter_layers()
    destination = codec_for(net(storage if into == "same" else into)[0])
    break_write_(monkeypatch, type(destination), nth, half_written=True)
    assert_untouched(lora, lambda: merge(lora, adapters=["a"], into=into), BrokenError, "the write")
    monkeypatch.undo()
    lora.enable_adapter_layers()
    assert torch.equal(output(lora), merged)
    lora.unmerge_adapter()


@pytest.mark.parametrize("storage", ["float32", "nf4-double", "int8"])
@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_adapter_fails_as_a_whole(monkeypatch: pytest.MonkeyPatch, storage: str, merged_before: bool) -> None:
    lora = adapted(storage, ("a", "b"))
    if merged_before:
        lora.merge_adapter(["a"])
    break_write_(monkeypatch, type(lora.adapter_layers()["0"].codec), 3, half_written=True)
    assert_untouched(lora, lambda: lora.merge_adapter(["b"]), BrokenError, "the write")


# -- values that aren't finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_factor_that_is_not_finite(value: float, factor: str) -> None:
    lora = adapted("float32", ("a", "b"))
    with torch.no_grad():
        getattr(lora.adapter_layers()["4"], factor)["b"].weight[1, 2] = value
    lora.set_adapter("a")
    expected = output(lora)
    for safe in (False, True):
        with pytest.raises(MergeError, match=r"^4: adapter 'b' holds NaN or infinite"):
            lora.merge_and_unload(safe_merge=safe, adapter_names=["a", "b"])
        assert torch.equal(output(lora), expected)
    before = bits(lora)
    with pytest.raises(MergeError, match=r"^4: merging \['b'\] gives a weight with NaN or infinite"):
        lora.merge_adapter(["b"], safe_merge=True)
    assert_same_bits(lora, before)
    lora.merge_and_unload(safe_merge=True, adapter_names=["a"])
    torch.testing.assert_close(output(lora), expected, rtol=0, atol=1e-5)


def scale_factors_(lora: LoraModel, path: str, entry: float) -> None:
    """Make one entry of the delta at ``path`` ``entry``, through finite factors."""
    layer = lora.adapter_layers()[path]
    with torch.no_grad():
        A, B = layer.factors("a")
        A.zero_(), B.zero_()
        A[0, 0] = B[0, 0] = (entry / layer.scaling["a"]) ** 0.5


@pytest.mark.parametrize(
    ("storage", "into", "entry"),
    [
        ("float32", "same", 2.0 * 3.4e38),  # the sum itself
        ("float16", "same", 1e5),  # the cast to float16, whose largest is 65504
        ("int8", "same", 1e5),  # which bitsandbytes quantizes from float16
        ("float32", "float16", 1e5),
        ("nf4", "float16", 1e5),
        ("nf4", "same", 2.0 * 3.4e38),
        ("bfloat16", "same", 3.4e38),  # finite in float32, and rounded up beyond bfloat16's largest
    ],
)
@pytest.mark.parametrize("safe", [False, True])
def test_a_sum_or_a_cast_that_overflows(storage: str, into: str, entry: float, safe: bool) -> None:
    lora = adapted(storage)
    scale_factors_(lora, "4", entry)
    before = bits(lora)
    match = r"^4: .*(NaN or inf|finite)"
    with pytest.raises(MergeError, match=match):
        merge(lora, into=into)
    assert_same_bits(lora, before)
    if into == "same":
        with pytest.raises(MergeError, match=match):
            lora.merge_and_unload(safe_merge=safe)
        with pytest.raises(MergeError, match=match):
            lora.merge_adapter(safe_merge=safe)
        assert_same_bits(lora, before)
    merge(lora, into="float32") if entry < 3e38 else lora.unload()


@pytest.mark.parametrize("storage", ["nf4", "int8", "float32"])
def test_an_overflow_where_no_adapter_is(storage: str) -> None:
    model = net(storage)
    codec = codec_for(model[4])
    weight = codec.read(model[4])
    if storage == "int8":
        model[4].weight.SCB[3] = 1e6
    else:
        weight[3, 3] = 1e6
        codec.write_(model[4], weight)
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    assert_untouched(lora, lambda: merge(lora, into="float16"), MergeError, r"^4\b.*(infinite|overflows).*float16")
    merge(lora, into="bfloat16")


def test_a_trained_copy_or_bias_that_overflows() -> None:
    for part in ("head.weight", "norm.weight"):
        lora = apply_lora(TinyNet().half(), LoraConfig(target_modules=["fc"], modules_to_save=["head", "norm"]))
        name, _, parameter = part.partition(".")
        with torch.no_grad():
            getattr(lora.saved_modules()[name].modules_to_save["default"], parameter).flatten()[0] = 7e4
        before = bits(lora)
        with pytest.raises(MergeError, match=rf"^{part}: a value overflows torch.float16"):
            lora.merge_and_unload()
        assert_same_bits(lora, before)
        merge(lora, into="float32")


# -- what can't be asked for ----------------------------------------------------------------------------------------


def test_names_and_storages_that_are_not_there() -> None:
    lora = adapted("float32", ("a", "b"))
    known = r"the model has \['a', 'b'\]"
    assert_untouched(lora, lambda: merge(lora, adapters=["c"]), MergeError, rf"unknown adapter\(s\) \['c'\]; {known}")
    assert_untouched(lora, lambda: merge(lora, adapters="c"), MergeError, rf"unknown adapter\(s\) \['c'\]; {known}")
    assert_untouched(lora, lambda: merge(lora, adapters=[]), MergeError, rf"nothing to merge: .*{known}")
    assert_untouched(lora, lambda: lora.merge_adapter([]), MergeError, rf"nothing to merge: .*{known}")
    assert_untouched(lora, lambda: lora.merge_adapter("c"), AdapterError, rf"unknown adapter 'c'; {known}")
    assert_untouched(lora, lambda: merge(lora, adapters=["a", "a"]), MergeError, "a name stands twice")
    assert_untouched(
        lora, lambda: merge(lora, into="int4"), MergeError, r"into='int4': expected 'same' or one of .*bfloat16"
    )
    lora.set_adapter([])
    assert_untouched(lora, lambda: merge(lora), MergeError, rf"nothing to merge: no adapter is active.*{known}")


def test_merging_a_second_time() -> None:
    lora = adapted()
    merge(lora)
    merged = output(lora)
    for attempt in (lora.merge_and_unload, lora.merge_adapter):
        with pytest.raises(MergeError, match=r"nothing to merge: .*the model has \[\]"):
            attempt()
    lora.unmerge_adapter()
    assert torch.equal(output(lora.unload()), merged)


def test_two_trained_copies_of_one_module() -> None:
    config = LoraConfig(target_modules=["fc"], modules_to_save=["head"])
    lora = apply_lora(TinyNet(), config, "a")
    lora.add_adapter("b", config)
    randomize_trainable_(lora)
    before = bits(lora)
    with pytest.raises(MergeError, match=r"head: expected at most one .*\(modules_to_save\), found \['a', 'b'\]"):
        merge(lora, adapters=["a", "b"])
    assert_same_bits(lora, before)


def test_weights_that_are_not_in_memory() -> None:
    lora = adapted()
    lora.adapter_layers()["2"].base_layer.to("meta")
    for into in ("same", "bfloat16"):
        with pytest.raises(MergeError, match=r"^2: .*meta device \(offloaded"):
            merge(lora, into=into)
    assert sorted(lora.adapter_layers()) == list(PATHS)


def test_packed_weights_that_nothing_can_make_dense() -> None:
    """A dense model that still holds packed weights would be one in name only."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].register_parameter("stack", nn.Parameter(torch.randn(2, 64, 64)))
    replace_parameter_4bit(model[1], "stack")
    lora = apply_lora(model, LoraConfig(target_modules=r"0", init_lora_weights=False)).eval()
    match = r"^1\.parametrizations\.stack\.original: .*can be made dense, found .*uint8"
    assert_untouched(lora, lambda: merge(lora, into="float32"), MergeError, match)
    merge(lora)
