"""Secrets out of text, and out of URLs: nothing that is written or shown may hold one.

`redact` masks what looks like a secret anywhere in a text, and what this process knows to be one:
the values of variables whose names say so, and whatever was given to `conceal`. `split_secret`
parts a URL into what names the file, which may be stored, and what lets one in, which may not.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote_plus

import pyarrow as pa
import pyarrow.compute as pc

MASK = "***"
SHORTEST = 8  # characters: a shorter value of a variable would mask ordinary words

# Names of parameters. `sig`, `key` and the like only as words of a name: `design` is none.
_SENSITIVE = (
    r"(?:[\w.-]*(?:signature|token|credential|secret|passw(?:or)?d|apikey|accesskey)[\w.-]*"
    r"|(?:[\w.-]*[_.-])?(?:sig|key|auth|policy|pass|pwd|hmac|jwt|hdnts|hdnea)(?:[_.-][\w.-]*)?)"
)
_USERINFO = re.compile(r"(\w://)[^/\s@'\"?#]*(?:@[^/\s@'\"?#]+)*@(?=[\w\[.])")
_QUERY = re.compile(rf"([?&;]{_SENSITIVE}=)[^&;#\s'\"<>]+", re.IGNORECASE)
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|x-api-key|api-key|x-amz-security-token|cookie|set-cookie)"
    r"(['\"]?\s*[:=]\s*['\"]?)[^\r\n'\"]+",
    re.IGNORECASE,
)
_SCHEME = re.compile(r"\b(bearer|basic)\s+(?=\S*[\d=])[\w.~+/=-]{12,}", re.IGNORECASE)
_LABEL = (
    r"(?:[\w-]*(?:api|access|secret|private|account|storage|signing)[_-]?(?:access[_-]?)?key"
    r"|[\w-]*(?:token|secret|password|passwd)|sharedaccesssignature)"
)
_ASSIGNED = re.compile(
    rf"(?<![/\w.-])({_LABEL}['\"]?=['\"]?|{_LABEL}['\"]\s*:\s*['\"])[^\s'\",;&]+", re.I
)
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z)", re.DOTALL)
# Keys that one knows by their form. W&B's are 40 hex digits, as commits are: known by their names.
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}"
    r"|ya29\.[\w-]{20,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*)"
)
_MAYBE = re.compile(
    r"://|[?&;=]|key|token|secret|passw|auth|bearer|basic|cookie|hf_|sk-|akia|asia|aiza|gh._"
    r"|github_|glpat|xox|ya29|eyj|-----begin",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(
    r"secret|token|passw(?:or)?d|credential|connection_string|(?:^|_)auth(?:$|_)|api_?key"
    r"|(?:^|_)(?:access_|account_|storage_|private_|license_)?key(?:_id)?$",
    re.IGNORECASE,
)
_SECRET_FIELD = re.compile(
    r"(?:^|[_-])(?:secret|token|passw(?:or)?d|credentials?|authorization)$|(?:api|access|account|"
    r"private)_?key$",
    re.IGNORECASE,
)

# The parameters of signed URLs: they differ with each signing, and the file is the same.
_AMZ, _GOOG = re.compile(r"x-amz-", re.IGNORECASE), re.compile(r"x-goog-", re.IGNORECASE)
_CLOUDFRONT = frozenset({"expires", "signature", "key-pair-id", "policy", "hash-algorithm"})
_SIGNED_V2 = frozenset(
    {"expires", "signature", "awsaccesskeyid", "googleaccessid", "ossaccesskeyid", "security-token"}
)
_SAS = frozenset(
    (
        *("sv", "ss", "srt", "sp", "se", "st", "spr", "sig", "sr", "sip", "si", "skoid", "sktid"),
        *("skt", "ske", "sks", "skv", "sdd", "saoid", "suoid", "scid"),
    )
)
_EXACT = re.compile(rf"{_SENSITIVE}\Z", re.IGNORECASE)

# All controls but the line break and the tab, marks that turn the direction, halves of surrogates.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

_concealed: set[str] = set()


def conceal(secret: str | None) -> None:
    """From now on `redact` masks this text in this process, whatever it looks like."""
    if secret and len(secret) >= SHORTEST:
        _concealed.add(secret)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` with everything masked that is a secret: `secrets`, what `conceal` was told, values
    of this process' variables that are named as secrets, keys by their form, and what lets one in
    in the URLs and headers of the text."""
    for form in _known(secrets):
        text = text.replace(form, MASK)
    return redact_urls(text)


