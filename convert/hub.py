"""Files of one repository on the Hugging Face hub: listed, fetched through bad links, checked.

huggingface_hub does the HTTP: addresses, redirects, tokens, mirrors. Its download functions throw
away what they have when they fail (release 2.4: every call begins at byte 0 under a new temporary
name), lose up to 10 MB at each dropped connection and compare only sizes. So each file here grows
as `.NAME.HASH.partial`, a later run goes on with it, and it takes its name only when its hash is
the published one. Which repositories and files are worth having is not known here.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import random
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import huggingface_hub
from huggingface_hub import HfApi, errors
from huggingface_hub.file_download import get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from qwen_jax.errors import InputError
from qwen_jax.files import sync_folder

OFFICIAL_ENDPOINT = "https://huggingface.co"

_LONGEST_WAIT = 60.0  # seconds between two attempts
_HASH_ATTEMPTS = 3  # a mirror that serves wrong bytes again and again will not stop doing so
# The library's HTTP client has changed twice; its errors are known by the package they come from.
_TRANSPORTS = ("httpx2", "httpx", "requests", "urllib3")
Result = TypeVar("Result")


class RemoteFile(NamedTuple):
    """A file of the repository; the hub gives a sha256 for large files, a git hash for small."""

    name: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def digest(self) -> str:
        """What identifies the content, as far as the hub says."""
        return self.sha256 or self.git_sha1 or f"{self.size}"

    @property
    def partial_name(self) -> str:
        """Under which it grows; another content never goes on with it."""
        return f".{self.name}.{self.digest[:12]}.partial"

    def matches(self, path: pathlib.Path) -> bool:
        """Whether the file at `path` has the published size and hash."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return False
        if self.sha256:
            return _hash(path, hashlib.sha256()) == self.sha256
        # A git hash is of the content behind a short header.
        return not self.git_sha1 or self.git_sha1 == _hash(
            path, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        )


class Stopped(Exception):
    """Another file failed or the user interrupted: this one is left as far as it is."""


