"""The benchmark of rows: its arms compute the same, and a file holds the rows alone."""

import torch

from examples.benchmarks.rows import ARMS, Work, arm, file_size, loss, step

TINY = Work(rows=3, vocabulary=300, hidden=64, layers=1, tokens=12, dtype=torch.float32)


def test_all_arms_do_the_same_work():
    models = {name: arm(name, TINY) for name in ARMS}
    for _ in range(2):
        for model in models.values():
            step(model, TINY)()
    found = {name: loss(model, TINY) for name, model in models.items()}
    torch.testing.assert_close(found["hf_lora"], found["peft"], rtol=1e-4, atol=1e-5)
    assert found["hf_lora"] < found["frozen"]
    assert found["in full"] < found["hf_lora"]


def test_a_file_holds_the_rows_alone():
    ours, whole = (file_size(name, arm(name, TINY)) for name in ("hf_lora", "in full"))
    assert 3 * 64 * 4 < ours < 3 * 64 * 4 + 5_000 < whole
