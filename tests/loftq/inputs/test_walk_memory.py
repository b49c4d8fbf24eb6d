"""Activations of a walk that stands still: over a bound they lie in files, and what comes back is bitwise the same."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import MODELS, WIDTH, Batches, seeded, targets
from torch import Tensor, nn

from loftq.inputs.groups import Stage, stages
from loftq.inputs.walk import Walk, stops_for

ROWS, BATCHES = 512, 12
ONE = ROWS * WIDTH * 4  # bytes of one batch's activations between two blocks


def statistics_of(walk: Iterable[Stage]) -> dict[str, list[Tensor]]:
    found = {}
    for stage in walk:
        for path, seen in stage.seen().items():
            half = [] if seen.half is None else [seen.half.statistics, seen.half.cross, seen.half.shortfall]
            found[path] = [each for each in (seen.statistics, seen.cross, seen.shortfall, *half) if each is not None]
    return found


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_files_change_nothing(name: str, sequential: bool, tmp_path: Path) -> None:
    make, draw = MODELS[name]
    model, batches = make(), draw()
    options: dict[str, Any] = {"sequential": sequential, "folder": tmp_path}
    expected = statistics_of(stages(model, batches, targets(model), **options))
    for limit in (0, 3000):  # everything, and all but one or two of the runs
        found = statistics_of(stages(model, batches, targets(model), limit=limit, **options))
        assert found.keys() == expected.keys()
        for path, own in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(found[path], own, strict=True)), path
    assert list(tmp_path.iterdir()) == []


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.sin(ids[:, None] * torch.arange(1, WIDTH + 1))
        for block in self.blocks:
            x = block(x)
        return x


def deep() -> tuple[nn.Module, Batches]:
    return seeded(Deep), [{"ids": torch.arange(ROWS) + ROWS * number} for number in range(BATCHES)]


def alive() -> int:
    """Bytes of all floating-point tensors in the process, each storage once."""
    found = [v for v in gc.get_objects() if type(v) is Tensor and v.is_floating_point()]
    return sum({v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in found}.values())


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.slow
def test_the_bytes_in_memory_are_bounded(sequential: bool, tmp_path: Path) -> None:
    most: dict[int, int] = {}
    for limit in (0, 4 * ONE, 1 << 30):
        model, batches = deep()
        before, peak, calls = alive(), 0, 0

        def look(*_: object, before: int = before) -> None:
            nonlocal peak, calls
            calls += 1
            if calls % 5 == 0:  # often enough to meet a block's last batches, and quick
                peak = max(peak, alive() - before)

        model.get_submodule("blocks.1.inner").register_forward_hook(look)
        for stage in stages(model, batches, targets(model), limit=limit, folder=tmp_path, sequential=sequential):
            stage.seen()
            peak = max(peak, alive() - before)
        most[limit] = peak
    # In flight is one batch: its arguments, their copies, what the layer makes of them, the block's output, the
    # statistics' products, and on the way to a file a copy. All else is within the limit.
    in_flight = 8 * ONE
    assert most[0] <= in_flight
    assert most[4 * ONE] <= 4 * ONE + in_flight
    assert most[1 << 30] >= (BATCHES + 1) * ONE, "without a limit all batches lie in memory"


@torch.no_grad()
def test_files_hold_the_activations_and_go_when_these_are_back(tmp_path: Path) -> None:
    model, batches = deep()
    with Walk(model, batches, stops_for(model, targets(model)), limit=0, folder=tmp_path) as walk:
        assert [file.stat().st_size for file in tmp_path.iterdir()] == [ONE] * BATCHES
        assert walk.holdings.nbytes == 0
        run = walk.runs[3]
        run.fill()
        assert (walk.holdings.nbytes, len(list(tmp_path.iterdir()))) == (ONE, BATCHES - 1)
        x = torch.sin(batches[3]["ids"][:, None] * torch.arange(1, WIDTH + 1))
        assert torch.equal(run.args[0], x)
        run.forward(keep=True)
        assert walk.holdings.nbytes == 0
        assert len(list(tmp_path.iterdir())) == BATCHES + 1  # the argument and the output
    assert list(tmp_path.iterdir()) == []


class Caching(nn.Module):
    """Makes its mask once, and gives it to its blocks in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None
        self.blocks = nn.ModuleList(Masked() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.linspace(-1, 1, x.shape[1])
        for block in self.blocks:
            x = block(x + self.mask, self.mask)
        return x


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.inner(x + mask))


def test_what_the_model_keeps_for_itself_stays_in_memory() -> None:
    model = seeded(Caching)
    batches = [{"x": torch.randn(5, WIDTH)} for _ in range(3)]
    expected = statistics_of(stages(model, batches, targets(model)))
    model = seeded(Caching)
    found = statistics_of(stages(model, batches, targets(model), limit=0))
    assert all(torch.equal(found[path][0], own[0]) for path, own in expected.items())
    assert model.mask is not None
    assert torch.equal(model.mask, torch.linspace(-1, 1, WIDTH))


def test_a_file_that_cannot_be_written_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    class Full(type(tmp_path)):  # type: ignore[misc]
        def open(self, *args: Any, **kwargs: Any) -> Any:
            raise OSError(28, "No space left on device")

    model, batches = deep()
    walk = Walk(model, batches, stops_for(model, targets(model)), limit=3 * ONE, folder=Full(tmp_path))
    with pytest.raises(OSError, match="No space left"):
        walk.__enter__()
    assert not any("forward" in vars(part) for part in model.modules())
    assert not any(run.thread.is_alive() for run in walk.runs)
