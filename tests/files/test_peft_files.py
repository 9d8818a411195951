"""PEFT writes and we load, we write and PEFT loads: every way in which a file can say what it is.

tests/oracle holds the architectures against each other; here it is the fields of the files.
"""

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import hf_lora
from hf_lora import AdapterFileError, UnsupportedAdapterError
from tests.files import edit
from tests.files.both_ways import (
    BERT,
    GPT2,
    LLAMA,
    both_ways,
    ours_answers,
    peft_answers,
    pefts,
    quiet,
)
from tests.files.refusing import refuse
from tests.oracle.adapting import TOLERANCE, distance, logits, scramble

pytestmark = quiet

FIELDS: dict[str, dict[str, Any]] = {
    "a list": {"target_modules": ["q_proj", "mlp.up_proj", "model.layers.1.self_attn.v_proj"]},
    "a pattern": {"target_modules": r".*\.(q|v)_proj"},
    "a pattern that looks ahead": {
        "target_modules": r"^(?!.*layers\.1).*(self_attn|mlp)\.\w+_proj$"
    },
    "a pattern with a choice of layers": {
        "target_modules": r"model\.layers\.[01]\.mlp\.(up|down)_proj"
    },
    "all-linear": {"target_modules": "all-linear"},
    "many whole paths, which PEFT shortens": {
        "target_modules": [
            f"model.layers.{n}.{where}_proj"
            for n in (0, 1)
            for where in (
                *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
                *("mlp.gate", "mlp.up", "mlp.down"),
            )
        ]
        + [f"no.such.module{n}" for n in range(10)]
    },
    "excluded by a list": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
    "excluded by a pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": r".*layers\.1.*q_proj",
    },
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "some layers of a name": {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "some layers of several names": {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "model.layers"],
    },
    "a whole path, which is not asked for its layer": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "patterns of names, of paths and of expressions": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {"k_proj": 4, r"layers\.0\.self_attn\.q_proj": 1, r".*1.*q_proj": 3},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 2, "k_proj": 9, "v_proj": 1.5},
    },
    "a pattern that means nothing": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"nothing": 4},
        "alpha_pattern": {"proj": 9},
    },
    "rank-stabilized, with patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 4},
    },
    "norms trained in full, by the ends of their names": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["layernorm", "model.norm"],
    },
    "the head trained in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings trained in full": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
    },
    "a start that changes nothing": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "an orthogonal start": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "minor components": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.25},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_a_file_of_pefts_and_back(tmp_path: Path, fields: dict[str, Any]):
    expected = pefts(tmp_path, **fields)
    both_ways(tmp_path, expected, LLAMA)


def test_conv1d_with_everything(tmp_path: Path):
    fields: dict[str, Any] = {
        "target_modules": ["c_attn", "mlp.c_proj"],
        "fan_in_fan_out": True,
        "rank_pattern": {"c_proj": 3},
        "modules_to_save": ["ln_f"],
        "layers_to_transform": [1],
    }
    both_ways(tmp_path, pefts(tmp_path, GPT2, **fields), GPT2)


