"""Several adapters, other types, what is carried along, what is refused, and what is reported."""

import json
import math
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import hf_lora
from tests.file_merging.families import FAMILIES, TOKENS, Family, made, tensors_in
from tests.model.models import llama
from tests.rounding import assert_rounded_alike
from tests.tiny import scramble
from tests.tiny_base import tiny_tokenizer

PLAIN = Family(llama, {"targets": "all-linear", "r": 4})


def second(base: Path, folder: Path, **fields: object) -> Path:
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    hf_lora.wrap(model, **{"targets": ["q_proj", "up_proj"], "r": 2} | fields)
    scramble(model, seed=9)
    hf_lora.save(model, folder)
    return folder


def test_several_adapters_are_added_up_and_rounded_once(tmp_path: Path):
    base, adapter, _ = made(PLAIN, tmp_path, torch.bfloat16)
    other = second(base, tmp_path / "other")
    factors = {str(adapter): 0.7, str(other): -0.4}
    hf_lora.merge_checkpoint(base, factors, tmp_path / "out")
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    for i, folder in enumerate(factors):
        hf_lora.load(model, folder, adapter=f"a{i}", check_base=False)
    hf_lora.merge_and_unwrap(model, {f"a{i}": factor for i, factor in enumerate(factors.values())})
    merged = dict(tensors_in(tmp_path / "out"))
    exact = model.state_dict()
    equal = [merged[name] == exact[name].to(torch.bfloat16) for name in merged]
    assert torch.cat([each.flatten() for each in equal]).double().mean() > 0.999


def test_copies_of_trained_modules_are_mixed(tmp_path: Path):
    base, adapter, _ = made(FAMILIES["llama with a head trained"], tmp_path)
    other = second(base, tmp_path / "other", train=["lm_head"])
    hf_lora.merge_checkpoint(base, {str(adapter): 0.25, str(other): 0.75}, tmp_path / "out")
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    hf_lora.load(model, adapter, adapter="a")
    hf_lora.load(model, other, adapter="b")
    hf_lora.merge_and_unwrap(model, {"a": 0.25, "b": 0.75})
    for name, tensor in tensors_in(tmp_path / "out"):
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(hf_lora.TargetError, match="factors that add up to 1"):
        hf_lora.merge_checkpoint(base, [adapter, other], tmp_path / "sum")


def test_it_is_what_peft_merges(tmp_path: Path):
    base, adapter, _ = made(PLAIN, tmp_path)
    hf_lora.merge_checkpoint(base, adapter, tmp_path / "out")
    plain = hf.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    ours = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    exact = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    hf_lora.merge_and_unwrap(hf_lora.load(exact, adapter, check_base=False))
    assert_rounded_alike((ours(TOKENS).logits, theirs(TOKENS).logits, exact(TOKENS).logits))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_every_number_gets_the_type_that_is_asked_for(name: str, tmp_path: Path):
    base, adapter, _ = made(FAMILIES["gemma with a tied head adapted"], tmp_path)
    report = hf_lora.merge_checkpoint(base, adapter, tmp_path / "out", dtype=name, verify=True)
    kind = getattr(torch, name)
    assert {tensor.dtype for _, tensor in tensors_in(tmp_path / "out")} == {kind}
    assert report.dtype == name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == name
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == kind
    exact = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    hf_lora.merge_and_unwrap(hf_lora.load(exact, adapter, check_base=False))
    equal = [
        (tensor == exact.state_dict()[n].to(kind)).flatten()
        for n, tensor in model.state_dict().items()
    ]
    assert torch.cat(equal).double().mean() > 0.999


def test_a_fresh_head_is_put_into_the_checkpoint(tmp_path: Path):
    llama().save_pretrained(tmp_path / "base")
    labels = {0: "no", 1: "yes", 2: "perhaps"}
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    model.config.pad_token_id = 0
    hf_lora.wrap(model, ["q_proj"], r=2)
    scramble(model)
    hf_lora.save(model, tmp_path / "adapter")
    report = hf_lora.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.added == ("score.weight",)
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert again.config.id2label == labels
    assert again.config.architectures == ["LlamaForSequenceClassification"]
    again.config.pad_token_id = 0
    torch.testing.assert_close(again(TOKENS).logits, model.eval()(TOKENS).logits)


def test_a_backbones_checkpoint_keeps_its_names(tmp_path: Path):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.BertConfig(vocab_size=48, intermediate_size=40, **sizes)
    hf.BertModel(config).save_pretrained(tmp_path / "base")
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    hf_lora.wrap(model, ["query"], r=2)
    scramble(model)
    hf_lora.save(model, tmp_path / "adapter")
    report = hf_lora.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.added == ("classifier.weight", "classifier.bias")
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(TOKENS).logits, model.eval()(TOKENS).logits)