def _known(secrets: Iterable[str]) -> list[str]:
    """Every secret that is known, as it stands and as it stands in URLs, the longest first."""
    known = [*secrets, *_concealed, *_of_environment(tuple(_named(os.environ)))]
    forms = {form for s in known if s for form in (s, quote(s, safe=""), quote_plus(s))}
    return sorted(forms, key=len, reverse=True)


def redact_urls(text: str) -> str:
    """The part of `redact` that depends on the text alone, for values that are data: what is made
    of a row must not depend on the machine's environment."""
    if not _MAYBE.search(text):
        return text
    text = _USERINFO.sub(rf"\1{MASK}@", text)
    text = _QUERY.sub(rf"\1{MASK}", text)
    text = _HEADER.sub(rf"\1\2{MASK}", text)
    text = _SCHEME.sub(rf"\1 {MASK}", text)
    text = _ASSIGNED.sub(rf"\1{MASK}", text)
    text = _PEM.sub(MASK, text)
    return _FORMS.sub(MASK, text)


def sentence(text: str | None) -> str | None:
    """A message as it may be stored: without secrets, and text that UTF-8 can hold."""
    if not text:
        return text
    return redact(text).encode("utf-8", "backslashreplace").decode()


def shown(text: str) -> str:
    """A text as it may go to a terminal: without secrets, and with control characters written out,
    since a file's name may hold what moves the cursor or turns the line around."""
    return _UNSAFE.sub(_written_out, redact(text))


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def redacted(value: Any, name: str = "") -> Any:
    """A JSON-able value with its texts redacted, and masked whole under names such as `api_key`."""
    if isinstance(value, str):
        return MASK if value and _SECRET_FIELD.search(name) else redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner, name) for inner in value]
    return value


def _named(environment: Mapping[str, str]) -> Iterable[str]:
    for name, value in environment.items():
        if len(value) < SHORTEST:
            continue
        if _SECRET_NAME.search(name):
            yield value
        elif "://" in value and "@" in value:
            yield value  # a proxy's address: its password is one


@functools.lru_cache(maxsize=8)
def _of_environment(values: tuple[str, ...]) -> tuple[str, ...]:
    found = set()
    for value in values:
        if "://" in value:
            found |= secrets_of(value)
        elif not (value.startswith(("/", "~")) and Path(value).expanduser().exists()):
            found.add(value)  # a file of credentials is none itself
    return tuple(found)


def split_secret(uri: str) -> tuple[str, str | None]:
    """What names the file, and the whole URI where it holds more than that: `(uri, None)` for most.

    User and password go, and so do the parameters of signed URLs (S3, GCS, Azure, CloudFront,
    OSS), which differ with every signing. The value of any other parameter that is named like a
    secret (`token`, `key`, `auth`, ...) becomes a hash: it may be what tells two files apart.
    """
    if not may_hold_secret(uri):
        return uri, None
    links = [_public(link) for link in uri.split("::")]
    public = "::".join(links)
    return (public, uri) if public != uri else (uri, None)


# The same for a whole column, with pyarrow.compute.match_substring_regex: the few rows for which
# it is true are worth a `split_secret`. (RE2: no lookaround.)
MAY_HOLD_SECRET = rf"(?i)://[^/?#]*@|[?&;]{_SENSITIVE}="
_may_hold = re.compile(MAY_HOLD_SECRET)


def may_hold_secret(uri: str) -> bool:
    """Whether `split_secret` may find something: quick, and true of a few that hold nothing."""
    return _may_hold.search(uri) is not None


