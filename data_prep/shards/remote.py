"""Reads shards behind a URL in parts, and keeps the parts that were read in a local copy.

`open_remote` returns the manifest and a `ShardCache`, which fetches members of tars through
`Remote`. The copy of a tar is a sparse file in which every member has the same offset as in the
tar. There is no record of the members in the copy: a member whose checksum is right is used, and
any other is fetched. Thus a killed process does no harm, a torn write or a flipped bit is repaired,
and the processes of a machine share one copy without a lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import aiohttp
import fsspec.core
from fsspec import AbstractFileSystem

from data_prep.running.redact import without_credentials
from data_prep.shards.format import MANIFEST_NAME, fingerprint, parse_manifest
from data_prep.shards.tar_members import OpenFiles, is_intact

# A server that sends nothing for so long counts as dead; a whole file may take any time.
_SILENCE_S = 20
_RANGE_BEHIND_END = 416
# HTTP status codes "request timeout" and "too many requests" are temporary, as 5xx are.
_BUSY = (408, 429)
# The copy of a corpus is named by a prefix of the fingerprint; 128 bits are practically unique.
_FINGERPRINT_DIGITS = 32
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

logger = logging.getLogger(__name__)


class Remote:
    """Reads the files below a URL, with retries.

    Threads may share the object; each process opens its own connections.

    Parameters
    ----------
    url
        Any URL that fsspec opens. Credentials come from fsspec's own configuration, or stand in the
        URL; then no message contains them.
    retry_pauses_s
        Seconds to wait after each temporary failure. After the last pause, another failure raises
        an error.
    """

    def __init__(self, url: str, retry_pauses_s: Sequence[float]) -> None:
        self._root = url.rstrip("/")
        self.url = without_credentials(self._root)
        self._retry_pauses_s = tuple(retry_pauses_s)

    def address(self, name: str) -> str:
        """Return the URL of a file below the URL, without credentials, for messages."""
        return f"{self.url}/{name}"

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the content of a file, or its bytes start..stop-1.

        Fewer bytes are returned if the file ends before `stop`, and the whole file if the server
        does not support range requests.

        Raises
        ------
        FileNotFoundError
            The file does not exist.
        ValueError
            The file cannot be read, and trying again would not help: unknown protocol, no
            permission.
        ConnectionError
            The file could not be read, even after all pauses.
        """
        failures = 0
        while True:
            try:
                filesystem, root = _open_in(os.getpid(), self._root)
                return filesystem.cat_file(f"{root}/{name}", start=start, end=stop)
            except FileNotFoundError:
                raise
            except Exception as error:  # noqa: BLE001  every file system has errors of its own
                if getattr(error, "status", None) == _RANGE_BEHIND_END:
                    return b""
                why = without_credentials(f"{type(error).__name__}: {error}")
                text = f"{self.address(name)}: cannot be read ({why})"
                if not _may_pass(error):
                    raise ValueError(f"{text}; check the URL and the permission") from error
                if failures == len(self._retry_pauses_s):
                    raise ConnectionError(f"{text}; tried {failures + 1} times") from error
                pause_s = self._retry_pauses_s[failures]
                logger.warning("%s; trying again in %g s", text, pause_s)
            time.sleep(pause_s)
            failures += 1


@cache
def _open_in(process: int, url: str) -> tuple[AbstractFileSystem, str]:  # noqa: ARG001
    """Return the file system of a URL, and the URL's root in it, cached for each process.

    Each process needs its own, because an event loop does not survive a fork. A child keeps the
    parent's file system in this cache for ever: if the child closed its connections, they would be
    removed from the epoll set that the child shares with the parent.
    """
    options = {"get_client": _http_client} if url.startswith(("http://", "https://")) else {}
    return fsspec.core.url_to_fs(url, **options)


async def _http_client(**settings) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
    # No compression, since a part of a compressed file cannot be unpacked. The proxies are taken
    # from the environment.
    headers = {"Accept-Encoding": "identity"} | settings.pop("headers", {})
    defaults = {"timeout": timeout, "trust_env": True, "headers": headers}
    return aiohttp.ClientSession(**defaults | settings)


def _may_pass(error: Exception) -> bool:
    """Return whether trying again may help.

    Every file system has its own errors, so it is True for all errors that are not known to be
    permanent.
    """
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status >= 500 or error.status in _BUSY
    return not isinstance(error, (*_LASTING, aiohttp.InvalidURL, ValueError, ImportError))


