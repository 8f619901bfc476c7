"""Objects in S3 and Google Cloud Storage: signed requests and listings, with the credentials of the environment."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlencode

import requests

from lit_transfer.data.transfer import Auth, Source, Version, transfer
from lit_transfer.errors import UserError

_S3_REMEDY = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE"
_GS_REMEDY = "check GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`"
_GS_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"


def s3_object(bucket: str, key: str) -> Source:
    """An object of S3, or of what AWS_ENDPOINT_URL names; unsigned where there are no credentials."""
    shown = f"s3://{bucket}/{key}"

    def request() -> tuple[str, Auth | None]:
        asked = {"Bucket": bucket, "Key": key}
        with _sentences_of_s3(shown):
            s3 = _s3(os.getpid())
            return s3.plain.generate_presigned_url("get_object", Params=asked), functools.partial(_sign, s3, shown)

    return Source(shown, request, _s3.cache_clear, _S3_REMEDY)


def list_s3(bucket: str, prefix: str, timeout_s: float) -> list[str]:
    """Keys of a bucket that begin with a prefix."""
    from botocore.config import Config

    _s3.cache_clear()  # a listing stands at the start of a command: read credentials anew
    with _sentences_of_s3(f"s3://{bucket}/{prefix}"):
        s3 = _s3(os.getpid())
        waits = {"connect_timeout": timeout_s, "read_timeout": timeout_s}
        config = Config(**waits, retries={"mode": "standard", "max_attempts": 4})
        client = s3.client(config if s3.credentials else config.merge(s3.unsigned))
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]


def gs_object(bucket: str, key: str) -> Source:
    """An object of Google Cloud Storage, or of what STORAGE_EMULATOR_HOST names."""
    return _gs_source(f"gs://{bucket}/{key}", f"{_gs_endpoint()}/{quote(bucket)}/{quote(key)}")


def list_gs(bucket: str, prefix: str, timeout_s: float) -> list[str]:
    """Keys of a bucket that begin with a prefix."""
    return list(_list_gs(bucket, prefix, timeout_s))


def _list_gs(bucket: str, prefix: str, timeout_s: float) -> Iterator[str]:
    page: dict[str, Any] = {"nextPageToken": ""}
    while "nextPageToken" in page:
        query = {"prefix": prefix, "pageToken": page["nextPageToken"], "fields": "items/name,nextPageToken"}
        url = f"{_gs_endpoint()}/storage/v1/b/{quote(bucket)}/o?{urlencode(query)}"
        source = _gs_source(f"gs://{bucket}/{prefix}", url)
        page = json.loads(b"".join(transfer(source, 0, None, timeout_s=timeout_s, expected=Version())))
        yield from (item["name"] for item in page.get("items", []))


@contextmanager
def _sentences_of_s3(shown: str) -> Iterator[None]:
    """Turns botocore's errors into sentences without its details, which may hold a token."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        raise UserError(f"{shown}: the bucket cannot be read ({code}); {_S3_REMEDY}.") from None
    except BotoCoreError as error:
        raise UserError(f"{shown}: no request to S3 ({type(error).__name__}); {_S3_REMEDY}.") from None


class _S3:
    """What one process asks S3 with.

    Signatures are sent as headers, not in the address, so that no address holds one.
    """

    def __init__(self) -> None:
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config

        self.session = botocore.session.get_session()
        self.credentials = self.session.get_credentials()  # renews what a provider gives for a time
        self.region = os.environ.get("AWS_REGION") or self.session.get_config_variable("region") or "us-east-1"
        own_endpoint = {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"} & {*os.environ}
        self.style = Config(s3={"addressing_style": "path"} if own_endpoint else {})  # bucket.localhost is no host
        self.unsigned = Config(signature_version=UNSIGNED)
        self.plain = self.client(self.unsigned)

    def client(self, config: Any) -> Any:
        """A client; its signature is that of the credentials unless the config says otherwise."""
        return self.session.create_client("s3", region_name=self.region, config=self.style.merge(config))


@functools.lru_cache(maxsize=1)
def _s3(pid: int) -> _S3:
    return _S3()


def _sign(s3: _S3, shown: str, request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Add the headers of AWS Signature Version 4, if there are credentials."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest

    if s3.credentials is not None:
        asked = AWSRequest(method=request.method, url=request.url)
        with _sentences_of_s3(shown):
            S3SigV4Auth(s3.credentials.get_frozen_credentials(), "s3", s3.region).add_auth(asked)
        request.headers.update(dict(asked.headers))
    return request


def _gs_endpoint() -> str:
    host = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com").rstrip("/")
    return host if "://" in host else f"http://{host}"


def _gs_source(shown: str, url: str) -> Source:
    def request() -> tuple[str, Auth | None]:
        import google.auth.exceptions

        try:
            credentials = _gs_credentials(os.getpid())
        except google.auth.exceptions.GoogleAuthError as error:
            raise UserError(f"{shown}: no credentials ({type(error).__name__}); {_GS_REMEDY}.") from None
        return url, functools.partial(_bearer, credentials, shown) if credentials else _as_it_is

    return Source(shown, request, _gs_credentials.cache_clear, _GS_REMEDY)


@functools.lru_cache(maxsize=1)
def _gs_credentials(pid: int) -> Any:
    """The default credentials, or None where there are none: then the bucket must be public."""
    import google.auth
    import google.auth.exceptions

    try:
        return google.auth.default(scopes=[_GS_SCOPE])[0]
    except google.auth.exceptions.DefaultCredentialsError:
        if "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:
            raise
        return None


def _bearer(credentials: Any, shown: str, request: requests.PreparedRequest) -> requests.PreparedRequest:
    import google.auth.exceptions
    import google.auth.transport.requests

    transport = google.auth.transport.requests.Request()
    try:
        credentials.before_request(transport, request.method, request.url, request.headers)
    except google.auth.exceptions.GoogleAuthError as error:
        raise UserError(f"{shown}: no token ({type(error).__name__}); {_GS_REMEDY}.") from None
    return request


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Signed already; without this, requests would add a password from ~/.netrc."""
    return request
