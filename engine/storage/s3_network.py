"""How S3 is reached: the proxy and the certificates that options, AWS profile and environment name.

A CA bundle or a proxy that is not there fails each request of the client as an outage of the store would,
and would be tried for minutes. So both are looked at before the first request.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import urllib3
from botocore.httpsession import ProxyConfiguration, get_cert_path
from botocore.utils import get_environ_proxies

from engine.errors import ConfigError
from engine.storage.deadlines import call
from engine.storage.redact import redact_uri
from engine.storage.transport import MOST_IDLE

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Setting:
    """A value, and what a user calls the place where it was set."""

    source: str
    value: Any


def check(fs: Any, uri: str) -> None:
    """ConfigError if a setting names a CA bundle that cannot be used, or a proxy that does not listen."""
    call(fs, "connect")
    verify = verify_setting(fs, os.environ)
    if isinstance(verify.value, str) and (reason := unusable(verify.value)):
        raise ConfigError(
            f"{uri} cannot be opened: {verify.source} names the CA bundle {verify.value}, {reason}; "
            "correct the path or remove the setting"
        )
    config = fs.s3.meta.config
    proxy = proxy_setting(config.proxies, fs.s3.meta.endpoint_url, os.environ)
    if proxy is not None and (reason := unreachable(proxy.value, config.connect_timeout)):
        raise ConfigError(
            f"{uri} cannot be opened: {proxy.source} names the proxy {redact_uri(proxy.value)}, {reason}; "
            "correct it, or list the store's host in NO_PROXY"
        )


def pool_manager(fs: Any, address: str) -> urllib3.PoolManager:
    """Connections to the host of `address`, by the settings of the client."""
    config = fs.s3.meta.config
    verify = verify_setting(fs, os.environ).value
    https = urlsplit(address).scheme == "https"
    context = tls_context(verify, config.client_cert) if https else None
    proxies = ProxyConfiguration(_proxies(config.proxies, address))
    proxy = proxies.proxy_url_for(address)
    if proxy is None:
        return urllib3.PoolManager(maxsize=MOST_IDLE, ssl_context=context)
    return urllib3.ProxyManager(
        proxy,
        proxy_headers=proxies.proxy_headers_for(proxy),
        proxy_ssl_context=tls_context(verify) if proxy.startswith("https:") else None,
        maxsize=MOST_IDLE,
        ssl_context=context,
    )


def tls_context(verify: bool | str, client_cert: str | tuple[str, str] | None = None) -> ssl.SSLContext:
    """The certificates that are accepted, and the one that is shown; both as botocore takes them."""
    context = ssl.create_default_context(cafile=get_cert_path(verify) or None)
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if client_cert is not None:
        context.load_cert_chain(*([client_cert] if isinstance(client_cert, str) else client_cert))
    return context


def verify_setting(fs: Any, environ: Mapping[str, str]) -> Setting:
    """What certificates are checked with: a bundle's path, True or False. The order is botocore's."""
    variable = "AWS_CA_BUNDLE"
    for source, value in (
        ("the storage option client_kwargs.verify", fs.client_kwargs.get("verify")),
        (variable if variable in environ else "ca_bundle of the AWS profile", _of_profile(fs, "ca_bundle")),
        ("REQUESTS_CA_BUNDLE", environ.get("REQUESTS_CA_BUNDLE")),
    ):
        if value is not None:
            return Setting(source, value)
    return Setting("the default", True)


def proxy_setting(
    given: Mapping[str, str] | None, address: str, environ: Mapping[str, str]
) -> Setting | None:
    """The proxy through which requests to `address` go. `given` is the option, which comes first."""
    scheme = urlsplit(address).scheme
    value = _proxies(given, address).get(scheme)
    if not value:
        return None
    if given is not None:
        return Setting("the storage option config_kwargs.proxies", value)
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper())
    source = next((name for name in names if environ.get(name) == value), "the system's configuration")
    return Setting(source, value)


def unusable(bundle: str) -> str:
    """Why no certificate can be checked with a CA bundle; empty if it can be read."""
    try:
        tls_context(bundle)
    except FileNotFoundError:
        return "which does not exist"
    except OSError as error:  # ssl.SSLError is one
        return f"which cannot be read ({error.strerror or error})"
    return ""


def unreachable(proxy: str, connect_secs: float) -> str:
    """Why no request can go through a proxy; empty if something listens there."""
    try:
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme="http")
        host, port = parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        host = port = None
    if host is None or port is None or parts.scheme not in _PORTS:
        return "which is not an address like http://host:port"
    try:
        socket.create_connection((host, port), timeout=connect_secs).close()
    except OSError as error:
        return f"where nothing answers ({error.strerror or error})"
    return ""


def _proxies(given: Mapping[str, str] | None, address: str) -> Mapping[str, str]:
    if given is not None:
        return given
    found: Mapping[str, str] = get_environ_proxies(address)
    return found


def _of_profile(fs: Any, name: str) -> Any:
    return fs.session.get_config_variable(name)
