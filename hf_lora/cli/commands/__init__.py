"""What each command does; imported when it is called: this brings torch and transformers."""

from transformers.utils import logging

# Their lines would stay behind on a terminal; the commands show their own.
logging.disable_progress_bar()
