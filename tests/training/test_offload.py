"""``offload_activations``: what is moved, what stays, and that nothing else differs.

On a machine without a GPU all tensors are where they would be moved to. So that the rest can be seen here too, the
place called "the CPU" gets another name in these tests, and the copies go through torch's ``save_on_cpu`` as ever.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from checkpointing import enable_checkpointing
from tiny_llama import HIDDEN, adapted, batch, llama
from torch import nn

from qlora_kit import ConfigError
from qlora_kit.training import offload, offload_activations, use_chunked_loss

ROWS = 2 * 12  # tokens of a batch
BLOCK = 4 * ROWS * HIDDEN  # bytes of what a block is given


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_CPU", "another place")


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_are_the_same_and_weights_stay(checkpointing: bool) -> None:
    model = adapted(llama()).train()
    if checkpointing:
        enable_checkpointing(model.model)
    expected = gradients(model)
    seen: list[int] = []
    with offload_activations(model, least_bytes=0) as moved:
        mover = moved._mover
        pack, weights = mover.pack, {t.untyped_storage().data_ptr() for t in model.parameters()}
        mover.pack = lambda tensor, move: pack(  # type: ignore[method-assign]
            tensor, lambda t: seen.append(t.untyped_storage().data_ptr()) or move(t)
        )
        found = gradients(model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found.keys() == expected.keys()
    assert moved.moved > 0
    assert not weights & set(seen)


@pytest.mark.usefixtures("elsewhere")
def test_with_checkpointing_one_tensor_a_block_is_moved() -> None:
    model = adapted(llama()).train()
    enable_checkpointing(model.model)
    use_chunked_loss(model)  # so that logits aren't saved
    moved = offload_activations(model, least_bytes=BLOCK)
    gradients(model)
    inputs = {id(layer): BLOCK for layer in model.model.model.layers}
    # The last norm saves its input, in effect the last block's output, twice, and what it makes; the loss a gradient.
    assert sum(inputs.values()) <= moved.moved <= sum(inputs.values()) + 4 * BLOCK
    more = adapted(llama(num_hidden_layers=4)).train()
    enable_checkpointing(more.model)
    use_chunked_loss(more)
    second = offload_activations(more, least_bytes=BLOCK)
    gradients(more)
    assert second.moved - moved.moved == 2 * BLOCK


@pytest.mark.usefixtures("elsewhere")
def test_small_tensors_stay() -> None:
    model = adapted(llama())
    with offload_activations(model) as moved:
        gradients(model)
    assert moved.moved == 0


def test_on_the_cpu_nothing_is_moved() -> None:
    model = adapted(llama())
    with offload_activations(model, least_bytes=0) as moved:
        gradients(model)
    assert moved.moved == 0


@pytest.mark.cuda
def test_on_a_gpu_what_is_saved_lies_on_the_cpu() -> None:
    model = adapted(llama()).cuda().train()
    inputs = {name: value.cuda() for name, value in batch().items()}
    expected = torch.autograd.grad(model(**inputs).loss, [p for p in model.parameters() if p.requires_grad])
    with offload_activations(model, least_bytes=0) as moved:
        found = torch.autograd.grad(model(**inputs).loss, [p for p in model.parameters() if p.requires_grad])
    assert moved.moved > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.usefixtures("elsewhere")
def test_on_off_again_and_copies() -> None:
    model = adapted(llama())
    used = offload_activations(model, least_bytes=0)
    again = offload_activations(model, least_bytes=1)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    gradients(model)
    assert (used.moved, again.moved > 0) == (0, True)
    before = again.moved
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        gradients(other)
    assert again.moved == before
    again.remove()
    again.remove()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.usefixtures("elsewhere")
def test_an_error_within_the_forward_ends_it() -> None:
    model = llama()
    used = offload_activations(model, least_bytes=0)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 10**6))
    before = used.moved
    (model.lm_head(torch.ones(1, HIDDEN)) ** 2).sum().backward()  # saves outside of the forward
    assert used.moved == before


@pytest.mark.slow
def test_what_it_is_given_is_checked() -> None:
    with pytest.raises(ConfigError, match="model: expected a model that is loaded"):
        offload_activations("name")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="least_bytes: expected an integer of at least 0, found -1"):
        offload_activations(llama(), least_bytes=-1)
