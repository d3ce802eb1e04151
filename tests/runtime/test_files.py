"""What is written appears whole, replaces nothing that it should not, and is on the disk once it is there."""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedra_engine.callbacks.saved_rounds import save_checkpoint
from fedra_engine.runtime.files import (
    make_folders,
    remove_unfinished,
    whole_file,
    whole_files,
    whole_folder,
    write_whole,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(path: Path) -> None:
    with whole_folder(path) as folder:
        (folder / "file").write_text("new")


def write_files(path: Path) -> None:
    with whole_files(path) as folder:
        (folder / "file").write_text("new")


@pytest.mark.parametrize(
    ("write", "made"),
    [
        (lambda path: write_whole(path, "new"), "run"),
        (lambda path: save_checkpoint(path, 1, {"a": torch.ones(1)}, {}), "run/checkpoints/round_0001"),
        (write_folder, "run"),
        (write_files, "run/file"),
    ],
    ids=["file", "checkpoint", "folder", "files"],
)
def test_all_is_on_the_disk_before_it_is_seen_and_so_is_its_name_at_the_end(
    write: Callable[[Path], None], made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    seen: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)

    def moved(move: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def check(source: Path, target: Path) -> None:
            # A file may move between two hidden names.
            if not Path(target).name.startswith("."):
                entries = [Path(source), *Path(source).rglob("*")]
                assert {entry.stat().st_ino for entry in entries} <= synced, target
                synced.clear()
                seen.append(Path(target).name)
            move(source, target)

        return check

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moved(os.rename))
    monkeypatch.setattr(os, "replace", moved(os.replace))
    write(tmp_path / "run")
    assert seen == [Path(made).name]
    assert (tmp_path / made).parent.stat().st_ino in synced


@pytest.mark.parametrize("kind", ["file", "empty folder", "folder", "dangling link"])
def test_a_folder_replaces_nothing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "taken"
    if kind == "file":
        path.touch()
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
    if kind == "folder":
        (path / "file").write_text("old")
    before = path.lstat()
    with pytest.raises(FileExistsError) as raised:
        write_folder(path)
    assert raised.value.filename == str(path)
    assert (path.lstat().st_ino, names(tmp_path)) == (before.st_ino, ["taken"])


def test_of_two_that_make_a_folder_at_once_the_slower_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(FileExistsError), whole_folder(path) as folder:  # noqa: PT012 - the faster one in its midst
        (folder / "file").write_text("slower")
        write_folder(path)
    assert (path / "file").read_text() == "new"
    assert names(tmp_path) == ["run"]


def test_a_folder_taken_at_the_last_moment_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    write_folder(tmp_path / "run")
    (tmp_path / "run" / "file").write_text("old")
    (tmp_path / "file").write_text("old")
    for taken in ("run", "file"):
        with pytest.raises(FileExistsError):
            write_folder(tmp_path / taken)
    assert (tmp_path / "run" / "file").read_text() == (tmp_path / "file").read_text() == "old"


def test_files_replace_those_of_their_names_and_leave_others(tmp_path: Path) -> None:
    for name in ("file", "other"):
        (tmp_path / name).write_text("old")
    write_files(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {"file": "new", "other": "old"}


def test_what_broke_off_leaves_all_as_it_was_and_nothing_of_its_own(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "old")
    for broken_off in (whole_file(tmp_path / "file"), whole_files(tmp_path), whole_folder(tmp_path / "folder")):
        with pytest.raises(RuntimeError), broken_off as made:  # noqa: PT012 - breaks off half-way
            (made / "file" if made.is_dir() else made).write_text("new")
            raise RuntimeError
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_what_a_library_writes_can_be_read_by_those_who_can_read_other_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole_files(tmp_path / "adapters") as folder:
            save_file({"a": torch.ones(1)}, folder / "model.safetensors")
            (folder / "config.json").touch()
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "adapters").iterdir()}
    assert modes == {0o640}


@pytest.mark.parametrize("library", ["python", "safetensors"])
def test_a_file_that_cannot_be_written_is_named_whoever_writes_it(library: str, tmp_path: Path) -> None:
    target = tmp_path / "file"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised, whole_file(target) as file:  # noqa: PT012 - two ways
            if library == "python":
                file.write_bytes(bytes(2000))
            else:
                save_file({"a": torch.ones(1000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(target))
    assert names(tmp_path) == []


def test_what_a_library_says_without_a_number_is_kept(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="encoder error -2") as raised, whole_file(tmp_path / "plot.png"):
        raise OSError("encoder error -2")
    assert (raised.value.errno, raised.value.filename) == (errno.EIO, str(tmp_path / "plot.png"))
    with (
        pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*plot.png'$"),
        whole_file(tmp_path / "plot.png"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_folders_are_made_to_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    make_folders(tmp_path / "a" / "b")
    assert synced == [tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino]


def test_unfinished_files_and_folders_go_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").touch()
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / "kept.tmp").touch()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.tmp"]
