"""Folders with a config.json and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo import ZOO


def config_folder(folder: Path, name: str, layers: int = 2, **settings: Any) -> Path:
    """One for a model of the zoo with so many layers."""
    model = ZOO[name].make()
    found = {**model.config.to_dict(), "architectures": [type(model).__name__], **settings}
    for count in ("num_hidden_layers", "n_layer", "num_layers"):
        if count in found:
            found[count] = layers
    if isinstance(kinds := found.get("layer_types"), list):
        found["layer_types"] = (kinds * layers)[:layers]
    (folder / "config.json").write_text(json.dumps(found, default=str))
    return folder