def secrets_of(uri: str) -> set[str]:
    """The texts in a URI that are secret by themselves, as they stand there and decoded."""
    found: set[str] = set()
    for link in uri.split("::"):
        if "://" not in link and "?" not in link:
            continue
        authority = link.partition("://")[2].partition("/")[0]
        userinfo = authority.rpartition("@")[0]
        found |= {userinfo, userinfo.partition(":")[2] or userinfo}
        for name, value in _parameters(_query(link)):
            if _EXACT.match(name):
                found.add(value)
    found |= {unquote_plus(text) for text in found}
    return {text for text in found if len(text) >= SHORTEST // 2}


def _public(link: str) -> str:
    head, question, rest = link.partition("?")
    scheme, sep, path = head.partition("://")
    if sep:
        authority, slash, inner = path.partition("/")
        head = scheme + sep + authority.rpartition("@")[2] + slash + inner
    if not question:
        return head
    query, hash_, fragment = rest.partition("#")
    pairs = _parameters(query)
    drop = _signing({name.lower() for name, _ in pairs})
    kept = []
    for name, value in pairs:
        if name.lower() in drop:
            continue
        if value and _EXACT.match(name):
            mark = hashlib.sha256(f"{head}\0{name}\0{value}".encode("utf-8", "surrogatepass"))
            value = f"~{mark.hexdigest()[:16]}"
        kept.append(f"{name}={value}" if value is not None else name)
    return head + ("?" + "&".join(kept) if kept else "") + hash_ + fragment


def _query(link: str) -> str:
    return link.partition("?")[2].partition("#")[0]


def _parameters(query: str) -> list[tuple[str, Any]]:
    """Names and values as they stand; None for a name without a value."""
    parts = (part.partition("=") for part in re.split("[&;]", query) if part)
    return [(name, value if equals else None) for name, equals, value in parts]


def _signing(names: set[str]) -> set[str]:
    """Which of the parameters' names belong to a signature."""
    drop: set[str] = set()
    for prefix in (_AMZ, _GOOG):
        own = {name for name in names if prefix.match(name)}
        if any(name.endswith("signature") for name in own):
            drop |= own
    if "signature" in names and "key-pair-id" in names:
        drop |= names & _CLOUDFRONT
    if "signature" in names and names & {"awsaccesskeyid", "googleaccessid", "ossaccesskeyid"}:
        drop |= names & _SIGNED_V2
    if "sig" in names and names & {"sv", "se"}:
        drop |= names & _SAS
    return drop


def has_credentials(url: str) -> bool:
    """Whether a URL bears a user, a password or a signature."""
    return split_secret(url)[1] is not None


def part(uris: pa.Array) -> tuple[pa.Array, list[tuple[str, str]]]:
    """A column of URIs as it may be stored, and the pairs for `manifests.credentials`."""
    hits = _hits(uris, MAY_HOLD_SECRET)
    parted = {i: split_secret(uris[i].as_py()) for i in hits}
    pairs = [(public, whole) for public, whole in parted.values() if whole is not None]
    return _replaced(uris, {i: public for i, (public, _) in parted.items()}), pairs


def cleaned(texts: pa.Array) -> pa.Array:
    """A column of the user's table, with the secrets of the URLs in it masked. What is one URL and
    nothing else becomes what `split_secret` says, so that a new signature changes no row."""
    return _replaced(texts, {i: clean(texts[i].as_py()) for i in _hits(texts, _SUSPECT)})


def clean(text: str) -> str:
    """One value of `cleaned`."""
    public, whole = (
        split_secret(text) if "://" in text and not _SPACE.search(text) else (text, None)
    )
    return public if whole is not None else redact_urls(text)


_SPACE = re.compile(r"\s")
# Beside URLs, keys by their form: `manifests.redact.redact_urls` has the exact ones.
_SUSPECT = (
    MAY_HOLD_SECRET + r"|hf_\w{16}|\bsk-|akia|asia|aiza|gh[pousr]_|github_pat|glpat-|xox|ya29|eyj"
    r"|-----begin|bearer|basic|authorization|cookie|api-key|(?:key|token|secret|passw\w*)['\"]?\s*[:=]"
)


def sentences(texts: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column of messages as `sentence` has each of them."""
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    if texts.null_count == len(texts):
        return texts
    known = "|".join(re.escape(form) for form in _known(()))
    hits = _hits(texts, _SUSPECT + (f"|{known}" if known else ""))
    return _replaced(texts, {i: sentence(texts[i].as_py()) or "" for i in hits})


def _hits(texts: pa.Array, pattern: str) -> list[int]:
    found = pc.match_substring_regex(texts, pattern)
    hits: list[int] = pc.indices_nonzero(pc.fill_null(found, False)).to_pylist()
    return hits


def _replaced(texts: pa.Array, values: dict[int, str]) -> pa.Array:
    if not values:
        return texts
    mask = [False] * len(texts)
    for i in values:
        mask[i] = True
    new = pa.array([values[i] for i in sorted(values)], texts.type)
    return pc.replace_with_mask(texts, pa.array(mask), new)


def redact_logs() -> None:
    """Has every record of `logging` in this process redacted, whoever writes it."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        try:
            made.msg, made.args = redact(made.getMessage()), ()
        except (TypeError, ValueError):
            pass  # logging itself says what is wrong with it
        if made.exc_info and not made.exc_text:
            made.exc_text = redact(logging.Formatter().formatException(made.exc_info))
        return made

    record.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)
