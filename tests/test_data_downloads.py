"""Downloads: checked, bounded, resumed; archives are read without extracting them."""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.file_server import FileServer, serving

from koclip.config import RunError
from koclip.data_sets.archives import member, members
from koclip.data_sets.downloads import Download, fetch, fetch_all

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as running:
        running.files["/a.bin"] = CONTENT
        yield running


def wanted(server: FileServer, sha256: str | None = SHA256, max_bytes: int = 20_000, **options: str) -> Download:
    return Download("a.bin", f"{server.url}/a.bin", max_bytes, sha256, **options)


def downloaded(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "downloads").iterdir())


def test_a_file_is_downloaded_once(server, tmp_path):
    assert fetch(wanted(server), tmp_path).read_bytes() == CONTENT
    assert fetch(wanted(server), tmp_path) == tmp_path / "downloads" / "a.bin"
    assert len(server.requests) == 1
    assert not (tmp_path / "checksums.json").exists()  # its checksum is known


def test_another_content_is_refused(server, tmp_path):
    with pytest.raises(RunError, match=r"a\.bin.*sha256"):
        fetch(wanted(server, "0" * 64), tmp_path)
    with pytest.raises(RunError, match=r"a\.bin.*md5"):
        fetch(wanted(server, None, md5="0" * 32), tmp_path)
    fetch(wanted(server, None, md5=hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()), tmp_path)


def test_an_unknown_checksum_is_recorded_and_binds_the_next_download(server, tmp_path, capsys):
    fetch(wanted(server, None), tmp_path)
    assert json.loads((tmp_path / "checksums.json").read_text()) == {"a.bin": SHA256}
    assert SHA256 in capsys.readouterr().out
    (tmp_path / "downloads" / "a.bin").unlink()
    server.files["/a.bin"] = CONTENT[::-1]
    with pytest.raises(RunError, match=SHA256):
        fetch(wanted(server, None), tmp_path)


@pytest.mark.parametrize("announces", [True, False])
def test_a_file_that_is_too_large_is_not_kept(server, tmp_path, announces):
    server.announces = announces
    with pytest.raises(RunError, match=r"a\.bin.*5,000"):
        fetch(wanted(server, max_bytes=5_000), tmp_path)
    assert sum(file.stat().st_size for file in (tmp_path / "downloads").iterdir()) == 0


def test_a_broken_download_continues(server, tmp_path):
    server.break_after = 3_000
    with pytest.raises(RunError, match=r"a\.bin.*failed"):
        fetch(wanted(server), tmp_path)
    assert downloaded(tmp_path) == ["a.bin.part"]
    server.break_after = None
    assert fetch(wanted(server), tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=3000-"]
    assert downloaded(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("etags", "asked"), [(['"1"', '"1"'], "bytes=3000-"), (['"1"', '"2"'], "bytes=3000-"), ([], None)]
)
def test_a_file_without_known_checksum_continues_only_if_the_server_says_it_is_the_same(server, tmp_path, etags, asked):
    server.break_after = 3_000
    server.etags = {"/a.bin": etags[0]} if etags else {}
    with pytest.raises(RunError, match=r"a\.bin"):
        fetch(wanted(server, None), tmp_path)
    server.break_after = None
    server.etags = {"/a.bin": etags[1]} if etags else {}
    if etags == ['"1"', '"2"']:
        server.files["/a.bin"] = CONTENT[::-1]
    assert fetch(wanted(server, None), tmp_path).read_bytes() == server.files["/a.bin"]
    assert server.requests[-1][1] == asked


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    part = tmp_path / "downloads" / "a.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT * 2)
    with pytest.raises(RunError, match=r"a\.bin.*416"):
        fetch(wanted(server), tmp_path)
    assert fetch(wanted(server), tmp_path).read_bytes() == CONTENT


def test_many_files_are_fetched_and_the_first_failure_is_named(server, tmp_path):
    server.files |= {f"/{number}.jpg": bytes([number]) for number in range(20)}
    asked = [Download(f"{number}.jpg", f"{server.url}/{number}.jpg", 100) for number in range(20)]
    files = fetch_all(asked, tmp_path, "photos")
    assert [file.read_bytes() for file in files] == [bytes([number]) for number in range(20)]
    assert len(json.loads((tmp_path / "checksums.json").read_text())) == 20
    with pytest.raises(RunError, match=r"/21\.jpg.*404"):
        fetch_all([*asked, Download("21.jpg", f"{server.url}/21.jpg", 100)], tmp_path, "photos")


def archive(file: Path, content: dict[str, bytes]) -> Path:
    """Write a zip or a tar archive with these files, and in the tar file a link out of it."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w") as opened:
            for name, data in content.items():
                opened.writestr(name, data)
        return file
    with tarfile.open(file, "w:gz") as opened:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(link)
    return file


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_archives_are_read_and_nothing_is_written(name, tmp_path):
    """A path that leads out of the archive is a name like others; a link is no file."""
    file = archive(tmp_path / name, {"x/1.jpg": b"1", "../../2.jpg": b"2", "x/1.txt": b"3"})
    assert dict(members(file, r".*\.jpg")) == {"x/1.jpg": b"1", "../../2.jpg": b"2"}
    assert member(file, "x/1.txt") == b"3"
    assert [path.name for path in tmp_path.rglob("*")] == [name]
    with pytest.raises(RunError, match=r"missing"):
        member(file, "missing")


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_large_files_and_damaged_archives_are_refused(name, tmp_path):
    file = archive(tmp_path / name, {"bomb": bytes(10_000)})
    with pytest.raises(RunError, match=r"bomb.*9,999"):
        member(file, "bomb", max_bytes=9_999)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(RunError, match=f"{name}.*delete it"):
        member(file, "bomb")
