"""S3's own ways to fail, over real HTTP."""

import os
import shutil
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from werkzeug.serving import make_server

from tests.s3_server import BUCKET, s3_server  # noqa: F401
from tuneloop.errors import TryAgain, UserError
from tuneloop.storage import ABSENT, VersionConflict, open_storage


def test_s3_requests_use_the_path_style_and_are_checked_by_sha256(s3_server):  # noqa: F811
    storage = open_storage(f"s3://{BUCKET}/p")
    storage.write_bytes("a", b"x")
    assert ("PUT", f"/{BUCKET}/p/a") in s3_server.requests
    head = s3_server.client().head_object(Bucket=BUCKET, Key="p/a", ChecksumMode="ENABLED")
    assert head["ChecksumSHA256"]


def test_s3_missing_bucket_and_credentials_are_user_errors(s3_server, monkeypatch):  # noqa: F811
    nowhere = open_storage("s3://nowhere/p")
    for action in (lambda: nowhere.read_bytes("a"), lambda: nowhere.write_bytes("a", b""),
                   lambda: nowhere.exists("a"), nowhere.list):  # fmt: skip
        with pytest.raises(UserError, match="bucket does not exist"):
            action()
    with pytest.raises(UserError, match="not a valid S3 location"):
        open_storage("s3://Bad_Bucket!").read_bytes("a")
    s3_server.refuse["GET", 403, "AccessDenied"] = 1
    with pytest.raises(UserError, match="access denied"):
        open_storage(f"s3://{BUCKET}").read_bytes("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL"):
        open_storage(f"s3://{BUCKET}").read_bytes("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID"):
        open_storage(f"s3://{BUCKET}").read_bytes("a")


