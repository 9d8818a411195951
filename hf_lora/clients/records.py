"""What is told of clients: which of them an adapter is for, and what was written for one."""

import dataclasses
import json
from typing import Any

from hf_lora.errors import listing
from hf_lora.text import printable


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether one client can use an adapter."""

    client: str
    works: bool
    reasons: tuple[str, ...]
    """Why not, a line each; nothing if it works."""

    way: str
    """How it comes to the client; if it cannot, what to do instead."""


@dataclasses.dataclass(frozen=True)
class Servable:
    """Which clients can use an adapter. ``print(servable)`` shows it as text."""

    adapter: str
    base: str | None
    """The base that was looked at; None where it is not known here, and then not asked for."""

    clients: tuple[Verdict, ...]

    def __getitem__(self, client: str) -> Verdict:
        """Return the verdict on one client.

        Raises:
            KeyError: There is no such client.
        """
        for verdict in self.clients:
            if verdict.client == client:
                return verdict
        raise KeyError(client)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __str__(self) -> str:
        """Return a line for each client that can use it, and the reasons for each that cannot."""
        base = self.base or "a base that is not known here"
        lines = [f"{self.adapter}, an adapter of {base}"]
        for each in self.clients:
            if each.works:
                lines.append(f"{each.client}: yes, {each.way}")
            else:
                lines.append(listing(f"{each.client}: no", each.reasons, f"  {each.way}"))
        return printable("\n".join(lines), longest=None)


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written for a client. ``print(exported)`` shows it as text."""

    adapter: str
    client: str
    folder: str
    files: tuple[str, ...]
    """Their names in the folder."""

    notes: tuple[str, ...]
    """What was changed, and how the client is told of them."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __str__(self) -> str:
        """Return where the files are, and what to do with them."""
        lines = [f"{self.folder}: {self.adapter} for {self.client}: {', '.join(self.files)}"]
        return printable("\n".join([*lines, *self.notes]), longest=None)
