"""Who may do what: access tokens and their roles, as the Hub knows them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Token:
    """An access token. It acts for one user, who may belong to organizations."""

    value: str
    user: str
    role: Literal["write", "read"] = "write"
    orgs: tuple[str, ...] = ()

    def owns(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in (self.user, *self.orgs)

    def profile(self) -> dict:
        """The answer to `whoami-v2`."""
        return {
            "type": "user",
            "id": self.user,
            "name": self.user,
            "fullname": self.user.title(),
            "email": f"{self.user}@example.org",
            "emailVerified": True,
            "canPay": False,
            "isPro": False,
            "orgs": [{"type": "org", "name": org, "roleInOrg": "write"} for org in self.orgs],
            "auth": {
                "type": "access_token",
                "accessToken": {"displayName": "tests", "role": self.role},
            },
        }


WRITE = Token("hf_userwrite", "user", orgs=("org",))
READ = Token("hf_userread", "user", role="read", orgs=("org",))
OTHER = Token("hf_otherwrite", "other")
