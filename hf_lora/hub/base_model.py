"""The base model as others see it: the id under which they find it, and its licence."""

import os
import re
import warnings

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_lora.errors import HfLoRAWarning
from hf_lora.hub.errors import asked

LICENSE_FIELDS = ("license", "license_name", "license_link")

_SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\][0-9a-f]{40}[/\\]?")


def hub_base(base: str | None) -> str | None:
    """Return the id of a model's base as :func:`hub_id` does, with a warning if it has none."""
    found = hub_id(base)
    if base is not None and found is None:
        warnings.warn(
            f"The base model was loaded from the folder {base!r}, which nobody else has; what is "
            "pushed names no base. Set model.config._name_or_path to its Hub id to name it.",
            HfLoRAWarning,
            stacklevel=4,
        )
    return found


def hub_id(base: str | None) -> str | None:
    """Return the id under which others find a base model, or None if they cannot.

    A folder of the Hub's own cache stands for the repo that it is a copy of.

    Args:
        base: What the model or the adapter names as its base: an id or a folder.
    """
    if base is None:
        return None
    cached = _SNAPSHOT.search(base)
    name = cached["id"].replace("--", "/") if cached else base
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if cached or not os.path.isdir(name) else None


def base_license(base: str, token: str | bool | None) -> dict[str, str]:
    """Return what the base model's own card says of its licence, which holds for an adapter too.

    Nothing, if the Hub cannot be asked: a card without it is better than no push.
    """
    card = asked(lambda: HfApi(token=token).model_info(base).card_data, None)
    found = {name: card.get(name) for name in LICENSE_FIELDS} if card else {}
    return {name: value for name, value in found.items() if isinstance(value, str)}
