"""Where a table, or a server that redirects, may lead download to."""

from __future__ import annotations

from pathlib import Path

import pytest
from web import Request, Web

from stages.base import Context, Failed
from stages.download import Download, DownloadSettings
from stages.guard import allowed


@pytest.fixture
def local(tmp_path: Path) -> Context:
    return Context(str(tmp_path / "work"), str(tmp_path))


def fetch(context: Context, *uris: str, **settings: object) -> list[object]:
    stage = Download(DownloadSettings(**{"backoff": 0.0, "retries": 0, **settings}), context)
    return list(stage.process([{"clip_id": u, "uri": u} for u in uris]))


def error(outcome: object) -> str:
    assert isinstance(outcome, Failed), outcome
    return outcome.error


@pytest.mark.parametrize(
    ("address", "own", "expected"),
    [
        ("93.184.216.34", False, True),
        ("10.0.0.8", False, True),  # a company's own servers
        ("127.0.0.1", True, True),
        ("127.0.0.1", False, False),
        ("0.0.0.0", False, False),
        ("::1", False, False),
        ("::ffff:127.0.0.1", False, False),
        ("169.254.169.254", True, False),
        ("::ffff:169.254.169.254", True, False),
        ("fe80::1%eth0", True, False),
        ("fd00:ec2::254", True, False),
        ("100.100.100.200", True, False),
        ("224.0.0.1", True, False),
    ],
)
def test_which_addresses_a_table_may_lead_to(address: str, own: bool, expected: bool) -> None:
    assert allowed(address, own) is expected


def redirecting(request: Request) -> None:
    path, _, target = request.path.partition("?to=")
    if path.startswith("/hops/"):
        left = int(path.rpartition("/")[2])
        request.reply(302, Location=f"/hops/{left - 1}" if left > 1 else "/a.mp4")
    elif target:
        request.reply(302, Location=target)
    else:
        request.reply(200, b"video")


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("file:///etc/passwd", "bad_redirect"),
        ("ftp://127.0.0.1/a", "bad_redirect"),
        ("http://169.254.169.254/latest/meta-data/", "bad_address"),
        ("http://[::ffff:169.254.169.254]/", "bad_address"),
        ("http://localhost:1/", "bad_address"),
        ("//[::1]:1/a", "bad_address"),
    ],
)
def test_a_redirect_leads_to_no_file_and_to_no_service_of_ours(
    local: Context, target: str, expected: str, archive: bool
) -> None:
    def answer(request: Request) -> None:
        request.reply(302, Location=target)

    with Web(answer) as web:
        uri = f"{web.url}/x.zip"
        (outcome,) = fetch(local, f"zip://a.mp4::{uri}" if archive else uri)
    assert error(outcome) == expected
    assert len(set(web.requests)) <= 2, "HEAD and GET of the first address, and nothing else"


def test_a_redirect_on_the_host_that_the_table_names_is_followed(local: Context) -> None:
    with Web(redirecting) as web:
        (outcome,) = fetch(local, f"{web.url}/x?to=/a.mp4")
        assert outcome["bytes"] == 5
        (outcome,) = fetch(local, f"{web.url}/x?to={web.url}/b.mp4")
        assert outcome["bytes"] == 5


@pytest.mark.parametrize(("hops", "limit"), [(5, 5), (6, 5), (1, 0), (0, 0)])
def test_redirects_are_counted(local: Context, hops: int, limit: int) -> None:
    with Web(redirecting) as web:
        uri = f"{web.url}/hops/{hops}" if hops else f"{web.url}/a.mp4"
        (outcome,) = fetch(local, uri, redirects=limit)
    if hops <= limit:
        assert outcome["bytes"] == 5
    else:
        assert error(outcome) == "bad_redirect"
        assert len(web.requests) <= limit + 1


def test_from_https_no_redirect_leads_to_http() -> None:
    """aiohttp calls the guard for each redirect; no server with a certificate is needed to see
    what it says."""
    import asyncio
    from types import SimpleNamespace

    import yarl

    from stages.guard import Guard
    from stages.transfer import TransferError

    trace = Guard("/data", ("http", "https"), False).trace()
    (check,) = trace.on_request_redirect
    closed = []
    response = SimpleNamespace(
        url=yarl.URL("https://93.184.216.34/a"),
        headers={"Location": "http://93.184.216.34/a"},
        close=lambda: closed.append(True),
    )
    context = SimpleNamespace(named="93.184.216.34")
    with pytest.raises(TransferError, match="https:// to http://"):
        asyncio.run(check(None, context, SimpleNamespace(response=response)))
    assert closed
    response.headers = {"Location": "/b"}
    asyncio.run(check(None, context, SimpleNamespace(response=response)))


def test_a_table_from_elsewhere_names_no_server_on_this_machine(tmp_path: Path) -> None:
    with Web(redirecting) as web:
        uri = f"{web.url}/a.mp4"
        elsewhere = Context(str(tmp_path / "work"), "https://93.184.216.34/tables")
        assert error(fetch(elsewhere, uri)[0]) == "bad_address"
        assert web.requests == []
        assert fetch(elsewhere, uri, allow_outside=True)[0]["bytes"] == 5
        # One that came from here may name where it came from.
        here = Context(str(tmp_path / "work2"), f"{web.url}/tables")
        assert fetch(here, "a.mp4", uri)[0]["bytes"] == 5
        assert error(fetch(here, "http://localhost:1/a.mp4")[0]) == "bad_address"


def test_the_metadata_server_is_never_asked(local: Context) -> None:
    (outcome,) = fetch(local, "http://169.254.169.254/latest/meta-data/iam/")
    assert error(outcome) == "bad_address"
    assert "allow_outside" in outcome.message
