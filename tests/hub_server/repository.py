"""One model repository: commits with git's own ids, branches, tags, pull requests."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from .discussion import Discussion
from .messages import HubError, entry_not_found, revision_not_found


def git_oid(content: bytes, kind: str = "blob") -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    head = "version https://git-lfs.github.com/spec/v1"
    return f"{head}\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Entry:
    """A file of a commit. `oid` is the git blob's id; a large file's blob is its LFS pointer."""

    oid: str
    size: int
    sha256: str | None = None

    @classmethod
    def large(cls, sha256: str, size: int) -> "Entry":
        return cls(git_oid(lfs_pointer(sha256, size)), size, sha256)

    @property
    def key(self) -> str:
        """Where the content lies in the store, and the ETag a download shows."""
        return self.sha256 or self.oid

    def describe(self, path: str) -> dict:
        """The entry as the tree and paths-info calls list it."""
        info: dict = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.sha256 is not None:
            pointer = lfs_pointer(self.sha256, self.size)
            info["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(pointer)}
        return info


def tree_oids(files: Mapping[str, Entry]) -> dict[str, str]:
    """The git tree id of every folder; the root is `""`."""
    children: dict[str, list[tuple[str, str, str]]] = {"": []}
    for path, entry in files.items():
        folder, _, name = path.rpartition("/")
        children.setdefault(folder, []).append((name, "100644", entry.oid))
        while folder:
            folder = folder.rpartition("/")[0]
            children.setdefault(folder, [])
    oids: dict[str, str] = {}
    # Deepest first: a folder's id is part of its parent's content.
    for folder in sorted(children, key=lambda f: (-f.count("/") if f else 1, f)):
        # git sorts a folder as if its name ended in a slash
        entries = sorted(children[folder], key=lambda e: e[0] + "/" * (e[1] == "40000"))
        content = b"".join(
            f"{mode} {name}\0".encode() + bytes.fromhex(oid) for name, mode, oid in entries
        )
        oids[folder] = git_oid(content, "tree")
        if folder:
            parent, _, name = folder.rpartition("/")
            children[parent].append((name, "40000", oids[folder]))
    return oids


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    description: str
    author: str
    date: datetime
    files: dict[str, Entry]

    @classmethod
    def make(
        cls,
        files: Mapping[str, Entry],
        parent: "Commit | None",
        title: str,
        description: str,
        author: str,
    ) -> "Commit":
        date = datetime.now(UTC)
        who = f"{author} <{author}@example.org> {date.timestamp():.0f} +0000"
        lines = [f"tree {tree_oids(files)['']}", f"author {who}", f"committer {who}"]
        if parent is not None:
            lines.insert(1, f"parent {parent.id}")
        message = f"{title}\n\n{description}" if description else title
        content = "\n".join([*lines, "", message]).encode()
        parent_id = None if parent is None else parent.id
        oid = git_oid(content, "commit")
        return cls(oid, parent_id, title, description, author, date, dict(files))

    def entry(self, path: str) -> Entry:
        if path not in self.files:
            raise entry_not_found("Entry not found", self.id)
        return self.files[path]


@dataclass
class Repository:
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    """Full reference name (`refs/heads/main`, `refs/tags/v1`, `refs/pr/1`) to commit id."""
    discussions: dict[int, Discussion] = field(default_factory=dict)
    created: datetime = field(default_factory=lambda: datetime.now(UTC))

    def reference(self, revision: str) -> str:
        """The full name of the branch, tag or pull request that `revision` means."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return name
        raise revision_not_found(revision)

    def resolve(self, revision: str) -> Commit:
        try:
            return self.commits[self.refs[self.reference(revision)]]
        except HubError:
            known = [c for c in self.commits if len(revision) >= 7 and c.startswith(revision)]
            if len(known) != 1:
                raise
            return self.commits[known[0]]

    def add_reference(self, name: str, commit: str) -> None:
        if name in self.refs:
            raise HubError(409, f"Reference already exists: {name}")
        self.refs[name] = commit

    def commit(
        self,
        reference: str,
        changes: Mapping[str, Entry | None],
        title: str,
        description: str = "",
        author: str = "user",
    ) -> Commit:
        """Put `changes` on top of `reference`; None removes a path."""
        parent = self.commits[self.refs[reference]] if reference in self.refs else None
        files = {**(parent.files if parent else {}), **changes}
        kept = {path: entry for path, entry in sorted(files.items()) if entry is not None}
        commit = Commit.make(kept, parent, title, description, author)
        self.commits[commit.id] = commit
        self.refs[reference] = commit.id
        return commit

    def history(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        commit: Commit | None = self.resolve(revision)
        found = []
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return found

    def listing(self, revision: str, folder: str = "", recursive: bool = False) -> list[dict]:
        """Files and folders below `folder`, as the tree call lists them."""
        commit = self.resolve(revision)
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        if prefix and not any(path.startswith(prefix) for path in commit.files):
            raise entry_not_found(f'{folder} does not exist on "{revision}"', commit.id)
        entries = [
            {"type": "directory", "oid": oid, "size": 0, "path": path}
            for path, oid in tree_oids(commit.files).items()
            if path
        ]
        entries += [entry.describe(path) for path, entry in commit.files.items()]
        inside = [e for e in entries if e["path"].startswith(prefix)]
        if not recursive:
            inside = [e for e in inside if "/" not in e["path"][len(prefix) :]]
        return sorted(inside, key=lambda e: e["path"])
