from __future__ import annotations

import logging

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from manifests import redact as module
from manifests.credentials import Credentials, CredentialsError
from manifests.redact import (
    MAY_HOLD_SECRET,
    clean,
    cleaned,
    conceal,
    has_credentials,
    may_hold_secret,
    part,
    redact,
    redact_logs,
    redacted,
    secrets_of,
    sentence,
    sentences,
    shown,
    split_secret,
)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ("{'authorization': 'Basic dTpw'}", "{'authorization': '***'}"),
        ("sent bearer 0123456789abcdef.x", "sent bearer ***"),
        ("a flag bearer representing characteristically", None),
        ("key hf_abcdefghijABCDEFGHIJ0123 refused", "key *** refused"),
        ("Incorrect API key: sk-proj-abcDEF0123456789xyz.", "Incorrect API key: ***."),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567", "WANDB_API_KEY=***"),
        ('{"aws_secret_access_key": "abc/def+ghi"}', '{"aws_secret_access_key": "***"}'),
        ("https://u:p@ss@h/a", "https://***@h/a"),
        ("ask me@example.org or see https://h/@me/a.mp4", None),
        ("https://h/a?design=2&monkey=3&author=x&keyframe=7", None),
        ("unexpected token: something", None),
        ("revision 0123456789abcdef0123456789abcdef01234567", None),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "***"),
    ],
)
def test_what_looks_like_a_secret_is_masked_and_nothing_else(text: str, masked: str | None) -> None:
    assert redact(text) == (text if masked is None else masked)


def test_values_of_variables_that_are_named_as_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain words here")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/XUtn+FEMI=")
    monkeypatch.setenv("https_proxy", "http://me:proxypass@proxy:3128")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/dev/null")
    monkeypatch.setenv("HARMLESS", "untouched")
    text = "plain words here, wJalr/XUtn+FEMI=, wJalr%2FXUtn%2BFEMI%3D, proxypass"
    assert redact(text) == "***, ***, ***, ***"
    assert redact("false, /dev/null, untouched") == "false, /dev/null, untouched"


def test_what_was_concealed_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_concealed", set())
    conceal("correct horse")
    conceal(None)
    assert redact("the server says: correct horse") == "the server says: ***"


def test_messages_are_text_that_can_be_stored_and_shown() -> None:
    assert sentence("a\ud800b https://u:pw@h/") == "a\\ud800b https://***@h/"
    assert sentence("") == ""
    assert sentence(None) is None
    assert shown("a\x1b[31m\r\x9b2J\u202e\ud800b\nc\td") == (
        "a\\x1b[31m\\x0d\\x9b2J\\u202e\\ud800b\nc\td"
    )


def test_settings_are_masked_by_their_names() -> None:
    settings = {"hf_token": "abc", "tokenizer": "gpt2", "max_tokens": 5, "x": ["https://u:p@h"]}
    expected = {"hf_token": "***", "tokenizer": "gpt2", "max_tokens": 5, "x": ["https://***@h"]}
    assert redacted(settings) == expected


AMZ = "X-Amz-Algorithm=AWS4&X-Amz-Credential=A%2FB&X-Amz-Date=2026&X-Amz-Signature=ff"
SAS = "sv=2024&se=2026&sr=b&sp=r&sig=a%2Bb%3D"


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        (f"https://b.s3.amazonaws.com/a.mp4?{AMZ}", "https://b.s3.amazonaws.com/a.mp4"),
        (f"https://h/a.mp4?part=1&{AMZ}#t=3", "https://h/a.mp4?part=1#t=3"),
        (
            f"https://x.blob.core.windows.net/c/a.mp4?{SAS}",
            "https://x.blob.core.windows.net/c/a.mp4",
        ),
        ("https://cdn/a.mp4?Expires=1&Signature=x&Key-Pair-Id=K", "https://cdn/a.mp4"),
        ("https://h/a?GoogleAccessId=a&Expires=1&Signature=x", "https://h/a"),
        ("https://h/a?X-Goog-Signature=x&X-Goog-Date=1&b=2", "https://h/a?b=2"),
        ("https://user:pass@h/a.mp4", "https://h/a.mp4"),
        ("https://token@h:8443/a.mp4", "https://h:8443/a.mp4"),
        ("zip://in.mp4::https://u:p@h/b.zip", "zip://in.mp4::https://h/b.zip"),
        ("a.mp4?Expires=1&Signature=x&Key-Pair-Id=K", "a.mp4"),
    ],
)
def test_what_names_a_file_is_parted_from_what_lets_one_in(uri: str, public: str) -> None:
    assert split_secret(uri) == (public, uri)
    assert may_hold_secret(uri)
    assert pc.match_substring_regex(pa.array([uri]), MAY_HOLD_SECRET).to_pylist() == [True]
    assert split_secret(public) == (public, None)


