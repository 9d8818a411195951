"""TRL's trainers that compare with a reference model: the base itself, at no cost in memory."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import hf_lora
from hf_lora.errors import StateError
from tests.integrations import training
from tests.integrations.training import adapter_tensors, base_tensors, same
from tests.integrations.trl_runs import (
    COMPLETIONS,
    PREFERENCES,
    PROMPTS,
    make,
    reward,
    small,
    storages,
)


def wrapped(seed: int = 1, model: Any = None, **fields: Any) -> Any:
    model = small() if model is None else model
    with training.seeded(seed):
        return hf_lora.wrap(model, **{"targets": ["q_proj", "v_proj"], "r": 4, **fields})


class WhileTraining(TrainerCallback):
    """Looks at the memory during every step: all tensors that are as large as the base's."""

    def __init__(self, view: Any) -> None:
        self.view = view
        self.shared: list[bool] = []
        self.embeddings: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = storages(kwargs["model"])
        self.shared.append(all(model[n] == at for n, at in storages(self.view).items()))
        shape = self.view.model.embed_tokens.weight.shape
        alive = [t for t in gc.get_objects() if isinstance(t, torch.nn.Parameter)]
        self.embeddings.append(len({t.data_ptr() for t in alive if t.shape == shape}))


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    training.speed_up_collection()  # and leave what other tests made out of what is counted
    model = wrapped()
    base = base_tensors(model)
    view = hf_lora.base_view(model)
    watch = WhileTraining(view)
    x = torch.tensor([[3, 5, 7, 9, 10]])
    with torch.no_grad():
        before = small().eval()(x).logits, view(x).logits
    trainer = make(
        DPOTrainer,
        DPOConfig,
        model,
        tmp_path_factory.mktemp("dpo"),
        PREFERENCES,
        ref_model=view,
        callbacks=[watch],
        args={"bf16": False},
    )
    batch = next(iter(trainer.get_train_dataloader()))
    reference = [trainer.compute_ref_log_probs(trainer.ref_model, batch)]
    trainer.train()
    reference.append(trainer.compute_ref_log_probs(trainer.ref_model, batch))
    plain = make(
        DPOTrainer,
        DPOConfig,
        small(),
        tmp_path_factory.mktemp("plain"),
        PREFERENCES,
        ref_model=small(),
        args={"bf16": False},
    )
    reference.append(plain.compute_ref_log_probs(plain.ref_model, batch))
    return {
        "trainer": trainer,
        "base": base,
        "view": view,
        "watch": watch,
        "before": before,
        "reference": reference,
        "x": x,
    }


