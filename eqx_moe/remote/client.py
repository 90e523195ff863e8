"""The Hub's client: names of repos, what is tried again, and errors in this library's shape without any secret."""

import http
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from eqx_moe import __version__
from eqx_moe.errors import CheckpointError, quote

T = TypeVar("T")

#: Who sends a request, as the client's functions take it.
SENDER: dict[str, Any] = {"library_name": "eqx_moe", "library_version": __version__}
#: Seconds between tries.
WAITS = (1.0, 2.0, 4.0, 8.0)
#: Seconds for which an answer to a request about a repo is waited for.
TIMEOUT = 30.0
_LONGEST_WAIT = 300.0  # however long the server asks for
_TRANSIENT = (408, 429, 500, 502, 503, 504)
# A user or organisation, and a name: what the Hub allows.
_REPO = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?/[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{8,}")
_SIGNED = re.compile(
    r"\?[^\s?'\"<>]*(?:signature|token|credential|x-amz-|x-goog-|key-pair-id)[^\s'\"<>]*", re.IGNORECASE
)
_TAIL = re.compile(r"\(…\)[^\s'\"<>)]*")  # the last 40 characters of a URL, as the client shows it
# What does not pass by itself.
_GONE = "look whether the repo and its files are still there, and whether HF_ENDPOINT is a Hub"
_REFUSED = "see what the Hub says of the request; if that is nothing, update huggingface_hub"
_FIXES = {
    **{400: _REFUSED, 422: _REFUSED, 404: _GONE, 410: _GONE},
    413: "send smaller files: the Hub or a proxy before it takes none of this size; see `max_shard_size`",
    507: "make room in the account's storage: the Hub has none left for this",
}
_CREDENTIALS = re.compile(r"(https?://)[^\s/@'\"<>]+@")


def is_repo(name: object) -> bool:
    """Whether `name` is shaped like a repo's, "org/name"."""
    return (
        isinstance(name, str)
        and len(name) <= 96
        and _REPO.fullmatch(name) is not None
        and not any(mark in name for mark in ("--", "..", ".git/"))
        and not name.endswith(".git")
    )


def is_revision(name: str) -> bool:
    """Whether git takes `name` for a branch or a tag (`git check-ref-format`), or it may be a commit."""
    parts = name.split("/")
    return (
        name.isprintable()
        and not re.search(r"[ ~^:?*\[\\]|\.\.|@\{|^-|\.$|^@$", name)
        and all(part and not part.startswith(".") and not part.endswith(".lock") for part in parts)
    )


def api(token: str | bool | None) -> Any:
    """A `huggingface_hub.HfApi`, which sends `token`, or with None the one that the user is logged in with.

    Raises:
        ValueError: it is no text that can be sent.
    """
    from huggingface_hub import HfApi

    if isinstance(token, str):
        token = token.strip()
    sent = token if isinstance(token, str) else None if token is False else _login()
    # What it is would be shown by the client as it fails, and must not be here.
    if sent is not None and not re.fullmatch("[!-~]+", sent):
        raise ValueError("`token` (or HF_TOKEN, or the login) must be printable ASCII and not empty; got another one.")
    return HfApi(token=token, **SENDER)


def retrying(call: Callable[[], T], waits: tuple[float, ...] = WAITS) -> T:
    """What `call` gives; what may pass by itself (a lost connection, a server's fault) is tried again after waiting."""
    for wait in waits:
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            pause = seconds_to_wait(error, wait)
        time.sleep(pause)
    return call()


def seconds_to_wait(error: BaseException, planned: float) -> float:
    """As many as planned, or as the server asks for, within reason."""
    for cause in chain(error):
        asked = getattr(getattr(cause, "response", None), "headers", {}).get("retry-after", "")
        if asked.isdigit():
            return max(planned, min(float(asked), _LONGEST_WAIT))
    return planned


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    for cause in chain(error):
        # The second is what the client raises when it has itself tried enough.
        if isinstance(cause, OfflineModeIsEnabled | LocalEntryNotFoundError):
            return False
        if isinstance(cause, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
            return False
        if isinstance(cause, httpx.TransportError | json.JSONDecodeError):
            return True
        if (status := _status(cause)) is not None:
            return status in _TRANSIENT
    # How the client says that a download is of another size than it should be.
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


def is_unreachable(error: BaseException) -> bool:
    """Whether no answer came at all."""
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    causes = [cause for cause in chain(error) if not isinstance(cause, httpx.LocalProtocolError)]
    return any(isinstance(cause, OfflineModeIsEnabled | httpx.TransportError) for cause in causes)


def is_conflict(error: BaseException) -> bool:
    """Whether the branch has moved on since the commit that a new one was to follow."""
    return _first_status(error) in (409, 412)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what caused it, from the outside in."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def redact(text: str, *tokens: object) -> str:
    """The text without tokens, without credentials and without the queries of signed URLs."""
    for token in tokens:
        if isinstance(token, str) and token.strip():
            for form in (token.strip(), repr(token.strip())[1:-1]):
                text = text.replace(form, "hf_...")
    text = _TAIL.sub("...", _SIGNED.sub("?...", _TOKEN.sub("hf_...", text)))
    return _CREDENTIALS.sub(r"\1...@", text)


def _shows_no_secret(error: BaseException, secrets: tuple[object, ...]) -> bool:
    """Whether neither an error nor any behind it has something to redact in it."""
    behind, seen = [error], set()
    while behind:
        each = behind.pop()
        if any(redact(text, *secrets) != text for text in (str(each), repr(each))):
            return False
        seen.add(id(each))
        behind += [other for other in (each.__cause__, each.__context__) if other is not None and id(other) not in seen]
    return True


def explain(error: Exception, doing: str, repo: str, *, revision: str | None = None, token: object = None) -> NoReturn:
    """Raises what the client raised as a `CheckpointError`, with `error` as its cause unless that shows a secret.

    HUB-REPO, HUB-ACCESS, HUB-CONFLICT, HUB-OFFLINE or HUB-FAILED. What has nothing to do with the Hub (this library's
    own errors, a disk's) is raised as it is.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if not _is_the_clients(error):
        raise error
    secrets = (token, _login())
    causes = list(chain(error))
    shown = error if _shows_no_secret(error, secrets) else None
    status = _first_status(error)

    def say(code: str, expected: str, found: str, fix: str, item: str = "") -> NoReturn:
        refusal = CheckpointError(code=code, doing=doing, file=repo, item=item, expected=expected, found=found, fix=fix)
        try:
            raise refusal from shown
        finally:
            refusal.__context__ = shown  # Python has put `error` here.

    if any(isinstance(cause, GatedRepoError) for cause in causes):
        fix = "ask for access on the repo's page, then log in with `hf auth login` or pass `token`"
        say("HUB-ACCESS", "a repo that you may read", "a gated one, to which you have no access", fix)
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        fix = "give a branch, a tag, or a commit that is there; the repo's page lists them"
        say("HUB-REPO", "a revision of the repo", "none of that name", fix, item=revision or "main")
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        fix = "check the name; for a private repo log in with `hf auth login`, or pass `token`"
        say("HUB-REPO", "a repo on the Hub", "none of that name that you may see", fix)
    if status in (401, 403):
        fix = "log in with `hf auth login`, or pass a `token` that may do this"
        say("HUB-ACCESS", "the right to do this", _title(status) + _said(causes, secrets), fix)
    if status == 412 or (status == 409 and any(_is_of_a_commit(cause) for cause in causes)):
        fix = "look at what was committed, and push again to put the model after it"
        say("HUB-CONFLICT", "a branch that stays as it is", "another commit to it meanwhile", fix)
    if status is None and is_unreachable(error):
        fix = "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, and run it again: nothing whole is sent twice"
        say("HUB-OFFLINE", "a Hub that can be reached", f"no answer: {type(causes[-1]).__name__}", fix)
    found = type(error).__name__ if status is None else _title(status) + _said(causes, secrets)
    if status is None and str(error):
        found += f": {quote(redact(str(error).strip().splitlines()[0], *secrets))}"
    fix = _FIXES.get(status or 0, "run it again later: nothing whole is sent twice")
    say("HUB-FAILED", "an answer as the Hub gives it", found, fix)


def _is_the_clients(error: Exception) -> bool:
    """Whether an error was raised in the client, and is not the system's about a file."""
    from huggingface_hub.utils import httpx

    if isinstance(error, httpx.HTTPError):
        return True
    if isinstance(error, CheckpointError) or (isinstance(error, OSError) and error.errno is not None):
        return False
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module.split(".")[0] == "huggingface_hub" for module in modules)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_of_a_commit(error: BaseException) -> bool:
    return "/commit/" in str(getattr(getattr(error, "response", None), "url", ""))


def _first_status(error: BaseException) -> int | None:
    return next((status for cause in chain(error) if (status := _status(cause)) is not None), None)


def _title(status: int | None) -> str:
    try:
        return f"{status} {http.HTTPStatus(status or 0).phrase}"
    except ValueError:
        return str(status)


def _said(causes: list[BaseException], secrets: tuple[object, ...]) -> str:
    """What the server gave as its reason."""
    for cause in causes:
        if text := getattr(cause, "server_message", None):
            return f": {quote(redact(text, *secrets))}"
    return ""


def _login() -> str | None:
    """The token that the client sends if none is given."""
    from huggingface_hub import get_token

    return get_token()
