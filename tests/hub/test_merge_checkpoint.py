"""Merging into a base on the Hub: fetched file by file, compared before it is used, and let go."""

from tests.hub.hub_worker import Worker
from tests.hub_server import HubServer

MAKE = """
model = tiny_model()
model.save_pretrained("sharded", max_shard_size="20kB")
tiny_tokenizer().save_pretrained("sharded")
HfApi().create_repo("user/sharded", exist_ok=True)
HfApi().upload_folder(repo_id="user/sharded", folder_path="sharded")
model = adapted("user/sharded")
hf_lora.push_to_hub(model, "user/an-adapter")
expected = logits(model)
shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)

def cached():
    found = Path(os.environ["HF_HOME"]).rglob("model-*.safetensors")
    return sorted(path.name for path in found if path.exists())

def merged(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder).eval())
"""


def test_files_come_one_by_one_and_stay_or_go(hub: HubServer, worker: Worker):
    found = worker.run(
        MAKE
        + """
found = {}
told = hf_lora.merge_checkpoint(
    None, "user/an-adapter", "out", keep_downloads=False, verify=True)
found["after"] = cached()
assert torch.allclose(merged("out"), expected, atol=1e-5)
assert AutoTokenizer.from_pretrained("out")("Once upon").input_ids
assert told.base == "user/sharded" and len(told.commit) == 40
hf_lora.merge_checkpoint("user/sharded", "user/an-adapter", "kept")
found["kept"] = cached()
hf_lora.merge_checkpoint("user/sharded", "user/an-adapter", "again", keep_downloads=False)
found["again"] = cached()
for other in ("kept", "again"):
    for file in Path("out").glob("*.safetensors"):
        assert (Path(other) / file.name).read_bytes() == file.read_bytes()
report(found)
"""
    )
    assert found["after"] == []
    assert len(found["kept"]) > 2
    assert found["again"] == found["kept"]  # what was there before is not ours to delete


def test_another_base_is_told_by_its_numbers_when_they_come(hub: HubServer, worker: Worker):
    found = worker.run(
        MAKE
        + """
other = tiny_model(seed=5)
other.save_pretrained("other", max_shard_size="20kB")
HfApi().create_repo("user/other", exist_ok=True)
HfApi().upload_folder(repo_id="user/other", folder_path="other")
report([
    outcome(hf_lora.merge_checkpoint, "user/other", "user/an-adapter", "wrong"),
    Path("wrong").exists(),
    outcome(hf_lora.merge_checkpoint, "user/nothing", "user/an-adapter", "wrong"),
])
"""
    )
    assert found[0].startswith("BaseMismatchError: ")
    assert not found[1]
    assert found[2].startswith("HubError: ")
