"""Object stores through fsspec: the one module that imports it.

Credentials and endpoints come from the environment, as the driver of each store documents it. s3fs: ``AWS_*``,
``AWS_ENDPOINT_URL`` or ``FSSPEC_S3_ENDPOINT_URL`` for a store that is not Amazon's; gcsfs:
``GOOGLE_APPLICATION_CREDENTIALS``.
"""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shards.errors import UserError

CHUNK = 8 << 20  # bytes a request, where an object is read from end to end

_ATTEMPTS = 3  # of an upload; the drivers try each request several times themselves
_PAUSE = 1.0  # seconds before the second attempt, doubled before the next
_SILENCE = 20  # seconds in which a store must answer for the first time; the drivers would try for minutes
_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
# One request at a time: 10 would hold 500 MiB in every worker, and ask for an object's size before each read of it.
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 1}, "s3a": {"max_concurrency": 1}}


def file_system(url: str) -> Any:
    """This process's fsspec file system for `url`, made when first asked for; nothing in it is cached.

    Raises UserError where the package is missing, the kind of URL unknown, or the store does not answer at all.
    """
    scheme, _, rest = url.partition("://")
    return _file_system(os.getpid(), f"{scheme}://{rest.partition('/')[0]}")


@functools.lru_cache(maxsize=16)
def _file_system(process: int, root: str) -> Any:  # by process: the threads and sockets in it do not survive a fork
    scheme = root.partition("://")[0]
    try:
        import fsspec

        options = {"skip_instance_cache": True, "use_listings_cache": False, **_OPTIONS.get(scheme, {})}
        store, bucket = fsspec.url_to_fs(root, **options)
    except ImportError as error:
        packages = f"pip install fsspec {_DRIVERS.get(scheme, '')}".rstrip()
        raise UserError(f"{root}: {_one_line(error)}; {packages}") from error
    except ValueError as error:
        raise UserError(
            f"{root}: {_one_line(error)}; give a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
        ) from error
    except Exception as error:  # gcsfs looks for credentials right here
        raise failure(root, error) from error
    if store.async_impl:
        _refuse_silence(store, bucket, root)
    return store


def _refuse_silence(store: Any, bucket: str, root: str) -> None:
    """Raises UserError where nobody answers. What is answered does not matter: each request sees to that itself."""
    from fsspec.asyn import sync
    from fsspec.exceptions import FSTimeoutError

    try:
        sync(store.loop, store._info, bucket, timeout=_SILENCE)
    except FSTimeoutError:
        raise failure(root, TimeoutError(f"no answer within {_SILENCE} s")) from None
    except OSError:
        return
    except Exception as error:  # of the connection or the credentials: there was no answer
        raise failure(root, error) from error


@contextlib.contextmanager
def answers(url: str) -> Iterator[None]:
    """UserError for whatever a driver raises, except FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, UserError, MemoryError):
        raise
    except Exception as error:  # each driver has a family of its own, most of it outside OSError
        raise failure(url, error) from error


def failure(url: str, error: Exception) -> UserError:
    """What went wrong, in one line with the mend."""
    if isinstance(error, FileNotFoundError):
        reason, mend = "no such object, folder or bucket", "check the name; a bucket must be made beforehand"
    else:
        reason, mend = _one_line(error), "check the name, the network and the endpoint, then run the same command again"
    if _is_refusal(error):
        mend = "see to your credentials (AWS_PROFILE or AWS_ACCESS_KEY_ID …) and to what they may do in this bucket"
        if url.startswith(("gs:", "gcs:")):
            mend = mend.replace("AWS_PROFILE or AWS_ACCESS_KEY_ID …", "GOOGLE_APPLICATION_CREDENTIALS")
    return UserError(f"{url}: {reason}; {mend}")


def _is_refusal(error: Exception) -> bool:
    """Whether it is about credentials; no two drivers name them with the same class."""
    return isinstance(error, PermissionError) or "Credential" in type(error).__name__


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def fetch(url: str) -> bytes:
    """A whole object. Raises FileNotFoundError, and UserError for any other failure, as do all below."""
    with answers(url):
        data: bytes = file_system(url).cat_file(url)
        return data


def fetch_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer where the object ends."""
    if not size:
        return b""  # HTTP has no empty range
    with answers(url):
        data: bytes = file_system(url).cat_file(url, start=offset, end=offset + size)
        return data


def size(url: str) -> int:
    """Bytes of an object."""
    with answers(url):
        info = file_system(url).info(url)
        if info["type"] != "file":
            raise FileNotFoundError(url)
        return int(info["size"])


def sha256(url: str, tick: Callable[[], None]) -> str:
    """The sha256 of an object in hexadecimal, read from end to end with `tick` called between."""
    return _sha256(url, size(url), tick)


def _sha256(url: str, length: int, tick: Callable[[], None] = lambda: None) -> str:
    digest = hashlib.sha256()
    for offset in range(0, length, CHUNK):
        digest.update(fetch_range(url, offset, min(CHUNK, length - offset)))
        tick()
    return digest.hexdigest()


def listing(url: str) -> tuple[dict[str, int], list[str]]:
    """What lies directly below a folder: objects with their bytes, and folders; by name.

    Raises FileNotFoundError where nothing does, but for an empty bucket.
    """
    with answers(url):
        files: list[dict[str, Any]] = file_system(url).ls(url, detail=True)
        root = file_system(url)._strip_protocol(url).rstrip("/")
    objects, folders = {}, []
    for entry in files:
        name = entry["name"].removeprefix(root).removeprefix("/")
        if entry["type"] == "directory":
            if not name:
                raise UserError(f"{url}: a key with '//' lies in it, which has no name as a file; rename or remove it")
            folders.append(name)
        elif name:  # the marker of a folder that somebody made by hand has none
            objects[name] = int(entry["size"])
    return objects, folders


def remove(url: str) -> None:
    """Take an object away, if it is there."""
    with answers(url), contextlib.suppress(FileNotFoundError):
        file_system(url).rm_file(url)


def upload(file: Path, url: str, sha256_of_file: str) -> None:
    """Copy a local file to `url` and read it back. What comes back as something else is removed, with a UserError.

    Stores of objects show the object whole, when it is complete, or the former one. A multipart upload that was
    killed stays in the bucket unseen, until a lifecycle rule there clears it away.
    """
    _put(file, url)
    length = file.stat().st_size
    try:
        intact = size(url) == length and _sha256(url, length) == sha256_of_file
    except FileNotFoundError:
        raise UserError(f"{url} is gone right after its upload; see who else writes there, then run it again") from None
    if not intact:
        remove(url)
        raise UserError(f"{url}: not what was uploaded, so it was removed; run the same command again")


def _put(file: Path, url: str) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            file_system(url).put_file(os.fspath(file), url)
            return
        except (UserError, MemoryError):
            raise
        except Exception as error:
            last = isinstance(error, FileNotFoundError) or _is_refusal(error) or attempt == _ATTEMPTS - 1
            if last:
                raise failure(url, error) from error
            time.sleep(_PAUSE * 2**attempt)
