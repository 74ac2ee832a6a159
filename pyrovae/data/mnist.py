"""MNIST's four files: found in a folder or downloaded, always checked, and parsed.

Each file is looked for as ``mnist/NAME.gz`` and ``NAME.gz`` (or without ``.gz``) in the folder ``root``, or in the
folder that the environment variable ``PYROVAE_DATA`` names; then in the user's cache; then at ``MIRRORS``, in order. A
downloaded file goes into the cache.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np

from pyrovae.checkpoint import write_bytes

__all__ = ["MD5", "MIRRORS", "read"]

MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
"""Base URLs, tried in order. Assign another tuple to download from another place."""

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""MD5 of the uncompressed bytes of each file, as the gzip wrapping differs between mirrors."""


class _Damaged(ValueError):
    """A file is not the one that its name promises."""


def read(root: str | Path | None = None) -> dict[str, np.ndarray]:
    """Return uint8 arrays: ``train images`` (60000, 28, 28), ``train labels`` (60000,), and the same for ``test``.

    Raises:
        FileNotFoundError: ``root`` or ``PYROVAE_DATA`` names no folder.
        ValueError: a file is damaged.
        ConnectionError: a file is nowhere on this machine and no mirror gives it.
    """
    folder = _folder(root)
    arrays = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        arrays[f"{part} images"] = _parse(_find(f"{prefix}-images-idx3-ubyte", folder))
        arrays[f"{part} labels"] = _parse(_find(f"{prefix}-labels-idx1-ubyte", folder))
    return arrays


def _folder(root: str | Path | None) -> Path | None:
    name, value = ("root", root) if root is not None else ("PYROVAE_DATA", os.environ.get("PYROVAE_DATA"))
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name}: expected a folder that holds mnist/{next(iter(MD5))}.gz and its like; there is no "
            f"folder {folder}. Correct it, or leave {name} out to download the files."
        )
    return folder


def _find(stem: str, folder: Path | None) -> bytes:
    """Return the uncompressed bytes of one file, from the folder, the cache or a mirror."""
    if folder is not None:
        for path in (folder / "mnist" / f"{stem}.gz", folder / f"{stem}.gz", folder / "mnist" / stem, folder / stem):
            if path.is_file():
                try:
                    return _checked(path.read_bytes(), stem, str(path))
                except _Damaged as error:  # the user's own file: change nothing
                    raise ValueError(f"{error} Replace the file, or delete it to have it downloaded.") from error
    import pooch

    cached = Path(pooch.os_cache("pyrovae")) / "mnist" / f"{stem}.gz"
    if cached.is_file():
        try:
            return _checked(cached.read_bytes(), stem, str(cached))
        except _Damaged:  # our own copy: fetch another
            cached.unlink()
    return _download(stem, cached, folder)


def _download(stem: str, cached: Path, folder: Path | None) -> bytes:
    import pooch

    # pooch.retrieve would log the hash of each file and ask to pin it, but only the content is pinned here. The check
    # is made in memory, so the cache never holds a bad file.
    download = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=2**16)
    failures: list[Exception] = []
    for mirror in MIRRORS:
        url = f"{mirror.rstrip('/')}/{stem}.gz"
        buffer = io.BytesIO()
        try:
            download(url, buffer, None)
            content = _checked(buffer.getvalue(), stem, url)
        except (OSError, _Damaged) as error:  # requests' exceptions are OSErrors
            if (response := getattr(error, "response", None)) is not None:
                response.close()  # pooch leaves the socket of an HTTP error open
            failures.append(error)
            continue
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(cached, buffer.getvalue())
        except OSError as error:
            warnings.warn(
                f"mnist: {cached} cannot be written ({error}), so the next use downloads {stem}.gz again. "
                f"Set PYROVAE_DATA to a folder that holds mnist/{stem}.gz.",
                stacklevel=2,
            )
        return content
    kind = ValueError if failures and all(isinstance(f, _Damaged) for f in failures) else ConnectionError
    raise kind(
        f"mnist: {stem}.gz {f'is not in {folder}, and ' if folder else ''}could not be downloaded.\n"
        + "".join(f"  {failure}\n" for failure in failures)
        + "Fix: connect to the network and try again; or fetch these files elsewhere, put them into a folder "
        "`mnist`, and name the folder above it by the environment variable PYROVAE_DATA or by root=...:\n"
        + "\n".join(f"  mnist/{name}.gz" for name in MD5)
    )


def _checked(raw: bytes, stem: str, where: str) -> bytes:
    """Return the uncompressed content of ``raw``, gzip or not; raise unless it is the file that ``stem`` names."""
    try:  # a server or a browser may have unpacked the file
        content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    except (OSError, EOFError, zlib.error) as error:
        found = f"gzip that does not unpack ({error})"
    if found != MD5[stem]:
        raise _Damaged(f"{where} is damaged: expected MD5 {MD5[stem]} of the uncompressed bytes; found {found}.")
    return content


def _parse(content: bytes) -> np.ndarray:
    """Unpack IDX: three bytes for uint8, the rank, the sizes as big-endian uint32, the values. Its MD5 is checked."""
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