class TestDPO:
    def test_there_is_no_second_copy_while_it_trains(self, dpo: dict[str, Any]):
        watch = dpo["watch"]
        assert watch.shared == [True] * 4
        first = watch.embeddings[0]
        assert watch.embeddings == [first] * 4
        # the embeddings and the head, of this model alone
        assert first == 2

    def test_the_reference_is_the_base_before_and_after(self, dpo: dict[str, Any]):
        fresh, view = dpo["before"]
        assert torch.equal(fresh, view)
        with torch.no_grad():
            assert torch.equal(dpo["view"](dpo["x"]).logits, fresh)

    def test_its_log_probabilities_are_those_of_a_model_of_its_own(self, dpo: dict[str, Any]):
        before, after, plain = dpo["reference"]
        for chosen_or_rejected in range(2):
            assert torch.equal(before[chosen_or_rejected], plain[chosen_or_rejected])
            assert torch.equal(after[chosen_or_rejected], plain[chosen_or_rejected])

    def test_the_base_is_the_same_to_the_byte_and_the_adapter_is_not(self, dpo: dict[str, Any]):
        model = dpo["trainer"].model
        assert same(base_tensors(model), dpo["base"])
        start, end = adapter_tensors(wrapped()), adapter_tensors(model)
        assert all(not torch.equal(start[key], end[key]) for key in start)

    def test_the_loss_starts_where_policy_and_reference_agree(self, dpo: dict[str, Any]):
        logs = [log for log in dpo["trainer"].state.log_history if "loss" in log]
        assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2
        assert logs[-1]["loss"] < logs[0]["loss"]

    def test_its_checkpoints_hold_the_adapter_and_resume(self, dpo: dict[str, Any], tmp_path: Path):
        folder = Path(dpo["trainer"].args.output_dir)
        assert not (folder / "checkpoint-2" / "model.safetensors").exists()
        model = wrapped(seed=9)
        view = hf_lora.base_view(model)
        args = {"bf16": False}
        resumed = make(
            DPOTrainer, DPOConfig, model, tmp_path, PREFERENCES, ref_model=view, args=args
        )
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert same(adapter_tensors(model), adapter_tensors(dpo["trainer"].model))

    def test_a_view_after_the_trainer_was_made_is_the_base_too(self, dpo: dict[str, Any]):
        """TRL's forward on the model calls the model; that of the view calls the view."""
        view = hf_lora.base_view(dpo["trainer"].model)
        with torch.no_grad():
            assert torch.equal(view(dpo["x"]).logits, dpo["before"][0])

    def test_an_adapter_may_be_trained_further_against_its_own_base(
        self, dpo: dict[str, Any], tmp_path: Path
    ):
        trained = dpo["trainer"].model
        trained.save_pretrained(tmp_path / "adapter")
        model = hf_lora.load(small(), tmp_path / "adapter", trainable=True)
        view = hf_lora.base_view(model)
        with torch.no_grad():
            assert torch.equal(view(dpo["x"]).logits, dpo["before"][0])
        make(DPOTrainer, DPOConfig, model, tmp_path, PREFERENCES, ref_model=view).train()

    def test_precomputed_references_are_those_of_the_model_as_it_starts(
        self, dpo: dict[str, Any], tmp_path: Path
    ):
        """For a fresh adapter that is the base; for a trained one it is not."""
        runs = []
        for start in ("fresh", "trained"):
            model = wrapped()
            if start == "trained":
                hf_lora.unwrap(model)
                dpo["trainer"].model.save_pretrained(tmp_path / "adapter")
                hf_lora.load(model, tmp_path / "adapter", trainable=True)
            args = {"bf16": False, "precompute_ref_log_probs": True}
            folder = tmp_path / start
            trainer = make(DPOTrainer, DPOConfig, model, folder, PREFERENCES, args=args)
            trainer.train()
            assert trainer.ref_model is None
            runs.append(trainer)
        fresh, trained = runs
        expected = adapter_tensors(dpo["trainer"].model)
        for key, tensor in adapter_tensors(fresh.model).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5)
        logs = [log for log in trained.state.log_history if "loss" in log]
        assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: it is its own reference

    def test_dropout_is_off_as_trl_promises(self, tmp_path: Path):
        """TRL switches off every nn.Dropout; the adapter's is no module, and follows."""
        runs = []
        for dropout in (0.5, 0.0):
            model = wrapped(dropout=dropout)
            view = hf_lora.base_view(model)
            folder = tmp_path / str(dropout)
            make(DPOTrainer, DPOConfig, model, folder, PREFERENCES, ref_model=view).train()
            runs.append(adapter_tensors(model))
            assert hf_lora.adapters(model)["default"].dropout == dropout
        assert same(*runs)

    def test_a_reference_that_would_be_written_is_refused(self, tmp_path: Path):
        """TRL refuses it for PEFT; here it would write through the shared tensors."""
        model = wrapped()
        base = base_tensors(model)
        trainer = make(
            DPOTrainer,
            DPOConfig,
            model,
            tmp_path,
            PREFERENCES,
            ref_model=hf_lora.base_view(model),
            args={"sync_ref_model": True, "ref_model_sync_steps": 1},
        )
        with pytest.raises(StateError, match="sync_ref_model=True writes into"):
            trainer.train()
        assert same(base_tensors(model), base)


class TestOthers:
    """Each trains the adapter, leaves the base as it was and saves the adapter alone."""

    def check(self, model: Any, trainer: Any) -> None:
        base, start = base_tensors(model), adapter_tensors(model)
        trainer.train()
        end = adapter_tensors(model)
        assert same(base_tensors(model), base)
        assert all(not torch.equal(start[key], end[key]) for key in start)
        last = Path(trainer.args.output_dir) / "checkpoint-4"
        assert same(training.saved(last), training.in_file_names(model))
        assert not (last / "model.safetensors").exists()

    def test_kto(self, tmp_path: Path):
        model = wrapped()
        view = hf_lora.base_view(model)
        trainer = make(KTOTrainer, KTOConfig, model, tmp_path, COMPLETIONS, ref_model=view)
        self.check(model, trainer)
        assert trainer.ref_model.lm_head.weight is model.lm_head.weight

    @pytest.mark.parametrize(
        ("cls", "config"), [(ORPOTrainer, ORPOConfig), (CPOTrainer, CPOConfig)]
    )
    def test_those_without_a_reference(self, tmp_path: Path, cls: Any, config: Any):
        model = wrapped()
        self.check(model, make(cls, config, model, tmp_path, PREFERENCES))

    @pytest.mark.parametrize(
        ("cls", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)]
    )
    def test_those_that_generate(self, tmp_path: Path, cls: Any, config: Any):
        model = wrapped()
        args = {"beta": 0.0, "max_completion_length": 6, "num_generations": 2}
        trainer = make(cls, config, model, tmp_path, PROMPTS, reward_funcs=reward, args=args)
        self.check(model, trainer)
        assert trainer.ref_model is None

    def test_a_reward_model_with_a_fresh_head(self, tmp_path: Path):
        config = small().config
        config.num_labels = 1
        with training.seeded(0):
            base = LlamaForSequenceClassification(config)
        model = wrapped(model=base, train=["score"])
        pairs = {"chosen": PREFERENCES["chosen"], "rejected": PREFERENCES["rejected"]}
        self.check(model, make(RewardTrainer, RewardConfig, model, tmp_path, pairs))
