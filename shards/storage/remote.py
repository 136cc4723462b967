"""Object stores through fsspec. No other module imports it.

Credentials and endpoints come from the environment, as the driver of each store documents it. s3fs reads ``AWS_*``,
and for a store other than Amazon's ``AWS_ENDPOINT_URL`` or ``FSSPEC_S3_ENDPOINT_URL``. gcsfs reads
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

CHUNK = 8 << 20  # bytes per request, where an object is read from end to end

_ATTEMPTS = 3  # of an upload; the drivers retry each request several times themselves
_PAUSE = 1.0  # seconds before the second attempt, doubled before the next
_SILENCE = 20  # seconds in which a store must answer for the first time; the drivers would retry for minutes
_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
# One request at a time: 10 would hold 500 MiB in every worker, and ask for an object's size before each read of it.
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 1}, "s3a": {"max_concurrency": 1}}


def open_file_system(url: str) -> Any:
    """Return this process's fsspec file system for `url`. It is made at the first call and caches no listings.

    Raises UserError where the package is missing, the kind of URL is unknown, or the store does not answer at all.
    """
    scheme, _, rest = url.partition("://")
    return _open_file_system(os.getpid(), f"{scheme}://{rest.partition('/')[0]}")


@functools.lru_cache(maxsize=16)
def _open_file_system(process: int, root: str) -> Any:  # by process: its threads and sockets do not survive a fork
    scheme = root.partition("://")[0]
    try:
        import fsspec

        options = {"skip_instance_cache": True, "use_listings_cache": False, **_OPTIONS.get(scheme, {})}
        store, bucket = fsspec.url_to_fs(root, **options)
    except ImportError as error:
        packages = f"pip install fsspec {_DRIVERS.get(scheme, '')}".rstrip()
        raise UserError(f"{root}: {_join_lines(error)}. Install the package with '{packages}'.") from error
    except ValueError as error:
        raise UserError(
            f"{root}: {_join_lines(error)}. Give a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER."
        ) from error
    except Exception as error:  # gcsfs looks for credentials right here
        raise make_error(root, error) from error
    if store.async_impl:
        _refuse_silent_store(store, bucket, root)
    return store


def _refuse_silent_store(store: Any, bucket: str, root: str) -> None:
    """Raise UserError where nobody answers. Any answer is fine here: each request checks its own."""
    from fsspec.asyn import sync
    from fsspec.exceptions import FSTimeoutError

    try:
        sync(store.loop, store._info, bucket, timeout=_SILENCE)
    except FSTimeoutError:
        raise make_error(root, TimeoutError(f"no answer within {_SILENCE} s")) from None
    except OSError:
        return
    except Exception as error:  # of the connection or the credentials: there was no answer
        raise make_error(root, error) from error


@contextlib.contextmanager
def convert_errors(url: str) -> Iterator[None]:
    """Turn whatever a driver raises into UserError, except FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, UserError, MemoryError):
        raise
    except Exception as error:  # each driver has its own family of exceptions, most of them not OSError
        raise make_error(url, error) from error


def make_error(url: str, error: Exception) -> UserError:
    """Return a UserError that says in one line what went wrong and what to do."""
    if isinstance(error, FileNotFoundError):
        reason, fix = "no such object, folder or bucket", "Check the name. Buckets are not created here."
    else:
        reason, fix = (
            _join_lines(error),
            "Check the name, the network and the endpoint, then run the same command again.",
        )
    if _is_about_credentials(error):
        fix = "Check your credentials (AWS_PROFILE or AWS_ACCESS_KEY_ID …) and their permissions for this bucket."
        if url.startswith(("gs:", "gcs:")):
            fix = fix.replace("AWS_PROFILE or AWS_ACCESS_KEY_ID …", "GOOGLE_APPLICATION_CREDENTIALS")
    return UserError(f"{url}: {reason}. {fix}")


def _is_about_credentials(error: Exception) -> bool:
    """Return whether an error is about credentials. No two drivers have the same class for these."""
    return isinstance(error, PermissionError) or "Credential" in type(error).__name__


def _join_lines(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def read_object(url: str) -> bytes:
    """Return a whole object. Raises FileNotFoundError, and UserError for other failures, as all functions below."""
    with convert_errors(url):
        data: bytes = open_file_system(url).cat_file(url)
        return data


def read_object_range(url: str, offset: int, size: int) -> bytes:
    """Return `size` bytes from `offset`, or fewer where the object ends."""
    if not size:
        return b""  # HTTP has no empty range
    with convert_errors(url):
        data: bytes = open_file_system(url).cat_file(url, start=offset, end=offset + size)
        return data


def get_size(url: str) -> int:
    """Return the length of an object in bytes."""
    with convert_errors(url):
        info = open_file_system(url).info(url)
        if info["type"] != "file":
            raise FileNotFoundError(url)
        return int(info["size"])


def hash_object(url: str, tick: Callable[[], None]) -> str:
    """Return the sha256 of an object, hexadecimal. It is read from end to end, with `tick` called between reads."""
    return _hash_bytes(url, get_size(url), tick)


def _hash_bytes(url: str, length: int, tick: Callable[[], None] = lambda: None) -> str:
    digest = hashlib.sha256()
    for offset in range(0, length, CHUNK):
        digest.update(read_object_range(url, offset, min(CHUNK, length - offset)))
        tick()
    return digest.hexdigest()


def list_folder(url: str) -> tuple[dict[str, int], list[str]]:
    """Return what lies directly in a folder: its objects with their bytes, and its folders, by name.

    Raises FileNotFoundError where nothing lies there, except for an empty bucket.
    """
    with convert_errors(url):
        files: list[dict[str, Any]] = open_file_system(url).ls(url, detail=True)
        root = open_file_system(url)._strip_protocol(url).rstrip("/")
    objects, folders = {}, []
    for entry in files:
        name = entry["name"].removeprefix(root).removeprefix("/")
        if entry["type"] == "directory":
            if not name:
                raise UserError(f"{url}: it holds a key with '//', which cannot be a file name. Rename or remove it.")
            folders.append(name)
        elif name:  # the marker of a folder that somebody made by hand has no name
            objects[name] = int(entry["size"])
    return objects, folders


def remove_object(url: str) -> None:
    """Remove an object, if it is there."""
    with convert_errors(url), contextlib.suppress(FileNotFoundError):
        open_file_system(url).rm_file(url)


def upload(file: Path, url: str, sha256_of_file: str) -> None:
    """Copy a local file to `url` and read it back. If the bytes differ, remove the object and raise UserError.

    Object stores show either the complete new object or the former one. A multipart upload that was killed stays in
    the bucket, invisible, until a lifecycle rule of the bucket removes it.
    """
    _put_with_retries(file, url)
    length = file.stat().st_size
    try:
        intact = get_size(url) == length and _hash_bytes(url, length) == sha256_of_file
    except FileNotFoundError:
        raise UserError(
            f"{url}: disappeared right after its upload. Check who else writes there, then run the same command again."
        ) from None
    if not intact:
        remove_object(url)
        raise UserError(
            f"{url}: the store returned other bytes than were uploaded, so the object was removed. "
            "Run the same command again."
        )


def _put_with_retries(file: Path, url: str) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            open_file_system(url).put_file(os.fspath(file), url)
            return
        except (UserError, MemoryError):
            raise
        except Exception as error:
            is_last = isinstance(error, FileNotFoundError) or _is_about_credentials(error) or attempt == _ATTEMPTS - 1
            if is_last:
                raise make_error(url, error) from error
            time.sleep(_PAUSE * 2**attempt)
