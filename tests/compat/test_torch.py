"""PyTorch's private parts that hf_lora reads: each is there, and means what it is taken for.

Every test is named after the part and fails alone where a version has another.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint as checkpoints
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from hf_lora.compat import torch_modules
from hf_lora.compat.torch_checkpoint import keep_functions
from hf_lora.compat.torch_execution import after_backward, backward_number, in_transform
from hf_lora.compat.torch_graph import (
    gelu_approximation,
    hooks_on_saved,
    result_of,
    saved_factors,
    saved_input,
)


def _unmarked(function: Callable[..., object]) -> Callable[..., object]:
    """Return what stands behind the function that ours has replaced, if it has."""
    names = function.__code__.co_freevars
    held = dict(zip(names, function.__closure__ or (), strict=True))
    return held["original"].cell_contents if "original" in held else function


def seen_by_vmap(found: list[bool]) -> None:
    torch.vmap(lambda x: found.append(in_transform()) or x)(torch.zeros(2))


def seen_by_forward_mode(found: list[bool]) -> None:
    with forward_ad.dual_level():
        found.append(in_transform())


def seen_by_jit(found: list[bool]) -> None:
    torch.jit.trace(
        lambda x: found.append(in_transform()) or x + 1, torch.zeros(2), check_trace=False
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("part", "see"),
    [
        ("torch._C._are_functorch_transforms_active", seen_by_vmap),
        ("torch.autograd.forward_ad._current_level", seen_by_forward_mode),
        ("torch._C._get_tracing_state", seen_by_jit),
    ],
)
def test_transforms_are_seen(part: str, see: Callable[[list[bool]], None]):
    found: list[bool] = []
    see(found)
    assert found, part
    assert all(found), part
    assert not in_transform(), part


def test_current_graph_task_id_numbers_backward_passes():
    numbers: list[int] = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: numbers.append(backward_number()))
    for _ in range(2):
        (x * x).sum().backward()
    assert backward_number() == -1
    assert len(set(numbers)) == 2
    assert -1 not in numbers


def test_queue_callback_calls_when_all_gradients_are_there():
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    there: list[bool] = []

    def look() -> None:
        there.append(first.grad is not None and second.grad is not None)

    for parameter in (first, second):
        parameter.register_hook(lambda grad: after_backward(look))
    (first * second).sum().backward()
    assert there == [True, True]


def test_saved_self_and_saved_other_are_a_products_factors():
    x, y = torch.rand(2, 3, requires_grad=True), torch.rand(3, requires_grad=True)
    kept = saved_factors((x * y).grad_fn)
    assert all(map(torch.equal, kept, (x, y)))  # type: ignore[arg-type]
    assert saved_factors((x * torch.rand(3)).grad_fn)[0] is None


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_saved_self_is_an_activations_input(name: str):
    x = torch.rand(2, 3, requires_grad=True)
    assert torch.equal(saved_input(getattr(nn.functional, name)(x).grad_fn), x)


def test_saved_approximate_is_the_formula_of_a_gelu():
    x = torch.rand(2, requires_grad=True)
    for wanted in ("none", "tanh"):
        assert gelu_approximation(nn.functional.gelu(x, approximate=wanted).grad_fn) == wanted


def test_what_is_saved_raises_once_it_is_freed_or_changed():
    x = torch.rand(2, requires_grad=True)
    y = x * x
    y.sum().backward()
    with pytest.raises(RuntimeError):
        saved_factors(y.grad_fn)
    inner = x * 2
    outer = nn.functional.silu(inner)
    inner.add_(1)
    with pytest.raises(RuntimeError):
        saved_input(outer.grad_fn)


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("MulBackward0", lambda x: x * x),
        ("ToCopyBackward0", lambda x: x.to(torch.bfloat16)),
        ("ViewBackward0", lambda x: x.view(3, 2)),
        ("UnsafeViewBackward0", lambda x: x.transpose(0, 1).reshape(6)),
        ("SiluBackward0", nn.functional.silu),
        ("GeluBackward0", nn.functional.gelu),
    ],
)
def test_nodes_are_called_so_and_input_metadata_is_their_result(
    name: str, operation: Callable[[torch.Tensor], torch.Tensor]
):
    y = operation(torch.rand(2, 3, requires_grad=True))
    assert y.grad_fn is not None
    assert y.grad_fn.name() == name
    assert (torch.Size(result_of(y.grad_fn).shape), result_of(y.grad_fn).dtype) == (
        y.shape,
        y.dtype,
    )


def test_top_saved_tensors_default_hooks_are_those_in_force():
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    assert hooks_on_saved() is None
    with saved_tensors_hooks(pack, unpack):
        assert hooks_on_saved() == (pack, unpack)
    assert hooks_on_saved() is None


def test_next_id_grows_with_every_hook_anywhere():
    module = nn.Linear(1, 1)
    counts = [torch_modules.hook_count()]
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        register(lambda *args: None).remove()
        counts.append(torch_modules.hook_count())
    assert counts == sorted(set(counts))


def test_forward_hooks_stand_in_these_tables():
    module = nn.Linear(1, 1)
    tables = (*torch_modules.forward_hooks(module), *torch_modules.forward_hooks_of_all())
    handles = [
        register(lambda *args: None)
        for register in (
            module.register_forward_pre_hook,
            module.register_forward_hook,
            nn.modules.module.register_module_forward_pre_hook,
            nn.modules.module.register_module_forward_hook,
        )
    ]
    try:
        assert [len(table) for table in tables] == [1, 1, 1, 1]
    finally:
        for handle in handles:
            handle.remove()
    assert not any(tables)


def test_every_table_of_hooks_has_its_name():
    """One that is new would be called in the copy that is traced."""
    tables = {
        name
        for name, value in vars(nn.Linear(1, 1)).items()
        if "hooks" in name and isinstance(value, dict)
    }
    saving = {name for name in tables if "state_dict" in name}
    assert tables - saving == set(torch_modules.HOOKS)


def test_a_pre_hook_is_removed_without_its_handle_with_keywords_too():
    module = nn.Linear(2, 2)
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *args: calls.append("kept"))
    module.register_forward_pre_hook(lambda *args: calls.append("gone"), with_kwargs=True)
    again = copy.deepcopy(module)
    torch_modules.remove_pre_hooks(again, lambda hook: hook.__code__.co_consts[-1] == "gone")
    again(torch.zeros(1, 2))
    assert calls == ["kept"]
    assert not again._forward_pre_hooks_with_kwargs


def test_hooks_around_state_dicts_are_removed_without_their_handles():
    calls: list[str] = []

    def gone(*args: object) -> None:
        calls.append("gone")

    def kept(*args: object) -> None:
        calls.append("kept")

    module = nn.Linear(1, 1)
    for hook in (gone, kept):
        module.register_state_dict_pre_hook(hook)
        module.register_load_state_dict_pre_hook(hook)
        module.register_load_state_dict_post_hook(hook)
    torch_modules.remove_state_hooks(module, lambda hook: hook is gone)
    module.load_state_dict(module.state_dict())
    assert calls == ["kept"] * 3


def test_to_empty_is_told_by_its_name_from_other_functions():
    seen: list[bool] = []

    class Layer(nn.Linear):
        def _apply(self, fn, recurse=True):
            seen.append(torch_modules.is_to_empty(fn))
            return super()._apply(fn, recurse)

    layer = Layer(2, 2)
    layer.to_empty(device="cpu")
    layer.to(torch.float64)
    layer.float()
    assert seen == [True, False, False]


def test_is_replica_marks_what_data_parallel_copies():
    module = nn.Linear(1, 1)
    assert torch_modules.is_replica(module._replicate_for_data_parallel())
    assert not torch_modules.is_replica(module)


def test_cdata_is_that_of_the_memory():
    x = torch.zeros(4)
    assert torch_modules.storage_of(x) == torch_modules.storage_of(x[2:])
    assert torch_modules.storage_of(x) != torch_modules.storage_of(torch.zeros(4))


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpoint_runs_again_can_be_replaced(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
):
    """``CheckpointFunction.forward`` and ``_checkpoint_hook`` with its ``recompute_fn``."""
    kept: list[str] = []

    def keep(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        kept.append("kept")
        return function

    class CheckpointFunction(torch.autograd.Function):
        """A copy of PyTorch's own, as it was: the first ``keep`` counts in the whole process."""

        forward = staticmethod(_unmarked(checkpoints.CheckpointFunction.forward))
        backward = staticmethod(checkpoints.CheckpointFunction.backward)

    monkeypatch.setattr(checkpoints, "CheckpointFunction", CheckpointFunction)
    monkeypatch.setattr(checkpoints, "_checkpoint_hook", checkpoints._checkpoint_hook)
    keep_functions(keep)
    x = torch.ones(2, requires_grad=True)
    y = checkpoints.checkpoint(lambda t: t.sin().sin(), x, use_reentrant=reentrant)
    y.sum().backward()
    expected = torch.ones(2, requires_grad=True)
    expected.sin().sin().sum().backward()
    assert kept, "CheckpointFunction.forward" if reentrant else "_checkpoint_hook"
    assert torch.equal(x.grad, expected.grad)  # type: ignore[arg-type]