class ShardCache:
    """The local copy of one corpus, filled from a remote folder as its parts are read.

    Parameters
    ----------
    remote
        The remote folder of the shards.
    folder
        Folder for this corpus alone. It is created if it does not exist.
    """

    def __init__(self, remote: Remote, folder: Path) -> None:
        self.folder = folder
        self._remote = remote
        self._open_files = OpenFiles()
        self._writes = True
        self._has_warned_of_ranges = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def address(self, name: str) -> str:
        """Return the URL of a file of the corpus."""
        return self._remote.address(name)

    def put(
        self, name: str, content: bytes, is_right: Callable[[Path], bool] = lambda path: True
    ) -> bool:
        """Store a small file if `is_right` accepts it, and return whether it does.

        The stored file is always complete.
        """
        path = self.folder / name
        aside = self.folder / f".{name}.{uuid.uuid4().hex}.partial"
        try:
            if path.exists() and path.read_bytes() == content:
                return is_right(path)
            try:
                aside.write_bytes(content)
                if not is_right(aside):
                    return False
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        return True

    def file(self, name: str, is_right: Callable[[Path], bool]) -> Path:
        """Return the path of a small file, which is fetched unless a correct copy exists.

        Raises
        ------
        ValueError
            The file is missing or wrong at the source.
        """
        path = self.folder / name
        if path.exists() and is_right(path):
            return path
        try:
            content = self._remote.read(name)
        except FileNotFoundError as error:
            raise ValueError(f"{self.address(name)}: is missing; copy the shards again") from error
        if not self.put(name, content, is_right):
            raise ValueError(
                f"{self.address(name)}: does not match the manifest; it is damaged at the source, "
                "or the shards are being replaced"
            )
        return path

    def read(self, tar: str, offset: int, size: int, crc32: int) -> bytes | None:
        """Return the bytes of a tar member, from the copy or else from the source.

        None means that the member is damaged at the source.

        Raises
        ------
        ValueError
            The tar is missing at the source.
        """
        try:
            descriptor = self._open_files.get(tar, lambda: self._open(tar))
        except OSError:
            descriptor = None
        if descriptor is not None:
            # If the disk cannot be read, the member is fetched as if the copy did not have it.
            with contextlib.suppress(OSError):
                payload = os.pread(descriptor.number, size, offset)
                if is_intact(payload, size, crc32):
                    return payload
        for _ in range(2):  # after wrong bytes the source is asked once more
            first_byte, fetched = self._fetch(tar, offset, size)
            payload = fetched[offset - first_byte : offset - first_byte + size]
            if is_intact(payload, size, crc32):
                break
        else:
            return None
        if descriptor is not None and self._writes:
            self._write(descriptor.number, fetched, first_byte)
        return payload

    def _open(self, tar: str) -> int:
        # The manifest comes from elsewhere: the name of a tar in it must not lead out of the
        # folder.
        if Path(tar).name != tar:
            raise ValueError(f"{self._remote.url}: its manifest names a shard {tar!r}, not a file")
        path = self.folder / tar
        if self._writes:
            try:
                return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                self._stop_writing(error)
        return os.open(path, os.O_RDONLY)

    def _write(self, descriptor: int, content: bytes, offset: int) -> None:
        rest = memoryview(content)
        try:
            while rest:
                written = os.pwrite(descriptor, rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        if self._writes:
            logger.warning(
                "%s: the local copy cannot be written (%s); what is not in it is read from %s "
                "every time", self.folder, error, self._remote.url,
            )  # fmt: skip
        self._writes = False

    def _fetch(self, tar: str, offset: int, size: int) -> tuple[int, bytes]:
        """Return (offset, bytes) of a part of a tar that contains a member.

        The part is the whole tar if the server does not support range requests.
        """
        try:
            fetched = self._remote.read(tar, offset, offset + size)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.address(tar)}: shard is missing; copy or prepare it again"
            ) from error
        if len(fetched) > size:
            self._warn_of_ranges()
            return 0, fetched
        return offset, fetched

    def _warn_of_ranges(self) -> None:
        if not self._has_warned_of_ranges:
            logger.warning("%s: knows no range requests, sends whole shards", self._remote.url)
        self._has_warned_of_ranges = True

    def _unwritable(self, error: OSError) -> ValueError:
        return ValueError(
            f"{self.folder}: cannot hold the local copy of {self._remote.url} ({error}); give "
            "another folder for it"
        )


def open_remote(
    url: str, folder: Path | None, retry_pauses_s: Sequence[float]
) -> tuple[dict, ShardCache]:
    """Return the present manifest of a corpus behind a URL, and the corpus's local copy.

    Raises
    ------
    ValueError
        There are no shards, the manifest was edited, or no folder is given.
    ConnectionError
        The URL could not be read.
    """
    if folder is None:
        raise ValueError(
            f"{url}: shards are read from a URL through a local copy; give a folder for it "
            "(data.cache=FOLDER or --cache FOLDER)"
        )
    remote = Remote(url, retry_pauses_s)
    try:
        text = remote.read(MANIFEST_NAME)
    except FileNotFoundError as error:
        raise ValueError(
            f"{url}: no {MANIFEST_NAME}; expected the URL of a folder made by `geneloom prepare`"
        ) from error
    manifest = parse_manifest(text, remote.address(MANIFEST_NAME))
    # The fingerprint names the copy. A fingerprint that does not belong to the content would mix
    # the copies of two corpora.
    if fingerprint(manifest) != manifest["fingerprint"]:
        raise ValueError(
            f"{remote.address(MANIFEST_NAME)}: its fingerprint does not follow from its content: "
            "it was edited; copy the shards again"
        )
    copy = ShardCache(remote, folder / manifest["fingerprint"][:_FINGERPRINT_DIGITS])
    copy.put(MANIFEST_NAME, text)
    return manifest, copy
