"""The README.md beside a stored adapter: what hubs read of it in the front matter, and what people want to know.

A README is its owner's. One that is there already keeps its text; its front matter gets the entries that make a hub
take the folder for an adapter, and the part between our own two marks, where there is one, is brought up to date.
Front matter that isn't YAML is left alone.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.files import write_atomically
from ..config.lora import LoraConfig

NAME = "README.md"
_BEGIN, _END = "<!-- adapter: begin -->", "<!-- adapter: end -->"
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
#: What hubs name repositories: OWNER/NAME or NAME, none of them beginning as ``./here`` does.
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?\Z")
_OURS = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)


@dataclass(frozen=True)
class About:
    """What a README says of an adapter beside its configuration.

    Attributes:
        rows: of its table, such as how it was started.
        tags: for hubs, beside those that every adapter gets.
        hub: whether hubs know models such as its base, so that the front matter may name that.
    """

    rows: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()
    hub: bool = True


def write_card(folder: Path, config: LoraConfig, about: About | None = None) -> None:
    """Write the README of the adapter in ``folder``, or bring the one that is there up to date.

    Args:
        config: as it is stored beside the weights.
        about: further rows and tags.
    """
    path = folder / NAME
    before = path.read_bytes().decode("utf-8", errors="surrogateescape") if path.exists() else None
    text = card(before, config, about or About())
    if text != before:
        write_atomically(path, text.encode("utf-8", errors="surrogateescape"))


def card(before: str | None, config: LoraConfig, about: About) -> str:
    """The text of the README, made from the one ``before``."""
    described = _described(config, about.rows)
    if before is None:
        base = _public_base(config)
        title = f"LoRA adapter for {base}" if base else "LoRA adapter"
        before = f"\n# {title}\n\n{described}\n"
    else:
        before = _OURS.sub(lambda _: described, before, count=1)
    return _with_front_matter(before, config, about)


def about_start(config: LoraConfig, reports: Sequence[Any]) -> dict[str, str]:
    """Rows about the start that ``config`` asked for, and what its ``reports``, one a layer, say of it."""
    method = getattr(config.loftq_config, "chosen_method", None)
    kind = str(method if method and config.init_lora_weights == "loftq" else config.init_lora_weights)
    rows = {"start": {"True": "zero", "False": "random", "loftq": "LoftQ"}.get(kind, kind)}
    errors = [(r.error, r.zero_error) for r in reports if hasattr(r, "error") and hasattr(r, "zero_error")]
    if errors:
        ours, plain = (sum(column) / len(errors) for column in zip(*errors, strict=True))
        rows["error of the weights at the start"] = f"{ours:.4f}, where plain quantization has {plain:.4f}"
        rows["bits a weight"] = _each(f"{report.bits:.3g}" for report in reports if hasattr(report, "bits"))
    return rows


def _described(config: LoraConfig, about: Mapping[str, str]) -> str:
    targets: Any = config.target_modules
    rows = {
        "base model": _public_base(config) or ("a local folder" if config.base_model_name_or_path else "not recorded"),
        "rank": _counted(config.r, config.rank_pattern),
        "alpha": _counted(config.lora_alpha, config.alpha_pattern)
        + (", over the root of the rank (rslora)" if config.use_rslora else ""),
        "modules": targets if isinstance(targets, str) else ", ".join(sorted(targets or ())),
        **({"trained whole": ", ".join(config.modules_to_save)} if config.modules_to_save else {}),
        **({"biases": config.bias} if config.bias != "none" else {}),
        **about,
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    return "\n".join([_BEGIN, "| | |", "| --- | --- |", *lines, _END])


def _public_base(config: LoraConfig) -> str | None:
    """The base model's name on a hub, unless it is a folder of this machine, which nobody else has.

    A folder that is there is what libraries load where it is named as a repository is.
    """
    base = config.base_model_name_or_path
    return base if base and _REPOSITORY.match(base) and not os.path.isdir(base) else None


def _counted(usual: float, pattern: Mapping[str, float]) -> str:
    """The usual value, and how many modules' names have others."""
    others = sorted(Counter(pattern.values()).items())
    return f"{usual:g}" + "".join(f", {value:g} in {count}" for value, count in others)


def _each(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _cell(value: str) -> str:
    return value.replace("|", r"\|").replace("\n", " ")


def _with_front_matter(text: str, config: LoraConfig, about: About) -> str:
    import yaml  # type: ignore[import-untyped]

    found = _FRONT.match(text)
    try:
        data = yaml.safe_load(found[1] or "") if found else {}
    except yaml.YAMLError:
        return text
    data = {} if data is None else data
    if not isinstance(data, dict):
        return text
    updated = _front_matter(data, config, about)
    if updated == data:
        return text
    front = yaml.safe_dump(updated, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n" + (text[found.end() :] if found else text)


def _front_matter(data: Mapping[str, Any], config: LoraConfig, about: About) -> dict[str, Any]:
    base = _public_base(config) if about.hub else None
    given = data.get("tags") or []
    tags = {str(tag) for tag in ([given] if isinstance(given, str) else given)} | {"lora", *about.tags}
    if base:
        tags.add(f"base_model:adapter:{base}")
    updated = {**data, "library_name": "peft", "tags": sorted(tags), **({"base_model": base} if base else {})}
    if config.task_type == "CAUSAL_LM" and not data.get("pipeline_tag"):
        updated["pipeline_tag"] = "text-generation"
    return updated
