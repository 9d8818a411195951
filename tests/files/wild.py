"""Adapter folders as other tools write them, made of random factors and their exact effect."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

from tests.files import edit
from tests.oracle.architectures import ARCHITECTURES

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
PREFIX = "base_model.model."
R, ALPHA = 2, 6.0

Tensors = dict[str, torch.Tensor]


class Shape:
    """One folder on its way: what is in it, and the model that it should make of the base.

    Args:
        build: Makes the base, with equal weights each time.
        inputs: What the base is asked.
    """

    def __init__(self, build: Callable[[], nn.Module], inputs: Mapping[str, torch.Tensor]):
        self.build = build
        self.inputs = dict(inputs)
        self.twin = build()
        self.tensors: Tensors = {}
        self.fields: dict[str, Any] = {
            "base_model_name_or_path": "someone/base",
            "lora_alpha": int(ALPHA),
            "peft_type": "LORA",
            "r": R,
            "target_modules": [],
        }
        self.said: str | None = ""
        """What hf_lora warns of; "" for nothing."""
        self.options: dict[str, Any] = {}
        """How it is loaded."""
        self._draw = torch.Generator().manual_seed(4)

    def layers(self, *tails: str, inside: str = "") -> list[str]:
        """Return the paths of the layers that end so."""
        return [
            path
            for path, _ in self.twin.named_modules()
            if path.endswith(tails) and inside in path and "." in path
        ]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._draw) * 0.2

    @torch.no_grad()
    def adapt(
        self,
        paths: Iterable[str],
        *,
        r: int = R,
        scale: float = ALPHA / R,
        name: Callable[[str], str] = lambda path: path,
        dtype: torch.dtype = torch.float32,
    ) -> "Shape":
        """Give layers factors, in the file and in the weights of the twin."""
        for path in paths:
            weight = self.twin.get_submodule(path).weight
            out_in = weight.shape[::-1] if is_transposed(self.twin, path) else weight.shape
            a, b = (t.to(dtype) for t in (self.random(r, out_in[1]), self.random(out_in[0], r)))
            delta = scale * b.float() @ a.float()
            weight.add_(delta.t() if is_transposed(self.twin, path) else delta)
            self.tensors[f"{PREFIX}{name(path)}.lora_A.weight"] = a
            self.tensors[f"{PREFIX}{name(path)}.lora_B.weight"] = b
        return self

    @torch.no_grad()
    def train(self, path: str, *, name: str | None = None) -> "Shape":
        """Give a module other values, in the file and in the twin."""
        for role, tensor in self.twin.get_submodule(path).named_parameters():
            tensor.copy_(tensor + self.random(*tensor.shape))
            self.tensors[f"{PREFIX}{path if name is None else name}.{role}"] = tensor.clone()
        return self

    def say(self, **fields: Any) -> "Shape":
        """Set fields of the JSON; ``...`` takes one away."""
        self.fields = {k: v for k, v in (self.fields | fields).items() if v is not ...}
        return self

    def rename(self, change: Callable[[str], str]) -> "Shape":
        """Change the keys in the file."""
        self.tensors = {change(key): tensor for key, tensor in self.tensors.items()}
        return self

    def tell(self, words: str) -> "Shape":
        """Expect a warning."""
        self.said = words
        return self

    def on(self, build: Callable[[], nn.Module]) -> "Shape":
        """Load onto another model than the one that it was made of."""
        self.build = build
        return self

    def load_with(self, **options: Any) -> "Shape":
        self.options |= options
        return self

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / edit.CONFIG).write_text(json.dumps(self.fields))
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        save_file(tensors, folder / edit.WEIGHTS, metadata={"format": "pt"})


def is_transposed(model: nn.Module, path: str) -> bool:
    return type(model.get_submodule(path)).__name__ == "Conv1D"


def of(name: str) -> Shape:
    """Return the beginning of a shape on one of the oracle's models."""
    return Shape(BY_NAME[name].build, BY_NAME[name].inputs())


def seeded(model_class: Any, config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(5)
        return model_class(config).eval()

    return build


TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 16,
}
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def llava() -> Shape:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.CLIPVisionConfig(**VISION),
        image_token_index=60,
        vision_feature_layer=-1,
    )
    ids = IDS.clone()[:1]
    ids[0, 2:6] = 60
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    build = seeded(hf.LlavaForConditionalGeneration, config)
    return Shape(build, {"input_ids": ids, "pixel_values": image})


def text_model() -> Shape:
    build = seeded(hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT))
    return Shape(build, {"input_ids": IDS})


def qwen_vl() -> Shape:
    """The text part alone is asked: what counts are the names of the checkpoint."""
    text = {
        **TEXT,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    }
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = hf.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    ids = IDS.clone()[:1]
    ids[0, 1] = 62
    ids[0, 2:6] = 60
    ids[0, 6] = 63
    image = torch.randn(16, 96, generator=torch.Generator().manual_seed(2))
    return Shape(
        seeded(hf.Qwen2VLForConditionalGeneration, config),
        {
            "input_ids": ids,
            "pixel_values": image,
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (ids == 60).int(),
        },
    )


def experts(kind: str) -> Shape:
    """A mixture of experts, in which transformers 5 stacks what were layers before."""
    more = {"moe_intermediate_size": 16, "num_experts": 4} if kind == "Qwen3Moe" else {}
    more |= {"num_local_experts": 4} if kind == "Mixtral" else {}
    config = getattr(hf, f"{kind}Config")(**TEXT, **more, num_experts_per_tok=2)
    return Shape(seeded(getattr(hf, f"{kind}ForCausalLM"), config), {"input_ids": IDS})
