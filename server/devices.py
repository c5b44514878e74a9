"""Disk edge: what the coordinator durably knows of devices, in SQLite.

A name has at most one enrolled key. A key is first claimed (by a token), then enrolled, and once
revoked it stays so for ever; the name may come back with another key. Every change is one
transaction with its entry in a hash-chained audit log. Threads and processes may use the database
at once: each call has a connection of its own.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxymoe.common.assignment import Application, application_bytes, parse_application
from proxymoe.common.certificates import DeviceCertificate
from proxymoe.common.errors import ConfigError
from proxymoe.common.identity import check_name
from proxymoe.common.plan import Plan
from proxymoe.server import audit
from proxymoe.server.database import Database
from proxymoe.server.enrolment import Invitation, Standing

log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS invitations (
    device TEXT PRIMARY KEY, secret_digest TEXT NOT NULL, expires REAL NOT NULL, key TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS keys (
    key TEXT PRIMARY KEY, device TEXT NOT NULL, standing TEXT NOT NULL, since REAL NOT NULL,
    serial TEXT, expires REAL, node TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS public_keys (key TEXT PRIMARY KEY, pem TEXT NOT NULL) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS enrolled ON keys (device) WHERE standing = 'enrolled';
CREATE TABLE IF NOT EXISTS plans (
    device TEXT PRIMARY KEY, application BLOB NOT NULL, plan TEXT NOT NULL, manifest TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS blobs (
    manifest TEXT NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (manifest, digest)
) STRICT, WITHOUT ROWID;
"""
NEW_KEY = "INSERT OR IGNORE INTO keys (key, device, standing, since) VALUES (?, ?, 'unknown', ?)"


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """One device name, and what is known of it now; None where there is nothing yet."""

    name: str
    standing: Standing
    """Of its newest key; unknown while it is only invited, or has not finished enrolling."""
    key: str | None
    serial: str | None
    """Of its certificate."""
    expires: float | None
    """Its certificate, or the invitation if there is none; unix seconds."""
    node: int | None
    """Its id in Flower."""
    enrolled_at: float | None
    """Unix seconds."""
    application: Application | None
    plan: str | None
    """Digest."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What a device applied for, and what it got."""

    application: Application
    plan: Plan
    manifest: str
    """Digest."""


