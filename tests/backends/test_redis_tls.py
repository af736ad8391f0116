"""A store on a Redis server that encrypts."""

from collections.abc import Generator
from pathlib import Path

import pytest
from redis_servers import RedisServer, free_port, needs_server

from aiokv import AsyncKVStore, ConnectError, RedisOptions, RetryPolicy

trustme = pytest.importorskip("trustme")

pytestmark = needs_server


@pytest.fixture
def tls_port(tmp_path: Path) -> Generator[int]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    plain, encrypted = free_port(), free_port()
    server = RedisServer(
        tmp_path / "server",
        *("--port", str(plain), "--tls-port", str(encrypted), "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(tmp_path / "cert.pem"), "--tls-key-file", str(tmp_path / "key.pem")),
        *("--tls-ca-cert-file", str(tmp_path / "ca.pem")),
        port=plain,
    )
    server.start()
    try:
        server.wait()
        yield encrypted
    except OSError:
        pytest.skip("this server was built without TLS")
    finally:
        server.kill()


async def test_certificate_is_checked_against_the_given_authority(tls_port: int, tmp_path: Path) -> None:
    url = f"rediss://127.0.0.1:{tls_port}"
    async with AsyncKVStore("db", url=url, redis=RedisOptions(ca_file=str(tmp_path / "ca.pem"))) as store:
        await store.set("k", "v", 60)
        assert await store.get("k") == "v"
    async with AsyncKVStore("db", url=url, retry=RetryPolicy(total_timeout=0.5)) as store:
        with pytest.raises(ConnectError):
            await store.get("k")
