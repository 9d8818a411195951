"""The benchmark of merges in memory: both arms merge the same, and every verb is timed."""

import torch

from examples.benchmarks.merge_in_memory import FOR_GOOD, UNDONE, Sizes, base, measured

TINY = Sizes(vocabulary=50, hidden=32, ffn=48, layers=2, heads=4, kv_heads=2)


def test_both_arms_merge_the_same():
    found = {name: merge(make(TINY)).state_dict() for name, (make, merge) in FOR_GOOD.items()}
    assert found["hf_lora"].keys() == found["peft"].keys()
    bare = base(TINY).state_dict()
    for name, tensor in found["hf_lora"].items():
        assert torch.equal(tensor, bare[name]) == ("_proj" not in name)
        # PEFT rounds the update, and then the sum
        torch.testing.assert_close(tensor, found["peft"][name], rtol=2**-7, atol=2**-10)


def test_every_verb_is_timed():
    found = measured(TINY, 1)
    assert {*found} == {"merge", "unmerge", "for good"}
    assert all({*arms} == {*UNDONE} for arms in found.values())
    assert all(seconds > 0 for arms in found.values() for seconds in arms.values())
