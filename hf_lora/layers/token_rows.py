"""Which rows of a module's weight an adapter trains, and whose tensor that is."""

import dataclasses

from hf_lora.layers.names import parameter_name
from hf_lora.layers.roles import Group

ROWS = "lora_rows"
"""The role of an adapter's rows, (N, D): what they are, and not what is added to the base's."""

ROW_GROUP = Group(5, "rows")
"""The parameter group of such rows."""

INDEX = ("lora_row_ids", "lora_row_order")
"""The kinds of buffers that a module finds an adapter's rows by."""


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """The rows of one module that one adapter trains."""

    ids: tuple[int, ...]
    """Their numbers in the weight, none twice, in the order in which the adapter has them."""

    of: str | None = None
    """Path of the module that has the adapter's tensor, where the base ties the two weights."""


def index_names(adapter: str) -> tuple[str, str]:
    """Return the names of the buffers that a module finds an adapter's rows by."""
    ids, order = (parameter_name(kind, adapter) for kind in INDEX)
    return ids, order
