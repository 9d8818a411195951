"""What is checked of each model of the zoo, for hf_lora and for PEFT alike."""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import hf_lora
from examples.benchmarks.zoo_inputs import fitting, outputs
from examples.benchmarks.zoo_models import classes, configs

RANK = 2
MEMORY = next((p for p in ("/dev/shm",) if Path(p).is_dir()), None)
"""Where files are as fast as memory, if there is such a place."""

MOST_ROUNDING = 0.01
MOST_PARAMETERS = 60_000_000


class NotHere(Exception):
    """A model that cannot be built and run here."""


class Failed(Exception):
    """A check that does not hold: its kind, and what was seen."""

    def __init__(self, kind: str, seen: str = ""):
        super().__init__(f"{kind}: {seen}" if seen else kind)
        self.kind = kind


class Case:
    """A tiny model that runs, and the numbers that decide on it."""

    def __init__(self, kind: str):
        self.kind = kind
        self.make, self.given, self.reached, self.leaves = _runnable(kind)
        model = self.make()
        self.name = type(model).__name__
        self.state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with torch.no_grad():
            self.plain = outputs(model, self.given)
            again = outputs(model, self.given)
            self.frozen = outputs(model.requires_grad_(False), self.given)
        # after a forward, in which some models put other modules into themselves
        self.kinds = _kinds(model)
        if not same(self.plain, again):
            raise NotHere("it gives something else each time that it is called")
        self.training = _trains(model, self.given)

    def is_plain(self, found: list[torch.Tensor]) -> bool:
        """Say whether outputs are the plain model's, as it is or frozen, bit for bit.

        PyTorch's matmul goes another way where a weight needs no gradient.
        """
        return same(found, self.plain) or same(found, self.frozen)

    def fresh(self) -> nn.Module:
        """Return the model anew, with the same numbers."""
        model = self.make()
        model.load_state_dict(self.state)
        return model


def _runnable(kind: str) -> tuple[Callable[[], nn.Module], dict[str, Any], int, int]:
    said: Exception | None = None
    for config in configs(kind):
        if isinstance(config, Exception):
            said = said or config
            continue
        for name in classes(kind):
            try:
                cls = getattr(transformers, name)
                with torch.device("meta"):
                    size = sum(p.numel() for p in cls(config).parameters())
                if size > MOST_PARAMETERS:
                    raise NotHere(f"{size:,} parameters where sizes are as small as they get")

                def make(cls: Any = cls, config: Any = config) -> nn.Module:
                    torch.manual_seed(0)
                    return cls(config).float().eval()

                return make, *fitting(make(), kind)
            except Exception as error:  # another class or another size may do
                said = said if isinstance(said, ImportError) else error
    raise NotHere(first_line(said)) from said


def first_line(error: BaseException | None) -> str:
    """Return what an error says, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, NotHere):
        return lines[0]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


def _kinds(model: nn.Module) -> dict[str, str]:
    """Return the name of each module's class; parametrized ones have a class each."""
    return {name: type(module).__qualname__ for name, module in model.named_modules()}


def _trains(model: nn.Module, given: dict[str, Any]) -> bool:
    """Say whether the plain model runs in training mode."""
    model.train()
    try:
        return all(bool(t.isfinite().all()) for t in outputs(model, given))
    except Exception:
        return False
    finally:
        model.eval()


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Say whether outputs are equal, bit for bit."""
    return len(one) == len(other) and all(
        torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the largest difference, each output's in units of its largest value."""
    if len(one) != len(other) or any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
        return float("inf")
    most = 0.0
    for a, b in zip(one, other, strict=True):
        scale = max(float(a.abs().max()), 1e-6) if a.numel() else 1.0
        gap = float((a - b).abs().max() / scale) if a.numel() else 0.0
        most = max(most, gap if gap == gap else float("inf"))
    return most


