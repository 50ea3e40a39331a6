"""How a test reaches an S3 server: as programs do, as the storage does, and past everything under test."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

REGION = "us-east-1"


@dataclass(frozen=True)
class Account:
    """Credentials."""

    access_key: str
    secret_key: str


@dataclass(frozen=True)
class Bucket:
    """A bucket at an endpoint, as one account sees it."""

    endpoint: str
    name: str
    account: Account

    def uri(self, prefix: str = "run") -> str:
        return f"s3://{self.name}/{prefix}"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables with which any S3 client finds it."""
        bypass = ",".join(part for part in (os.environ.get("NO_PROXY"), "127.0.0.1") if part)
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.account.access_key,
            "AWS_SECRET_ACCESS_KEY": self.account.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_ALLOW_HTTP": "true",
            "NO_PROXY": bypass,
        }

    @property
    def options(self) -> dict[str, object]:
        """Storage options that reach it."""
        return {
            "endpoint_url": self.endpoint,
            "key": self.account.access_key,
            "secret": self.account.secret_key,
            "client_kwargs.region_name": REGION,
        }

    def at(self, endpoint: str) -> Bucket:
        """The same bucket by another way, such as a proxy."""
        return Bucket(endpoint, self.name, self.account)

    def seen_by(self, account: Account) -> Bucket:
        """The same bucket with other credentials."""
        return Bucket(self.endpoint, self.name, account)

    def client(self) -> Any:
        """A boto3 client that tries everything once."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.account.access_key,
            aws_secret_access_key=self.account.secret_key,
            region_name=REGION,
            config=Config(proxies={}, retries={"total_max_attempts": 3, "mode": "standard"}),
        )

    def create(self) -> Bucket:
        """Make it. Returns itself."""
        self.client().create_bucket(Bucket=self.name)
        return self

    def objects(self, prefix: str = "") -> dict[str, int]:
        """{key: bytes} of every object whose key begins so."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}

    def uploads(self) -> list[str]:
        """The keys of the multipart uploads that are neither completed nor aborted."""
        found = self.client().list_multipart_uploads(Bucket=self.name)
        return sorted(upload["Key"] for upload in found.get("Uploads", []))

    def remove(self) -> None:
        """Empty it and delete it: a server that many tests share keeps its data in memory."""
        client = self.client()
        for upload in client.list_multipart_uploads(Bucket=self.name).get("Uploads", []):
            client.abort_multipart_upload(Bucket=self.name, Key=upload["Key"], UploadId=upload["UploadId"])
        keys = [{"Key": key} for key in self.objects()]
        for first in range(0, len(keys), 1000):
            client.delete_objects(Bucket=self.name, Delete={"Objects": keys[first : first + 1000]})
        client.delete_bucket(Bucket=self.name)
