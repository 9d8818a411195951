"""What the fused path keeps for the backward pass: no more than the frozen model does."""

import gc
import weakref

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora.layers.fusing import update_type
from tests.layers.fused_models import INPUTS, gradients, llama, of


def kept(model: nn.Module, tokens: int) -> int:
    """Return the bytes that autograd keeps of a forward, each storage once, without parameters."""
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    embedded = torch.randn(2, tokens // 2, 32, dtype=model.dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.model(inputs_embeds=embedded, use_cache=False)
    for tensor in (*model.parameters(), *model.buffers()):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    assert output.last_hidden_state.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_no_more_is_kept_than_by_the_frozen_model(dtype: torch.dtype, dropout: float):
    model = llama(dropout=dropout).to(dtype)
    frozen = hf_lora.base_view(model).train()
    for each in (model, frozen):
        kept(each, 200)  # what is rebuilt is tried first
    layers, width, inner, r = 2, 32, 48, 4
    masks = (6 * width + inner) // 8 + 7 * r * dtype.itemsize if dropout else 0  # and h
    short, long = (kept(model, tokens) - kept(frozen, tokens) for tokens in (200, 400))
    assert long - short <= 200 * layers * masks
    # and the factors in the type that their products are computed in, once
    size = update_type("cpu", dtype).itemsize
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad) * size
    assert short - 200 * layers * masks <= adapter + 7 * layers * 64


def test_nothing_of_a_step_outlives_it():
    model = llama()
    gradients(model, INPUTS)
    seen: list[weakref.ref] = []
    hook = of(model, "1.mlp.down_proj").register_forward_hook(
        lambda module, args, y: seen.append(weakref.ref(args[0]))
    )
    gradients(model, INPUTS)
    hook.remove()
    gc.collect()
    assert [reference() for reference in seen] == [None]
