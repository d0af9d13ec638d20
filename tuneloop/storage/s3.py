"""Storage in an S3 bucket, or in anything that speaks S3 (MinIO, Ceph, R2).

The content's sha256 is kept in the object's own metadata: unlike a second object it cannot get out of step, and unlike
S3's checksum of a multipart upload it is over the whole content. S3 checks every upload by SHA256 on arrival.
Credentials, region, endpoint and the number of tries are those of every AWS tool: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_MAX_ATTEMPTS, a shared config file, or the pod's role (IRSA,
Pod Identity). TUNELOOP_S3_ENCRYPTION is the server-side encryption of writes: AES256, aws:kms or aws:kms:dsse;
with the last two, TUNELOOP_S3_KMS_KEY may name the key. Without it the bucket's own default holds.
"""

import contextlib
import hashlib
import io
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlparse

from tuneloop.errors import TryAgain, UserError
from tuneloop.storage.base import (
    ABSENT,
    CHUNK_BYTES,
    Damaged,
    IfVersion,
    NotFound,
    Storage,
    VerifyingReader,
    VersionConflict,
    check_key,
    join_key,
    join_uri,
)
from tuneloop.storage.local import replace_file

_SHA256, _WRITE_ID = "sha256", "write-id"  # names in the objects' metadata
_RESUMES = 5  # broken downloads in a row, with nothing read in between
_BUSY_WAIT_SECONDS = 0.2
_TRIES = 8  # of a request, waiting up to 20 s between two, by chance: about half a minute in all
_BUSY = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "IncompleteBody", "OperationAborted")
_EXPIRED, _REGION = "renew the credentials, they have expired", "set AWS_REGION to the bucket's region"
_HINTS = {
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
}
_ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")


