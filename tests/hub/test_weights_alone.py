"""A repo that holds the weights of an adapter and no adapter_config.json."""

from pathlib import Path

from tests.hub.hub_worker import Worker, working
from tests.hub_server import HubServer


def test_our_weights_alone_are_an_adapter(hub: HubServer, worker: Worker, tmp_path: Path):
    """As in a folder: their header has what ``adapter_config.json`` would say."""
    folder = worker.home / "whole"
    expected = worker.run(
        """
        model = adapted()
        hf_lora.save(model, folder)
        report(logits(model).tolist())
        """,
        folder=folder,
    )
    weights = (folder / "adapter_model.safetensors").read_bytes()
    alone = {"adapter_model.safetensors": weights, "fr/adapter_model.safetensors": weights}
    hub.add_repo("user/alone", alone)
    code = """
        onto = AutoModelForCausalLM.from_pretrained(folder)
        fr, said = told(hf_lora.load, onto, "user/alone", subfolder="fr")
        report([logits(hf_lora.from_pretrained("user/alone")).tolist(), logits(fr).tolist(),
                said])
    """
    plain, fr, said = worker.run(code, folder=worker.home / "base")
    assert plain == fr == expected
    assert len(said) == 1
    assert said[0].endswith(
        "adapter_config.json is missing; the header of adapter_model.safetensors has it all"
    )
    worker.run(
        """
        from hf_lora.hub.download import pull
        pull("user/alone", Path(folder))
        """,
        folder=tmp_path / "pulled",
    )
    for file in folder.iterdir():
        assert (tmp_path / "pulled" / file.name).read_bytes() == file.read_bytes()
    hub.stop()
    cache = {"HF_HUB_CACHE": str(worker.home / "huggingface" / "hub")}
    with working(hub, tmp_path / "offline", offline=True, **cache) as offline:
        assert offline.run(code, folder=worker.home / "base") == [plain, fr, said]


def test_weights_of_others_alone_are_none(hub: HubServer, worker: Worker):
    folder = worker.home / "peft"
    worker.run(
        """
        from safetensors.torch import load_file, save_file
        hf_lora.save(adapted(), folder)
        file = Path(folder) / "adapter_model.safetensors"
        save_file(load_file(file), file, {"format": "pt"})
        """,
        folder=folder,
    )
    weights = (folder / "adapter_model.safetensors").read_bytes()
    hub.add_repo("user/theirs", {"adapter_model.safetensors": weights})
    said = worker.run("""report(outcome(hf_lora.load, tiny_model(), "user/theirs"))""")
    assert said == (
        "AdapterFileError: user/theirs has no adapter_config.json, so it is no adapter that "
        "hf_lora can read. It has: '.gitattributes', 'adapter_model.safetensors'."
    )
