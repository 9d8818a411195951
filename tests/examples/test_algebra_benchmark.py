"""The benchmark of arithmetic on adapters: what it computes is close to the best there is."""

from examples.benchmarks import algebra


def test_every_way_is_close_to_the_best():
    found = algebra.measure(192, 1)
    for task in ("sum of four, rank 16", "extraction, rank 32"):
        for way in found[task].values():
            assert abs(way["above_the_least"]) < 1e-3
            assert way["milliseconds"] > 0
    ours = found["sum of four, rank 16"]["hf_lora"]
    assert abs(ours["above_the_least"]) < 1e-5
