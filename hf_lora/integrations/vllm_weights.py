"""Handing a wrapped policy's weights to the vLLM engine that samples for TRL's trainers.

TRL sends every named parameter of a model that is not PEFT's; vLLM knows the base's names only.
"""

from collections.abc import Iterator
from typing import Any

import torch

from hf_lora.errors import StateError
from hf_lora.integrations.import_hooks import when_imported
from hf_lora.integrations.in_front import Original, patch_class
from hf_lora.layers.kind import Patched
from hf_lora.merging.hand_over import merged_tensors

_SENDERS = {
    # GRPO, RLOO, distillation and most of the experimental trainers
    "trl.generation.vllm_generation": ("VLLMGeneration", "_iter_named_params"),
    "trl.experimental.online_dpo.online_dpo_trainer": (
        "OnlineDPOTrainer",
        "_move_model_to_vllm_inner",
    ),
}


def install() -> None:
    """Patch what sends weights, now where it is imported, and otherwise when it will be."""
    for name in _SENDERS:
        when_imported(name, _patch)


def _patch(module: Any) -> None:
    name, method = _SENDERS[module.__name__]
    patch_class(module, name, {method: _OURS[name]}, "vLLM gets names it does not know")


def _iterate(original: Original, generation: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what vLLM shall have, one tensor at a time; collective where the model is spread."""
    if not _is_ours(generation.model):
        return original()
    if generation._dist.fsdp_version == 1:
        raise StateError(
            "FSDP1 keeps a model's weights in flat parts, out of which adapters cannot be merged "
            "for vLLM; use FSDP2 (fsdp_version=2)."
        )
    return merged_tensors(generation.model, generation._dist.gather_params)


def _send(original: Original, trainer: Any) -> None:
    """Send the weights by the trainer's own channel, as the method in front of which it stands."""
    if not _is_ours(trainer.model):
        original()
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise StateError(
            f"{type(trainer).__name__} with vLLM cannot send a wrapped model that FSDP or "
            "DeepSpeed holds; use one process, DDP, or GRPOTrainer."
        )
    for name, tensor in merged_tensors(trainer.model):
        if trainer.vllm_mode == "colocate":
            runner = trainer.llm.llm_engine.model_executor.driver_worker.model_runner
            runner.model.load_weights([(name, tensor)])
        elif trainer.accelerator.is_main_process:
            trainer.vllm_client.update_named_param(name, tensor)


def _is_ours(model: Any) -> bool:
    return any(isinstance(module, Patched) for module in model.modules())


_OURS = {"VLLMGeneration": _iterate, "OnlineDPOTrainer": _send}
