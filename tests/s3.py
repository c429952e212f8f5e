"""An S3 server (moto) in its own process, which tests reach over the network.

It listens on a free port of the loopback interface, keeps everything in memory, and exits when the
process that started it does, even by kill -9.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import boto3
from botocore.config import Config

ACCESS_KEY = "AKIAEXAMPLECANARY000"
SECRET_KEY = "canary/secret/0123456789abcdefghijklmnop"

# Short, so that a listing of little more than a hundred objects takes two pages.
PAGE_LENGTH = 100

# The read returns when the pipe closes, which it does even if the parent is killed.
_SERVER = """
import logging, sys
logging.getLogger("werkzeug").disabled = True
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class S3Server:
    endpoint_url: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make a process use this server."""
        return environment(self.endpoint_url)

    def create_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)

    def empty_bucket(self, name: str) -> None:
        for page in self.client().get_paginator("list_objects_v2").paginate(Bucket=name):
            for entry in page.get("Contents", ()):
                self.client().delete_object(Bucket=name, Key=entry["Key"])

    def client(self):
        """A client independent of the code under test."""
        return _client(self.endpoint_url)

    @contextmanager
    def demanding_credentials(self) -> Iterator[None]:
        """Refuse every request, for there are no accounts, until the context exits."""
        self._post("/moto-api/reset-auth", b"0")
        try:
            yield
        finally:
            self._post("/moto-api/reset-auth", b"inf")

    def _post(self, path: str, body: bytes) -> None:
        request = urllib.request.Request(
            self.endpoint_url + path, data=body, headers={"Content-Type": "text/plain"}
        )
        with urllib.request.urlopen(request) as answer:
            answer.read()


@functools.cache
def _client(endpoint_url: str):
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


def environment(endpoint_url: str) -> dict[str, str]:
    """The variables that make botocore, and all that is built on it, use this endpoint."""
    return {
        "AWS_ENDPOINT_URL": endpoint_url,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        # Ignore the machine's own profiles and roles.
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }


@contextmanager
def serve_s3() -> Iterator[S3Server]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE_LENGTH)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield S3Server(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=30)
