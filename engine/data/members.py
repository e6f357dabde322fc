"""Which files are read, which are left alone: one rule for shards, folders and tables."""

from __future__ import annotations

from .schema import Reason

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm")

# Files that some loader would execute or unpickle. Nothing here ever does; they are counted apart, because
# finding one in a data set is worth knowing.
UNSAFE_EXTENSIONS = frozenset(
    {"pyd", "pyc", "pyo", "py", "pickle", "pkl", "joblib", "dill", "pt", "pth", "ckpt", "bin", "npz"}
    | {"so", "dll", "dylib", "exe", "com", "bat", "cmd", "sh", "ps1", "jar", "class"}
)


def split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: (key, extension), cut at the first dot of the last path component.

    >>> split_name("a/b.c/d.seg.PNG")
    ('a/b.c/d', 'seg.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def is_unsafe_path(name: str) -> bool:
    """Absolute, with a drive, with a parent folder or with a control character in it."""
    if name.startswith(("/", "\\")) or name[1:2] == ":" or "\0" in name:
        return True
    return ".." in name.replace("\\", "/").split("/")


def refusal(name: str, extension: str) -> str | None:
    """Why a member is not read, or None for an image, ``.json``, ``.txt`` or ``.npy`` member."""
    if is_unsafe_path(name):
        return Reason.UNSAFE_PATH
    last = extension.rpartition(".")[2]
    if last in UNSAFE_EXTENSIONS:
        return Reason.UNSAFE_TYPE
    if extension in IMAGE_EXTENSIONS or extension in ("json", "txt") or last == "npy":
        return None
    return Reason.UNKNOWN_TYPE