def test_stacks_that_are_stored_transposed(tmp_path: Path):
    base, adapter, model = made(FAMILIES["qwen 3 vl, stacked"], tmp_path)
    tensors = load_file(base / "model.safetensors")
    turned = {
        name: tensor.transpose(1, 2).contiguous() if "mlp.experts" in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(turned, base / "model.safetensors", metadata={"format": "pt"})
    hf_lora.merge_checkpoint(base, adapter, tmp_path / "out", verify=True)
    hf_lora.merge_and_unwrap(model)
    again = type(model).from_pretrained(tmp_path / "out")
    stacks = 0
    for name, tensor in dict(tensors_in(tmp_path / "out")).items():
        assert tensor.shape == turned[name].shape
        stacks += not torch.equal(tensor, turned[name])
    assert stacks == 4
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_tokenizer_and_its_template_come_along(tmp_path: Path):
    base, adapter, _ = made(PLAIN, tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(base)
    (base / "pytorch_model.bin").write_bytes(b"old")
    (base / "README.md").write_text("# the base")
    hf_lora.merge_checkpoint(base, adapter, tmp_path / "out")
    again = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template
    assert again("a word").input_ids == tokenizer("a word").input_ids
    assert not {"pytorch_model.bin", "README.md"} & {p.name for p in (tmp_path / "out").iterdir()}
    # what was saved beside an adapter was changed for it
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter)
    hf_lora.merge_checkpoint(base, adapter, tmp_path / "with")
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "with").chat_template.startswith("{{ mess")


