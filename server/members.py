"""The devices that can take part in a round, as the round engine sees them."""

from collections.abc import Iterator, Mapping

from proxymoe.common.adapter import AdapterLayout
from proxymoe.server.devices import Devices
from proxymoe.server.round import Member


class Members(Mapping[str, Member]):
    """Enrolled devices that have a plan. A live view: who enrols later appears later.

    A device that was revoked is no member any more, yet it can be looked up: a round may be on to
    whose cohort it belongs.

    Args:
        devices: what is known of them.
        layout: of the full model's adapter.
    """

    def __init__(self, devices: Devices, layout: AdapterLayout) -> None:
        self._devices, self._layout = devices, layout
        self._held: dict[str, AdapterLayout] = {}
        """By manifest; many devices may share one."""

    def __getitem__(self, name: str) -> Member:
        found = self._devices.planned(name)
        if found is None:
            raise KeyError(name)
        if found.manifest not in self._held:
            self._held[found.manifest] = self._layout.held_under(found.plan)
        return Member(found.plan, self._held[found.manifest])

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._devices.is_enrolled(name) and self._has_plan(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._devices.assigned())

    def __len__(self) -> int:
        return len(self._devices.assigned())

    def _has_plan(self, name: str) -> bool:
        return self._devices.planned(name) is not None
