"""What is measured against what: one model five times, with the same weights and the same factors.

| arm     | what it is                                                                       |
|---------|----------------------------------------------------------------------------------|
| frozen  | the model without LoRA, gradients flowing through it to its input: the floor      |
| peft    | PEFT as it comes, which keeps its adapters in float32                             |
| peft16  | PEFT with `autocast_adapter_dtype=False`: adapters in the model's own type        |
| unfused | hf_lora on the plain path: the formula in PyTorch's own operations                |
| hf_lora | hf_lora as it comes                                                              |

Any of them with `+compile` behind its name is the same under `torch.compile`.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

import hf_lora
from hf_lora.kinds.lora import LoRALayer

ARMS = ("frozen", "peft", "peft16", "unfused", "hf_lora")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"all-linear": LINEAR, "qv": ["q_proj", "v_proj"]}
FACTOR = 0.02
"""Standard deviation of every factor; B does not start at zero, so that all gradients are alive."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One training step to measure."""

    hidden: int = 576
    ffn: int = 1536
    layers: int = 8
    tokens: int = 512
    dtype: torch.dtype = torch.bfloat16
    targets: str = "all-linear"
    r: int = 16
    dropout: float = 0.0
    head: bool = False
    """The whole language model with SmolLM2's 49,152 words and its loss, not the layers alone."""

    def __str__(self) -> str:
        """Return the row's name."""
        kind = "with head" if self.head else f"{self.layers} layers"
        dtype = str(self.dtype).removeprefix("torch.")
        drop = f", dropout {self.dropout:g}" if self.dropout else ""
        return (
            f"h{self.hidden} f{self.ffn}, {kind}, {self.tokens} tokens, {dtype}, "
            f"{self.targets} r{self.r}{drop}"
        )


def base(work: Work) -> PreTrainedModel:
    """Return the frozen model, with the same random weights at every call."""
    torch.manual_seed(0)
    heads = work.hidden // 64
    config = LlamaConfig(
        vocab_size=49152 if work.head else 64,
        hidden_size=work.hidden,
        intermediate_size=work.ffn,
        num_hidden_layers=work.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads // 4,
        tie_word_embeddings=True,
    )
    model = (LlamaForCausalLM if work.head else LlamaModel)(config)
    return model.to(work.dtype).train().requires_grad_(False)


def arm(name: str, work: Work) -> nn.Module:
    """Return one arm's model."""
    if name.endswith("+compile"):
        return torch.compile(arm(name.removesuffix("+compile"), work), fullgraph=True)  # type: ignore[return-value]
    model = base(work)
    if name == "frozen":
        return model
    targets = TARGETS[work.targets]
    if name.startswith("peft"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=work.r, lora_alpha=2 * work.r, lora_dropout=work.dropout, target_modules=targets
        )
        return _fill(get_peft_model(model, config, autocast_adapter_dtype=name == "peft"))
    model = hf_lora.wrap(model, targets=targets, r=work.r, alpha=2 * work.r, dropout=work.dropout)
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
            layer.lora_routing.plain = name == "unfused"
    return _fill(model)


def _fill(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=FACTOR)
    return model


def step(model: nn.Module, work: Work) -> Callable[[], None]:
    """Return a function that runs one forward and backward pass."""
    torch.manual_seed(2)
    embedded = torch.randn(1, work.tokens, work.hidden, dtype=work.dtype)
    labels = torch.randint(0, 49152, (1, work.tokens)) if work.head else None
    flow = torch.randn(1, work.tokens, work.hidden, dtype=work.dtype)

    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        forward(model, embedded, labels, flow)[0].backward()

    return run


def forward(
    model: nn.Module, embedded: torch.Tensor, labels: torch.Tensor | None, flow: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a scalar that depends on every output, and the input that gradients reach."""
    inputs = embedded.clone().requires_grad_()
    if labels is not None:
        return model(inputs_embeds=inputs, labels=labels, use_cache=False).loss, inputs
    hidden = model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    return (hidden * flow).sum(), inputs
