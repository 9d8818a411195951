"""What the Hub's client raises, turned into one error of ours that says what to do."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from hf_lora.errors import HfLoRAError, HubError
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.hub.answers import Answers, watched
from hf_lora.text import show, some

_LOG_IN = "log in with `hf auth login`, or pass token=..."
_AGAIN = (
    "Push again: what has arrived is not sent twice, and if the commit did get through no second "
    "one is made."
)
_AGAIN_PR = (
    "Look whether the pull request is there before you push again: a second push opens another."
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_ADVICE = {
    402: "the account's plan does not allow it",
    409: "it collides with what somebody else did at the same moment; try again",
    412: "somebody else pushed at the same moment; push again",
    413: "it is too large for that server",
    429: "too many requests; wait a minute and try again",
}
_PASSING = {500, 502, 503, 504, 507, 520, 521, 522, 523, 524, 529}
"""Answers of a server that may do it at another time; 501 and the like say that it never will."""

_LONGEST_SAID = 300
_PACKAGE = __name__.split(".")[0]
_T = TypeVar("_T")


@contextmanager
def reading(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what goes wrong while something is fetched into a HubError."""
    yield from _translating(repo_id, lambda error: _read_words(error, repo_id, revision))


@contextmanager
def writing(repo_id: str, create_pr: bool) -> Iterator[None]:
    """Turn what goes wrong while something is pushed into a HubError."""
    yield from _translating(repo_id, lambda error: _write_words(error, repo_id, create_pr))


def asked(question: Callable[[], _T], default: _T) -> _T:
    """Return what the Hub answers, or ``default`` where it cannot be asked or answers oddly.

    For what would be good to know, and nothing fails without.
    """
    try:
        with watched():
            return question()
    except Exception as error:
        if not isinstance(error, HubError) and _is_ours(error):
            raise
        return default


def expected(kind: type[_T], value: object, what: str) -> _T:
    """Return a part of an answer, which the client hands on as the server sent it.

    Raises:
        HubError: It is not of the type that it should be.
    """
    if not isinstance(value, kind):
        raise HubError(
            f"The server at {constants.ENDPOINT} does not answer as a Hub: {what} is {show(value)}."
        )
    return value


def file_names(listed: Iterable[object]) -> list[str]:
    """Return a listing of a repo's files as names.

    Raises:
        HubError: Something in it is none.
    """
    return [expected(str, name, "a file's name") for name in listed]


def what_is_there(repo_id: str, subfolder: str | None, missing: str, files: Sequence[str]) -> str:
    """Return words for a repo that lacks a file of an adapter.

    Args:
        repo_id, subfolder: Where it was looked for.
        missing: The file.
        files: All files of the repo.
    """
    prefix = f"{Path(subfolder).as_posix()}/" if subfolder else ""
    here = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    folders = [file.removesuffix(f"/{WEIGHTS_FILE}") for file in files]
    adapters = [folder for folder, file in zip(folders, files, strict=True) if folder != file]
    pickles = [file for file in here if "/" not in file and file.endswith(_PICKLES)]
    if pickles and WEIGHTS_FILE not in here:
        found = (
            f"It has {show(pickles[0])}, a pickle, which can run code when it is read; whoever "
            f"trusts it can convert it to {WEIGHTS_FILE} (in PEFT: save_pretrained)"
        )
    elif adapters:
        found = f"Its folders hold adapters; pass subfolder= one of: {some(adapters)}"
    elif "config.json" in here and CONFIG_FILE not in here:
        found = "It holds a whole model: load that with transformers"
    else:
        found = f"It has: {some(here, 10) or 'nothing'}"
    where = f"{repo_id}/{prefix}".rstrip("/")
    return f"{where} has no {missing}, so it is no adapter that hf_lora can read. {found}."


_BROKEN = (OSError, RuntimeError, httpx2.HTTPError, XetDownloadError)
"""What the client raises where the wire or the disk failed, or the server said no."""


def _translating(repo_id: str, words: Callable[[Exception], str | None]) -> Iterator[None]:
    with watched() as answers:
        try:
            yield
        except HfLoRAError:
            raise
        except Exception as error:
            text = words(_behind(error))
            if text is None:
                if _is_ours(error):
                    raise
                text = _odd_words(repo_id, answers)
            texts = _all_texts(error)
            # a traceback shows what an error came from: not where the token stands there
            cause = error if answers.without_secrets(texts) == texts else None
            raise HubError(answers.without_secrets(text)) from cause


def _is_broken(error: Exception) -> bool:
    return isinstance(error, _BROKEN) and not isinstance(error, RecursionError | FileMetadataError)


