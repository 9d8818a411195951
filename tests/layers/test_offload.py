"""Weights that accelerate keeps elsewhere between calls: merged in their store, exactly, and back.

The oracle is the same model without offloading, to the bit.
"""

import copy
import gc
import hashlib
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn
from transformers import LlamaForCausalLM

import hf_lora
from hf_lora.errors import SaveError, StateError
from tests.integrations.training import saved
from tests.model.models import TOKENS, llama
from tests.rounding import assert_rounded_alike
from tests.tiny import scramble

CPU = torch.device("cpu")
LORA = {"r": 4, "alpha": 8.0}
Place = Callable[[nn.Module, Path], nn.Module]


def in_memory(model: nn.Module, folder: Path) -> nn.Module:
    """Offload into one state dict."""
    return cpu_offload(model, execution_device=CPU)


def each_its_own(model: nn.Module, folder: Path) -> nn.Module:
    """Offload each linear layer into a table of its hook."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook(CPU, offload=True))
    return model


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    """Offload into memory-mapped files with an index."""
    return disk_offload(model, folder / "offload", execution_device=CPU)


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """Offload one block and the head to disk and leave the rest where it is."""
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb"], "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "disk"}
    return dispatch_model(model, places, offload_dir=folder / "offload")


def from_checkpoint(model: nn.Module, folder: Path) -> nn.Module:
    """Load with the weights left in the checkpoint's own safetensors file."""
    model.save_pretrained(folder / "base")
    loaded = LlamaForCausalLM.from_pretrained(
        folder / "base",
        device_map={"": "disk"},
        offload_folder=folder / "offload",
        dtype=next(model.parameters()).dtype,
    )
    # from_pretrained has a model on disk alone compute on the first accelerator, if there is one
    assert loaded.model.layers[0].self_attn.q_proj._hf_hook.offload
    return loaded


STORES = [in_memory, each_its_own, on_disk, dispatched, from_checkpoint]
each_store = pytest.mark.parametrize("place", STORES)


def adapted(model: nn.Module, **fields: object) -> nn.Module:
    """Wrap all linear layers, the head too, with an adapter that says something."""
    hf_lora.wrap(model, [".*_proj", "lm_head"], **(LORA | fields))
    scramble(model)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """What the model says."""
    return model.eval()(TOKENS).logits


