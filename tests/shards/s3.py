"""A real S3 server in a process of its own, for the tests of what goes to object stores."""

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from shards.storage import remote

# Its standard input is ours: when that ends, however we end, the server does.
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
_PAGE = "7"  # keys a listing: whoever reads the first page alone is found out


@dataclass(frozen=True)
class Server:
    """A server that is up, and a client of it that is not fsspec."""

    endpoint: str
    client: Any  # boto3's

    def bucket(self) -> str:
        """A new bucket; its URL."""
        name = f"bucket-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def put(self, url: str, data: bytes) -> None:
        """Store an object."""
        self.client.put_object(**_where(url), Body=data)

    def get(self, url: str) -> bytes:
        """The bytes of an object."""
        with contextlib.closing(self.client.get_object(**_where(url))["Body"]) as body:
            return bytes(body.read())

    def remove(self, url: str) -> None:
        """Take an object away."""
        self.client.delete_object(**_where(url))

    def keys(self, url: str) -> list[str]:
        """The keys of all objects below a URL, in full."""
        where = _where(url)
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=where["Bucket"], Prefix=where["Key"])
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def _where(url: str) -> dict[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """Start a server and point this process and its children to it; skip the test where that cannot be."""
    boto3 = pytest.importorskip("boto3", reason="an S3 server needs moto: pip install 'moto[server]' s3fs")
    pytest.importorskip("s3fs")
    with _process() as port, pytest.MonkeyPatch.context() as patch:
        endpoint = f"http://127.0.0.1:{port}"
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        forget()
        with contextlib.closing(boto3.client("s3")) as client:
            yield Server(endpoint, client)
        forget()


def forget() -> None:
    """Have this process look at its environment again."""
    remote._open_file_system.cache_clear()


@contextlib.contextmanager
def _process() -> Iterator[int]:
    """A server process; its port."""
    environment = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": _PAGE}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", _SERVER], env=environment, **pipes) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                pytest.skip("moto's S3 server does not start here")
            yield int(line)
        finally:
            process.kill()
