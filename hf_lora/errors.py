"""Every error and warning of hf_lora, and the one way their messages are built.

HfLoRAError
├── ConfigError (ValueError)            a field or a file of LoRAConfig is wrong
├── TargetError (ValueError)            a pattern matches nothing, or nothing that can be adapted
├── UnknownAdapterError (LookupError)   no adapter of that name on this model
├── StateError (RuntimeError)           not now: wrapped twice, not wrapped, merged, on meta
├── AdapterFileError (ValueError)       a folder or file is not a sound adapter
│   ├── UnsupportedAdapterError         sound, but of a kind that hf_lora does not implement
│   └── AdapterMismatchError            sound, but made for another model
│       └── BaseMismatchError           same shapes, other weights
├── BaseLoadError (OSError)             the base model that an adapter asks for cannot be loaded
├── SaveError (OSError)                 an adapter could not be written
├── GradientError (RuntimeError)        training would change nothing, or has gone to nan
└── HubError (ConnectionError)          the Hub said no, or nothing at all
HfLoRAWarning (UserWarning)             something was resolved or left out, and you should know
"""

from collections.abc import Iterable

from hf_lora.text import grouped, printable

_MOST_LINES = 20


class HfLoRAError(Exception):
    """Base of every error that hf_lora raises on purpose. Its message fits a screen."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(HfLoRAError, ValueError):
    """A field or a file of :class:`hf_lora.LoRAConfig` is wrong."""


class TargetError(HfLoRAError, ValueError):
    """A pattern matches no layer, or only layers that cannot be adapted."""


class UnknownAdapterError(HfLoRAError, LookupError):
    """The model has no adapter of that name."""


class StateError(HfLoRAError, RuntimeError):
    """The model is not in a state in which this can be done."""


class AdapterFileError(HfLoRAError, ValueError):
    """A folder or a file is not a sound adapter."""


class UnsupportedAdapterError(AdapterFileError):
    """The adapter is of a kind, or uses a feature, that hf_lora does not implement."""


class AdapterMismatchError(AdapterFileError):
    """The adapter's tensors do not fit this model."""


class BaseMismatchError(AdapterMismatchError):
    """The adapter fits the shapes, but was trained on other base weights."""


class BaseLoadError(HfLoRAError, OSError):
    """The base model that an adapter asks for is not there, or cannot be loaded."""


class SaveError(HfLoRAError, OSError):
    """An adapter could not be written. The folder has the old one or the new one, whole."""


class GradientError(HfLoRAError, RuntimeError):
    """Training would change nothing, because no gradient arrives, or has left no numbers."""


class HubError(HfLoRAError, ConnectionError):
    """The Hub refused a request or could not be reached."""


class HfLoRAWarning(UserWarning):
    """Something was resolved or left out that the user should know about."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(arg) if isinstance(arg, str) else arg for arg in args))


def listing(headline: str, problems: Iterable[str], advice: str = "") -> str:
    """Build a message that names all problems at once, one per line.

    Args:
        headline: What was attempted and failed, without a full stop.
        problems: One line each; those that differ in the number of a layer alone share one, and
            beyond 20 the rest is counted, not printed.
        advice: What to do about it.
    """
    lines = grouped(problems)
    shown = [f"  - {line}" for line in lines[:_MOST_LINES]]
    if len(lines) > _MOST_LINES:
        shown.append(f"  - ... and {len(lines) - _MOST_LINES} more")
    return "\n".join([f"{headline}:", *shown, *([advice] if advice else [])])