def files(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@each_store
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_and_unmerged_as_without_offloading(
    place: Place, tmp_path: Path, dtype: torch.dtype
):
    model, plain = adapted(place(llama(dtype=dtype), tmp_path)), adapted(llama(dtype=dtype))
    before, there = logits(model), files(tmp_path)
    assert torch.equal(before, logits(plain))
    for _ in range(3):
        hf_lora.merge(model)
        hf_lora.merge(plain)
        assert torch.equal(logits(model), logits(plain))
        merged = files(tmp_path)
        assert {name: merged[name] for name in there} == there  # nothing that was there is written
        hf_lora.unmerge(model)
        hf_lora.unmerge(plain)
        assert torch.equal(logits(model), before)
        assert files(tmp_path) == there
    hf_lora.unwrap(model)
    assert torch.equal(logits(model), logits(llama(dtype=dtype)))
    if place is not from_checkpoint:  # accelerate leaves on meta what was never in memory
        remove_hook_from_submodules(model)
        assert torch.equal(logits(model), logits(llama(dtype=dtype)))


@each_store
def test_merged_for_good_and_saved(place: Place, tmp_path: Path):
    model = hf_lora.merge_and_unwrap(adapted(place(llama(), tmp_path)))
    plain = hf_lora.merge_and_unwrap(adapted(llama()))
    assert torch.equal(logits(model), logits(plain))
    assert type(model.lm_head) is nn.Linear
    if not hasattr(model, "hf_device_map"):  # transformers saves no other offloaded model
        remove_hook_from_submodules(model)
        assert torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    for (name, one), other in zip(again.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_no_file_is_left_when_nobody_can_read_it_any_more(tmp_path: Path):
    model = adapted(on_disk(llama(), tmp_path))
    before = files(tmp_path)
    hf_lora.merge_and_unwrap(model)
    assert len(files(tmp_path)) == len(before) + 15
    del model
    gc.collect()
    assert files(tmp_path) == before


@each_store
def test_a_copy_of_a_merged_model_is_unmerged_by_itself(place: Place, tmp_path: Path):
    model = adapted(place(llama(), tmp_path))
    before, there = logits(model), files(tmp_path)
    hf_lora.merge(model)
    merged = logits(model)
    twin = copy.deepcopy(model)
    hf_lora.unmerge(model)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(twin), merged)
    hf_lora.unmerge(twin)
    assert torch.equal(logits(twin), before)
    assert files(tmp_path) == there


@pytest.mark.parametrize("tied", [False, True])
@each_store
def test_only_one_of_several_adapters_and_a_tied_head(place: Place, tmp_path: Path, tied: bool):
    model, plain = adapted(place(llama(tied=tied), tmp_path)), adapted(llama(tied=tied))
    for each in (model, plain):
        hf_lora.add_adapter(each, "other", ["lm_head", "q_proj"], r=2)
        scramble(each, seed=8)
        hf_lora.activate(each, ["default", "other"])
    before = logits(model)
    for each in (model, plain):
        hf_lora.merge(each, "other")
    assert torch.equal(logits(model), logits(plain))
    assert model.config.tie_word_embeddings is plain.config.tie_word_embeddings is False
    hf_lora.unmerge(model)
    assert torch.equal(logits(model), before)
    assert model.config.tie_word_embeddings is tied


@each_store
def test_a_merge_that_fails_halfway_changes_nothing(place: Place, tmp_path: Path):
    model = adapted(place(llama(), tmp_path))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_B[0, 0] = torch.inf
    before, there = logits(model), files(tmp_path)
    with pytest.raises(StateError, match=r"down_proj: .* merged values are not finite"):
        hf_lora.merge(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0, equal_nan=True)
    assert files(tmp_path) == there
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_B[0, 0] = 0
    before = logits(model)
    hf_lora.merge(model)
    hf_lora.unmerge(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("place", [on_disk, from_checkpoint])
def test_a_disk_that_takes_no_more_changes_nothing(place: Place, tmp_path: Path):
    model = adapted(place(llama(), tmp_path))
    before, there = logits(model), files(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # room for a file of 32 x 32 numbers, as the first layers have, and not for 40 x 32
    resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 32 * 4, limits[1]))
    try:
        with pytest.raises(SaveError, match=r"_proj\.weight cannot be written into .*offload"):
            hf_lora.merge(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(logits(model), before)
    assert files(tmp_path) == there
    hf_lora.merge(model)
    assert len(files(tmp_path)) == len(there) + 15


def test_a_store_of_another_kind_is_refused(tmp_path: Path):
    class Frozen:
        """Hands tensors out, and takes none."""

        def __init__(self, tensors: dict[str, torch.Tensor]):
            self.tensors = tensors

        def __getitem__(self, name: str) -> torch.Tensor:
            return self.tensors[name]

    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    hook = AlignDevicesHook(CPU, offload=True, weights_map=Frozen({"weight": layer.weight.data}))
    add_hook_to_module(layer, hook)
    adapted(model)
    before = logits(model)
    with pytest.raises(hf_lora.TargetError, match=r"layers\.0\.mlp\.up_proj: its weight is not in"):
        hf_lora.merge(model)
    assert torch.equal(logits(model), before)


@each_store
def test_hooks_taken_off_while_merged(place: Place, tmp_path: Path):
    if place is from_checkpoint:
        pytest.skip("accelerate leaves on meta what was never in memory, whoever takes hooks off")
    model, plain = adapted(place(llama(), tmp_path)), adapted(llama())
    before = logits(plain)
    hf_lora.merge(model)
    hf_lora.merge(plain)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), logits(plain))
    hf_lora.unmerge(model)
    assert torch.equal(logits(model), before)
    assert not model.lm_head.weight.is_meta


@pytest.mark.parametrize("place", [in_memory, each_its_own, on_disk])
def test_hooks_put_on_while_merged(place: Place, tmp_path: Path):
    model = adapted(llama())
    before = logits(model)
    hf_lora.merge(model)
    merged = logits(model)
    place(model, tmp_path)
    assert torch.equal(logits(model), merged)
    hf_lora.unmerge(model)
    assert torch.equal(logits(model), before)