@pytest.mark.parametrize(
    "uri",
    ["a.mp4", "/videos/a@b.mp4", "s3://b/a@b.mp4", "https://h/a?expires=1&page=2", "é?x=1", ""],
)
def test_most_uris_hold_no_secret(uri: str) -> None:
    assert split_secret(uri) == (uri, None)


def test_a_parameter_that_may_name_the_file_is_hashed_and_never_dropped() -> None:
    one, two = (split_secret(f"https://h/get?key={name}")[0] for name in ("a.mp4", "b.mp4"))
    assert one != two
    assert "a.mp4" not in one
    assert split_secret("https://h/get?key=a.mp4")[0] == one


def test_the_secrets_of_a_uri_are_known_one_by_one() -> None:
    found = secrets_of("https://me:pass%20word@h/a?token=abcdef&page=2")
    assert {"pass%20word", "pass word", "abcdef"} <= found
    assert not found & {"2", "h", "me"}


def test_a_workdir_with_credentials_is_known() -> None:
    assert has_credentials("s3://key:secret@bucket/run")
    assert not has_credentials("s3://bucket/run")
    assert not has_credentials("/home/a@b/run")


def test_a_column_is_parted_at_once() -> None:
    uris = pa.array(["a.mp4", f"https://h/a.mp4?{AMZ}", None, "https://u:p@h/b.mp4"])
    public, pairs = part(uris)
    assert public.to_pylist() == ["a.mp4", "https://h/a.mp4", None, "https://h/b.mp4"]
    assert pairs == [
        ("https://h/a.mp4", f"https://h/a.mp4?{AMZ}"),
        ("https://h/b.mp4", "https://u:p@h/b.mp4"),
    ]
    plain = pa.array(["a.mp4", None])
    assert part(plain)[0] is plain


def test_texts_of_the_table_are_cleaned_one_by_one_or_as_a_column() -> None:
    texts = [
        "a bear",
        f"https://h/t.jpg?{AMZ}",
        "see https://u:p@h/a, it",
        None,
        "key hf_abcdefghijABCDEFGHIJ0123",
        "AKIAIOSFODNN7EXAMPLE",
    ]
    expected = ["a bear", "https://h/t.jpg", "see https://***@h/a, it", None, "key ***", "***"]
    assert cleaned(pa.array(texts)).to_pylist() == expected
    assert [clean(t) if t is not None else None for t in texts] == expected


def test_whole_uris_are_in_a_file_that_only_the_user_can_read(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    mine, other = Credentials("/work/a"), Credentials("/work/b")
    assert not mine
    assert mine.whole(["x"]) == {}
    mine.keep([])
    assert not mine
    mine.keep([(f"p{i}", f"s{i}") for i in range(1200)])
    mine.keep(iter([("p1", "newer")]))
    assert Credentials("/work/a/")
    assert mine.file.stat().st_mode & 0o777 == 0o600
    assert mine.file.parent.stat().st_mode & 0o777 == 0o700
    found = mine.whole(f"p{i}" for i in range(1300))
    assert len(found) == 1200
    assert (found["p0"], found["p1"]) == ("s0", "newer")
    assert not other
    mine.file.write_bytes(b"damaged" * 1000)
    with pytest.raises(CredentialsError, match="Delete it"):
        mine.whole(["p1"])


def test_a_state_folder_that_cant_be_written_is_named(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(CredentialsError, match="XDG_STATE_HOME"):
        Credentials("/work").keep([("a", "b")])


def test_whatever_a_library_logs_is_redacted(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        redact_logs()
        redact_logs()
        try:
            raise OSError("https://u:hunter22@h/")
        except OSError:
            logging.getLogger("some.library").exception("asked %s", "https://u:hunter22@h/a")
    finally:
        logging.setLogRecordFactory(before)
    assert "asked https://***@h/a" in caplog.text
    assert "hunter22" not in caplog.text


def test_a_column_of_messages_is_redacted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain (words")
    messages = ["len = 3", "plain (words", None, "at https://u:pw@h/a", "plain+%28words"]
    column = pa.chunked_array([messages[:2], messages[2:]])
    assert sentences(column).to_pylist() == [sentence(message) for message in messages]
    assert sentences(column)[1].as_py() == "***"
