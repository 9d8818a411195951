"""Adapters in MLX's and diffusers' format on the Hub."""

from tests.hub.hub_worker import Worker
from tests.hub_server import HubServer


def test_mlx_files_are_found_by_their_name(hub: HubServer, worker: Worker):
    equal, said = worker.run("""
        model = adapted()
        hf_lora.save(model, "saved")
        hf_lora.export("saved", "for-mlx", "mlx", base="user/base")
        HfApi().create_repo("user/mlx")
        HfApi().upload_folder(folder_path="for-mlx", repo_id="user/mlx")
        again = hf_lora.from_pretrained("user/mlx", base="user/base")
        from hf_lora.hub.download import pull
        from pathlib import Path
        report([torch.allclose(logits(again), logits(model), atol=1e-5),
                outcome(pull, "user/mlx", Path("pulled"))])
    """)
    assert equal is True
    assert said.startswith("AdapterFileError: user/mlx holds an adapter in another format than")


def test_a_component_of_a_file_is_picked(hub: HubServer, worker: Worker):
    found = worker.run("""
        from safetensors.torch import save_file
        from hf_lora.files.read import read_folder
        from hf_lora.hub.download import locate
        names = {"unet.a": (2, 8), "text_encoder.b": (2, 4)}
        tensors = {f"{n}.lora_A.weight": torch.ones(r, i) for n, (r, i) in names.items()}
        tensors |= {f"{n}.lora_B.weight": torch.ones(i, r) for n, (r, i) in names.items()}
        save_file(tensors, "pytorch_lora_weights.safetensors")
        HfApi().create_repo("user/style")
        HfApi().upload_file(path_or_fileobj="pytorch_lora_weights.safetensors",
                            path_in_repo="pytorch_lora_weights.safetensors", repo_id="user/style")
        report([[*read_folder(locate("user/style", subfolder=part)).factors]
                for part in ("unet", "text_encoder")])
    """)
    assert found == [["a"], ["b"]]
