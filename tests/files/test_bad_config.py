"""Configurations that make no sense, contradict the weights, or belong to another method."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import hf_lora
from hf_lora import (
    UnsupportedAdapterError,
)
from tests import tiny
from tests.files import edit
from tests.files.refusing import refuse

Q0 = "base_model.model.layers.0.q_proj"


class TestConfig:
    """A JSON that makes no sense, or contradicts the weights."""

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("r", 4, "says r=4, the tensors have 2"),
            ("r", 0, "r is 0"),
            ("r", -2, "r is -2"),
            ("r", 2.0, "r is 2.0"),
            ("r", True, "r is True"),
            ("r", "2", "r is '2'"),
            ("r", None, "r is None"),
            ("r", [2], "r is [2]"),
            ("r", 10**400, "r is 1000"),
            ("lora_alpha", float("nan"), "lora_alpha is nan"),
            ("lora_alpha", float("inf"), "lora_alpha is inf"),
            ("lora_alpha", 10**400, "lora_alpha is 1000"),
            ("lora_alpha", 0, "lora_alpha is 0"),
            ("lora_alpha", None, "lora_alpha is None"),
            ("lora_alpha", {}, "lora_alpha is {}"),
            ("lora_dropout", 1.0, "lora_dropout is 1.0"),
            ("lora_dropout", -0.1, "lora_dropout is -0.1"),
            ("lora_dropout", float("nan"), "lora_dropout is nan"),
            ("lora_dropout", "0", "lora_dropout is '0'"),
            ("use_rslora", "yes", "use_rslora is 'yes'"),
            ("use_rslora", 1, "use_rslora is 1"),
            ("rank_pattern", {"q_proj": 3}, "layers.0.q_proj: the configuration says r=3"),
            ("rank_pattern", {"q_proj": "2"}, "rank_pattern: 'q_proj' is '2'"),
            ("rank_pattern", ["q_proj"], "rank_pattern is ['q_proj']"),
            ("rank_pattern", {"(": 2}, "'(' is not a regular expression"),
            ("alpha_pattern", {"q_proj": float("nan")}, "alpha_pattern: 'q_proj' is nan"),
            ("alpha_pattern", {"q_proj": True}, "alpha_pattern: 'q_proj' is True"),
            ("alpha_pattern", 3, "alpha_pattern is 3"),
            ("target_modules", ["q_proj"], "layers.0.v_proj has tensors, but is no target"),
            ("target_modules", ["q_proj", "v_proj", "head"], "head is a target, but has no"),
            ("target_modules", ".*q_proj", "layers.0.v_proj has tensors, but is no target"),
            ("target_modules", "all-linear", "head is a target, but has no tensors"),
            ("target_modules", [], "has tensors, but is no target"),
            ("target_parameters", "q_proj.weight", "target_parameters is 'q_proj.weight'"),
            ("target_parameters", ["experts.down_proj"], "of which there are no factors"),
            ("target_modules", 3, "target_modules is 3"),
            ("target_modules", {"q_proj": 1}, "target_modules is {'q_proj': 1}"),
            ("target_modules", ["q_proj", 3], "target_modules is ['q_proj', 3]"),
            ("target_modules", "(q_proj", "is not a regular expression"),
            ("exclude_modules", ["q_proj"], "layers.0.q_proj has tensors, but is no target"),
            ("exclude_modules", ".*1.v_proj", "layers.1.v_proj has tensors, but is no target"),
            ("exclude_modules", 3, "exclude_modules is 3"),
            ("layers_to_transform", [5], "has tensors, but is no target"),
            ("layers_to_transform", [[0]], "layers_to_transform is [[0]]"),
            ("layers_to_transform", {"0": 1}, "layers_to_transform is [{'0': 1}]"),
            ("layers_to_transform", "0", "layers_to_transform is ['0']"),
            ("layers_to_transform", [True], "layers_to_transform is [True]"),
            ("modules_to_save", ["head"], "head.weight is missing from the file"),
            ("modules_to_save", ["nothing"], "modules_to_save names 'nothing', which is neither"),
            ("modules_to_save", [["head"]], "modules_to_save is [['head']]"),
            ("modules_to_save", [""], "modules_to_save is ['']"),
            ("modules_to_save", "head", "modules_to_save is 'head'"),
            ("base_model_name_or_path", ["x"], "base_model_name_or_path is ['x'], not a name"),
            ("task_type", {}, "task_type is {}, not a name"),
            ("revision", 3, "revision is 3, not a name"),
        ],
    )
    def test_a_field(self, pefts: Path, field: str, value: Any, words: str):
        edit.change_config(pefts, **{field: value})
        refuse(pefts, words)

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("r", 4, ["r=4"]),
            ("lora_alpha", 8, ["alpha = 8.0", "in the header 4.0"]),
            ("alpha_pattern", {"q_proj": 5}, ["alpha = 5.0", "in the header 4.0"]),
            ("use_rslora", True, ["rslora = True", "in the header False"]),
            ("target_modules", ["q_proj"], ["layers.0.v_proj has tensors, but is no target"]),
            ("layers_to_transform", [0], ["layers.1.q_proj has tensors, but is no target"]),
            ("modules_to_save", ["head"], ["modules_to_save = ['head'], in the header []"]),
        ],
    )
    def test_a_field_that_our_header_says_otherwise(
        self, ours: Path, field: str, value: Any, words: list[str]
    ):
        edit.change_config(ours, **{field: value})
        refuse(ours, *words)

    def test_what_the_mathematics_does_not_need_may_change(self, ours: Path):
        edit.change_config(
            ours, base_model_name_or_path="someone/else", inference_mode=False, task_type="SEQ_CLS"
        )
        model = hf_lora.load(tiny.Net(), ours)
        assert torch.equal(tiny.answers(model), tiny.answers(tiny.adapted()))

    def test_an_unknown_field_is_told(self, pefts: Path):
        edit.change_config(pefts, use_magic=True)
        with pytest.warns(hf_lora.HfLoRAWarning, match="ignored: 'use_magic'"):
            hf_lora.load(tiny.Net(), pefts)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "not readable JSON"),
            ("{", "not readable JSON"),
            ("[]", "holds list, not a mapping"),
            ("null", "not a mapping"),
            ("[" * 100_000, "not readable JSON"),
            ('{"peft_type": "LORA", "x": ' + "[" * 90 + "]" * 90 + "}", "nested more than 50 deep"),
            ('{"r": 2, "r": 4}', "names 'r' twice"),
            ('{"rank_pattern": {"a": 1, "a": 2}}', "names 'a' twice"),
            ('{"r": ' + "9" * 5000 + "}", "not readable JSON"),
            ("{}", "peft_type is None"),
            ('{"x": [' + "{}," * 2_000_000 + "0]}", "values, more than any adapter needs"),
            ('{"x": "' + "y" * 17_000_000 + '"}', "larger than 16000000 bytes"),
        ],
        ids=range(12),
    )
    def test_json_that_is_none(self, pefts: Path, text: str, words: str):
        (pefts / edit.CONFIG).write_text(text)
        refuse(pefts, words)

    @pytest.mark.parametrize("content", [b"\xff\xfe{", b'{"peft_type": "\xff"}'])
    def test_bytes_that_are_no_text(self, pefts: Path, content: bytes):
        (pefts / edit.CONFIG).write_bytes(content)
        refuse(pefts, "not readable JSON")

    def test_messages_hold_no_control_characters(self, pefts: Path):
        """`refuse` checks that each message is printable; half characters and escapes are shown."""
        edit.change_config(pefts, r="\x1b[31m\ud800\n", target_modules=["\u202e"])
        refuse(pefts, r"'\x1b[31m\ud800\n'")


class TestOtherMethods:
    """What PEFT has and hf_lora has not is refused by its name, as PEFT itself writes it."""

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            (peft.VeraConfig(target_modules=["q_proj"], r=2), "VERA"),
            (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
            (peft.LoHaConfig(target_modules=["q_proj"], r=2), "LOHA"),
            (peft.LoraConfig(target_modules=["q_proj"], r=2, use_dora=True), "use_dora = True"),
            (
                peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa"),
                "init_lora_weights = 'pissa'",
            ),
            (
                peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="olora"),
                "path_initial_model_for_weight_conversion",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_as_peft_writes_it(self, tmp_path: Path, config: peft.PeftConfig, words: str):
        peft.get_peft_model(tiny.Net(), config).save_pretrained(tmp_path)
        refuse(tmp_path, words, error=UnsupportedAdapterError)

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_biases_of_the_base(self, tmp_path: Path, bias: Any):
        """As the JSON promises them: each is in the file, or a load says which is not."""
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, bias=bias)
        model = peft.get_peft_model(tiny.Net(), config)
        tiny.scramble(model)
        model.save_pretrained(tmp_path)
        edit.change_tensors(
            tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if "bias" in key]
        )
        refuse(tmp_path, "layers.0.q_proj.bias was trained, and is not in the file")
        loaded = hf_lora.load(tiny.Net(), tmp_path, missing="zero")
        assert not any("bias" in name for name, p in loaded.named_parameters() if p.requires_grad)

    def test_biases_that_the_configuration_does_not_mention(self, tmp_path: Path):
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, bias="all", lora_bias=True)
        model = peft.get_peft_model(tiny.Net(), config)
        tiny.scramble(model)
        model.save_pretrained(tmp_path)
        edit.change_config(tmp_path, lora_bias=False)
        refuse(tmp_path, "layers.0.q_proj: lora_bias is False, and it has one")
        edit.change_config(tmp_path, lora_bias=True, bias="none")
        refuse(tmp_path, "neither a factor nor part of a module in modules_to_save")
        edit.change_config(tmp_path, bias="lora_only")
        refuse(tmp_path, "norm.bias: neither a factor nor part of a module in modules_to_save")
        edit.change_config(tmp_path, bias="all", lora_bias="yes")
        refuse(tmp_path, "lora_bias is 'yes', not true or false")
        edit.change_config(tmp_path, bias="all", lora_bias=True)
        edit.change_tensors(
            tmp_path, lambda t: [t.pop(key) for key in list(t) if key.endswith("lora_B.bias")]
        )
        refuse(tmp_path, "layers.0.q_proj: lora_bias is True, and it has no bias on B")

    def test_biases_of_other_sizes(self, tmp_path: Path):
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, bias="all", lora_bias=True)
        peft.get_peft_model(tiny.Net(), config).save_pretrained(tmp_path)
        key = "base_model.model.layers.0.q_proj."

        def cut(name: str) -> Any:
            return lambda t: t.update({key + name: t[key + name][:3].clone()})

        edit.change_tensors(tmp_path, cut("base_layer.bias"))
        refuse(tmp_path, "the adapter has a bias of shape (3,), the layer has one of shape (8,)")
        edit.change_tensors(tmp_path, cut("lora_B.bias"))
        refuse(tmp_path, "has a bias on B of shape (3,), which for this B would be (8,)")

    @pytest.mark.parametrize("value", ["some", True, ["all"], {}])
    def test_what_bias_never_says(self, pefts: Path, value: Any):
        edit.change_config(pefts, bias=value)
        refuse(pefts, "bias = ", error=UnsupportedAdapterError)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("alora_invocation_tokens", [1]),
            ("layer_replication", [[0, 1]]),
            ("target_parameters", ["experts.w13"]),
            ("use_qalora", True),
            ("megatron_config", {"a": 1}),
            ("kasa_config", {"a": 1}),
            ("use_dora", 1),
        ],
    )
    def test_a_switch(self, pefts: Path, field: str, value: Any):
        edit.change_config(pefts, **{field: value})
        refuse(pefts, field, error=UnsupportedAdapterError)

    def test_tied_embeddings_as_one(self, pefts: Path):
        """PEFT then applies the head's adapter to the embedding as well."""

        def rename(tensors: edit.Tensors) -> None:
            for key in list(tensors):
                tensors[key.replace("layers.1.q_proj", "lm_head")] = tensors.pop(key)

        edit.change_tensors(pefts, rename)
        edit.change_config(pefts, ensure_weight_tying=True)
        refuse(pefts, "ensure_weight_tying", "lm_head", error=UnsupportedAdapterError)


