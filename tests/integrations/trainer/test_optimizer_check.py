"""An optimizer that holds another model's tensors is an error at the first step, not a lost run."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

import hf_lora
from hf_lora.errors import GradientError, HfLoRAWarning
from tests.integrations import training
from tests.integrations.training import adapter_tensors, base_tensors, same

NUMBERS = {"lr": 1e-2, "b_lr_ratio": 4.0}
LAYERS = 2
FACTORS = 2 * 3 * LAYERS
"""A and B of three layers in each block: what tests.integrations.training.wrapped adds."""


def described(model: Any) -> tuple[type, dict[str, Any]]:
    groups = hf_lora.optimizer_groups(model, **NUMBERS)
    return torch.optim.AdamW, {"params": groups, "fused": True}


class Describes(Trainer):
    """Given an optimizer's class and arguments in the way that the README shows."""

    given: Any = None

    def __init__(self, **kwargs: Any):
        super().__init__(optimizer_cls_and_kwargs=self.given, **kwargs)


def by_class(given: tuple[type, dict[str, Any]]) -> type[Trainer]:
    return type("Describes", (Describes,), {"given": given})


def by_object(optimizer: torch.optim.Optimizer) -> Any:
    def made(**kwargs: Any) -> Trainer:
        return Trainer(optimizers=(optimizer, None), **kwargs)

    return made


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(hf_lora.optimizer_groups(model, **NUMBERS))


def train(model: Any, folder: Path, **fields: Any) -> Trainer:
    made = training.trainer(model, folder, **{"max_steps": 1, "warmup_steps": 0, **fields})
    made.train()
    return made


def silently(model: Any, folder: Path, **fields: Any) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("error", HfLoRAWarning)
        return train(model, folder, **fields)


def refused(model: Any, folder: Path, **fields: Any) -> str:
    before = adapter_tensors(model)
    with pytest.raises(GradientError) as caught:
        train(model, folder, **fields)
    after = adapter_tensors(model)
    assert same({key: after[key] for key in before}, before)
    return str(caught.value)


def warned(model: Any, folder: Path, **fields: Any) -> list[str]:
    """The lines of the one warning of a run."""
    with pytest.warns(HfLoRAWarning) as caught:
        train(model, folder, **fields)
    (warning,) = [w for w in caught if issubclass(w.category, HfLoRAWarning)]
    headline, *lines = str(warning.message).splitlines()
    assert headline.startswith("The optimizer does not hold these adapter tensors")
    return [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]


class TestOfAnotherModel:
    @pytest.mark.parametrize("way", ["class", "object"])
    def test_groups_of_another_model_object(self, tmp_path: Path, way: str):
        model, other = training.wrapped(), training.wrapped()
        cls = by_class(described(other)) if way == "class" else by_object(adamw(other))
        message = refused(model, tmp_path, cls=cls)
        assert "The optimizer holds no tensor of an active adapter" in message
        assert f"of the {FACTORS} parameters that it holds, 0 are this model's" in message
        assert message.count(".lora_A") + message.count(".lora_B") == FACTORS
        assert "made from another model object" in message

    def test_model_init_makes_another_model(self, tmp_path: Path):
        cls = by_class(described(training.wrapped()))
        with pytest.raises(GradientError, match="model_init has made anew"):
            train(None, tmp_path, cls=cls, model_init=lambda: training.wrapped())

    def test_groups_from_before_unwrap_and_wrap(self, tmp_path: Path):
        model = training.wrapped(train=["norm"])
        optimizer = adamw(model)
        hf_lora.unwrap(model)
        hf_lora.wrap(model, targets="q_proj", r=2, train=["norm"])
        message = refused(model, tmp_path, cls=by_object(optimizer))
        assert "model.norm" in message  # the copy that a module in full trains is new as well
        assert "unwrapped and wrapped again" in " ".join(message.split())

    def test_an_optimizer_of_the_base_alone(self, tmp_path: Path):
        """The base would learn, and the adapters that are to train would not."""
        model = training.wrapped()
        norm = model.model.norm.weight.requires_grad_(True)
        message = refused(model, tmp_path, cls=by_object(torch.optim.SGD([norm], lr=0.1)))
        assert "of the 1 parameters that it holds, 1 are this model's" in message

    def test_a_trainer_keeps_its_optimizer_when_the_model_is_wrapped_anew(self, tmp_path: Path):
        model = training.wrapped()
        trainer = silently(model, tmp_path)
        hf_lora.unwrap(model)
        hf_lora.wrap(model, targets="q_proj", r=2)
        with pytest.raises(GradientError, match="holds no tensor of an active adapter"):
            trainer.train()


