"""The benchmark of experts: its arms compute the same, and ours keeps what grows with rows."""

import torch

from examples.benchmarks.experts import ARMS, Work, arm, forward, measure_bytes, step

TINY = Work(experts=6, width=16, top=2, hidden=64, layers=1, tokens=24, r=2, dtype=torch.float32)


def test_all_arms_do_the_same_work():
    outputs = {name: forward(arm(name, TINY), TINY) for name in ARMS}
    torch.testing.assert_close(outputs["hf_lora"], outputs["peft"], rtol=1e-4, atol=1e-3)
    assert not torch.equal(outputs["hf_lora"], outputs["frozen"])
    for name in ARMS:
        step(arm(name, TINY), TINY)()


def test_ours_keeps_nothing_that_is_there_however_few_tokens_come():
    kept = measure_bytes(TINY)
    assert kept["hf_lora"]["once, a layer"] == 0
    assert kept["hf_lora"]["per token and layer"] < kept["frozen"]["per token and layer"]
    assert kept["peft"]["once, a layer"] >= 6 * 3 * 16 * 64 * 4