def test_tokens_that_an_adapter_brings_are_added(tmp_path: Path):
    llama(tied=True).save_pretrained(tmp_path / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(51, mean_resizing=False)
    hf_lora.wrap(model, ["q_proj"], r=2, train=["embed_tokens"])
    scramble(model)
    hf_lora.save(model, tmp_path / "adapter")
    hf_lora.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.vocab_size == 51
    assert again.lm_head.weight is again.model.embed_tokens.weight
    hf_lora.merge_and_unwrap(model)
    torch.testing.assert_close(again(TOKENS).logits, model.eval()(TOKENS).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_peft_has_saved_of_a_grown_base_are_put_in(tied: bool, tmp_path: Path):
    llama(tied=tied).save_pretrained(tmp_path / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(51, mean_resizing=False)
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    scramble(theirs)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    report = hf_lora.merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True
    )
    assert not report.untied
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    ids = torch.tensor([[1, 47, 48, 50]])
    torch.testing.assert_close(again(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_report_says_how_much_is_lost_and_which_type_keeps_it(tmp_path: Path):
    base, adapter, model = made(PLAIN, tmp_path, torch.bfloat16, alpha=0.004)
    with pytest.warns(hf_lora.HfLoRAWarning, match=r"bfloat16 has rounded away .* float32"):
        report = hf_lora.merge_checkpoint(base, adapter, tmp_path / "out")
    before, after = dict(tensors_in(base)), dict(tensors_in(tmp_path / "out"))
    lost = change = 0.0
    for each in report.tensors:
        path = each.name.removesuffix(".weight")
        delta = model.get_submodule(path).lora_delta("default").detach().double()
        stored = after[each.name].double() - before[each.name].double()
        lost += float((stored - delta).norm()) ** 2
        change += float(delta.norm()) ** 2
    assert report.rounded_away == pytest.approx(math.sqrt(lost / change), rel=0.2)
    assert report.lost["float32"] < 1e-4 < report.lost["float16"] < report.lost["bfloat16"]
    assert report.lost["nf4"] > 0.9  # in 4 bits nothing is left of it
    assert [each.rounded_away for each in report.worst] == sorted(
        (each.rounded_away for each in report.worst), reverse=True
    )
    found = json.loads((tmp_path / "out" / "hf_lora_merge.json").read_text())
    assert found == json.loads(report.to_json(tmp_path / "report.json"))
    assert str(report) in f"{report}"
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_it_can_be_measured_before_anything_is_written(tmp_path: Path):
    base, adapter, _ = made(PLAIN, tmp_path, torch.bfloat16, alpha=0.004)
    with pytest.warns(hf_lora.HfLoRAWarning, match="rounded away"):
        first = hf_lora.merge_checkpoint(base, adapter, tmp_path / "out", dry_run=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    with pytest.warns(hf_lora.HfLoRAWarning, match="rounded away"):
        report = hf_lora.merge_checkpoint(base, adapter, tmp_path / "out")
    assert first.rounded_away == pytest.approx(report.rounded_away, rel=0.2)
    assert first.directory is None


def test_another_base_is_refused_before_anything_is_written(tmp_path: Path):
    base, adapter, _ = made(PLAIN, tmp_path)
    torch.manual_seed(77)
    hf.LlamaForCausalLM(llama().config).save_pretrained(tmp_path / "other")
    with pytest.raises(hf_lora.BaseMismatchError, match="weights are others"):
        hf_lora.merge_checkpoint(tmp_path / "other", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    hf_lora.merge_checkpoint(tmp_path / "other", adapter, tmp_path / "out", check_base=False)
    hf_lora.merge_checkpoint(None, adapter, tmp_path / "named")
    assert (
        load_file(tmp_path / "named" / "model.safetensors").keys()
        == load_file(base / "model.safetensors").keys()
    )


def test_a_folder_of_no_model_is_told_from_an_adapters(tmp_path: Path):
    _, adapter, _ = made(PLAIN, tmp_path)
    with pytest.raises(
        hf_lora.BaseLoadError, match=r"has no config\.json: it is no model's folder"
    ):
        hf_lora.merge_checkpoint(tmp_path, adapter, tmp_path / "out")


def test_what_is_there_is_not_written_over(tmp_path: Path):
    base, adapter, _ = made(PLAIN, tmp_path)
    for there in (base, adapter, tmp_path / "base" / "config.json"):
        before = there.stat().st_mtime_ns
        with pytest.raises(hf_lora.SaveError, match="Nothing was written"):
            hf_lora.merge_checkpoint(base, adapter, there)
        assert there.stat().st_mtime_ns == before
    (tmp_path / "empty").mkdir()
    hf_lora.merge_checkpoint(base, adapter, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_grouped_convolution_is_refused_by_name(tmp_path: Path):
    torch.manual_seed(1)
    config = hf.ConvNextConfig(num_stages=1, hidden_sizes=[8], depths=[1], num_labels=3)
    model = hf.ConvNextForImageClassification(config)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    hf_lora.wrap(model, ["dwconv", "pwconv1"], r=8)
    scramble(model)
    hf_lora.save(model, tmp_path / "adapter")
    with pytest.raises(hf_lora.TargetError, match=r"dwconv: it is grouped"):
        hf_lora.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_convolutions_of_which_others_are_weight_normed(tmp_path: Path):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    config = hf.Wav2Vec2Config(
        vocab_size=12,
        intermediate_size=40,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
        **sizes,
        **more,
    )
    base = hf.Wav2Vec2ForCTC(config)
    base.save_pretrained(tmp_path / "base")
    model = hf_lora.wrap(base, ["q_proj", "conv_layers.*.conv"], r=2)
    scramble(model)
    hf_lora.save(model, tmp_path / "adapter")
    hf_lora.merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", check_base=False
    )
    hf_lora.merge_and_unwrap(model)
    again = type(model).from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "float8"}, "dtype is one of"),
        ({"adapter": []}, "no adapter is named"),
        ({"adapter": {"adapter": float("nan")}}, "no finite factor"),
    ],
)
def test_wrong_arguments_are_named(fields: dict, words: str, tmp_path: Path):
    arguments = {"base": "base", "adapter": "adapter", "output": tmp_path / "out"} | fields
    with pytest.raises(hf_lora.ConfigError, match=words):
        hf_lora.merge_checkpoint(**arguments)


def test_what_is_no_checkpoint_of_safetensors_is_refused(tmp_path: Path):
    base, adapter, _ = made(FAMILIES["llama in shards"], tmp_path)
    one = sorted(base.glob("*.safetensors"))[0]
    content = one.read_bytes()
    one.write_bytes(content[:-8])
    with pytest.raises(hf_lora.BaseLoadError, match="truncated"):
        hf_lora.merge_checkpoint(base, adapter, tmp_path / "out")
    one.unlink()
    with pytest.raises(hf_lora.BaseLoadError, match="not there"):
        hf_lora.merge_checkpoint(base, adapter, tmp_path / "out")
    (base / "model.safetensors.index.json").unlink()
    for path in base.glob("*.safetensors"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(hf_lora.BaseLoadError, match=r"pytorch_model\.bin"):
        hf_lora.merge_checkpoint(base, adapter, tmp_path / "out")
    with pytest.raises(hf_lora.BaseLoadError):
        hf_lora.merge_checkpoint(tmp_path / "nowhere", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
