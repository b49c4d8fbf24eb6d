"""The account of a merge against float64, entry by entry; as a table, as JSON and as a picture; and its refusals."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_nets import PATHS, adapted, assert_same_bits, bits, delta_of, output, stored_weight
from reference import merging as reference

from qlora_kit import LoraModel, MergeError, MergeReport, merge
from qlora_kit.merging.fidelity import LayerFidelity

# float32 sums over some 6,000 entries, relative to deltas down to a tenth of the weight.
REPORT = 3e-5


@pytest.mark.parametrize("weights", [None, [2.0, -0.5]])
@pytest.mark.parametrize(
    ("storage", "options"),
    [
        ("nf4-double", {}),
        ("float32", {"into": "nf4"}),
        ("nf4", {"into": "nf3", "residual_rank": 2}),
        ("int8", {"rounding": "scale-search", "into": "packed"}),
        ("packed-nf3", {"residual_rank": 3, "residual_dtype": torch.bfloat16}),
    ],
)
@pytest.mark.slow
def test_every_number_by_its_definition(storage: str, options: dict[str, Any], weights: list[float] | None) -> None:
    if options.get("into") == "packed":
        options = {**options, "into": "affine3"}
    lora = adapted(storage, ("a", "b"))
    sizes = dict(zip(("a", "b"), weights or [1.0, 1.0], strict=True))
    before = {path: stored_weight(lora.adapter_layers()[path].base_layer) for path in PATHS}
    deltas = {path: sum(w * delta_of(lora, path, (n,)) for n, w in sizes.items()) for path in PATHS}
    report = merge(lora, weights=weights, force=True, **options)
    kept = total = 0.0
    for layer in report.layers:
        base, delta = before[layer.path], deltas[layer.path]
        module: Any = report.model.get_submodule(layer.path)
        module = getattr(module, "base_layer", module)
        stored = stored_weight(module)
        if options.get("residual_rank"):
            A, B = report.model.adapter_layers()[layer.path].factors("residual")
            stored = stored + B.detach().double().numpy() @ A.detach().double().numpy()
        expected = reference.fidelity(base, delta, stored)
        for name, value in expected.items():
            assert getattr(layer, name) == pytest.approx(value, rel=REPORT, abs=REPORT), (layer.path, name)
        assert layer.delta_norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert (layer.rank, layer.base_error) == (options.get("residual_rank", 0), None)
        kept += expected["retained"] * np.linalg.norm(delta) ** 2
        total += np.linalg.norm(delta) ** 2
    assert report.retained == pytest.approx(kept / total, rel=REPORT)
    assert report.mean("error") == pytest.approx(np.mean([layer.error for layer in report.layers]))


def row(path: str, retained: float, size: float) -> LayerFidelity:
    return LayerFidelity(path, "dense", 0.1, retained, 0.01, 0.1, delta_norm=size)


def test_large_deltas_weigh_more_and_no_layers_lose_nothing() -> None:
    model = torch.nn.Linear(1, 1)
    report = MergeReport(model, "same", ["a"], [row("x", 0.0, 3.0), row("y", 1.0, 1.0)])
    assert report.retained == pytest.approx(0.1)
    assert report.mean("retained") == 0.5
    assert MergeReport(model, "same", ["a"]).retained == 1.0
    assert MergeReport(model, "same", ["a"], [row("x", 1.0, 0.0)]).retained == 1.0


def test_saved_as_json(tmp_path: Path) -> None:
    report = merge(adapted("nf4", ("a", "b")), weights=[1, 0.5], into="nf3", residual_rank=2)
    report.save(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored == report.to_dict()
    assert stored["weights"] == {"a": 1.0, "b": 0.5}
    assert [LayerFidelity(**layer) for layer in stored["layers"]] == report.layers
    assert (stored["into"], stored["residual_rank"], stored["agreement"]) == ("nf3", 2, None)
    assert str(report).splitlines()[-1].endswith("a residual adapter of rank 2 attached")


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.slow
def test_a_picture(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"report.{ending}"
    merge(adapted("nf4")).plot(path)
    head = path.read_bytes()[:400]
    assert head.startswith(b"\x89PNG") if ending == "png" else b"<svg" in head
    one = MergeReport(torch.nn.Linear(1, 1), "float32", ["a"], [row("x", float("nan"), 0.0), row("y", -3.0, 1.0)])
    MergeReport(torch.nn.Linear(1, 1), "same", ["a"]).plot(path)  # no layers
    one.layers[0] = row("x", 1.0, 0.0)
    one.plot(path)


# -- refusals ----------------------------------------------------------------------------------------------------


def small(storage: str, size: float = 1e-4) -> LoraModel:
    torch.manual_seed(3)
    return adapted(storage, size=size)


@pytest.mark.parametrize(("storage", "into"), [("nf4", "same"), ("packed-nf3", "same"), ("nf4", "nf4")])
def test_what_rounding_swallows_is_refused(storage: str, into: str) -> None:
    lora = small(storage)
    before, apart = bits(lora), output(lora)
    with pytest.raises(MergeError, match=r"expected at least 50% of the delta to survive rounding into") as caught:
        merge(lora, into=into)
    assert_same_bits(lora, before)
    assert torch.equal(output(lora), apart)
    said = str(caught.value)
    forced = merge(small(storage), into=into, force=True)
    assert f"found {forced.retained:.1%}: " in said
    lost = np.sqrt(sum((layer.delta_error * layer.delta_norm) ** 2 for layer in forced.layers))
    size = np.sqrt(sum(layer.delta_norm**2 for layer in forced.layers))
    assert f"rounding moves the weights {lost / size:.1f} times as far as the adapter does" in said
    assert "into='bfloat16' keeps all of it in 16 bits; force=True merges all the same" in said

    # The message's advice, taken: the report shows what was promised.
    advised = dict(re.findall(r"(rounding='[a-z-]+'|residual_rank=\d+) keeps (-?[\d.]+%)", said))
    assert advised, said
    for setting, share in advised.items():
        name, value = setting.split("=")
        option: Any = int(value) if value.isdigit() else value.strip("'")
        report = merge(small(storage), into=into, force=True, **{name: option})
        assert f"{report.retained:.1%}" == share, setting
    assert merge(small(storage), into="bfloat16").retained > 0.5


@pytest.mark.parametrize(("storage", "into"), [("nf4", "bfloat16"), ("bfloat16", "same"), ("bfloat16", "bfloat16")])
def test_a_dense_merge_is_never_refused(storage: str, into: str) -> None:
    assert len(merge(small(storage, 1e-7), into=into).layers) == 3


def test_no_delta_at_all_is_not_refused() -> None:
    lora = adapted("nf4", size=0.0)
    assert merge(lora).retained == 1.0


def test_the_threshold_is_the_callers_and_merge_and_unload_only_logs(caplog: pytest.LogCaptureFixture) -> None:
    lora = small("nf4", 0.01)
    share = merge(small("nf4", 0.01), force=True).retained
    with pytest.raises(MergeError, match=rf"expected at least 99% .*found {share:.1%}"):
        merge(lora, least_retained=0.99)
    merge(small("nf4", 0.01), least_retained=share - 0.01)
    with caplog.at_level(logging.WARNING):
        model = small("nf4").merge_and_unload()
    assert not isinstance(model, LoraModel)
    assert re.search(r"merge: -?[\d.]+ % of the delta survived rounding", caplog.text)