class Devices:
    """The devices of one coordinator; a `server.enrolment.Registry`.

    Args:
        path: the database; made if it is missing.
        clock: unix seconds, for the records.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._database = Database(path, SCHEMA, clock)

    def close(self) -> None:
        """Closes the database."""
        self._database.close()

    # Enrolment

    def standing(self, key: str) -> Standing:
        """Of the device key with this digest."""
        row = self._database.row("SELECT standing FROM keys WHERE key = ?", key)
        return Standing(row[0]) if row else Standing.UNKNOWN

    def invite(self, device: str, secret_digest: str, expires: float) -> None:
        """Remembers an enrolment token; an older one for the name is void.

        Raises:
            ConfigError: not a name that a device may have.
        """
        check_name(device)
        with self._database.change("invited", device=device, expires=expires) as database:
            database.execute(
                "INSERT OR REPLACE INTO invitations VALUES (?, ?, ?, NULL)",
                (device, secret_digest, expires),
            )

    def invitation(self, device: str) -> Invitation | None:
        """The newest one for this device name, used or not."""
        row = self._database.row(
            "SELECT secret_digest, expires FROM invitations WHERE device = ?", device
        )
        return Invitation(*row) if row else None

    def claim(self, device: str, key: str) -> bool:
        """Whether that invitation is now this key's: it was unused, or this key's already.

        A key that is revoked, or another device's, gets none.
        """
        with self._database.transaction() as database:
            query = "SELECT key FROM invitations WHERE device = ?"
            invited = database.execute(query, (device,)).fetchone()
            barred = database.execute(
                "SELECT 1 FROM keys WHERE key = ? AND (device != ? OR standing = 'revoked')",
                (key, device),
            ).fetchone()
            if invited is None or barred is not None:
                return False
            if invited[0] is not None:
                return bool(invited[0] == key)
            now = self._database.clock()
            database.execute("UPDATE invitations SET key = ? WHERE device = ?", (key, device))
            database.execute(NEW_KEY, (key, device, now))
            audit.append(database, now, "claimed", device=device, key=key)
        return True

    def admit(self, certificate: DeviceCertificate) -> None:
        """Records the certificate; from now on its key is enrolled, and the name's older is not.

        A key that was revoked since it asked stays revoked.
        """
        key, device, now = certificate.key, certificate.device, self._database.clock()
        with self._database.transaction() as database:
            database.execute(NEW_KEY, (key, device, now))
            query = "SELECT standing FROM keys WHERE key = ?"
            (standing,) = database.execute(query, (key,)).fetchone()
            if standing == Standing.REVOKED:
                log.warning("device %s: key %s was revoked; not enrolled", device, key[:16])
                return
            database.execute(
                "UPDATE keys SET standing = 'revoked' WHERE device = ? AND key != ?", (device, key)
            )
            database.execute(
                "UPDATE keys SET standing = 'enrolled', since = ?, serial = ?, expires = ? "
                "WHERE key = ?",
                (now, certificate.serial, certificate.expires, key),
            )
            pem = certificate.public_key.decode()
            database.execute("INSERT OR IGNORE INTO public_keys VALUES (?, ?)", (key, pem))
            body = {"device": device, "key": key, "serial": certificate.serial}
            audit.append(database, now, "enrolled", **body)

    def revoke(self, device: str) -> list[int]:
        """Shuts a device out, for ever unless it enrols with another key; returns its Flower nodes.

        A token that it has not used is void. ConfigError: there is no such device.
        """
        with self._database.change("revoked", device=device) as database:
            gone = database.execute("DELETE FROM invitations WHERE device = ?", (device,)).rowcount
            nodes = database.execute(
                "UPDATE keys SET standing = 'revoked' WHERE device = ? AND standing != 'revoked' "
                "RETURNING node",
                (device,),
            ).fetchall()
            if not gone and not nodes:
                raise ConfigError(f"{device[:80]!r}: no such device, or revoked already")
        return [int(node) for (node,) in nodes if node is not None]

    # Flower's nodes

    def note_node(self, key: str, node: int) -> None:
        """Remembers the Flower node of a key that was claimed.

        Raises:
            ConfigError: nobody claimed a token with this key.
        """
        row = self._database.row("SELECT node FROM keys WHERE key = ?", key)
        if row is None:
            raise ConfigError(f"key {key[:16]}: no device has it; enrol the device first")
        if row[0] != str(node):
            with self._database.change("node", key=key, node=str(node)) as database:
                # As text: Flower's ids have 64 bits, SQLite's integers a sign.
                database.execute("UPDATE keys SET node = ? WHERE key = ?", (str(node), key))

    def node_of(self, device: str) -> int | None:
        """The Flower node of an enrolled device, as far as it is known."""
        query = "SELECT node FROM keys WHERE device = ? AND standing = 'enrolled'"
        row = self._database.row(query, device)
        return int(row[0]) if row and row[0] is not None else None

    def is_device(self, node: int, device: str) -> bool:
        """Whether this Flower node was admitted as that device, and still is."""
        return self.node_of(device) == node

    def is_enrolled(self, device: str) -> bool:
        """Whether some key is enrolled under this name."""
        query = "SELECT 1 FROM keys WHERE device = ? AND standing = 'enrolled'"
        return self._database.row(query, device) is not None

    def public_keys(self) -> dict[str, str]:
        """{device: PEM public key} of all that are enrolled."""
        query = (
            "SELECT device, pem FROM keys JOIN public_keys USING (key) WHERE standing = 'enrolled'"
        )
        return dict(self._database.rows(query))

    # Plans

    def keep_plan(
        self,
        device: str,
        application: Application,
        plan: Plan,
        manifest: str,
        digests: Iterable[str],
    ) -> None:
        """Remembers what a device gets from now on: all blobs with these digests, and no others."""
        body = {"device": device, "plan": plan.digest, "manifest": manifest}
        with self._database.change("planned", **body) as database:
            database.executemany(
                "INSERT OR IGNORE INTO blobs VALUES (?, ?)",
                [(manifest, bytes.fromhex(digest)) for digest in digests],
            )
            database.execute(
                "INSERT OR REPLACE INTO plans VALUES (?, ?, ?, ?)",
                (device, application_bytes(application), plan.model_dump_json(), manifest),
            )
            database.execute("DELETE FROM blobs WHERE manifest NOT IN (SELECT manifest FROM plans)")

    def planned(self, device: str) -> Planned | None:
        """What a device has, enrolled or revoked; None if it never applied."""
        row = self._database.row(
            "SELECT application, plan, manifest FROM plans WHERE device = ?", device
        )
        if row is None:
            return None
        return Planned(parse_application(row[0]), Plan.model_validate_json(row[1]), row[2])

    def plan_of(self, device: str) -> Plan | None:
        """The plan of a device, enrolled or revoked; None if it never applied."""
        found = self.planned(device)
        return found.plan if found else None

    def may_have(self, device: str, digest: str) -> bool:
        """Whether an enrolled device's plan names the blob with this digest, whatever that is."""
        try:
            wanted = bytes.fromhex(digest)
        except ValueError:
            return False
        query = (
            "SELECT 1 FROM keys JOIN plans USING (device) JOIN blobs USING (manifest) "
            "WHERE device = ? AND standing = 'enrolled' AND digest = ?"
        )
        return self._database.row(query, device, wanted) is not None

    # Lists

    def assigned(self) -> list[str]:
        """Sorted names of enrolled devices that have a plan."""
        found = self._database.rows(
            "SELECT device FROM plans JOIN keys USING (device) WHERE standing = 'enrolled' "
            "ORDER BY device"
        )
        return [name for (name,) in found]

    def num_enrolled(self) -> int:
        """Enrolled devices, with a plan or without."""
        row = self._database.row("SELECT count(*) FROM keys WHERE standing = 'enrolled'")
        return int(row[0]) if row else 0

    def entries(self) -> list[DeviceEntry]:
        """Every name that is invited or was ever enrolled, sorted."""
        invited: dict[str, float] = dict(
            self._database.rows("SELECT device, expires FROM invitations")
        )
        # Of several keys of a device the last counts: the enrolled one, else the newest.
        keys = {
            device: rest
            for device, *rest in self._database.rows(
                "SELECT device, standing, key, serial, expires, node, since FROM keys "
                "ORDER BY standing = 'enrolled', since"
            )
        }
        nothing = [Standing.UNKNOWN, None, None, None, None, None]
        names = sorted({*invited, *keys})
        return [self._entry(n, invited.get(n), *keys.get(n, nothing)) for n in names]

    def history(self) -> list[audit.Entry]:
        """Everything that ever changed; IntegrityError if the record was tampered with."""
        return self._database.history()

    def _entry(self, name: str, invited_until: float | None, *of_key: Any) -> DeviceEntry:
        standing, key, serial, expires, node, since = of_key
        planned = self.planned(name)
        return DeviceEntry(
            name=name,
            standing=Standing(standing),
            key=key,
            serial=serial,
            expires=expires if serial else invited_until,
            node=None if node is None else int(node),
            enrolled_at=since if serial else None,
            application=planned.application if planned else None,
            plan=planned.plan.digest if planned else None,
        )