def test_s3_without_boto3_says_what_to_install(s3_server, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    with pytest.raises(UserError, match="pip install"):
        open_storage(f"s3://{BUCKET}")


def test_s3_is_retried_and_then_it_is_try_again(s3_server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    storage = open_storage(f"s3://{BUCKET}/p")
    s3_server.refuse["PUT", 503, "SlowDown"] = 1
    storage.write_bytes("a", b"x")
    for method, action in (
        ("PUT", lambda: storage.write_bytes("a", b"y")),
        ("PUT", lambda: storage.put_file(Path(__file__), "a")),
        ("GET", lambda: storage.read_bytes("a")),
        ("GET", storage.list),
        ("GET", lambda: storage.exists("a")),
    ):
        s3_server.refuse = {(method, 503, "SlowDown"): 99}
        with pytest.raises(TryAgain, match="unavailable"):
            action()
    s3_server.refuse = {}
    assert storage.read_bytes("a") == b"x"


def test_s3_that_cannot_be_reached_is_try_again(s3_server, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    storage = open_storage(f"s3://{BUCKET}")
    for action in (lambda: storage.read_bytes("a"), lambda: storage.put_file(Path(__file__), "a")):
        with pytest.raises(TryAgain, match="cannot be reached"):
            action()


def test_a_conditional_write_whose_answer_was_lost_has_won(s3_server):  # noqa: F811
    storage = open_storage(f"s3://{BUCKET}")
    s3_server.lose_answers = 1
    first = storage.write_bytes("alias", b"1", if_version=ABSENT)
    s3_server.lose_answers = 1
    second = storage.write_bytes("alias", b"2", if_version=first)
    assert storage.read_versioned("alias") == (b"2", second)


def test_a_conditional_write_that_s3_is_still_deciding_is_tried_again(s3_server, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tuneloop.storage.s3._BUSY_WAIT_SECONDS", 0.01)
    storage = open_storage(f"s3://{BUCKET}")
    s3_server.refuse["PUT", 409, "ConditionalRequestConflict"] = 2
    storage.write_bytes("alias", b"1", if_version=ABSENT)
    s3_server.refuse["PUT", 409, "ConditionalRequestConflict"] = 99
    with pytest.raises(VersionConflict):
        storage.write_bytes("other", b"1", if_version=ABSENT)


def test_a_broken_download_goes_on_where_it_broke(s3_server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tuneloop.storage.s3._BUSY_WAIT_SECONDS", 0.01)
    storage = open_storage(f"s3://{BUCKET}")
    data = os.urandom(3_000_000)
    storage.write_bytes("big", data)
    s3_server.cut_bodies = 3
    storage.get_file("big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == data
    assert s3_server.cut_bodies == 0
    s3_server.cut_bodies, s3_server.cut_share = 99, 0.0
    with pytest.raises(TryAgain, match="broke"):
        storage.get_file("big", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_replaced_object_is_not_joined_to_the_start_of_the_old_one(s3_server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tuneloop.storage.s3._BUSY_WAIT_SECONDS", 0.01)
    storage = open_storage(f"s3://{BUCKET}")
    storage.write_bytes("big", b"a" * 3_000_000)
    s3_server.cut_bodies = 1
    with storage.open_read("big") as stream:
        assert stream.read(10) == b"a" * 10
        storage.write_bytes("big", b"b" * 3_000_000)
        with pytest.raises(TryAgain, match="was replaced"):
            stream.read()


def test_a_multipart_upload_whose_last_answer_was_lost_is_there(s3_server, tmp_path):  # noqa: F811
    storage = open_storage(f"s3://{BUCKET}")
    (tmp_path / "big").write_bytes(os.urandom(9_000_000))
    s3_server.lose_completions = 1
    digest = storage.put_file(tmp_path / "big", "big")
    assert storage.get_file("big", tmp_path / "back") == digest
    s3_server.refuse["POST", 404, "NoSuchUpload"] = 99
    with pytest.raises(TryAgain, match="ended by the server"):
        storage.put_file(tmp_path / "big", "other")


def test_checksums_behind_the_body_can_be_left_out(s3_server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    storage = open_storage(f"s3://{BUCKET}")
    (tmp_path / "big").write_bytes(os.urandom(9_000_000))
    digest = storage.put_file(tmp_path / "big", "big")
    storage.write_bytes("small", b"x")
    for key in ("big", "small"):
        head = s3_server.client().head_object(Bucket=BUCKET, Key=key, ChecksumMode="ENABLED")
        assert "ChecksumSHA256" not in head
    assert storage.get_file("big", tmp_path / "back") == digest


@pytest.mark.parametrize(
    ("status", "code", "kind", "message"),
    [
        (501, "NotImplemented", UserError, "conditional writes"),
        (400, "ExpiredToken", UserError, "expired"),
        (403, "RequestTimeTooSkewed", UserError, "clock"),
        (400, "AuthorizationHeaderMalformed", UserError, "AWS_REGION"),
        (400, "IncompleteBody", TryAgain, "unavailable"),
    ],
)
def test_s3_refusals_say_what_to_do(s3_server, monkeypatch, status, code, kind, message):  # noqa: F811
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage = open_storage(f"s3://{BUCKET}")
    s3_server.refuse["PUT", status, code] = 9
    with pytest.raises(kind, match=message):
        storage.write_bytes("a", b"x", if_version=ABSENT)


def test_a_login_that_has_ended_is_one_clear_line(s3_server, monkeypatch):  # noqa: F811
    from botocore.exceptions import UnauthorizedSSOTokenError

    storage = open_storage(f"s3://{BUCKET}")

    def ended(**_: object) -> None:
        raise UnauthorizedSSOTokenError

    monkeypatch.setattr(storage._client, "delete_object", ended)  # pyright: ignore
    with pytest.raises(UserError, match="SSO session"):
        storage.delete("a")


@pytest.mark.skipif(not shutil.which("openssl"), reason="the openssl command is missing")
def test_a_server_that_nobody_vouches_for_is_the_users_to_mend(monkeypatch, tmp_path):
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "1",
         "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"], capture_output=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    server = make_server("127.0.0.1", 0, lambda *_: [], ssl_context=context)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {"AWS_ENDPOINT_URL": f"https://127.0.0.1:{server.port}", "AWS_MAX_ATTEMPTS": "1",
                        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(UserError, match="AWS_CA_BUNDLE"):
            open_storage(f"s3://{BUCKET}").read_bytes("a")
    finally:
        server.shutdown()
