"""`parablock certs`: what it writes, for whom it is good, and what it never does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from parablock_rt.cli import app
from parablock_rt.errors import ConfigError
from parablock_rt.wire import certs

FILES = {"ca.pem", "ca.key", "server.pem", "server.key", "client-1.pem", "client-1.key", "client-2.pem", "client-2.key"}


def verifies(ca: Path, certificate: Path, purpose: str, *more: str) -> bool:
    """What an independent program says."""
    command = ["openssl", "verify", "-x509_strict", "-CAfile", str(ca), "-purpose", purpose, *more, str(certificate)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_one_command_makes_what_a_deployment_needs(tmp_path: Path) -> None:
    arguments = ["certs", str(tmp_path / "tls"), "--host", "server.example.org, 203.0.113.7,::1", "--clients", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    folder = tmp_path / "tls"
    assert {path.name for path in folder.iterdir()} == FILES
    made = json.loads(result.output)
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", made["server"]["certificate"]],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.strip().split("=")[1].replace(":", "").lower() == made["server"]["fingerprint"]
    ca, server, client = folder / "ca.pem", folder / "server.pem", folder / "client-2.pem"
    assert verifies(ca, server, "sslserver", "-verify_hostname", "server.example.org")
    assert verifies(ca, server, "sslserver", "-verify_ip", "203.0.113.7")
    assert verifies(ca, server, "sslserver", "-verify_ip", "::1")
    assert not verifies(ca, server, "sslserver", "-verify_hostname", "other.example.org")
    assert verifies(ca, client, "sslclient")
    assert not verifies(ca, client, "sslserver")
    assert not verifies(ca, server, "sslclient")


def test_private_keys_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    certs.create(tmp_path / "tls", ["localhost"], clients=1)
    for path in (tmp_path / "tls").iterdir():
        assert path.stat().st_mode & 0o777 == (0o600 if path.suffix == ".key" else 0o644)
    assert (tmp_path / "tls").stat().st_mode & 0o077 == 0


def test_nothing_is_replaced_unless_told(tmp_path: Path) -> None:
    certs.create(tmp_path, ["localhost"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "ca.pem").unlink()
    with pytest.raises(ConfigError, match=r"already has ca\.key, server\.pem, server\.key; say --force"):
        certs.create(tmp_path, ["localhost"], clients=3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        name: content for name, content in before.items() if name != "ca.pem"
    }
    (tmp_path / "server.key").chmod(0o644)
    certs.create(tmp_path, ["localhost"], force=True)
    assert (tmp_path / "server.key").read_bytes() != before["server.key"]
    assert (tmp_path / "server.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("host", ["", "server.example.org:7070", "a b", "-", "*.", "ümlaut.example"])
def test_what_is_no_host_is_an_error(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="host"):
        certs.create(tmp_path, [host] if host else [])
    assert not list(tmp_path.iterdir())


def test_one_host_as_text_is_not_taken_for_the_hosts_of_its_letters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a list of at least one host .* found 'localhost'"):
        certs.create(tmp_path, "localhost")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot make the folder .*/file/tls: Not a directory"):
        certs.create(tmp_path / "file" / "tls", ["localhost"])


def test_the_text_for_a_reader_names_the_commands_to_type(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["certs", str(tmp_path), "--host", "localhost", "--clients", "1"])
    for flag in ("--tls-cert", "--tls-key", "--tls-ca", "--tls-fingerprint", "--tls-client-ca", "ca.key signs all"):
        assert flag in result.output
