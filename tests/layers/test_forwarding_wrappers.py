"""A wrapper that forwards attributes is no layer; the one inside it is."""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import hf_lora


def test_the_layer_inside_a_checkpoint_wrapper_is_adapted_once():
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)))
    plan = hf_lora.plan(model, r=2)
    assert [target.path for target in plan.targets] == ["0._checkpoint_wrapped_module"]
    assert not plan.problems
