"""Proxies and certificates of S3: the settings are used, and what they name wrongly is refused at once."""

from __future__ import annotations

import http.client
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import ConfigError, StorageError, StorageUnavailableError
from engine.storage.remote import FsspecStorage
from engine.storage.remote_failures import UntrustedError
from engine.storage.retry import Retry
from tests.services.certificates import certificate
from tests.services.moto import BUCKET, S3Server
from tests.storage.buffers import pattern, source
from tests.storage.contract import SEVERAL_WINDOWS, read_all

pytest.importorskip("botocore")
from engine.storage.s3_network import Setting, proxy_setting, unreachable, verify_setting
from engine.storage.transport import RefusedError, Transport

NEVER = threading.Event()
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy, bundle or profile but those that a test names."""
    for name in (*PROXY_VARIABLES, *map(str.lower, PROXY_VARIABLES), "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


class Proxy(ThreadingHTTPServer):
    """Passes requests on, by absolute addresses or through a tunnel; `seen` names them. Once `gone`, none."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.seen: list[str] = []
        self.gone = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def pass_on(self) -> None:
        assert self.path.startswith("http://"), self.path
        host, _, target = self.path.removeprefix("http://").partition("/")
        self.server.seen.append(f"{self.command} {self.path}")
        if self.server.gone:
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(host)
        connection.request(self.command, f"/{target}", body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.headers.get("Content-Length", str(len(data))))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on

    def do_CONNECT(self) -> None:
        self.server.seen.append(f"CONNECT {self.path}")
        host, _, port = self.path.partition(":")
        with socket.create_connection((host, int(port))) as there:
            self.send_response(200)
            self.end_headers()
            up = threading.Thread(target=pump, args=(self.connection, there))
            up.start()
            pump(there, self.connection)
            up.join()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


class TakesAll(BaseHTTPRequestHandler):
    """A store that takes any part."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("ETag", '"tag"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    with serving(made):
        yield made


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def opened(s3_server: S3Server, pauses: list[float]) -> Callable[..., FsspecStorage]:
    """Opens the test's bucket, with a client of its own; `pauses` notes every second try."""

    def open_with(**options: object) -> FsspecStorage:
        merged = {**s3_server.options, "skip_instance_cache": True, **options}
        return FsspecStorage(f"s3://{BUCKET}/network", merged, retry=Retry(sleep=pauses.append))

    return open_with


def refused(storage: FsspecStorage) -> str:
    """What the first use says. It must be one sentence, and the second use must say it too."""
    said = set()
    for _ in range(2):
        with pytest.raises(ConfigError) as raised:
            storage.list_dir()
        said.add(str(raised.value))
    (text,) = said
    assert text.startswith(f"s3://{BUCKET}/network cannot be opened: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_a_ca_bundle_that_is_missing_is_refused_at_once(
    opened: Callable[..., FsspecStorage],
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str,
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "no.pem"))
    assert f"{variable} names the CA bundle {tmp_path}/no.pem, which does not exist" in refused(opened())
    assert pauses == []


def test_a_ca_bundle_without_certificates_is_refused_at_once(
    opened: Callable[..., FsspecStorage], pauses: list[float], tmp_path: Path
) -> None:
    (tmp_path / "empty.pem").write_text("none here")
    storage = opened(**{"client_kwargs.verify": str(tmp_path / "empty.pem")})
    assert "client_kwargs.verify names the CA bundle" in (text := refused(storage))
    assert "empty.pem, which cannot be read" in text
    assert pauses == []