AFTER = [in_memory, each_its_own, on_disk, dispatched]


def alone(model: nn.Module) -> nn.Module:
    """Put hooks on that offload nothing: each layer computes by itself, as offloaded ones do.

    Others compute together with those that read the same tensor, and round a little otherwise.
    """
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Take two steps of plain descent, which does not turn rounding errors into steps."""
    optimizer = optimizer or torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 0.1
    )
    for _ in range(2):
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("place", AFTER)
def test_hooks_put_on_after_wrapping(place: Place, tmp_path: Path):
    """The optimizer that was made before goes on with the same Parameters."""
    model, plain = adapted(llama(), train=["norm"]), alone(adapted(llama(), train=["norm"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    place(model, tmp_path)
    assert model.lm_head.weight.is_meta
    assert torch.equal(logits(model), logits(plain))
    now = [p for p in model.parameters() if p.requires_grad]
    assert len(now) == len(trained)
    assert {id(p) for p in now} == {id(p) for p in trained}
    train(model, optimizer)
    train(plain)
    assert torch.equal(logits(model), logits(plain))
    for each, name in ((model, "offloaded"), (plain, "plain")):
        hf_lora.save(each, tmp_path / name)
    assert saved(tmp_path / "offloaded").keys() == saved(tmp_path / "plain").keys()
    for key, tensor in saved(tmp_path / "offloaded").items():
        assert torch.equal(tensor, saved(tmp_path / "plain")[key]), key
    before = logits(model)
    for each in (model, plain):
        hf_lora.merge(each)
    assert torch.equal(logits(model), logits(plain))
    hf_lora.unmerge(model)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), before)
    hf_lora.unwrap(model)
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("place", AFTER)
def test_hooks_put_on_after_wrapping_and_left_when_unwrapping(place: Place, tmp_path: Path):
    model = hf_lora.unwrap(place(adapted(llama()), tmp_path))
    assert torch.equal(logits(model), logits(llama()))
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), logits(llama()))
    assert not any("lora" in key for key in model.state_dict())


def test_whole_blocks_are_fetched_at_once_after_wrapping(tmp_path: Path):
    model, plain = adapted(llama()), alone(adapted(llama()))
    cpu_offload(model, CPU, preload_module_classes=["LlamaDecoderLayer"])
    train(model)
    train(plain)
    assert torch.equal(logits(model), logits(plain))
    with pytest.raises(hf_lora.TargetError, match="nor in a store from which accelerate fetches"):
        hf_lora.merge(model)


@each_store
def test_trained_in_full_beside_factors(place: Place, tmp_path: Path):
    fields = {"targets": [".*_proj"], "train": ["lm_head", "norm"], **LORA}
    model = hf_lora.wrap(place(llama(), tmp_path), **fields)
    plain, together = (hf_lora.wrap(llama(), **fields) for _ in range(2))
    exact = hf_lora.wrap(llama().double(), **fields)
    trials = []
    for seed in range(3):
        for each in (model, alone(plain), together, exact):
            scramble(each, seed)
            train(each)
        assert torch.equal(logits(model), logits(plain))
        trials.append((logits(model), logits(together), logits(exact)))
    assert_rounded_alike(*trials)
    with hf_lora.no_adapter(model):
        assert torch.equal(logits(model), logits(llama()))
    before = logits(model)
    for each in (model, plain):
        hf_lora.merge(each)
    assert torch.equal(logits(model), logits(plain))
    hf_lora.unmerge(model)
    assert torch.equal(logits(model), before)
    hf_lora.unwrap(model)
    assert torch.equal(logits(model), logits(llama()))


@each_store
def test_generates_what_the_plain_model_does(place: Place, tmp_path: Path):
    model, plain = adapted(place(llama(), tmp_path)), adapted(llama())
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(TOKENS, **asked)
    assert torch.equal(model.generate(TOKENS, **asked), expected)
    hf_lora.merge(model)
    hf_lora.merge(plain)
    assert torch.equal(model.generate(TOKENS, **asked), plain.generate(TOKENS, **asked))
