"""``hf_lora.train``: an adapter from a recipe, in one call."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_lora.recipes.record import Trained


def train(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    *,
    settings: Iterable[str] = (),
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    more: float | None = None,
) -> Trained:
    """Train an adapter as a recipe says: base, data, lora, trainer, output, push.

    The same as ``hf-lora train``. The recipe and the data are checked in full before the weights
    are loaded. Progress is shown on stderr.

    Args:
        recipe: A .yaml, .yml or .json file, whose paths are relative to its folder; or what such a
            file would hold as a mapping, with paths relative to the current folder. There ``lora``
            may be a :class:`hf_lora.LoRAConfig`, and a path an ``os.PathLike``.
        settings: ``"section.field=value"`` each, taken instead of what the recipe says.
        output: Likewise, the folder for the adapter, relative to the current folder.
        resume: Go on where an interrupted training with the same recipe stopped.
        more: Epochs to add to a finished training with the same recipe: the optimizer goes on as it
            was, with a schedule of the new steps alone.

    Returns:
        Where the adapter is, and what each learning rate came to.

    Raises:
        ConfigError: The recipe, the data or the base cannot be used; everything that is wrong with
            the recipe is told at once. Or the output holds a training, and neither ``resume`` nor
            ``more`` was said.
        GradientError: Training cannot work, or diverged.
        HubError: The adapter is trained, and could not be pushed.
        KeyboardInterrupt: Ctrl-C was pressed. The step that was being done is saved as a
            checkpoint, and ``resume`` goes on from there.

    Example:
        >>> trained = hf_lora.train("recipe.yaml", settings=["trainer.max_steps=20"])
        >>> model = hf_lora.from_pretrained(trained.adapter)
    """
    from hf_lora.recipes.training import train_recipe

    folder = None if output is None else Path(output)
    return train_recipe(recipe, settings, folder, resume=resume, more=more)