class S3Storage(Storage):
    """Storage under a prefix of a bucket; the version tag is the object's ETag.

    Args:
        bucket: its name.
        prefix: what every key begins with; may be empty.

    Raises:
        UserError: boto3 is not installed, or its settings cannot be used.
    """

    def __init__(self, bucket: str, prefix: str = ""):
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.uri = join_uri(f"s3://{bucket}", self.prefix)
        self._encryption = _encryption()
        with _clear_errors(self.uri):
            self._client = _make_client()
        # Some servers cannot read the checksums that are sent behind a body: AWS_REQUEST_CHECKSUM_CALCULATION leaves
        # them out. What is read is compared with the sha256 in the metadata all the same.
        asked = self._client.meta.config.request_checksum_calculation
        self._checksum = {} if asked == "when_required" else {"ChecksumAlgorithm": "SHA256"}

    def read_versioned(self, key: str) -> tuple[bytes, str]:
        with self._reader(key) as reader:
            return reader.read(), reader.version

    def open_read(self, key: str) -> BinaryIO:
        return cast(BinaryIO, self._reader(key))

    def write_bytes(self, key: str, data: bytes, *, if_version: IfVersion = None) -> str:
        write_id = uuid.uuid4().hex
        if if_version is None:
            condition = {}
        else:
            condition = {"IfNoneMatch": "*"} if if_version is ABSENT else {"IfMatch": if_version}
        with _clear_errors(join_uri(self.uri, key)):
            try:
                return self._put_object(key, data, {_WRITE_ID: write_id}, condition)
            except VersionConflict:
                # A first try whose answer was lost makes the second one find what the first one wrote.
                head = self._head(key)
                if head is None or head["Metadata"].get(_WRITE_ID) != write_id:
                    raise
                return head["ETag"]

    def put_file(self, local: Path, key: str) -> str:
        from boto3.exceptions import S3UploadFailedError

        with open(local, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        extra = {**self._checksum, "Metadata": {_SHA256: digest}, **self._encryption}
        with _clear_errors(join_uri(self.uri, key)):
            try:
                self._client.upload_file(str(local), self.bucket, self._key(key), ExtraArgs=extra)
            except S3UploadFailedError as error:
                cause = error.__context__ or error  # it says whose mistake it is
                if not _is_code(cause, "NoSuchUpload"):
                    raise cause from None
                # Completed by a try whose answer was lost, or ended by someone else.
                head = self._head(key)
                if head is None or head["Metadata"].get(_SHA256) != digest:
                    raise TryAgain(f"{join_uri(self.uri, key)}: the upload was ended by the server") from None
        return digest

    def get_file(self, key: str, local: Path) -> str:
        with self.open_read(key) as source:
            local.parent.mkdir(parents=True, exist_ok=True)
            return replace_file(source, local)

    def exists(self, key: str) -> bool:
        # Asked by a listing: unlike the 404 of a HEAD, it tells a missing object from a missing bucket.
        with _clear_errors(join_uri(self.uri, key)):
            page = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._key(key), MaxKeys=1)
        return any(item["Key"] == self._key(key) for item in page.get("Contents", ()))

    def delete(self, key: str) -> None:
        with _clear_errors(join_uri(self.uri, key)):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def list(self, prefix: str = "") -> list[str]:
        return sorted(self.versions(prefix))

    def versions(self, prefix: str = "") -> dict[str, str]:
        above = f"{self.prefix}/" if self.prefix else ""
        start = f"{self._key(prefix)}/" if prefix else above
        found: dict[str, str] = {}
        with _clear_errors(self.uri):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start):
                found |= {item["Key"].removeprefix(above): item["ETag"] for item in page.get("Contents", ())}
        # Consoles mark a folder by an empty object whose key ends with a slash.
        return {key: version for key, version in found.items() if not key.endswith("/")}

    def _key(self, key: str) -> str:
        return join_key(self.prefix, check_key(key))

    def _reader(self, key: str) -> "_ObjectReader":
        return _ObjectReader(_ObjectStream(self._client, self.bucket, self._key(key), join_uri(self.uri, key)))

    def _head(self, key: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        try:
            return self._client.head_object(Bucket=self.bucket, Key=self._key(key))
        except ClientError as error:
            if _status(error) == 404:
                return None
            raise

    def _put_object(self, key: str, data: bytes, metadata: dict[str, str], condition: dict[str, str]) -> str:
        from botocore.exceptions import ClientError

        digest = hashlib.sha256(data).hexdigest()
        for wait in (0, 1, 2, 4, 8):
            time.sleep(wait * _BUSY_WAIT_SECONDS)
            try:
                return self._client.put_object(
                    Bucket=self.bucket,
                    Key=self._key(key),
                    Body=data,
                    Metadata={_SHA256: digest, **metadata},
                    **self._checksum,
                    **self._encryption,
                    **condition,
                )["ETag"]
            except ClientError as error:
                if condition and _status(error) == 409:
                    continue  # another conditional write is being decided; S3 asks to try again
                gone = "IfMatch" in condition and error.response["Error"].get("Code") == "NoSuchKey"
                if condition and (_status(error) == 412 or gone):
                    break
                raise
        raise VersionConflict(f"{join_uri(self.uri, key)}: was changed by someone else meanwhile")


class _ObjectReader(io.BufferedReader):
    """A verified, buffered stream of one object."""

    def __init__(self, stream: "_ObjectStream"):
        super().__init__(VerifyingReader(stream, stream.expected, stream.name), CHUNK_BYTES)
        self.version = stream.version


class _ObjectStream(io.RawIOBase):
    """One object from the first byte to the last; a broken connection is resumed where it broke."""

    def __init__(self, client: Any, bucket: str, key: str, name: str):
        super().__init__()
        self.name, self._client, self._offset = name, client, 0
        self._request = {"Bucket": bucket, "Key": key}
        with _clear_errors(name):
            response = client.get_object(**self._request)
        self._body, self.version = response["Body"], response["ETag"]
        digest = response["Metadata"].get(_SHA256)
        self.expected = frozenset({digest} if digest else ())

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        from botocore import exceptions

        for attempt in range(_RESUMES):
            if attempt:
                time.sleep(attempt * _BUSY_WAIT_SECONDS)
                self._reopen()
            try:
                data = self._body.read(None if size < 0 else size)
            except (exceptions.HTTPClientError, exceptions.IncompleteReadError):
                continue
            except exceptions.FlexibleChecksumError:
                raise Damaged(f"{self.name}: differs from S3's own checksum; restore it from a copy") from None
            self._offset += len(data)
            return data
        raise TryAgain(f"{self.name}: the download broke {_RESUMES} times")

    def close(self) -> None:
        self._body.close()
        super().close()

    def _reopen(self) -> None:
        self._body.close()
        # If-Match: the rest of another version must not be joined to the start of this one.
        with _clear_errors(self.name):
            rest = self._client.get_object(**self._request, Range=f"bytes={self._offset}-", IfMatch=self.version)
        self._body = rest["Body"]


def _make_client() -> Any:
    try:
        import botocore.session
        from boto3.session import Session
        from botocore.config import Config
    except ModuleNotFoundError:
        raise UserError("s3:// URIs need boto3: pip install 'tuneloop[s3]'") from None
    # A session of its own: boto3's default one is not safe to use from several threads.
    core = botocore.session.get_session()
    session = Session(botocore_session=core)
    config = Config(retries={"mode": "standard"}, connect_timeout=10, read_timeout=60)
    if core.get_config_variable("max_attempts") is None:
        config = config.merge(Config(retries={"mode": "standard", "total_max_attempts": _TRIES}))
    client = session.client("s3", config=config)
    of_amazon = (urlparse(client.meta.endpoint_url).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    if of_amazon or (client.meta.config.s3 or {}).get("addressing_style"):
        return client
    # Servers of one's own rarely have a DNS name for every bucket.
    return session.client("s3", config=config.merge(Config(s3={"addressing_style": "path"})))


def _encryption() -> dict[str, str]:
    """What a write asks the server to encrypt with."""
    kind, key = (os.environ.get(f"TUNELOOP_S3_{name}", "") for name in ("ENCRYPTION", "KMS_KEY"))
    if kind and kind not in _ENCRYPTIONS:
        raise UserError(f"TUNELOOP_S3_ENCRYPTION={kind}: expected one of {', '.join(_ENCRYPTIONS)}")
    if key and not kind.startswith("aws:kms"):
        raise UserError("TUNELOOP_S3_KMS_KEY names a key: set TUNELOOP_S3_ENCRYPTION=aws:kms too")
    asked = {"ServerSideEncryption": kind, "SSEKMSKeyId": key}
    return {name: value for name, value in asked.items() if value}


def _is_code(error: BaseException, code: str) -> bool:
    return getattr(error, "response", {}).get("Error", {}).get("Code") == code


def _status(error: Any) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


@contextlib.contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Turn what botocore raises into one line that says whose turn it is."""
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _client_error(name, error) from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.ProfileNotFound) as error:
        raise UserError(
            f"{name}: no usable AWS credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run "
            "under a role that may use the bucket"
        ) from None
    except (exceptions.ParamValidationError, exceptions.InvalidRegionError) as error:
        raise UserError(f"{name}: not a valid S3 location ({error})") from None
    except (
        exceptions.HTTPClientError,
        exceptions.ConnectionError,
        exceptions.IncompleteReadError,
        exceptions.FlexibleChecksumError,
        exceptions.CredentialRetrievalError,
    ) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UserError(f"{name}: {error}; set AWS_CA_BUNDLE to a file with the server's authority") from None
        raise TryAgain(f"{name}: storage cannot be reached ({error})") from None
    except ValueError as error:
        if "Invalid endpoint" in str(error):
            raise UserError(f"{name}: {error}; correct AWS_ENDPOINT_URL") from None
        raise
    except exceptions.BotoCoreError as error:  # a login that has ended, a config file that cannot be read, …
        raise UserError(f"{name}: S3 cannot be used as it is set up ({error})") from None


def _client_error(name: str, error: Any) -> UserError | TryAgain:
    code, status = error.response.get("Error", {}).get("Code", ""), _status(error)
    message = error.response.get("Error", {}).get("Message", "")
    if status == 501 or code == "NotImplemented":
        return UserError(f"{name}: the server cannot do what was asked ({message}); use one that honours conditional "
                         "writes, or set AWS_REQUEST_CHECKSUM_CALCULATION=when_required")  # fmt: skip
    if status >= 500 or status == 429 or code in _BUSY:
        return TryAgain(f"{name}: storage is unavailable ({status} {code})")
    if code == "NoSuchBucket":
        return UserError(f"{name}: the bucket does not exist; create it or correct the URI")
    if status == 404:
        return NotFound(f"{name}: no such object")
    if code in _HINTS:
        return UserError(f"{name}: storage refused the request ({status} {code} {message}); {_HINTS[code]}")
    if status in (401, 403):
        return UserError(f"{name}: access denied ({code} {message}); check the credentials and the bucket's policy")
    if status == 412:
        return TryAgain(f"{name}: was replaced while it was read")
    return UserError(f"{name}: storage refused the request ({status} {code} {message})")
