"""accelerate's private parts that hf_lora reads: each is there, and means what it is taken for."""

from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import hooks
from accelerate.utils import DistributedType, OffloadedWeightsLoader, PrefixedDataset
from torch import nn

from hf_lora.compat import accelerate as compat
from hf_lora.compat.offload_stores import entry_of
from hf_lora.errors import HfLoRAWarning
from hf_lora.layers.offload import guard_new_hooks

CPU = torch.device("cpu")


def placed(**options: object) -> nn.Linear:
    module = nn.Linear(2, 2)
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(CPU, **options))  # type: ignore[arg-type]
    return module


def test_hf_hook_and_old_forward_stand_on_the_instance():
    module = placed()
    assert compat.is_placed(module)
    assert vars(module)[compat.KEPT_FORWARD].__func__ is nn.Linear.forward
    assert not compat.is_placed(nn.Linear(2, 2))


def test_hooks_of_a_sequential_hook_are_a_list():
    module = placed()
    hooks.add_hook_to_module(module, hooks.ModelHook(), append=True)
    assert len(compat.device_hooks(module)) == 2


def test_execution_device_offload_and_place_submodules_are_attributes():
    module = placed(offload=True)
    assert compat.execution_device(module) == CPU
    assert compat.is_offloaded(module)
    assert not compat.offloads_below(module)
    assert compat.offloads_below(placed(offload=True, place_submodules=True))
    assert not compat.is_offloaded(placed())


def test_pre_forward_brings_the_weights_and_post_forward_takes_them():
    module = placed(offload=True)
    assert module.weight.is_meta
    with compat.present(module):
        assert not module.weight.is_meta
    assert module.weight.is_meta


def test_weights_map_leads_through_dataset_and_prefix_to_a_table_in_memory():
    table = {"part.weight": torch.zeros(2, 2), "part.bias": torch.zeros(2)}
    module = placed(offload=True, weights_map=PrefixedDataset(table, "part."))
    entry = entry_of(module, "weight")
    assert entry is not None
    assert entry.table is table
    assert entry.key == "part.weight"


def test_weights_map_leads_to_the_index_of_a_store_on_disk(tmp_path: Path):
    model = nn.Sequential(nn.Linear(2, 2))
    accelerate.disk_offload(model, tmp_path, execution_device=CPU)
    (hook,) = compat.device_hooks(model[0])
    assert isinstance(hook.weights_map.dataset, OffloadedWeightsLoader)
    entry = entry_of(model[0], "weight")
    assert entry is not None
    assert entry.table is hook.weights_map.dataset.index
    assert entry.folder == hook.weights_map.dataset.save_folder
    assert Path(entry.folder) == tmp_path


def test_init_hook_is_how_a_hook_takes_hold_of_a_module():
    guard_new_hooks(hooks)
    first = hooks.AlignDevicesHook.init_hook
    guard_new_hooks(hooks)
    assert hooks.AlignDevicesHook.init_hook is first  # once for the process
    assert placed(offload=True).weight.is_meta


def test_an_accelerate_without_init_hook_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(hooks.AlignDevicesHook, "init_hook")
    monkeypatch.delattr(hooks.ModelHook, "init_hook")
    with pytest.warns(HfLoRAWarning, match="init_hook"):
        guard_new_hooks(hooks)


def test_models_and_optimizers_of_an_accelerator_are_those_prepared():
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(2, 2)
    prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    assert compat.prepared_models(accelerator) == [prepared[0]]
    assert compat.prepared_optimizers(accelerator) == [prepared[1]]


def test_distributed_type_of_the_state_says_how_states_are_saved():
    accelerator = accelerate.Accelerator(cpu=True)
    before = accelerator.distributed_type
    with compat.as_without_fsdp(accelerator):
        assert accelerator.distributed_type is DistributedType.MULTI_CPU
        assert not accelerator.is_fsdp2
    assert accelerator.distributed_type is before