SAMPLE = ("fingerprint", "tensors", "layers.0.q_proj.weight")


class TestHeaderOfOurs:
    """Our part of the safetensors header, with a digest that fits."""

    @pytest.mark.parametrize(
        ("path", "value", "words"),
        [
            (["format"], 2, "has format 2"),
            (["format"], True, "has format True"),
            (["format"], None, "has format None"),
            (["slots"], {}, "damaged"),
            (["slots"], [], "damaged"),
            (["slots", "layers.0.q_proj"], 3, "damaged"),
            (["slots", "layers.0.q_proj", "r"], 3, "r = 2, in the header 3"),
            (["slots", "layers.0.q_proj", "r"], 2.0, "damaged"),
            (["slots", "layers.0.q_proj", "alpha"], 10**400, "damaged"),
            (["slots", "layers.0.q_proj", "alpha"], 5.0, "alpha = 4.0, in the header 5.0"),
            (["slots", "layers.0.q_proj", "dropout"], 1.0, "damaged"),
            (["slots", "layers.0.q_proj", "rslora"], None, "damaged"),
            (["slots", "layers.9.q_proj"], None, "damaged"),
            (["trained"], ["head"], "head.weight is missing from the file"),
            (["trained"], ["nowhere"], "nowhere was trained in full"),
            (["trained"], [""], "was trained in full"),
            (["trained"], [3], "damaged"),
            (["trained"], "head", "damaged"),
            (["config"], None, "damaged"),
            (["config", "r"], -1, "the configuration in the header"),
            (["config", "r"], 10**400, None),
            (["config", "dropout"], "x", "the configuration in the header"),
            (["config", "alpha"], 10**400, "the configuration in the header"),
            (["requires"], None, "damaged"),
            (["requires"], [3], "damaged"),
            (["requires"], "rslora", "damaged"),
            (["config", "targets"], ["("], "the configuration in the header"),
            (["config", "targets"], ["(?i:[\x00-\U0010ffff])"], "too long to compile"),
            (["config", "targets"], [r"(?i:[\0-\U0010ffff])"], "too long to compile"),
            (["config", "targets"], ["[!-\uffff]" * 5000], "too long to compile"),
            (["config", "overrides"], {"(?i:[!-\uffff])": {"r": 2}}, "too long to compile"),
            (["adapter_config"], None, "damaged"),
            ([*SAMPLE], "x", "sample is damaged"),
            ([*SAMPLE], [[8, 8]], "sample is damaged"),
            ([*SAMPLE], [[8, -8], "AAAA"], "sample is damaged"),
            ([*SAMPLE], [[8, 8.0], "AAAA"], "sample is damaged"),
            ([*SAMPLE], [[2**40] * 8, "AAAA"], "sample is damaged"),
            ([*SAMPLE], [[8] * 999, "AAAA"], "sample is damaged"),
            ([*SAMPLE], [[8, 8], "AAAA"], "sample is damaged"),
            ([*SAMPLE], [[8, 8], "\u00e9" * 88], "sample is damaged"),
            ([*SAMPLE], [[8, 8], 10**400], "sample is damaged"),
            ([*SAMPLE], [[8, 8], None, "no"], "sample is damaged"),
            ([*SAMPLE], [[8, 9], None], "has shape (8, 8), in the base (8, 9)"),
            ([*SAMPLE], [[8, 8], f"{'/' * 84}8A=="], "numbers that are not finite stand elsewhere"),
            ([*SAMPLE], [[8, 8], None], None),
            (["fingerprint", "ties"], {"head.weight": "nothing", "x": 3}, None),
            (["fingerprint", "ties"], 3, None),
            (["fingerprint", "vocabulary"], "many", None),
            (["fingerprint", "vocabulary"], 10**400, None),
            (["fingerprint"], {"samples": 3}, None),
            (["fingerprint"], {"tensors": 3}, None),
            (["fingerprint"], {"tensors": {}}, None),
            (["fingerprint"], "none", None),
            (["fingerprint"], {"samples": {"layers.0.q_proj": "x"}}, "sample is damaged"),
            (["fingerprint"], {"samples": {"layers.0.q_proj": [10**400]}}, "sample is damaged"),
            (["fingerprint"], {"samples": {"layers.0.q_proj": [[1.0]] * 16}}, "sample is damaged"),
            (["fingerprint"], {"samples": {"layers.0.q_proj": [1.0]}}, "the weights differ"),
        ],
    )
    def test_a_lie(self, ours: Path, path: list[str], value: Any, words: str | None):
        tensors, metadata = edit.read_tensors(ours)
        header = json.loads(metadata["hf_lora"])
        place = header
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        edit.write_tensors(ours, tensors, {"hf_lora": json.dumps(header)})
        if words is None:
            hf_lora.load(tiny.Net(), ours)
        else:
            refuse(ours, words)

    @pytest.mark.parametrize("text", ["", "null", "[]", "{", '{"format": 1}', "[" * 9999])
    def test_what_is_no_header(self, ours: Path, text: str):
        tensors, _ = edit.read_tensors(ours)
        edit.write_tensors(ours, tensors, {"hf_lora": text})
        refuse(ours, "hf_lora's part of the header")
