"""Tests of pictures in a tar: the index of its members and when it is built again, and references that are refused."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from miniatures import jpeg, write_tar
from tiny import OneLine

from rag_geotoken.photos import tar
from rag_geotoken.photos.pictures import BYTE_CAP, load_pictures
from rag_geotoken.photos.tar import read_member, references, tar_files, tar_index
from rag_geotoken.storage.parquet import read_table, write_table

LONG = "x" * 150 + ".jpg"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rag-geotoken"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "photos.tar"
    path.parent.mkdir()
    write_tar(path, {"./images/a.jpg": jpeg(1), "./images/b.jpg": jpeg(2), "x/y/c.jpg": jpeg(3)})
    return path


def plain_members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as file:
        return [member for member in file if member.isreg()]


def end_of(member: tarfile.TarInfo) -> int:
    """Where the padding behind its data ends."""
    return member.offset_data + -(-member.size // 512) * 512


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_is_what_tarfile_says(tmp_path: Path, format: int) -> None:
    path = tmp_path / "p.tar"
    names = ["./images/a.jpg", "d" * 60 + "/" + "e" * 60 + "/b.jpg"]
    names += [] if format == tarfile.USTAR_FORMAT else [f"./images/{LONG}", "./images/übär.jpg"]
    write_tar(path, {name: jpeg(i) for i, name in enumerate(names)}, format)
    index = tar_index([path])
    members = [(m.name.rpartition("/")[2], 0, m.offset_data, m.size) for m in plain_members(path)]
    assert [tuple(row.values()) for row in index.to_pylist()] == members
    data = [read_member(reference, BYTE_CAP) for reference in references([path], index).to_pylist()]
    assert data == [jpeg(i) for i in range(len(names))]


def test_links_devices_and_sparse_files_are_no_photos(tmp_path: Path) -> None:
    path = tmp_path / "p.tar"
    with tarfile.open(path, "w") as file:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"a{kind.decode()}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
    assert len(tar_index([path])) == 0


def test_of_two_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "p.tar"
    write_tar(path, [("./images/a.jpg", jpeg(1)), ("./images/b.jpg", jpeg(2)), ("./other/a.jpg", jpeg(3))])
    index = tar_index([path])
    assert index["name"].to_pylist() == ["b.jpg", "a.jpg"]
    assert read_member(references([path], index)[1].as_py(), BYTE_CAP) == jpeg(3)


def test_the_index_is_made_once_and_again_when_the_tar_has_changed(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = photos.parent / "photos.index.parquet"
    first = tar_index([photos])
    assert kept.is_file() and read_table(kept).equals(first)
    with monkeypatch.context() as patch:
        patch.setattr(tar, "_scan", None)
        assert tar_index([photos]).equals(first)
    status = photos.stat()
    write_tar(photos, {"./images/a.jpg": jpeg(4), "./images/b.jpg": jpeg(2), "x/y/c.jpg": jpeg(3)})
    os.utime(photos, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    second = tar_index([photos])
    assert not second.equals(first)
    assert read_member(references([photos], second)[0].as_py(), BYTE_CAP) == jpeg(4)
    # Broken, or another table under that name: made again.
    for spoil in (lambda: kept.write_bytes(b"PAR1"), lambda: write_table(kept, second.drop_columns("size"))):
        spoil()
        assert tar_index([photos]).equals(second) and read_table(kept).equals(second)


def test_a_folder_that_cannot_be_written(photos: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos.parent / "photos.index.parquet").mkdir()  # root may write anywhere, but not this
    first = tar_index([photos])
    (kept,) = cache.rglob("*.parquet")
    line = f"{photos.parent} cannot be written: the index of photos.tar is kept in {kept}"
    assert capsys.readouterr().err.splitlines() == [line]
    assert tar_index([photos]).equals(first) and not capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(photos: Path, cache: Path) -> None:
    photos.parent.chmod(0o555)
    try:
        assert len(tar_index([photos])) == 3 and list(cache.rglob("*.parquet"))
    finally:
        photos.parent.chmod(0o755)


@pytest.mark.parametrize("cut", ["in a header", "in the data", "at the end of a member", "in the end"])
def test_a_tar_cut_off(photos: Path, cut: str) -> None:
    member = plain_members(photos)[2]
    end = end_of(member) if cut == "in the end" else member.offset  # of the last whole member
    photos.write_bytes(photos.read_bytes()[: end + {"in a header": 100, "in the data": 1000}.get(cut, 0)])
    index = tar_index([photos])
    assert index["name"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg"][: 3 if cut == "in the end" else 2]
    assert f'"cut_off": {end}' in index.schema.metadata[b"tar"].decode()


def test_a_broken_header_in_the_middle_ends_the_index(photos: Path) -> None:
    member = plain_members(photos)[1]
    data = bytearray(photos.read_bytes())
    data[member.offset + 5] ^= 0xFF
    photos.write_bytes(data)
    index = tar_index([photos])
    assert index["name"].to_pylist() == ["a.jpg"]
    assert f'"cut_off": {member.offset}' in index.schema.metadata[b"tar"].decode()


@pytest.mark.parametrize("size", [-512, -1024, -(10**6), 1 << 62])
def test_sizes_that_lead_backwards_or_beyond_end_the_index(tmp_path: Path, size: int) -> None:
    path = tmp_path / "p.tar"
    write_tar(path, {"./images/a.jpg": jpeg(1)})
    evil = tarfile.TarInfo("./images/b.jpg")
    evil.size = size
    whole, end = path.read_bytes(), end_of(plain_members(path)[0])
    path.write_bytes(whole[:end] + evil.tobuf(tarfile.GNU_FORMAT) + whole[end:])
    assert tar_index([path])["name"].to_pylist() == ["a.jpg"]


def test_a_name_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "p.tar"
    write_tar(path, {"./images/a.jpg": jpeg(1)})
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    end = end_of(plain_members(path)[0])
    with path.open("rb+") as file:
        file.seek(end)
        file.write(name.tobuf(tarfile.GNU_FORMAT))
        file.truncate((1 << 33) + end + 10_240)  # sparse
    assert tar_index([path])["name"].to_pylist() == ["a.jpg"]


def test_pieces_in_order_up_to_the_first_gap(tmp_path: Path) -> None:
    assert tar_files(tmp_path, "p") == []
    for name in ("p00", "p01", "p03", "p1", "pxx"):
        (tmp_path / name).touch()
    assert [file.name for file in tar_files(tmp_path, "p")] == ["p00", "p01"]
    (tmp_path / "p.tar").touch()
    assert [file.name for file in tar_files(tmp_path, "p")] == ["p.tar"]


def test_any_cut_into_pieces_gives_the_same_members(photos: Path, tmp_path: Path) -> None:
    whole, data = tar_index([photos]), photos.read_bytes()
    starts = dict(zip(whole["name"].to_pylist(), whole["offset"].to_pylist(), strict=True))
    for at in (1, 511, 512, 513, starts["b.jpg"] - 512, starts["b.jpg"] - 100, starts["b.jpg"], starts["b.jpg"] + 9):
        files = [tmp_path / "q00", tmp_path / "q01", tmp_path / "q02"]
        for file, part in zip(files, (data[:at], data[at : at + 7], data[at + 7 :]), strict=True):
            file.write_bytes(part)
        index = tar_index(files)
        assert index["name"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg"]
        across = [row["file"] < 0 for row in index.to_pylist()]
        assert across == [
            any(row["offset"] - 512 < cut < row["offset"] + row["size"] for cut in (at, at + 7))
            for row in whole.to_pylist()
        ]
        kept = index.filter([not is_across for is_across in across])
        numbers = {"a.jpg": 1, "b.jpg": 2, "c.jpg": 3}
        for name, reference in zip(kept["name"].to_pylist(), references(files, kept).to_pylist(), strict=True):
            assert read_member(reference, BYTE_CAP) == jpeg(numbers[name])


def bad(reference: str) -> str:
    """The reason, in one line; the pixels stay zero."""
    pixels, errors = load_pictures([reference], 8)
    assert not pixels.any() and errors[0] is not None and len(errors[0].splitlines()) == 1
    return errors[0]


def test_references_that_reach_for_something_else_are_refused(photos: Path, tmp_path: Path) -> None:
    index = tar_index([photos])
    good = references([photos], index)[1].as_py()
    assert load_pictures([good], 8)[1] == [None]
    head, _, place = good.rpartition("#")
    offset, size = (int(part) for part in place.split("+"))
    end = photos.stat().st_size
    for far in (f"{end}+{size}", f"{end - 100}+{size}", f"{offset}+{end}", f"0+{size}", f"511+{size}", "9" * 16 + "+1"):
        assert "lies outside the tar" in bad(f"{head}#{far}")
    for near in (f"{offset + 512}+{size}", f"{offset}+{size - 1}", f"{offset}+{size + 1}", f"{offset - 1}+{size}"):
        assert "the tar has changed" in bad(f"{head}#{near}")
    for text in ("tar:", f"{head}", f"{head}#", f"{head}#{offset}", f"{head}#-1+5", f"{head}#{offset}+{size}x",
                 f"{head}#{'9' * 40}+1", f"tar:#{place}"):  # fmt: skip
        assert "not a reference to a picture in a tar" in bad(text)
    assert "there is no such file" in bad(f"tar:{tmp_path}/none.tar#{place}")
    assert "not a file" in bad(f"tar:{tmp_path}#{place}")
    assert f"larger than {BYTE_CAP // 1_000_000} MB" in bad(f"{head}#{offset}+{BYTE_CAP + 1}")
    # A picture that is no member, in a file that is no tar.
    (tmp_path / "mine.jpg").write_bytes(b"x" * 512 + jpeg(1))
    assert "the tar has changed" in bad(f"tar:{tmp_path}/mine.jpg#512+{len(jpeg(1))}")


def test_a_reference_to_a_member_that_is_no_plain_file(tmp_path: Path) -> None:
    link = tarfile.TarInfo("a.jpg")
    link.type, link.size = tarfile.SYMTYPE, len(jpeg(1))
    (tmp_path / "p.tar").write_bytes(link.tobuf(tarfile.USTAR_FORMAT) + jpeg(1))
    assert "the tar has changed" in bad(f"tar:{tmp_path}/p.tar#512+{link.size}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in bad(f"tar:{tmp_path}/pipe#512+10")


def test_a_moved_tar_is_missing_and_a_changed_one_is_noticed(photos: Path) -> None:
    old = references([photos], tar_index([photos])).to_pylist()
    write_tar(photos, {"./images/c.jpg": jpeg(7, 80), "./images/a.jpg": jpeg(1), "./images/b.jpg": jpeg(2)})
    assert all("changed" in bad(reference) for reference in old)
    photos.rename(photos.with_name("moved.tar"))
    assert all("there is no such file" in bad(reference) for reference in old)


def test_an_unreadable_tar(tmp_path: Path, one_line: OneLine) -> None:
    (tmp_path / "p.tar").write_bytes(b"")
    with one_line("is not a tar file"):
        tar_index([tmp_path / "p.tar"])
