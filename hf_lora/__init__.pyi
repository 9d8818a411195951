"""The package's names, for type checkers; at run time ``__init__.py`` finds them in ``public``."""

from hf_lora.public import *  # noqa: F403
from hf_lora.public import __all__ as __all__
from hf_lora.version import __version__ as __version__
