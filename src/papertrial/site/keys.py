"""Keys that the service makes for itself on first start: files with mode 0600 in ``keys/`` of the home folder."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from papertrial.errors import PapertrialError

KEY_BYTES = 32


def read_key(folder: Path, name: str) -> bytes:
    """A secret of `KEY_BYTES` random bytes, made where it is missing; two processes that start at once agree on one.

    Raises
    ------
    PapertrialError
        The file is damaged, or others may read it.
    """
    path = folder / "keys" / name
    if not path.exists():
        _make(path)
    if path.stat().st_mode & 0o077:
        raise PapertrialError(f"{path} can be read by others; run: chmod 600 {path}")
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise PapertrialError(
            f"{path} is damaged; restore it from a backup, or delete it and let everybody sign in anew"
        )
    return key


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(KEY_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        os.link(temporary, path)  # unlike a rename, it leaves the file of a process that was quicker
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def new_token(prefix: str = "") -> str:
    """A secret to hand out: 256 random bits that are safe in an address."""
    return prefix + secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    """What is stored of a token. No salt: the token is random already."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def seal(key: bytes, purpose: str, text: str) -> str:
    """A MAC over a text, different for every purpose."""
    return hmac.new(key, f"{purpose}\0{text}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def is_sealed(key: bytes, purpose: str, text: str, mac: str) -> bool:
    """Whether `mac` is the text's, compared in constant time."""
    return hmac.compare_digest(seal(key, purpose, text), mac) if mac.isascii() else False