def factors(model: nn.Module) -> list[nn.Parameter]:
    """Return what trains."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(case: Case, model: Any) -> None:
    """Take one step and check that what trains has moved, and nothing else.

    Raises:
        Failed: Something else moved, or nothing did.
    """
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train(case.training)
    loss = _loss(model, case)
    if loss is None:
        # functions that see the hidden states alone (Reformer's) pass nothing on without it
        model.enable_input_require_grads()
        loss = _loss(model, case)
    if loss is None:
        raise Failed("inert", "no output depends on an adapter")
    optimizer = torch.optim.AdamW(factors(model), lr=1e-2)
    loss.backward()
    optimizer.step()
    model.eval()
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    if moved - trains:
        raise Failed("moves the base", sorted(moved - trains)[0])
    if not moved:
        raise Failed("inert", "no factor gets a gradient")


def _loss(model: Any, case: Case) -> torch.Tensor | None:
    found = [t.float().square().mean() for t in outputs(model, case.given) if t.requires_grad]
    return torch.stack(found).sum() if found else None


@torch.no_grad()
def scramble(case: Case, model: nn.Module) -> tuple[list[torch.Tensor], float]:
    """Give all factors random numbers, so that every adapted layer counts.

    They are as large as the model bears: some have no norms.

    Returns:
        The outputs, and how far others may be from them.
    """
    for spread in (0.3, 0.1, 0.03):
        drawn = torch.Generator().manual_seed(4)
        for parameter in factors(model):
            parameter.copy_(torch.randn(parameter.shape, generator=drawn) * spread)
        found = outputs(model, case.given)
        allowed = rounding(case, model, found)
        if all(bool(t.isfinite().all()) for t in found) and allowed < MOST_ROUNDING:
            break
    return found, allowed


@torch.no_grad()
def rounding(case: Case, model: nn.Module, found: list[torch.Tensor]) -> float:
    """Return how far outputs may differ for rounding: by how they answer to other last places."""
    drawn = torch.Generator().manual_seed(5)
    kept = [parameter.clone() for parameter in factors(model)]
    for parameter in factors(model):
        noise = torch.randn(parameter.shape, generator=drawn) * torch.finfo(parameter.dtype).eps
        parameter.mul_(1 + noise)
    gap = distance(found, outputs(model, case.given))
    for parameter, before in zip(factors(model), kept, strict=True):
        parameter.copy_(before)
    return 1e-5 + 30 * gap


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def expect(kind: str, holds: bool, seen: str = "") -> None:
    """Check one thing.

    Raises:
        Failed: It does not hold.
    """
    if not holds:
        raise Failed(kind, seen)


def close(kind: str, found: list[torch.Tensor], wanted: list[torch.Tensor], allowed: float) -> None:
    """Check that outputs are equal, but for rounding."""
    gap = distance(wanted, found)
    expect(kind, gap <= allowed, f"{gap:.1e} apart, {allowed:.1e} allowed")


def _floats(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    found = state.items()
    return ((key, t) for key, t in found if t.is_floating_point() and t.numel())


def ours(case: Case, seen: dict[str, Any]) -> None:
    """Check everything of hf_lora; ``seen["stage"]`` says how far it came.

    Raises:
        Failed: A check does not hold.
        hf_lora.HfLoRAError: It was refused.
    """
    model = case.fresh()
    shown = {name: id(parameter) for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    seen["stage"] = "plan"
    plan = hf_lora.plan(model, r=RANK)
    seen["layers"] = len(plan.targets)
    for word in ("attention", "mlp", "experts"):
        seen[word] = len(hf_lora.plan(model, word, r=1).targets)
    if plan.problems:
        raise hf_lora.TargetError("; ".join(plan.problems))
    seen["stage"] = "wrap"
    hf_lora.wrap(model, r=RANK)
    with torch.no_grad():
        expect("identity", case.is_plain(outputs(model, case.given)))
    seen["stage"] = "step"
    step(case, model)
    wanted, allowed = scramble(case, model)
    with torch.no_grad():
        effect = distance(case.plain, wanted)
        expect("inert", effect > 0, "outputs do not see the adapter")
        seen["effect"], seen["allowed"] = effect, allowed
        expect("too sensitive", effect > 3 * allowed, f"{effect:.1e}, rounding is {allowed:.1e}")
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            seen["stage"] = "save"
            hf_lora.save(model, folder)
            seen["stage"] = "load"
            # as it was saved: PyTorch's matmul goes another way where a factor needs no gradient
            loaded = hf_lora.load(case.fresh(), folder, trainable=True)
            again = outputs(loaded, case.given)
            expect("load", same(again, wanted), f"{distance(wanted, again):.1e} apart")
            seen["stage"] = "PEFT reads"
            read = peft.PeftModel.from_pretrained(case.fresh(), folder).eval()
            close("PEFT reads", outputs(read, case.given), wanted, allowed)
        seen["stage"] = "merge"
        hf_lora.merge(model)
        close("merge", outputs(model, case.given), wanted, allowed)
        hf_lora.unmerge(model)
        expect("unmerge", same(outputs(model, case.given), wanted))
        seen["stage"] = "unwrap"
        hf_lora.unwrap(model)
        state = model.state_dict()
        expect("unwrap", state.keys() == case.state.keys(), "other keys")
        wrong = [key for key, tensor in state.items() if not torch.equal(tensor, case.state[key])]
        expect("unwrap", not wrong, f"{wrong[:1]} is not as it was")
        now = {name: id(parameter) for name, parameter in model.named_parameters()}
        expect("unwrap", now == shown, "other Parameter objects")
        expect("unwrap", _kinds(model) == case.kinds, "other classes")
        then = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        expect("unwrap", then == flags, "other flags")
        expect("unwrap", same(outputs(model, case.given), case.plain), "other outputs")
    seen["stage"] = "done"


def theirs(case: Case, seen: dict[str, Any]) -> None:
    """Check the same of PEFT, as far as it has it.

    Raises:
        Failed: A check does not hold.
    """
    config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear")
    seen["stage"] = "wrap"
    model = peft.get_peft_model(case.fresh(), config).eval()
    with torch.no_grad():
        expect("identity", case.is_plain(outputs(model, case.given)))
    seen["stage"] = "step"
    step(case, model)
    wanted, allowed = scramble(case, model)
    with torch.no_grad():
        expect("inert", distance(case.plain, wanted) > 0, "outputs do not see the adapter")
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            seen["stage"] = "save"
            model.save_pretrained(folder)
            expect("save", (Path(folder) / "adapter_model.safetensors").exists())
            seen["stage"] = "load"
            loaded = peft.PeftModel.from_pretrained(case.fresh(), folder).eval()
            close("load", outputs(loaded, case.given), wanted, allowed)
        seen["stage"] = "merge"
        model.merge_adapter()
        close("merge", outputs(model, case.given), wanted, allowed)
        model.unmerge_adapter()
        close("unmerge", outputs(model, case.given), wanted, allowed)
        seen["stage"] = "unload"
        plain = model.unload()
        state = plain.state_dict()
        expect("unload", state.keys() == case.state.keys(), "other keys")
        # in units, as its unmerge subtracts what the merge has added, and rounds twice
        off = max(float((state[key] - kept).abs().max()) for key, kept in _floats(case.state))
        expect("unload", off <= 1e-4, f"weights {off:.1e} off")
    seen["stage"] = "done"
