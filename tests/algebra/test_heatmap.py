"""Where in a picture each layer stands."""

import math

from hf_lora.algebra.heatmap import grid


def test_blocks_are_columns_and_modules_rows():
    paths = ["model.layers.10.q", "model.layers.2.q", "model.layers.2.mlp.3.up", "head", "0"]
    rows, columns, table = grid({path: float(i) for i, path in enumerate(paths)})
    assert columns == ["-", "0", "2", "10"]
    assert rows == ["model.layers.*.q", "model.layers.*.mlp.3.up", "head", "*"]
    assert table[0][2:] == [1.0, 0.0]
    assert table[1][2] == 2.0
    assert table[2][0] == 3.0
    assert table[3][1] == 4.0
    assert sum(math.isnan(value) for row in table for value in row) == 16 - 5
