"""Checks of values that configurations and functions share."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.config.checks import check_device
from qlora_kit.errors import ConfigError


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_devices_that_there_are(device: object) -> None:
    check_device("device", device)


@pytest.mark.parametrize("device", ["meta", "", "xla", "hpu", "lazy", "gpu9", "cpu:x", "cuda:99", 3.5])
def test_devices_that_there_aren_t(device: object) -> None:
    with pytest.raises(ConfigError, match=r"device: expected a device of this machine, found .*; pass device='cpu' \("):
        check_device("device", device)
