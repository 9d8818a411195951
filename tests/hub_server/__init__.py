"""A Hugging Face Hub for tests: a real HTTP server on loopback, spoken to by the real client.

It holds models, in memory, and speaks what huggingface_hub and transformers use for them: accounts
and tokens, repositories, commits and pull requests, LFS uploads, downloads. It has no Xet storage.
"""

from .accounts import OTHER, READ, WRITE, Token
from .client import Finished, hub_environment, run_python
from .faults import Answer, CutDownload, Die, Exchange, Fault, LoseAnswer, RequestLog
from .repository import Commit, Repository
from .server import HubServer

__all__ = [
    "OTHER",
    "READ",
    "WRITE",
    "Answer",
    "Commit",
    "CutDownload",
    "Die",
    "Exchange",
    "Fault",
    "Finished",
    "HubServer",
    "LoseAnswer",
    "Repository",
    "RequestLog",
    "Token",
    "hub_environment",
    "run_python",
]