class TestForms:
    """The same adapter in the forms that other tools and other times gave it."""

    @pytest.mark.parametrize(
        "fields",
        [
            {"rank_pattern": {}, "alpha_pattern": {}},
            {
                "rank_pattern": {"model.layers.0.self_attn.q_proj": 2},
                "alpha_pattern": {"model.layers.0.self_attn.q_proj": 6},
            },
            {},
        ],
    )
    def test_a_minimal_json(self, tmp_path: Path, fields: dict[str, Any]):
        """As mergekit writes it: no version, no bias, no init, alpha as it is."""
        expected = pefts(tmp_path, target_modules=["q_proj"])
        minimal = {
            "base_model_name_or_path": "someone/base",
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 6,
            "target_modules": ["q_proj"],
        }
        edit.write_config(tmp_path, minimal | fields)
        both_ways(tmp_path, expected, LLAMA)

    def test_the_first_pattern_that_fits_decides(self, tmp_path: Path):
        pefts(tmp_path, target_modules=["q_proj", "k_proj"])
        for patterns in (
            {"k_proj": 9, "layers.0.self_attn.k_proj": 2, "q_proj": 5, ".*": 3},
            {"layers.0.self_attn.k_proj": 2, ".*0.*": 3, "k_proj": 9},
            {r"self_attn\.(q|k)_proj": 7, "q_proj": 2},
        ):
            edit.change_config(tmp_path, alpha_pattern=patterns)
            assert distance(ours_answers(tmp_path), peft_answers(tmp_path)) < TOLERANCE

    def test_fields_that_are_null(self, tmp_path: Path):
        expected = pefts(tmp_path, target_modules=["q_proj"])
        names = ("bias", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias")
        edit.change_config(tmp_path, **dict.fromkeys(names))
        assert distance(ours_answers(tmp_path), expected) < TOLERANCE

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_tensors_of_another_type(self, tmp_path: Path, dtype: torch.dtype):
        pefts(tmp_path, target_modules=["q_proj"])
        edit.change_tensors(tmp_path, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
        ours, theirs = ours_answers(tmp_path), peft_answers(tmp_path)
        assert distance(ours, theirs) < TOLERANCE

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_saved_by_us_in_another_type(self, tmp_path: Path, dtype: str):
        model = hf_lora.wrap(LLAMA.build(), targets=["q_proj"], r=2)
        scramble(model)
        hf_lora.save(model, tmp_path, dtype=dtype)
        tensors = edit.read_tensors(tmp_path)[0]
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
        assert distance(ours_answers(tmp_path), peft_answers(tmp_path)) < TOLERANCE

    @pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
    def test_a_start_that_changes_the_base(self, tmp_path: Path, start: str):
        model = peft.get_peft_model(
            LLAMA.build(),
            peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start),
        ).eval()
        first = tmp_path / "first"
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(first)
        model.peft_config["default"].init_lora_weights = start
        scramble(model)
        expected = logits(model, LLAMA.inputs())
        model.save_pretrained(tmp_path / "raw")
        refuse(
            tmp_path / "raw",
            f"init_lora_weights = '{start}'",
            "path_initial_model_for_weight_conversion",
            error=UnsupportedAdapterError,
            model=LLAMA.build(),
        )
        model.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(first)
        )
        assert distance(ours_answers(tmp_path / "converted"), expected) < TOLERANCE

    def test_the_weights_alone(self, tmp_path: Path):
        """Our one file is complete; what it says is what the JSON said."""
        model = hf_lora.wrap(
            BERT.build(),
            targets=["query", "dense"],
            r=2,
            overrides={"dense": {"r": 3, "alpha": 5.0, "dropout": 0.5}},
            train=["classifier"],
            rslora=True,
        )
        scramble(model)
        hf_lora.save(model, tmp_path / "both")
        (tmp_path / "one").mkdir()
        shutil.copy(tmp_path / "both" / edit.WEIGHTS, tmp_path / "one")
        with pytest.warns(hf_lora.HfLoRAWarning, match=r"adapter_config\.json is missing"):
            alone = hf_lora.load(BERT.build(), tmp_path / "one")
        assert torch.equal(logits(alone, BERT.inputs()), logits(model, BERT.inputs()))
        assert hf_lora.adapters(alone) == hf_lora.adapters(model)
        hf_lora.save(alone, tmp_path / "again")
        for name in (edit.WEIGHTS, edit.CONFIG):
            again, both = (tmp_path / folder / name for folder in ("again", "both"))
            assert again.read_bytes() == both.read_bytes()

    def test_dropout_of_single_layers_comes_back(self, tmp_path: Path):
        """The JSON has one number for all; our header has each."""
        overrides = {"v_proj": {"dropout": 0.5}}
        model = hf_lora.wrap(LLAMA.build(), targets=["q_proj", "v_proj"], overrides=overrides)
        hf_lora.save(model, tmp_path)
        again = hf_lora.load(LLAMA.build(), tmp_path, trainable=True)
        state = torch.get_rng_state()
        with torch.no_grad():
            first = model.train()(**LLAMA.inputs()).logits
            torch.set_rng_state(state)
            assert torch.equal(again.train()(**LLAMA.inputs()).logits, first)

    def test_an_edited_dropout_is_told(self, tmp_path: Path):
        hf_lora.save(hf_lora.wrap(LLAMA.build(), targets=["q_proj"]), tmp_path)
        edit.change_config(tmp_path, lora_dropout=0.3)
        with pytest.warns(hf_lora.HfLoRAWarning, match="lora_dropout was changed and is ignored"):
            hf_lora.load(LLAMA.build(), tmp_path)


def test_a_promise_that_the_file_breaks(tmp_path: Path):
    """What PEFT only warns about: a layer that is targeted has no tensors."""
    pefts(tmp_path, target_modules=["q_proj", "v_proj"])
    edit.change_tensors(
        tmp_path, lambda t: [t.pop(key) for key in list(t) if "layers.1.self_attn.v" in key]
    )
    with pytest.raises(AdapterFileError, match=r"layers\.1\.self_attn\.v_proj is a target, but"):
        hf_lora.load(LLAMA.build(), tmp_path)
