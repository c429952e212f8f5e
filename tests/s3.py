"""An S3 server (moto) in a process of its own, so that tests speak to it over the network.

It listens on a free port of the loopback interface, keeps everything in memory, and ends with the
process that started it, however that ends.
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

# A short page, so that a hundred objects are more than one.
PAGE_LENGTH = 100

# Reading ends when the pipe closes, be it by kill -9 of the parent.
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
        """What a process needs to use the server: set it, in a test with monkeypatch.setenv."""
        return environment(self.endpoint_url)

    def create_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)

    def client(self):
        """An independent client, for looking behind the back of what is tested."""
        return _client(self.endpoint_url)

    @contextmanager
    def demanding_credentials(self) -> Iterator[None]:
        """Refuse every request meanwhile: nobody has an account."""
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
    """The variables by which botocore, and so everything on top of it, uses this endpoint."""
    return {
        "AWS_ENDPOINT_URL": endpoint_url,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        # Nothing of the machine's own: no profile, no role.
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