def _is_ours(error: BaseException) -> bool:
    """Say whether an error was raised by a line of hf_lora, which then is a fault of hf_lora."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals["__name__"].split(".")[0] == _PACKAGE


def _odd_words(repo_id: str, answers: Answers) -> str:
    return (
        f"{repo_id}: the server at {constants.ENDPOINT} does not answer as a Hub: "
        f"{answers.words()}. Check HF_ENDPOINT, and what stands between you and the Hub."
    )


def _all_texts(error: BaseException | None) -> str:
    """Return the texts of an error and of what it came from."""
    found = []
    while error is not None and len(found) < 20:
        found.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(found)


def _read_words(error: Exception, repo_id: str, revision: str | None) -> str | None:
    match error:
        case GatedRepoError():
            return (
                f"{repo_id} is gated: ask for access on its page on the Hub, then {_LOG_IN} of "
                "the account that was let in."
            )
        case RepositoryNotFoundError():
            return (
                f"There is no folder {repo_id!r} here, and no such repo on the Hub that your token "
                f"opens. Check the name; if the repo is private, {_LOG_IN}."
            )
        case RevisionNotFoundError():
            return (
                f"{repo_id} has no revision {revision!r}; give a branch, a tag, a full commit id "
                "or refs/pr/NUMBER."
            )
        case OfflineModeIsEnabled() | LocalEntryNotFoundError() if constants.is_offline_mode():
            return (
                f"{repo_id}{_at(revision)} is not in the cache, and HF_HUB_OFFLINE is set. Unset "
                "it, or fetch the adapter once while the Hub can be reached."
            )
        case LocalEntryNotFoundError() if isinstance(_root(error), FileMetadataError):
            return None
        case LocalEntryNotFoundError():
            return (
                f"{repo_id}{_at(revision)} is not in the cache, and it cannot be fetched: "
                f"{_reason(error)}. Check the connection and HF_ENDPOINT, and try again."
            )
    if (known := _common_words(error, repo_id)) or not _is_broken(error):
        return known
    return f"{repo_id} could not be fetched: {_reason(error)}. Try again: what has arrived is kept."


def _write_words(error: Exception, repo_id: str, create_pr: bool) -> str | None:
    match error:
        case RepositoryNotFoundError() | GatedRepoError():
            return (
                f"The Hub does not let you push to {repo_id}: {_LOG_IN}, with a token that may "
                "write there."
            )
        case RevisionNotFoundError():
            return f"{repo_id} has no such branch or pull request: {_reason(error)}"
        case OfflineModeIsEnabled():
            return f"{repo_id} cannot be pushed to while HF_HUB_OFFLINE is set; unset it."
        case httpx2.ConnectError():
            return (
                f"The Hub cannot be reached: {_reason(error)}. Nothing was pushed to {repo_id}; "
                "check the connection and HF_ENDPOINT, and push again."
            )
        case ConnectionError() if "xet" in str(error):
            return (
                f"The server keeps no Xet storage, which is how the client uploads to {repo_id}. "
                "Set HF_HUB_DISABLE_XET=1 in the environment before Python starts, and push again."
            )
        case ValueError() if "README.md" in str(error):
            return f"The Hub refuses the model card's metadata. {' '.join(str(error).split())}"
    if (known := _common_words(error, repo_id)) or not _is_broken(error):
        return known
    return (
        f"The connection to the Hub broke during the push to {repo_id}: {_reason(error)}. "
        f"{_AGAIN_PR if create_pr else _AGAIN}"
    )


def _common_words(error: Exception, repo_id: str) -> str | None:
    match error:
        case HFValidationError():
            return f"{repo_id!r} is no repo id such as 'user/name': {_reason(error)}"
        case LocalTokenNotFoundError():
            return f"token=True, but nobody is logged in on this machine: {_LOG_IN}."
        case DisabledRepoError():
            return f"The Hub has disabled {repo_id}."
        case HfHubHTTPError():
            return _status_words(error, repo_id)
    return None


def _status_words(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    words = " ".join((error.server_message or "").split())
    said = f" ({words[:_LONGEST_SAID]})" if words else ""
    if status in (401, 403):
        return f"Your token may not do this on {repo_id}, HTTP {status}{said}; {_LOG_IN}."
    if status in _PASSING:
        return f"The Hub failed on {repo_id}, HTTP {status}{said}; try again in a while."
    if status >= 500:
        return f"The server cannot do this on {repo_id}, HTTP {status}{said}; is it a Hub?"
    advice = _ADVICE.get(status, _reason(error))
    return f"The Hub refused this on {repo_id}, HTTP {status}{said}: {advice}."


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""


def _behind(error: Exception) -> Exception:
    """Return what an upload failed for: the client hides it behind a RuntimeError."""
    cause = error.__cause__
    return cause if type(error) is RuntimeError and isinstance(cause, Exception) else error


def _root(error: BaseException) -> BaseException:
    """Return why the Hub was not asked, where the client only says that the cache has nothing."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """Return what is behind an error, in a line."""
    error = _root(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
