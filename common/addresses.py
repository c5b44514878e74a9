"""Addresses of hosts, as people write them. It imports nothing heavy: every process starts here."""

import ipaddress
import re

from proxymoe.common.errors import ConfigError

HOST = r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*"
ADDRESS = rf"(\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>{HOST})):(?P<port>[0-9]{{1,5}})"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6 address]:port`.

    Raises:
        ConfigError: neither of them.
    """
    found = re.fullmatch(ADDRESS, address)
    if not found or not 0 < int(found["port"]) < 1 << 16:
        raise ConfigError(f"address {address[:80]!r}: write host:port, or [v6 address]:port")
    return found["v6"] or found["host"], int(found["port"])


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or address alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
