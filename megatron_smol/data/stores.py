"""Where the files of a source lie, and how bytes of them are read: a local or NFS folder, or an object store.

data/source.py asks a store for the sizes of files and for ranges of bytes. Ranges are read with `pread`, not
through a memory map: a map of a file that shrinks kills the process with SIGBUS and cannot say why, a short
`pread` is an error that names the file. It costs about the same (a window in the page cache to two int64
tensors: 4.3 us against 3.1 us at 2,048 tokens, 7.9 against 11.6 at 8,192), and lets go of the GIL while a disk
is slow, which a page fault does not.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_smol.data.cache import FileCache
from megatron_smol.data.files import read_blocks
from megatron_smol.data.manifest import FOLDER_MANIFEST, PREFIX_MANIFEST, Manifest, read_manifest
from megatron_smol.errors import DataError, UserError

_BLOCK_BYTES = 8 << 20
_AT_ONCE = 64  # ranges that a disk is told of ahead, and so the most files that one read keeps open


class FileFacts(NamedTuple):
    """A file of a source, as its manifest describes it. `sha256` is None where no manifest says it."""

    name: str
    bytes: int
    sha256: str | None = None


class Range(NamedTuple):
    """Bytes of a file that fill `into`."""

    file: FileFacts
    offset: int
    into: memoryview


class Store(Protocol):
    """A place that holds the files of one source."""

    def where(self, name: str) -> str:
        """Path or address of a file, for messages."""
        ...

    def sizes(self) -> dict[str, int] | None:
        """Bytes of each file, or None where a store cannot list."""
        ...

    def read(self, ranges: Sequence[Range]) -> None:
        """Fill every range, or raise DataError that names the file."""
        ...

    def blocks(self, file: FileFacts) -> Iterator[bytes]:
        """The whole file, block after block."""
        ...

    def local(self, file: FileFacts) -> Path:
        """The whole file as a local path."""
        ...


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


# --- local and network file systems ------------------------------------------------------------------------


class LocalStore:
    """A folder of this machine's file systems."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._prefix = os.path.join(folder, "")  # noqa: PTH118  a Path for each window costs more than reading it

    def where(self, name: str) -> str:
        return self._prefix + name

    def sizes(self) -> dict[str, int]:
        OPEN_FILES.forget(self._prefix)  # a file may have been made anew since this process opened it
        with os.scandir(self.folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def read(self, ranges: Sequence[Range]) -> None:
        for start in range(0, len(ranges), _AT_ONCE):
            self._read(ranges[start : start + _AT_ONCE])

    def _read(self, ranges: Sequence[Range]) -> None:
        opened = [OPEN_FILES.get(self._prefix + file.name, file.bytes) for file, _, _ in ranges]
        if len(ranges) > 1:  # the disk may work on all of them at once
            for descriptor, (_, offset, into) in zip(opened, ranges, strict=True):
                os.posix_fadvise(descriptor.fd, offset, len(into), os.POSIX_FADV_WILLNEED)
        for descriptor, (_, offset, into) in zip(opened, ranges, strict=True):
            descriptor.read_into(offset, into)

    def blocks(self, file: FileFacts) -> Iterator[bytes]:
        yield from read_blocks(self.local(file))

    def local(self, file: FileFacts) -> Path:
        return self.folder / file.name


class _Descriptor:
    """An open file; closed when the last thread that uses it lets go."""

    def __init__(self, path: str, expected_bytes: int) -> None:
        self.path = path
        self.expected_bytes = expected_bytes
        self.fd = -1
        with explained(path):
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._check_size()
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone at exit
        if self.fd >= 0:
            close(self.fd)

    def read_into(self, offset: int, into: memoryview) -> None:
        try:
            count = os.preadv(self.fd, [into], offset)
            while count < len(into):  # a signal, or the end of the file
                if not count:
                    self._check_size()
                    raise DataError(f"{self.path} ends before byte {offset + len(into):,}: preprocess again")
                into, offset = into[count:], offset + count
                count = os.preadv(self.fd, [into], offset)
        except OSError as error:
            raise unreadable(self.path, error) from None

    def _check_size(self) -> None:
        if (found := os.fstat(self.fd).st_size) != self.expected_bytes:
            raise DataError(wrong_size(self.path, found, self.expected_bytes))


class OpenFiles:
    """The least recently used files beyond a limit are closed, so that thousands of shards need few descriptors."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def forget(self, prefix: str) -> None:
        """Open the files whose paths begin so again at their next use."""
        with self._lock:
            for path in [path for path in self._open if path.startswith(prefix)]:
                del self._open[path]

    def get(self, path: str, expected_bytes: int) -> _Descriptor:
        with self._lock:
            found = self._open.get(path)
            if found is not None:
                self._open.move_to_end(path)
                return found
        opened = _Descriptor(path, expected_bytes)
        with self._lock:
            self._open[path] = opened
            while len(self._open) > self._limit:
                self._open.popitem(last=False)
        return opened


# A quarter of what the process may open: the rest is for the run's own files, sockets and libraries.
OPEN_FILES = OpenFiles(min(1024, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)))


@contextlib.contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Turn what the operating system says about a shard into one sentence."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path | str, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"missing shard file {path}: restore it, or run the preprocessing again")
    # A stale NFS handle, a dying disk, no permission.
    return DataError(
        f"{path} cannot be read ({error.strerror or error}); mend the disk or the mount, then run again"
    )


def wrong_size(path: Path | str, found: int, expected: int) -> str:
    return (
        f"{path} has {found:,} bytes, expected {expected:,}: it is truncated, or not the file its manifest "
        f"or index describes; restore it, or run the preprocessing again"
    )


# --- object stores -----------------------------------------------------------------------------------------


class RemoteStore:
    """A folder behind any fsspec address: s3://, gs://, https://, ...

    A window that is asked for is read at once by its byte range, while its whole shard is fetched into the
    cache in the background; once it is there, it is read like a local file. What the cache has no room for
    goes on being read by ranges.
    """

    def __init__(self, url: str, manifest_bytes: bytes, cache: FileCache) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = _file_system(self.url)
        self._folder = cache.folder_of(self.url, manifest_bytes)
        self._cache = cache
        self.manifest = read_manifest(cache.keep(self._folder, FOLDER_MANIFEST, manifest_bytes))
        self._asked: set[str] = set()
        self._wanted: deque[FileFacts] = deque()
        self._worker: threading.Thread | None = None  # lives while something is wanted
        self._lock = threading.Lock()
        self._damage: DataError | None = None

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def sizes(self) -> dict[str, int] | None:
        if "http" in self._fs.protocol:  # a web server's listing, if it has one, does not tell sizes
            return None
        with self._explained(self.url):
            listed = self._fs.ls(self._root, detail=True)
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in listed}

    def read(self, ranges: Sequence[Range]) -> None:
        if self._damage:
            raise self._damage
        far = []
        for one in ranges:
            cached = self._cache.get(self._folder, one.file)
            if cached is None:
                self._fetch_later(one.file)
                far.append(one)
            else:
                OPEN_FILES.get(str(cached), one.file.bytes).read_into(one.offset, one.into)
        if far:
            self._read_ranges(far)

    def blocks(self, file: FileFacts) -> Iterator[bytes]:
        with self._explained(file.name), self._fs.open(f"{self._root}/{file.name}", "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block

    def local(self, file: FileFacts) -> Path:
        path = self._cache.fetch(self._folder, file, self.where(file.name), self.blocks(file))
        if path is None:
            raise DataError(
                f"{self.where(file.name)} ({file.bytes:,} bytes) finds no room in the cache {self._cache.folder} "
                f"of {self._cache.limit_bytes / 1e9:g} GB; raise SMOL_CACHE_GB, or set SMOL_CACHE to a larger disk"
            )
        return path

    def wait(self) -> None:
        """Until everything asked for so far has been fetched (or found no room)."""
        while worker := self._worker:
            worker.join()

    def _read_ranges(self, ranges: Sequence[Range]) -> None:
        paths = [f"{self._root}/{one.file.name}" for one in ranges]
        starts = [one.offset for one in ranges]
        ends = [one.offset + len(one.into) for one in ranges]
        with self._explained(ranges[0].file.name):
            found = self._fs.cat_ranges(paths, starts, ends, on_error="return")
        for one, data in zip(ranges, found, strict=True):
            if isinstance(data, Exception):
                with self._explained(one.file.name):
                    raise data
            if len(data) == one.file.bytes:  # a web server that knows no ranges sends all
                data = data[one.offset : one.offset + len(one.into)]
            if len(data) != len(one.into):
                end = one.offset + len(one.into)
                raise DataError(
                    f"{self.where(one.file.name)} gave {len(data):,} of the {len(one.into):,} bytes before byte "
                    f"{end:,}: it is shorter than its manifest says ({one.file.bytes:,} bytes); upload it again"
                )
            one.into[:] = data

    def _fetch_later(self, file: FileFacts) -> None:
        with self._lock:
            if file.name in self._asked:
                return
            self._asked.add(file.name)
            self._wanted.append(file)
            if self._worker is None:
                # A daemon: a run that ends does not wait for half a gigabyte that nobody will read.
                self._worker = threading.Thread(target=self._fetch_all, name="fetch-shards", daemon=True)
                self._worker.start()

    def _fetch_all(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._worker = None
                    return
                file = self._wanted.popleft()
            try:
                address = self.where(file.name)
                self._cache.fetch(self._folder, file, address, self.blocks(file), wait=False)
            except DataError as error:
                self._damage = error
            except OSError as error:  # the cache's disk: reading by ranges goes on
                print(f"warning: {file.name} is not cached: {error}", file=sys.stderr)

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        with _explained_remote(name if is_remote(name) else self.where(name)):
            yield


def open_remote(url: str) -> tuple[RemoteStore, Manifest]:
    """The store behind an address, and the manifest it holds. Reads one small file."""
    fs, root = _file_system(url.rstrip("/"))
    name = FOLDER_MANIFEST
    with _explained_remote(url):
        if not fs.exists(f"{root}/{name}"):
            root, _, prefix = root.rpartition("/")
            url, name = url.rstrip("/").rpartition("/")[0], prefix + PREFIX_MANIFEST
            if not fs.exists(f"{root}/{name}"):
                raise DataError(
                    f"no tokens at {url}/{prefix}: expected {FOLDER_MANIFEST} in it, or {name} beside it; upload the "
                    f"whole folder that `smol preprocess` wrote"
                )
        data = fs.cat_file(f"{root}/{name}")
    store = RemoteStore(url, data, FileCache.from_environment())
    return store, store.manifest


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} needs a library that is not installed: {error}") from None
    except ValueError as error:  # unknown protocol
        raise UserError(f"{url} is no address that fsspec knows: {error}") from None
    return fs, str(root).rstrip("/")


@contextlib.contextmanager
def _explained_remote(address: str) -> Iterator[None]:
    """Every file system of fsspec has exceptions of its own."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise DataError(f"missing shard file {address}: upload it again") from None
    except Exception as error:
        raise DataError(
            f"{address} cannot be read ({type(error).__name__}: {error}); check the address, the network and the "
            f"credentials, then run again"
        ) from error
