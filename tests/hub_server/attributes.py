"""`.gitattributes` and `.gitignore`: which files are large, which are left out."""

from fnmatch import fnmatch

_LARGE = "bin bin.* ckpt gguf h5 model msgpack npy npz onnx pkl pt pth safetensors tar zip"
GITATTRIBUTES = "".join(f"*.{end} filter=lfs diff=lfs merge=lfs -text\n" for end in _LARGE.split())


def lfs_patterns(attributes: str) -> list[str]:
    """The patterns of a `.gitattributes` file that name large files."""
    lines = [line.split() for line in attributes.splitlines()]
    return [words[0] for words in lines if "filter=lfs" in words[1:]]


def matches(path: str, patterns: list[str]) -> bool:
    """git's plain patterns: a name anywhere, a path from the root, a folder."""
    names = path.split("/")
    for pattern in patterns:
        if not pattern or pattern.startswith("#"):
            continue
        bare = pattern.rstrip("/")
        if "/" in bare:
            if fnmatch(path, bare.lstrip("/")) or fnmatch(path, f"{bare.lstrip('/')}/*"):
                return True
        elif any(fnmatch(name, bare) for name in (names if pattern == bare else names[:-1])):
            return True
    return False