class Repository:
    """One commit of a repository. `retries`: attempts in a row that bring nothing new.

    `say` gets a line for each failed attempt. Raises InputError when retries are used up, at once
    for what another attempt cannot change.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        endpoint: str | None = None,
        revision: str = "main",
        retries: int = 10,
        say: Callable[[str], None] = print,
    ):
        self.repo_id, self.commit = repo_id, revision
        self.endpoint = (endpoint or huggingface_hub.constants.ENDPOINT).rstrip("/")
        # A token of the official hub is none of a mirror's business.
        self._token = None if self.endpoint == OFFICIAL_ENDPOINT else False
        self._retries, self._say = retries, say
        self.stop = threading.Event()

    def list_files(self) -> list[RemoteFile]:
        """The files of the commit that `revision` names; fixes that commit for every fetch."""
        api = HfApi(endpoint=self.endpoint, token=self._token)

        def ask() -> Any:
            return api.model_info(self.repo_id, revision=self.commit, files_metadata=True)

        info = self._persist(f"list of files of {self.repo_id}", ask)
        if not info.sha or not info.siblings:
            raise InputError(f"{self.endpoint} lists no files for {self.repo_id}; check the name")
        self.commit = info.sha
        return [
            RemoteFile(
                name=sibling.rfilename,
                size=sibling.size,
                sha256=_hex(sibling.lfs and sibling.lfs.sha256, 64),
                git_sha1=None if sibling.lfs else _hex(sibling.blob_id, 40),
            )
            for sibling in info.siblings
        ]

    def complete(self, file: RemoteFile) -> RemoteFile:
        """Asks for size and hash of a file that the list (of some mirrors) gives without them."""
        if file.size is not None:
            return file

        def ask() -> Any:
            return get_hf_file_metadata(
                self._url(file), headers=self._headers(), token=self._token, endpoint=self.endpoint
            )

        about = self._persist(file.name, ask)
        return file._replace(
            size=about.size, sha256=_hex(about.etag, 64), git_sha1=_hex(about.etag, 40)
        )

    def fetch(
        self, file: RemoteFile, folder: pathlib.Path, received: Callable[[int], None]
    ) -> pathlib.Path:
        """Brings a file into `folder`, going on where an earlier run stopped; returns its path.

        `received` is told of bytes as they come, and of a negative number if some are discarded.
        """
        target = folder / file.name
        partial = folder / file.partial_name
        for _ in range(_HASH_ATTEMPTS):
            with _disk_errors(folder), open(partial, "ab") as out:
                if out.tell():
                    received(out.tell())
                sink = _Sink(out, received, self.stop)
                transfer = functools.partial(self._transfer, file, sink)
                self._persist(file.name, transfer, lambda sink=sink: sink.most)
                sink.sync()
            if file.matches(partial):
                os.replace(partial, target)
                sync_folder(folder)
                return target
            received(-partial.stat().st_size)
            partial.unlink()
            self._say(f"{file.name}: what came has another hash than published; fetching it again")
        raise InputError(
            f"{self.endpoint} sent {file.name} {_HASH_ATTEMPTS} times with another hash than it "
            "publishes; try another --endpoint"
        )

    def _transfer(self, file: RemoteFile, sink: "_Sink") -> None:
        if file.size is not None and sink.tell() > file.size:
            sink.restart()
        have = sink.tell()
        if have == file.size:
            return
        headers = self._headers() | ({"Range": f"bytes={have}-"} if have else {})
        # max_retries=0: `_persist` repeats, from where the file then is.
        with http_stream_backoff(
            "GET",
            self._url(file),
            headers=headers,
            timeout=huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT,
            max_retries=0,
        ) as response:
            hf_raise_for_status(response)
            if have and response.status_code != 206:
                sink.restart()  # the server does not know ranges and sends all again
            for data in response.iter_bytes():
                sink.write(data)
        if file.size not in (None, sink.tell()):
            raise ConnectionError(f"{sink.tell()} bytes came of {file.size}")

    def _url(self, file: RemoteFile) -> str:
        return hf_hub_url(self.repo_id, file.name, revision=self.commit, endpoint=self.endpoint)

    def _headers(self) -> dict[str, str]:
        # A range of a compressed answer would be a range of something else.
        return build_hf_headers(token=self._token) | {"Accept-Encoding": "identity"}

    def _persist(
        self, what: str, action: Callable[[], Result], progress: Callable[[], int] = lambda: 0
    ) -> Result:
        """Repeats `action` with growing waits until it succeeds; progress renews the patience."""
        failures = 0
        while True:
            before = progress()
            try:
                return action()
            except (Stopped, InputError):
                raise
            except Exception as error:
                if not _may_pass(error):
                    raise InputError(self._explain(what, error)) from error
                failures = 0 if progress() > before else failures
                if failures >= self._retries:
                    raise InputError(
                        f"{what}: {failures} attempts in a row brought nothing ({_line(error)}); "
                        "what has arrived is kept: run the same command again, or with another "
                        "--endpoint"
                    ) from error
                wait = min(2.0**failures, _LONGEST_WAIT) * random.uniform(0.5, 1)
                failures += 1
                self._say(f"{what}: {_line(error)}; trying again in {wait:.0f} s")
                if self.stop.wait(wait):
                    raise Stopped from None

    def _explain(self, what: str, error: Exception) -> str:
        if isinstance(error, errors.GatedRepoError):
            return f"{self.repo_id} asks for an account that accepted its terms; see hf auth login"
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"{self.endpoint} has no repository {self.repo_id}; check the name"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{self.repo_id} has no revision {self.commit}; check --revision"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return f"{what}: HF_HUB_OFFLINE is set, so nothing can be fetched; unset it"
        return f"{what}: {self.endpoint} refuses it: {_line(error)}; check --repo_id and --endpoint"


class _Sink:
    """The growing file: counts what is written, and tells disk errors from those of the network."""

    def __init__(self, file: Any, received: Callable[[int], None], stop: threading.Event):
        self._file, self._received, self._stop = file, received, stop
        self.most = file.tell()  # bytes that were there at some time: a restart is no progress

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise Stopped
        with _disk_errors(self._file.name):
            count = self._file.write(data)
        self._received(count)
        self.most = max(self.most, self._file.tell())
        return count

    def tell(self) -> int:
        return self._file.tell()

    def restart(self) -> None:
        self._received(-self.tell())
        with _disk_errors(self._file.name):
            self._file.seek(0)
            self._file.truncate()

    def sync(self) -> None:
        with _disk_errors(self._file.name):
            self._file.flush()
            os.fsync(self._file.fileno())


@contextlib.contextmanager
def _disk_errors(path: Any) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error}; what has arrived is kept, run the same command "
            "again when this is mended"
        ) from error


def _hex(text: str | None, digits: int) -> str | None:
    """A hash as the server gives it, or None if that is none: it becomes part of a file name."""
    return text if text and re.fullmatch(f"[0-9a-f]{{{digits}}}", text) else None


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    # OSError is what the library raises for a body that ends early.
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _TRANSPORTS


def _line(error: Exception) -> str:
    if isinstance(error, errors.HfHubHTTPError):
        return f"HTTP {error.response.status_code} {error.response.reason_phrase}"
    return f"{type(error).__name__} {' '.join(str(error).split())[:160]}".strip()


def _hash(path: pathlib.Path, digest: Any) -> str:
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