class TestOfAPart:
    def test_an_adapter_that_was_added_later(self, tmp_path: Path):
        model = training.wrapped()
        optimizer = adamw(model)
        hf_lora.add_adapter(model, "fr", targets="q_proj", r=2)
        hf_lora.activate(model, ("default", "fr"))
        names = warned(model, tmp_path, cls=by_object(optimizer))
        assert len(names) == 2 * LAYERS
        assert all("q_proj" in name and "fr" in name for name in names)

    def test_one_kind_of_factor_alone(self, tmp_path: Path):
        model = training.wrapped()
        only_b = [g for g in hf_lora.optimizer_groups(model, **NUMBERS) if g["name"] == "lora_B"]
        names = warned(model, tmp_path, cls=by_object(torch.optim.AdamW(only_b)))
        assert len(names) == FACTORS // 2
        assert all("lora_A" in name for name in names)

    def test_a_module_in_full(self, tmp_path: Path):
        model = training.wrapped(train=["lm_head", "norm"])
        groups = hf_lora.optimizer_groups(model, **NUMBERS)
        factors = [group for group in groups if group["name"].startswith("lora_")]
        names = warned(model, tmp_path, cls=by_object(torch.optim.AdamW(factors)))
        assert [name.partition(".lora")[0] for name in names] == ["lm_head", "model.norm"]

    def test_frozen_and_inactive_adapters_need_no_place(self, tmp_path: Path):
        model = training.wrapped()
        hf_lora.add_adapter(model, "fr", targets="q_proj", r=2)
        hf_lora.freeze(model, "fr")
        hf_lora.activate(model, ("default", "fr"))
        silently(model, tmp_path, cls=by_object(adamw(model)))

    def test_a_base_that_trains_alone(self, tmp_path: Path):
        model = hf_lora.freeze(training.wrapped(), "default")
        norm = model.model.norm.weight.requires_grad_(True)
        before = norm.detach().clone()
        silently(model, tmp_path, cls=by_object(torch.optim.SGD([norm], lr=0.1)))
        assert not torch.equal(norm, before)


class Offloaded(torch.optim.Optimizer):
    """Steps float64 copies and brings the numbers back, as optimizers with master weights do."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.pairs = [(p, p.detach().double()) for p in parameters]
        super().__init__([copied for _, copied in self.pairs], {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter, copied in self.pairs:
            assert parameter.grad is not None
            copied -= 0.1 * parameter.grad.double()
            parameter.copy_(copied)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter, _ in self.pairs:
            parameter.grad = None


class TestOptimizersThatHoldOtherTensors:
    def test_copies_of_its_own(self, tmp_path: Path):
        model = training.wrapped()
        before = adapter_tensors(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        silently(model, tmp_path, cls=by_object(Offloaded(parameters)))
        assert not same(adapter_tensors(model), before)

    def test_one_that_steps_in_backward(self, tmp_path: Path):
        """As transformers sets up layer-wise GaLore: an optimizer for each tensor, in a hook."""
        model = training.wrapped()
        before, base = adapter_tensors(model), base_tensors(model)
        each = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters() if p.requires_grad}

        def step(parameter: torch.Tensor) -> None:
            each[parameter].step()
            each[parameter].zero_grad()

        for parameter in each:
            parameter.register_post_accumulate_grad_hook(step)
        dummy = LayerWiseDummyOptimizer(optimizer_dict=each, lr=0.1)
        silently(model, tmp_path, cls=by_object(dummy), gradient_accumulation_steps=1)
        after = adapter_tensors(model)
        assert all(not torch.equal(after[k], before[k]) for k in before if "lora_B" in k)
        assert same(base_tensors(model), base)


class Rates(TrainerCallback):
    """Keeps each group's learning rate, as each step finds it."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append([group["lr"] for group in kwargs["optimizer"].param_groups])


class TestTheSameDescriptionTwice:
    def test_trainer_leaves_the_users_dictionary_as_it_was(self, tmp_path: Path):
        model = training.wrapped()
        given = described(model)
        before = copy.copy(given[1]["params"]), [dict(group) for group in given[1]["params"]]
        trainer = silently(model, tmp_path, cls=by_class(given), max_steps=2)
        assert trainer.optimizer_cls_and_kwargs is given
        assert given[1].keys() == {"params", "fused"}
        assert all(a is b for a, b in zip(given[1]["params"], before[0], strict=True))
        assert [list(group) for group in given[1]["params"]] == [list(g) for g in before[1]]
        assert [group["lr"] for group in given[1]["params"]] == [1e-2, 4e-2]

    def test_a_second_trainer_of_the_same_model_has_the_same_rates(self, tmp_path: Path):
        model = training.wrapped()
        cls, rates = by_class(described(model)), [Rates(), Rates()]
        for each in rates:
            silently(model, tmp_path, cls=cls, callbacks=[each], max_steps=2)
        assert rates[0].seen == rates[1].seen
        assert rates[0].seen[0] == [1e-2, 4e-2]

    def test_a_second_trainer_of_another_model_is_refused(self, tmp_path: Path):
        """It would get Trainer's groups at the default rate: trained, but not as it was asked."""
        first = training.wrapped()
        cls = by_class(described(first))
        silently(first, tmp_path, cls=cls)
        refused(training.wrapped(), tmp_path, cls=cls)

    def test_it_is_put_back_after_an_error(self, tmp_path: Path):
        given = described(training.wrapped())
        trainer = training.trainer(training.wrapped(), tmp_path, by_class(given), max_steps=1)
        for _ in range(2):
            trainer.optimizer = None
            with pytest.raises(GradientError):
                trainer.train()
            assert trainer.optimizer_cls_and_kwargs is given
            assert "params" in given[1]

    def test_what_can_be_iterated_once_is_handed_on(self, tmp_path: Path):
        model = training.wrapped()
        before = adapter_tensors(model)
        params = (p for p in model.parameters() if p.requires_grad)
        silently(model, tmp_path, cls=by_class((torch.optim.SGD, {"params": params, "lr": 0.1})))
        assert not same(adapter_tensors(model), before)