def test_the_ca_bundle_of_a_profile_is_looked_at(
    opened: Callable[..., FsspecStorage], tmp_path: Path
) -> None:
    (tmp_path / "config").write_text("[default]\nca_bundle = /no/such/bundle.pem\n")
    assert "ca_bundle of the AWS profile names the CA bundle /no/such/bundle.pem" in refused(opened())


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def test_a_proxy_that_does_not_listen_is_refused_at_once(
    opened: Callable[..., FsspecStorage], pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = closed_port()
    monkeypatch.setenv("HTTP_PROXY", f"http://me:hunter2@127.0.0.1:{port}")
    text = refused(opened())
    assert f"HTTP_PROXY names the proxy http://***@127.0.0.1:{port}, where nothing answers" in text
    assert "hunter2" not in text
    assert pauses == []


def test_a_proxy_that_is_no_address_is_refused_at_once(
    opened: Callable[..., FsspecStorage], pauses: list[float]
) -> None:
    text = refused(opened(**{"config_kwargs.proxies": {"http": "http://proxy:port"}}))
    assert "config_kwargs.proxies names the proxy http://proxy:port, which is not an address" in text
    assert pauses == []


def test_a_proxy_that_goes_away_later_is_an_outage(
    opened: Callable[..., FsspecStorage], pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy()
    with serving(proxy):
        monkeypatch.setenv("HTTP_PROXY", proxy.address)
        storage = opened()
        storage.write_file("a", b"1")
    proxy.gone = True
    with pytest.raises(StorageUnavailableError, match="gave up after 8 tries"):
        storage.write_file("a", b"2")
    assert len(pauses) == 7


def test_everything_goes_through_the_proxy(
    opened: Callable[..., FsspecStorage], proxy: Proxy, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.address)
    storage, data = opened(), pattern(SEVERAL_WINDOWS)
    storage.write_shard("shard", source(data))
    assert read_all(storage, "shard") == data
    where = f"{s3_server.endpoint}/{BUCKET}/network/shard"
    signed = [seen for seen in proxy.seen if "Signature=" in seen]
    assert [seen.partition("?")[0] for seen in signed] == [f"PUT {where}"] * 3 + [f"GET {where}"] * (
        len(signed) - 3
    )
    assert len(signed) > 3
    assert [seen for seen in proxy.seen if seen.startswith("POST ")], "the client's own requests too"


def test_no_proxy_is_honoured(
    opened: Callable[..., FsspecStorage], proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    storage, data = opened(), pattern(SEVERAL_WINDOWS)
    storage.write_shard("direct", source(data))
    assert read_all(storage, "direct") == data
    assert proxy.seen == []


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and certificate of a store by https."""
    chain, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), TakesAll)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    with serving(server):
        yield f"https://127.0.0.1:{server.server_address[1]}", chain


def transport_to(address: str, **settings: Any) -> Transport:
    """As S3Multipart makes it, with a client whose settings are these."""
    from engine.storage.s3_network import pool_manager

    return Transport(pool_manager(fake_client(**settings), address))


def fake_client(verify: Any = None, profile: Any = None, proxies: Any = None) -> Any:
    config = SimpleNamespace(proxies=proxies, client_cert=None)
    return SimpleNamespace(
        client_kwargs={} if verify is None else {"verify": verify},
        session=SimpleNamespace(get_config_variable=lambda name: profile),
        s3=SimpleNamespace(meta=SimpleNamespace(config=config)),
    )


def test_a_certificate_has_to_be_trusted(tls: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    address, chain = tls
    with pytest.raises(RefusedError, match="its certificate was not accepted: self"):
        transport_to(address).put(f"{address}/k?X-Signature=hunter2", memoryview(b"x"), NEVER)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(chain))
    assert transport_to(address).put(f"{address}/k", memoryview(pattern(1 << 20)), NEVER) == '"tag"'
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert transport_to(address, verify=str(chain)).put(f"{address}/k", memoryview(b"x"), NEVER) == '"tag"'


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_verification_can_be_turned_off(tls: tuple[str, Path]) -> None:
    address, _ = tls
    assert transport_to(address, verify=False).put(f"{address}/k", memoryview(b"x"), NEVER) == '"tag"'


def test_https_goes_through_a_tunnel(tls: tuple[str, Path], proxy: Proxy) -> None:
    """The proxy sees the host, and nothing of what passes."""
    address, chain = tls
    transport = transport_to(address, verify=str(chain), proxies={"https": proxy.address})
    for _ in range(2):
        assert transport.put(f"{address}/k", memoryview(pattern(1 << 20)), NEVER) == '"tag"'
    assert proxy.seen == [f"CONNECT {address.removeprefix('https://')}"]


def test_an_untrusted_certificate_is_no_outage(
    tls: tuple[str, Path], opened: Callable[..., FsspecStorage], pauses: list[float]
) -> None:
    address, _ = tls
    with pytest.raises(StorageError, match="its certificate is not trusted") as raised:
        opened(endpoint_url=address).list_dir()
    assert type(raised.value) is UntrustedError
    assert pauses == []


def test_no_signature_in_the_librarys_log(caplog: pytest.LogCaptureFixture) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), TakesAll)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    with serving(server), caplog.at_level(logging.DEBUG, "urllib3"):
        transport_to(address).put(f"{address}/k?X-Amz-Signature=hunter2", memoryview(b"x"), NEVER)
    assert "/k?***" in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize(
    ("option", "profile", "environ", "expected"),
    [
        (None, None, {}, Setting("the default", True)),
        (None, None, {"REQUESTS_CA_BUNDLE": "r"}, Setting("REQUESTS_CA_BUNDLE", "r")),
        (None, "a", {"AWS_CA_BUNDLE": "a", "REQUESTS_CA_BUNDLE": "r"}, Setting("AWS_CA_BUNDLE", "a")),
        (None, "p", {"REQUESTS_CA_BUNDLE": "r"}, Setting("ca_bundle of the AWS profile", "p")),
        ("o", "p", {}, Setting("the storage option client_kwargs.verify", "o")),
        (False, "p", {}, Setting("the storage option client_kwargs.verify", False)),
    ],
)
def test_which_bundle_is_used(option: Any, profile: Any, environ: dict[str, str], expected: Setting) -> None:
    assert verify_setting(fake_client(option, profile), environ) == expected


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        (None, {}, None),
        (None, {"HTTP_PROXY": "http://p:1"}, None),
        (None, {"HTTPS_PROXY": "http://p:1"}, Setting("HTTPS_PROXY", "http://p:1")),
        (None, {"https_proxy": "http://p:1"}, Setting("https_proxy", "http://p:1")),
        (None, {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "store.example"}, None),
        ({}, {"HTTPS_PROXY": "http://p:1"}, None),
        ({"https": "p:1"}, {}, Setting("the storage option config_kwargs.proxies", "p:1")),
    ],
)
def test_which_proxy_is_used(
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str] | None,
    environ: dict[str, str],
    expected: Setting | None,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert proxy_setting(given, "https://bucket.store.example/key", environ) == expected


@pytest.mark.parametrize("proxy", ["http://", "http://:3128", "http://h:port", "socks5://h:1", "http://[::1"])
def test_what_is_no_proxy(proxy: str) -> None:
    assert "which is not an address" in unreachable(proxy, 10.0)
