"""The configuration that an adapter's file amounts to, where it does not hold one of ours."""

from collections.abc import Collection

from torch import nn

from hf_lora.adapter_io.match import Match
from hf_lora.config import LoRAConfig
from hf_lora.files.attention import without_outs
from hf_lora.files.biases import trains_biases
from hf_lora.files.patterns import SPECIAL
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.targets import shortest_names


def config_of(match: Match, model: nn.Module) -> LoRAConfig:
    """Return the adapter's own configuration, or the one that its file amounts to."""
    if match.folder.config is not None:
        return match.folder.config
    slots = without_outs(match.slots)
    stacks = [f"{path}.{part}" for path, slot in slots.items() for part in slot.parts]
    layers = [path for path, slot in slots.items() if not slot.parts]
    first = next(iter(slots.values()), LayerConfig(r=LoRAConfig.r, alpha=LoRAConfig.alpha))
    by_path = {
        path: {"r": slot.r, "alpha": slot.alpha}
        for path, slot in slots.items()
        if (slot.r, slot.alpha) != (first.r, first.alpha)
    }
    return LoRAConfig(
        targets=[
            *(_escape(name) for name in shortest_names(layers, dict(model.named_modules()))),
            *(_escape(name) for name in _parameter_names(stacks, model)),
        ],
        r=first.r,
        alpha=first.alpha,
        dropout=first.dropout,
        rslora=first.rslora,
        bias=trains_biases(match.folder.fields) or "none",
        lora_bias=any(slot.lora_bias for slot in match.slots.values()),
        overrides={_escape(path): fields for path, fields in by_path.items()},
        train=[_escape(path) for path in match.trained],
        train_rows={_escape(p): rows.ids for p, rows in match.rows.items() if rows.of is None},
    )


def _parameter_names(chosen: Collection[str], model: nn.Module) -> list[str]:
    """Return names of these parameters: with that of their module alone, if all such are meant."""
    short: dict[str, bool] = {}
    for full, _ in model.named_parameters():
        tail = ".".join(full.split(".")[-2:])
        short[tail] = short.get(tail, True) and full in chosen
    tails = ((".".join(full.split(".")[-2:]), full) for full in chosen)
    return sorted({tail if short.get(tail, False) else full for tail, full in tails})


def _escape(name: str) -> str:
    """Return the pattern that means the module called ``name``; the model itself has no name."""
    return SPECIAL.sub(r"\\\g<0>", name).replace(".", r"\.") or "(?:)"
