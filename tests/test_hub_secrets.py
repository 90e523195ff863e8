"""Tokens and signed addresses, in whatever form the client shows them, are in no error and in nothing behind one."""

import traceback

import huggingface_hub
import pytest
import tiny
from downloading import LARGE, REPO
from huggingface_hub.utils import httpx

import eqx_moe
from eqx_moe.errors import CheckpointError
from eqx_moe.remote import client

# Nothing in it says that it is one.
TOKEN = "s3cretNonHf"


def shown(error: BaseException) -> str:
    """What a program could print of an error, and of all that it holds on to."""
    texts, behind = traceback.format_exception(error), [error]
    while behind:
        each = behind.pop()
        texts += [str(each), repr(each)]
        behind += [other for other in (each.__cause__, each.__context__) if other is not None]
    return "".join(texts)


def load(token: str | None) -> object:
    return eqx_moe.from_pretrained(REPO, token=token)


def push(token: str | None) -> object:
    return eqx_moe.push_to_hub(tiny.model(), "org/other", token=token)


@pytest.mark.parametrize("call", [load, push])
@pytest.mark.parametrize(
    "token", ["", " ", "\n", TOKEN + "\x01", f"{TOKEN}\n{TOKEN}", f"{TOKEN} {TOKEN}", TOKEN + "Ü", TOKEN + "\ud800"]
)
def test_what_cannot_be_a_token_is_refused(repo, call, token):
    with pytest.raises(ValueError, match="`token`") as caught:
        call(token)
    assert TOKEN not in shown(caught.value) and not repo.requests and not repo.naps


@pytest.mark.parametrize("call", [load, push])
def test_what_cannot_be_a_token_is_refused_from_the_environment(repo, call, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN + "Ü")
    with pytest.raises(ValueError, match="HF_TOKEN") as caught:
        call(None)
    assert TOKEN not in shown(caught.value) and not repo.requests


def test_space_around_a_token_is_none_of_it(repo):
    repo.token, repo.repos[REPO].private = TOKEN, True
    eqx_moe.from_pretrained(REPO, token=f" {TOKEN}\n")
    eqx_moe.push_to_hub(tiny.model(), "org/other", token=TOKEN + "\r\n")


@pytest.mark.parametrize("token", [TOKEN, TOKEN + "\n", "s3cretNon'\\Hf", f"hf_{TOKEN}"])
@pytest.mark.parametrize("call", [load, push])
def test_what_the_server_repeats(repo, call, token):
    """With quotes and backslashes in it too, which stand escaped in what is quoted."""
    repo.fault(".*", "echo", times=10**6)
    with pytest.raises(CheckpointError) as caught:
        call(token)
    text = shown(caught.value)
    assert "you sent" in text and not any(
        form in text for form in (token.strip(), repr(token.strip())[1:-1], "cretNon")
    )


def test_what_the_client_says_of_a_header(repo, monkeypatch):
    """It quotes what it cannot send, which no second try makes better."""

    def refuse(*args, **options):
        raise httpx.LocalProtocolError(f"Illegal header value {f'Bearer {TOKEN}'.encode()!r}")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(CheckpointError, match="HUB-FAILED") as caught:
        load(TOKEN)
    assert TOKEN not in shown(caught.value) and not repo.naps


@pytest.mark.parametrize("status", [200, 302])
def test_signed_addresses(repo, status):
    """The client shows the end of an address that gave it nothing."""
    repo.fault(LARGE, "status", status=status, times=10**6)
    with pytest.raises(CheckpointError, match="HUB-FAILED") as caught:
        load(None)
    assert "Consistency check failed" in str(caught.value)
    assert not any(part in shown(caught.value) for part in ("Amz", "Signature=", "?X", "(…)"))


@pytest.mark.parametrize(
    "text",
    [
        "((…)5252fe3?X-Amz-Signature=5ecre7).",
        "((…)5ecre7&x-id=GetObject).",
        "/some/path?Expires=1&Policy=5ecre7&Key-Pair-Id=K2",
        "https://me:5ecre7@host/x",
        "https://host/x?X-Goog-Expires=5ecre7",
    ],
)
def test_redaction(text):
    assert "5ecre7" not in client.redact(f"failed ({text})") and client.redact("?blobs=1 (x)") == "?blobs=1 (x)"
