"""What the tests of the server share: a script's names for the client's calls, bare requests."""

import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import WRITE, HubServer, Token, hub_environment, run_python

# Past any proxy that this machine may have for the world outside.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# Errors as `outcome` in a script shows them.
FORBIDDEN = ["HfHubHTTPError", 403]
UNAUTHORIZED = ["HfHubHTTPError", 401]
NOT_FOUND = ["RepositoryNotFoundError", 404]
# Without a token an absent repository looks like a private one, and so does writing.
NOT_FOUND_ANONYMOUS = ["RepositoryNotFoundError", 401]

# The names that the scripts below use; `outcome` is a value, or an error as type and status.
NAMES = """
from huggingface_hub import (
    CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, ModelCard,
    get_safetensors_metadata, hf_hub_download, snapshot_download,
)
from pathlib import Path

api = HfApi()

def outcome(call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except Exception as error:
        response = getattr(error, "response", None)
        return [type(error).__name__, None if response is None else response.status_code]

def read(repo, file="a.txt", **kwargs):
    return Path(hf_hub_download(repo, file, **kwargs)).read_text()

def put(repo, file, content, **kwargs):
    return api.upload_file(
        repo_id=repo, path_in_repo=file, path_or_fileobj=content.encode(), **kwargs
    )
"""


def run(hub: HubServer, home: Path, code: str, *, token: Token | None = WRITE, **values: Any):
    """What a script that uses NAMES reports."""
    environment = hub_environment(hub, home, token=token)
    return run_python(NAMES + code, environment, **values).value


def fetch(
    url: str,
    body: bytes | None = None,
    *,
    method: str | None = None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> tuple[int, bytes, dict[str, str]]:
    """A request without the client: status, body and headers of its answer."""
    request = urllib.request.Request(url, body, dict(headers), method=method)
    try:
        with DIRECT.open(request) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)
