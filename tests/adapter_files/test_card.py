"""The README beside an adapter: what it says, and what it leaves of one that is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from qlora_kit import LoraConfig, LoraModel, apply_lora
from qlora_kit.adapter_files.card import About, card
from qlora_kit.folders import compress_folder


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def front_matter(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---\n")[1])  # type: ignore[no-any-return]


def test_it_says_what_the_adapter_is(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["0", "2"],
        rank_pattern={"0": 2},
        base_model_name_or_path="some/base",
        task_type="CAUSAL_LM",
    )
    apply_lora(mlp(), config).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "base_model" not in front_matter(text)  # which no hub knows
    model = mlp()
    model.config = None  # type: ignore[assignment]
    LoraModel.from_pretrained(model, tmp_path).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert front_matter(text) == {
        "library_name": "peft",
        "tags": ["base_model:adapter:some/base", "lora"],
        "base_model": "some/base",
        "pipeline_tag": "text-generation",
    }
    for row in ("base model | some/base", "rank | 4, 2 in 1", "alpha | 8", "modules | 0, 2", "start | zero"):
        assert f"| {row} |" in text


def test_it_gives_the_numbers_of_a_start(tmp_path: Path) -> None:
    lora = apply_lora(mlp(), LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights="loftq"))
    reports = [layer.start_reports["default"] for layer in lora.adapter_layers().values()]
    lora.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    ours, plain = (sum(getattr(r, name) for r in reports) / 2 for name in ("error", "zero_error"))
    assert f"{ours:.4f}, where plain quantization has {plain:.4f}" in text
    assert "| start | LoftQ |" in text
    assert ours < plain


def test_the_tags_of_the_model_come_along(tmp_path: Path) -> None:
    model = mlp()
    model.model_tags = ["mine"]  # type: ignore[assignment]
    apply_lora(model, LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    assert front_matter((tmp_path / "README.md").read_text())["tags"] == ["lora", "mine"]


def test_a_readme_keeps_its_text_and_gets_the_front_matter(tmp_path: Path) -> None:
    mine = "---\nlicense: mit\ntags:\n- fine\n---\r\n# My adapter\n\nWords of mine, é.\n"
    (tmp_path / "README.md").write_bytes(mine.encode())
    apply_lora(mlp(), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_bytes().decode()
    assert text.endswith("# My adapter\n\nWords of mine, é.\n")
    assert front_matter(text) == {"license": "mit", "tags": ["fine", "lora"], "library_name": "peft"}


def test_our_own_part_is_brought_up_to_date_and_the_rest_stays() -> None:
    first = card(None, LoraConfig(r=2, target_modules=["0"]), About())
    longer = first.replace("# LoRA adapter", "# Mine") + "\nMore of mine.\n"
    second = card(longer, LoraConfig(r=5, target_modules=["0"]), About({"seen": "a | b"}))
    assert "# Mine" in second
    assert second.endswith("\nMore of mine.\n")
    assert "| rank | 5 |" in second
    assert "| rank | 2 |" not in second
    assert r"| seen | a \| b |" in second
    assert card(second, LoraConfig(r=5, target_modules=["0"]), About({"seen": "a | b"})) == second


@pytest.mark.parametrize(
    "name",
    ["/home/me/secret", "./secret", "../secret", "my/own/secret", "~/secret", "C:\\secret", "kept/secret", "secret"],
)
def test_folders_of_this_machine_are_not_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept" / "secret").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    monkeypatch.chdir(tmp_path)
    text = card(None, LoraConfig(target_modules=["0"], base_model_name_or_path=name), About())
    assert "secret" not in text
    assert "| base model | a local folder |" in text
    assert "base_model:" not in text


@pytest.mark.parametrize("name", ["gpt2", "facebook/opt-350m", "some/base_1.5-x"])
def test_names_on_a_hub_are_told(name: str) -> None:
    text = card(None, LoraConfig(target_modules=["0"], base_model_name_or_path=name), About())
    assert front_matter(text)["base_model"] == name
    assert f"# LoRA adapter for {name}\n" in text


def test_front_matter_that_is_no_yaml_is_left_alone() -> None:
    for mine in ("---\na: [1\n---\ntext\n", "---\n- a\n- b\n---\ntext\n"):
        assert card(mine, LoraConfig(), About()) == mine
    assert card("---\n---\ntext\n", LoraConfig(), About()).endswith("---\ntext\n")
    assert card("text\n", LoraConfig(), About()).endswith("---\ntext\n")


def test_every_adapter_of_a_model_and_every_command_that_writes_one_has_it(tmp_path: Path) -> None:
    lora = apply_lora(mlp(), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    lora.add_adapter("other", LoraConfig(target_modules=["0"]))
    lora.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "README.md").exists()
    assert (tmp_path / "two" / "other" / "README.md").exists()
    compress_folder(tmp_path / "two", tmp_path / "small", rank=1)
    assert "| rank | 1 |" in (tmp_path / "small" / "README.md").read_text()


def test_it_loads_as_before(tmp_path: Path) -> None:
    lora = apply_lora(mlp(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(mlp(), tmp_path)
    torch.testing.assert_close(again.model[0].delta("default"), lora.model[0].delta("default"), rtol=0, atol=0)
