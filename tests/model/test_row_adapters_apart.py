"""A call with an adapter for each row: what is refused before anything runs, and that nothing of it stays.

Other threads, later calls and compiled code don't see what one call has chosen.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from two_adapters import IDS, NAMES, two, with_two

from qlora_kit import AdapterError, LoraConfig, apply_lora
from qlora_kit.layers.row_choice import _Choices, _rows


@pytest.fixture(autouse=True)
def _nothing_is_left_set() -> Iterator[None]:
    yield
    assert _rows.get() is None
    assert (_Choices.count, _Choices.any) == (0, False)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["p", "qq", "p", "p"], r"unknown adapter 'qq'; closest: \['q'\], of \['__base__', 'p', 'q'\]"),
        (["p", "base", "p", "p"], r"unknown adapter 'base'; closest: \['__base__'\]"),
        ("p", r"expected a list with a name for each row, found 'p'; put it into a list"),
        (7, r"expected a list with a name for each row, found 7"),
        (["p", None, "p", "p"], r"expected a list with a name for each row, found \['p', None"),
        (["p", "q"], r"expected a name for each of the 4 rows of input\w+, found 2 names"),
        (["p"] * 5, r"expected a name for each of the 4 rows of input\w+, found 5 names"),
        ([], r"expected a list with a name for each row, found \[\]"),
    ],
)
def test_names_that_are_not_one_for_each_row(names: Any, message: str) -> None:
    lora = two()
    lora.model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    for call in (lambda: lora(input_ids=IDS, adapter_names=names), lambda: lora.generate(IDS, adapter_names=names)):
        with pytest.raises(AdapterError, match=f"adapter_names: {message}"):
            call()


def test_states_that_do_not_allow_it() -> None:
    lora = two()

    def refuses(message: str) -> None:
        with pytest.raises(AdapterError, match=f"adapter_names: expected a model whose rows.*{message}"):
            lora(input_ids=IDS, adapter_names=NAMES)

    lora.train()
    refuses("training mode, where set_adapter says what trains; call eval")
    lora.eval()
    with lora.disable_adapter():
        refuses("adapters switched off; call enable_adapter_layers")
    lora.merge_adapter(["p"])
    refuses(r"\['p'\] merged into model.layers.0.self_attn.q_proj; call unmerge_adapter")
    lora.unmerge_adapter()
    lora(input_ids=IDS, adapter_names=NAMES)


def test_what_all_rows_share_is_refused_where_they_differ_in_it() -> None:
    """Biases trained in place, which the base has not, and statistics that one adapter has moved."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    lora = apply_lora(net, LoraConfig(r=1, target_modules=["0"], bias="all"), "p")
    lora.add_adapter("q", LoraConfig(r=1, target_modules=["0"]))
    x = torch.randn(2, 4)
    lora.eval()
    with pytest.raises(
        AdapterError, match="found biases that 'p' has trained, which rows of '__base__' would have too"
    ):
        lora(x, adapter_names=["p", "__base__"])
    lora(x, adapter_names=["p", "q"])  # which have the same biases each for itself
    lora.train()
    lora(torch.randn(8, 4))
    lora.eval()
    for names in (["p", "q"], ["q", "q"]):
        with pytest.raises(AdapterError, match=r"found buffers that adapters have moved \(1\.\w+\).*set_adapter"):
            lora(x, adapter_names=names)
    assert torch.equal(lora(x, adapter_names=["p", "p"]), lora(x))


def test_an_adapter_that_is_called_as_none_is() -> None:
    lora = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=1, target_modules=["0"]), "__base__").eval()
    with pytest.raises(AdapterError, match="'__base__' is for rows without an adapter, and the name of one here"):
        lora(torch.randn(2, 4), adapter_names=["__base__", "__base__"])


def test_methods_that_pack_rows_refuse_it() -> None:
    with pytest.raises(AdapterError, match="generate_batch: it packs rows into one"):
        two().generate_batch([[1, 2], [3]], adapter_names=["p", "q"])


# -- what is chosen ends with the call -----------------------------------------------------------------------


def test_an_error_within_leaves_nothing_set() -> None:
    lora = two()
    expected = lora(input_ids=IDS).logits
    state = {key: value.clone() for key, value in lora.state_dict().items()}
    hook = lora.model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    for call, settings in ((lora, {}), (lora.generate, {"max_new_tokens": 2})):
        with pytest.raises(ZeroDivisionError):
            call(input_ids=IDS, adapter_names=NAMES, **settings)
    hook.remove()
    assert torch.equal(lora(input_ids=IDS).logits, expected)
    assert lora.active_adapters == ["p"]
    after = lora.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())


@torch.no_grad()
def test_two_threads_do_not_see_each_others_rows() -> None:
    """Each waits within the model until the other is there too."""
    lora = two()
    choices: list[Any] = [None, ["p"] * 4, ["q", "p", "__base__", "q"], NAMES]
    expected = [lora(input_ids=IDS, adapter_names=names).logits for names in choices]
    together = threading.Barrier(len(choices))

    def wait(*_: Any) -> None:
        together.wait(60)

    lora.model.model.layers[0].register_forward_hook(wait)
    found: list[Any] = [None] * len(choices)

    def run(i: int) -> None:
        with torch.no_grad():
            found[i] = lora(input_ids=IDS, adapter_names=choices[i]).logits

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output, right in zip(found, expected, strict=True):
        assert torch.equal(output, right)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models() -> None:
    """As a whole, where a call with names is left to Python, and in part, where the layers look the names up; without
    names the model is one graph as before."""
    lora = with_two(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), ["0", "2"])
    x, names = torch.randn(3, 4), ["q", "__base__", "p"]
    plain, rows, others = lora(x), lora(x, adapter_names=names), lora(x, adapter_names=["p", "q", "p"])
    whole = torch.compile(lora, backend="eager", fullgraph=True)
    assert torch.equal(whole(x), plain)
    whole = torch.compile(lora, backend="eager")
    lora.model.compile(backend="eager")
    for call in (whole, lora):
        assert torch.equal(call(x), plain)
        assert torch.equal(call(x, adapter_names=names), rows)
        # The model's layers aren't compiled anew for other names.
        with torch._dynamo.config.patch(error_on_recompile=call is lora):
            assert torch.equal(call(x, adapter_names=["p", "q", "p"]), others)
        assert torch.equal(call(x), plain)
    with pytest.raises(AdapterError, match="unknown adapter"):
        whole(x, adapter_names=["c", "p", "p"])
    torch._dynamo.reset()


def test_a_replaced_forward_still_takes_names() -> None:
    """What mixed precision puts around it, and a plain function."""
    lora = two()
    expected = lora(input_ids=IDS, adapter_names=NAMES).logits
    forward = lora.forward
    lora.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert torch.equal(lora(input_ids=IDS, adapter_names=NAMES).logits, expected)
    del lora.forward
    with torch.autocast("cpu", torch.bfloat16):
        half = lora(input_ids=IDS, adapter_names=NAMES).logits
    assert (half - expected).abs().max() < 0.1 * expected.abs().max()  # a few roundings to 8 bits


def test_no_row_choice_keeps_a_model_alive() -> None:
    lora = two()
    lora(input_ids=IDS, adapter_names=NAMES)
    parts = [id(part) for part in lora.adapted.parts()]
    del lora
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o).__name__ == "Rows"], parts
