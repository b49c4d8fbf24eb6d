"""``qlora-kit extract``: does what the function does, prints the report, and says errors without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_llama import llama
from tuned_models import low_rank, noise, pair, tensors
from typer.testing import CliRunner

from qlora_kit import LoraConfig
from qlora_kit.cli.commands import app
from qlora_kit.folders.extract.run import extract_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair(llama(), tmp_path_factory.mktemp("pair"), low_rank(3, only="proj"), noise(only=("norm", "lm_head")))


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (["--rank", "2"], {"rank": 2}),
        (["--energy", "0.8", "--whole", "changed"], {"energy": 0.8, "whole": "changed"}),
        (
            ["--rank", "3", "--targets", "q_proj, v_proj", "--whole", "norm,lm_head", "--dtype", "bfloat16"],
            {"rank": 3, "target_modules": ["q_proj", "v_proj"], "whole": ["norm", "lm_head"], "dtype": "bfloat16"},
        ),
        (["--rank", "1", "--targets", r".*\.(up|down)_proj"], {"rank": 1, "target_modules": r".*\.(up|down)_proj"}),
    ],
)
@pytest.mark.slow
def test_the_command_does_what_the_function_does(
    options: list[str], fields: dict, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = folders
    given = ["extract", "--base", str(base), "--tuned", str(tuned), "--out", str(tmp_path / "cli"), *options]
    outcome = CliRunner().invoke(app, given)
    assert outcome.exit_code == 0, outcome.output
    report = extract_folders(str(base), str(tuned), tmp_path / "function", **fields)
    assert (
        str(report).replace("whole='changed'", "--whole changed").replace("own_ranks=True", "--own-ranks")
        in outcome.output
    )
    assert f"wrote {tmp_path / 'cli'}" in outcome.output
    assert files(tmp_path / "cli") == files(tmp_path / "function")
    assert len(tensors(tmp_path / "cli")) > 2
    assert LoraConfig.from_pretrained(tmp_path / "cli").base_model_name_or_path == str(base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--rank, --energy: expected one of the two"),
        (["--rank", "2", "--whole", "nrm"], "matches no module of the model"),
        (["--rank", "2", "--dtype", "int8"], "--dtype: expected one of"),
    ],
)
def test_errors_have_no_traceback(options: list[str], message: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    given = ["extract", "--base", str(base), "--tuned", str(tuned), "--out", str(tmp_path / "out"), *options]
    outcome = CliRunner().invoke(app, given)
    assert outcome.exit_code != 0
    assert message in " ".join(outcome.output.split())
    assert "Traceback" not in outcome.output
    assert not (tmp_path / "out").exists()
