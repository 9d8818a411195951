"""``hf-lora plan``: what wrapping a model would do, found out without its weights."""

from pathlib import Path
from typing import Any

import hf_lora
from hf_lora.cli.output import Result, plain
from hf_lora.config import LoRAConfig, read_mapping
from hf_lora.recipes.base_model import load_config, skeleton
from hf_lora.recipes.recipe import Base


def run(
    model: str,
    fields: dict[str, Any],
    *,
    config: Path | None,
    revision: str | None,
    gguf_file: str | None,
    world: int = 1,
) -> Result:
    """Plan for a model; ``fields`` are taken instead of what the file ``config`` says.

    ``world`` is the number of processes that a training is to be shared among.

    Raises:
        ConfigError: The model's configuration cannot be loaded, or a field is unknown or wrong.
    """
    said = {} if config is None else read_mapping(config)
    wanted = LoRAConfig.from_dict({**said, **fields})
    found = load_config(Base(model=model, revision=revision, gguf_file=gguf_file))
    plan = hf_lora.plan(skeleton(found), config=wanted, world=world)
    words = [str(plan)]
    if getattr(found, "quantization_config", None) is not None:
        words.append("note: the checkpoint is quantized; the base is counted as if it were not")
    return Result(data=_data(plan), text="\n".join(words), refused=bool(plan.problems))


def _data(plan: hf_lora.Plan) -> dict[str, Any]:
    counts = ("parameters", "weight_bytes", "gradient_bytes", "adam_bytes", "file_bytes")
    fields = plain(plan)
    for record, target in zip(fields["targets"], plan.targets, strict=True):
        record |= {"parameters": target.parameters, "bytes": target.bytes}
    return {**fields, **{name: getattr(plan, name) for name in counts}}
