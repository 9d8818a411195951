"""A discussion or pull request of a repository, and the list of what happened in it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime


def timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


@dataclass
class Discussion:
    num: int
    title: str
    author: str
    is_pull_request: bool
    status: str
    """open, closed; a pull request can also be draft or merged."""
    base: str | None = None
    """The commit that a pull request started from."""
    merge_commit: str | None = None
    events: list[dict] = field(default_factory=list)
    created: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def reference(self) -> str:
        return f"refs/pr/{self.num}"

    def add_event(self, kind: str, author: str, **data: object) -> dict:
        event = {
            "id": f"{self.num:08x}{len(self.events):08x}",
            "type": kind,
            "author": {"name": author},
            "createdAt": timestamp(datetime.now(UTC)),
            "data": data,
        }
        self.events.append(event)
        return event

    def comment(self, author: str, text: str) -> dict:
        latest = {"raw": text, "updatedAt": timestamp(datetime.now(UTC))}
        return self.add_event(
            "comment", author, edited=False, hidden=False, latest=latest, history=[]
        )

    def summary(self, repo_id: str) -> dict:
        return {
            "num": self.num,
            "title": self.title,
            "author": {"name": self.author},
            "status": self.status,
            "isPullRequest": self.is_pull_request,
            "createdAt": timestamp(self.created),
            "repo": {"name": repo_id, "type": "model"},
        }

    def details(self, repo_id: str) -> dict:
        details = self.summary(repo_id) | {"events": self.events}
        if self.is_pull_request:
            changes = {"base": "refs/heads/main"}
            if self.merge_commit is not None:
                changes["mergeCommitId"] = self.merge_commit
            details |= {"changes": changes, "filesWithConflicts": []}
        return details
