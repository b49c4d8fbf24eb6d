"""LoraConfig and LoftQConfig: what is refused and how it's said, and PEFT's JSON in both directions."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields

import pytest

from qlora_kit.config.lora import INIT_NAMES, LoftQConfig, LoraConfig
from qlora_kit.config.peft_json import FOREIGN_DEFAULTS, WITHOUT_EFFECT
from qlora_kit.errors import ConfigError

# Fields of ours that PEFT doesn't have; files name them where they say something, and PEFT passes over them.
OURS_ALONE = {"merge_aware"}
# A file as PEFT 0.4.0 wrote it, and the fields that 0.2 had besides.
PEFT_0_4 = {
    "auto_mapping": None,
    "base_model_name_or_path": "huggyllama/llama-7b",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 16.0,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 64,
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("r", 8.0),
        ("lora_alpha", -1),
        ("lora_alpha", 0),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("lora_alpha", True),
        ("lora_alpha", "16"),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("lora_dropout", math.nan),
        ("lora_dropout", False),
        ("bias", "lora"),
        ("bias", None),
        ("use_rslora", 1),
        ("fan_in_fan_out", None),
        ("inference_mode", "no"),
        ("init_lora_weights", "gausian"),
        ("init_lora_weights", None),
        ("init_lora_weights", 1),
        ("target_modules", []),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", ["q_proj", ""]),
        ("target_modules", ""),
        ("target_modules", 7),
        ("target_modules", "(unclosed"),
        ("exclude_modules", "*"),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [None]),
        ("layers_pattern", ["layers"]),
        ("layers_pattern", "layers"),
        ("layers_to_transform", -1),
        ("layers_to_transform", []),
        ("layers_to_transform", [0, "1"]),
        ("layers_to_transform", 1.5),
        ("layers_to_transform", True),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": True}),
        ("rank_pattern", {"q_(proj": 4}),
        ("rank_pattern", {3: 4}),
        ("alpha_pattern", {"q_proj": -2}),
        ("alpha_pattern", {"q_proj": math.nan}),
        ("loftq_config", 4),
        ("loftq_config", LoftQConfig()),
        ("loftq_config", {"loftq_bit": 4}),
        ("megatron_config", "small"),
        ("megatron_config", {1: 2}),
        ("megatron_core", 3),
        ("auto_mapping", []),
        ("task_type", "CAUSAL"),
        ("peft_type", "IA3"),
        ("base_model_name_or_path", 5),
        ("revision", 1.0),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}.*: expected .*found .*; ") as caught:
        LoraConfig(**{field: value})
    part = next(iter(value.values())) if field.endswith("_pattern") and isinstance(value, dict) else value
    shown = [repr(part), repr(value), *map(repr, value if isinstance(value, (list, dict)) else [])]
    assert any(text in str(caught.value) for text in shown), caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loftq_bits", 5),
        ("loftq_bits", "4"),
        ("loftq_bits", True),
        ("loftq_iter", 0),
        ("quant_type", "nf5"),
        ("quant_type", "nf2"),
        ("blocksize", 0),
        ("double_quant", 1),
        ("weights", 3),
    ],
)
def test_a_bad_loftq_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: expected .*, found {re.escape(repr(value))}; "):
        LoftQConfig(**{field: value})


def test_errors_propose_what_was_meant() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gaussian'"):
        LoraConfig(init_lora_weights="gausian")
    with pytest.raises(ConfigError, match="did you mean 'CAUSAL_LM'"):
        LoraConfig(task_type="CAUSAL")
    with pytest.raises(ConfigError, match="did you mean 'loftq_bits'"):
        LoftQConfig.from_dict({"loftq_bit": 4})
    with pytest.raises(ConfigError, match=r"pass modules_to_save=\['lm_head'\]"):
        LoraConfig(modules_to_save="lm_head")
    with pytest.raises(ConfigError, match="pass loftq_bits=2"):
        LoftQConfig(quant_type="nf2")


def test_layers_go_with_target_lists_only() -> None:
    config = LoraConfig(target_modules=["q"], layers_to_transform=range(2), layers_pattern="h")
    assert (config.layers_to_transform, config.layers_pattern) == ([0, 1], "h")
    assert LoraConfig(layers_to_transform=0).layers_to_transform == 0
    with pytest.raises(ConfigError, match="layers_to_transform: expected None with target_modules='q'"):
        LoraConfig(target_modules="q", layers_to_transform=[0])


def test_containers_are_the_configs_own() -> None:
    names, ranks = ["b", "a", "b"], {"a": 2}
    config = LoraConfig(target_modules=names, rank_pattern=ranks)
    names.append("c")
    ranks["c"] = 3
    assert config.target_modules == ["b", "a"]
    assert config.rank_pattern == {"a": 2}
    assert LoraConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]
    data = dict(PEFT_0_4)
    LoraConfig.from_dict(data)
    assert data == PEFT_0_4
    assert LoraConfig(rank_pattern=None, alpha_pattern=None) == LoraConfig()


def test_scaling() -> None:
    assert LoraConfig().scaling_of(4, 8) == 2.0
    assert LoraConfig(use_rslora=True).scaling_of(4, 8) == 4.0


def test_loftq_config_is_completed_or_converted() -> None:
    assert LoraConfig(init_lora_weights="loftq").loftq_config == LoftQConfig()
    config = LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 2, "loftq_iter": 5})
    assert config.loftq_config == LoftQConfig(loftq_bits=2, loftq_iter=5)
    assert LoraConfig(loftq_config={}).loftq_config is None


def test_a_registered_start_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.config.lora.INIT_NAMES", INIT_NAMES | {"mine"})
    assert LoraConfig(init_lora_weights="mine").init_lora_weights == "mine"


FULL = {
    "r": 4,
    "target_modules": ["v", "q"],
    "lora_alpha": 3.5,
    "lora_dropout": 0.1,
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["head"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [0, 2],
    "layers_pattern": ["h"],
    "rank_pattern": {r"^h\.0\.q": 2},
    "alpha_pattern": {"v": 1.5},
    "megatron_config": {"hidden_size": 8},
    "megatron_core": "mine.core",
    "exclude_modules": ["h.1"],
    "task_type": "SEQ_CLS",
    "inference_mode": True,
    "base_model_name_or_path": "somewhere",
    "revision": "main",
    "auto_mapping": {"base_model_class": "Net"},
}


def test_dict_round_trip_and_minimal_form() -> None:
    minimal = LoraConfig(target_modules=["q"]).to_dict()
    assert minimal == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["q"],
    }
    config = LoraConfig(**FULL)
    data = config.to_dict()
    assert set(data) == {*FULL, "peft_type"}
    assert LoraConfig.from_dict(json.loads(json.dumps(data))) == config
    shuffled = LoraConfig(**dict(reversed(FULL.items())))
    assert list(shuffled.to_dict()) == list(data)
    loftq = LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=2, blocksize=32))
    assert loftq.to_dict()["loftq_config"] == {"loftq_bits": 2, "loftq_iter": 1, "blocksize": 32}
    assert LoraConfig.from_dict(loftq.to_dict()) == loftq


def test_stored_form_starts_nothing() -> None:
    config = LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=2), r=4)
    stored = config.as_stored()
    assert (stored.init_lora_weights, stored.loftq_config, stored.inference_mode, stored.r) == (True, None, True, 4)
    assert config.init_lora_weights == "loftq"


def test_reads_what_peft_wrote_since_0_4() -> None:
    config = LoraConfig.from_dict(PEFT_0_4)
    assert (config.r, config.lora_alpha, config.target_modules) == (64, 16.0, ["q_proj", "v_proj"])
    assert config == LoraConfig.from_dict({**PEFT_0_4, "enable_lora": None, "merge_weights": False})
    later = {"rank_pattern": {}, "alpha_pattern": None, "loftq_config": {}, "megatron_core": "megatron.core"}
    assert config == LoraConfig.from_dict({**PEFT_0_4, **later, "layers_pattern": "", "modules_to_save": []})
    assert config == LoraConfig.from_dict({**PEFT_0_4, "eva_config": {"rho": 2.0}, "init_lora_weights": "eva"})
    started = {"corda_config": {"corda_method": "ipm"}, "lora_ga_config": {"scale": "stable"}}  # and converted since
    assert config == LoraConfig.from_dict({**PEFT_0_4, **started, "init_lora_weights": True})
    with pytest.raises(ConfigError, match=r"init_lora_weights.*'corda'"):
        LoraConfig.from_dict({**PEFT_0_4, **started, "init_lora_weights": "corda"})
    assert config == LoraConfig.from_dict({**PEFT_0_4, "peft_version": "9.0", "a_field_of_tomorrow": False})


def test_peft_defaults_and_field_table() -> None:
    peft = pytest.importorskip("peft", reason="the table of foreign fields is compared with the installed peft's")
    theirs = peft.LoraConfig()
    ours = LoraConfig()
    own = {f.name for f in fields(LoraConfig)}
    for name in own - {"peft_type", "loftq_config", *OURS_ALONE}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert theirs.peft_type.value == ours.peft_type
    assert not OURS_ALONE & {f.name for f in fields(peft.LoraConfig)}
    foreign = {f.name for f in fields(peft.LoraConfig)} - own
    # A new field of PEFT fails here first: decide whether to implement it, then list it.
    assert foreign <= set(FOREIGN_DEFAULTS) | WITHOUT_EFFECT
    for name in foreign - WITHOUT_EFFECT:
        assert getattr(theirs, name) == FOREIGN_DEFAULTS[name], name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("layer_replication", [[0, 4]]),
        ("target_parameters", ["experts.down_proj"]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("kasa_config", {"beta": 1}),
        ("lora_dropuot", 0.5),
        ("a_field_of_tomorrow", 0.5),
    ],
)
def test_foreign_fields_that_change_behaviour_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: expected .*, found {re.escape(repr(value))}.*PEFT"):
        LoraConfig.from_dict({**PEFT_0_4, field: value})


def test_starts_that_rewrote_the_base_are_refused() -> None:
    for name in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga"):
        if name not in INIT_NAMES:
            with pytest.raises(ConfigError, match=f"init_lora_weights: .*{name}.*path_initial_model"):
                LoraConfig.from_dict({**PEFT_0_4, "init_lora_weights": name})


def test_files_both_ways_with_peft(tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="configs are exchanged with the installed peft")
    config = LoraConfig(**FULL)
    config.save_pretrained(tmp_path / "ours")
    assert [p.name for p in (tmp_path / "ours").iterdir()] == ["adapter_config.json"]
    for reader in (peft.LoraConfig, peft.PeftConfig):
        read = reader.from_pretrained(str(tmp_path / "ours"))
        for name, value in FULL.items():
            found = getattr(read, name)
            assert (sorted(found) == sorted(value)) if isinstance(found, set) else found == value, name
    read.save_pretrained(str(tmp_path / "theirs"))
    back = LoraConfig.from_pretrained(tmp_path / "theirs")
    back.target_modules = FULL["target_modules"]  # PEFT keeps names as a set: their order is lost there
    assert back == config


def test_unreadable_files(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"adapter_config\.json: expected a readable file.*pass the folder"):
        LoraConfig.from_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    for text, message in (
        ("{", "expected a JSON object"),
        ("[]", "found a list"),
        ("[" * 100_000, "nested thousands"),
        ("{}", "peft_type: expected 'LORA'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            LoraConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps({**PEFT_0_4, "peft_type": "IA3"}))
    with pytest.raises(ConfigError, match=r"peft_type: expected one of .*'IA3'"):
        LoraConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"megatron_config.*JSON"):
        LoraConfig(megatron_config={"activation": print}).save_pretrained(tmp_path)
