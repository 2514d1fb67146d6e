"""A reader sees the old content or the new, whenever the writer dies."""

import errno
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from ssdtune import durable
from ssdtune.durable import (
    DurableError,
    commit_folder,
    committed_files,
    lock_folder,
    new_temporary_folder,
    remove_abandoned,
    remove_folder_we_made,
    write_file_atomically,
)

KILLED = 9
SYSTEM_CALLS = ("open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir")
OLD = {"a.bin": b"old a", "sub/b.bin": b"old b" * 1000}
NEW = {"a.bin": b"new a" * 7, "sub/b.bin": b"", "c.bin": b"c"}


def make_folder(final: Path, content: dict[str, bytes]) -> None:
    temporary = new_temporary_folder(final)
    for name, data in content.items():
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_bytes(data)
    commit_folder(temporary, final)


def content_of(folder: Path) -> dict[str, bytes] | None:
    if not folder.exists():
        return None
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if name != durable.MARKER_NAME}


def temporary_names(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".ssdtune-")]


def dies_at_call(number: int, act) -> bool:
    """Run `act` in a forked child that is gone just before its number-th system call.

    Returns whether the child was killed (False: it finished, having made fewer calls).
    """
    child = os.fork()
    if child == 0:
        calls = 0

        def guard(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == number:
                    os._exit(KILLED)
                return real(*args, **kwargs)

            return call

        for name in (*SYSTEM_CALLS, "_exchange"):
            owner = durable if name == "_exchange" else os
            setattr(owner, name, guard(getattr(owner, name)))
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def test_a_file_holds_the_old_bytes_or_the_new_wherever_the_writer_dies(tmp_path):
    path = tmp_path / "state.json"
    seen = set()
    number = 0
    for number in range(1, 50):
        path.write_bytes(b"old")
        killed = dies_at_call(number, lambda: write_file_atomically(path, b"new bytes"))
        seen.add(path.read_bytes())
        remove_abandoned(tmp_path)
        assert os.listdir(tmp_path) == ["state.json"]
        if not killed:
            break
    assert number > 5
    assert seen == {b"old", b"new bytes"}


@pytest.mark.parametrize("before", [None, OLD], ids=["first", "replaced"])
def test_a_folder_is_the_old_one_or_the_new_one_wherever_the_writer_dies(tmp_path, before):
    final = tmp_path / "run" / "step-1"
    final.parent.mkdir()
    seen = []
    number = 0
    for number in range(1, 200):
        if final.exists():
            remove_folder_we_made(final)
        if before is not None:
            make_folder(final, before)
        killed = dies_at_call(number, lambda: make_folder(final, NEW))
        found = content_of(final)
        assert found in (before, NEW)
        seen.append(found)
        remove_abandoned(final.parent)
        assert temporary_names(final.parent) == []
        assert content_of(final) == found
        if not killed:
            break
    assert number > 15
    assert seen[0] == before
    assert seen[-1] == NEW


def test_a_removed_folder_is_whole_or_out_of_sight_wherever_the_remover_dies(tmp_path):
    final = tmp_path / "step-1"
    number = 0
    for number in range(1, 60):
        if not final.exists():
            make_folder(final, OLD)
        killed = dies_at_call(number, lambda: remove_folder_we_made(final))
        assert content_of(final) in (None, OLD)
        remove_abandoned(tmp_path)
        assert temporary_names(tmp_path) == []
        if not killed:
            break
    assert number > 6
    assert not final.exists()


def test_everything_is_flushed_before_the_rename_and_the_parent_after_it(tmp_path, monkeypatch):
    log: list[tuple[str, str]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        log.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(source, target):
        log.append(("replace", str(target)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    final = tmp_path / "new parent" / "step-1"
    temporary = new_temporary_folder(final)
    (temporary / "sub").mkdir()
    (temporary / "sub" / "weights.bin").write_bytes(b"w")
    log.clear()
    commit_folder(temporary, final)

    renamed = log.index(("replace", str(final)))
    flushed_before = {path for act, path in log[:renamed] if act == "fsync"}
    needed = {temporary, temporary / "sub", temporary / "sub" / "weights.bin"}
    assert {str(path) for path in needed} <= flushed_before
    # The marker's own rename inside the folder must be followed by a flush of that folder.
    marked = log.index(("replace", str(temporary / durable.MARKER_NAME)))
    assert ("fsync", str(temporary)) in log[marked:renamed]
    assert ("fsync", str(final.parent)) in log[renamed:]


def test_a_new_parent_is_flushed_into_its_own_parent(tmp_path, monkeypatch):
    flushed = []
    real_fsync = os.fsync

    def fsync(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    new_temporary_folder(tmp_path / "runs" / "one" / "step-1")
    assert {str(tmp_path), str(tmp_path / "runs"), str(tmp_path / "runs" / "one")} <= set(flushed)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_drive_leaves_the_old_file_and_is_named(tmp_path, monkeypatch, number):
    path = tmp_path / "state.json"
    path.write_bytes(b"old")

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DurableError) as caught:
        write_file_atomically(path, b"new")
    message = str(caught.value)
    assert str(path) in message
    assert errno.errorcode[number] in message
    assert "intact" in message
    assert ("free some space" in message) == (number == errno.ENOSPC)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_write_that_takes_less_than_it_was_given_is_continued(tmp_path, monkeypatch):
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:3]))
    write_file_atomically(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_readers_never_meet_a_mixture_while_a_folder_is_exchanged(tmp_path):
    final = tmp_path / "latest"
    versions = [{"a": b"%d" % i * 50, "b": b"%d" % i * 50} for i in range(2)]
    make_folder(final, versions[0])
    found, done = [], threading.Event()

    def read():
        while not done.is_set():
            descriptor = os.open(final, os.O_DIRECTORY)  # fails if the name is ever missing
            with open(os.open("a", os.O_RDONLY, dir_fd=descriptor), "rb") as file:
                found.append(file.read())
            os.close(descriptor)

    # The reader may hold a folder that is being removed: only its name's presence is at stake.
    reader_errors = []

    def guarded():
        try:
            read()
        except FileNotFoundError as error:
            if error.filename == str(final):
                reader_errors.append(error)
            elif not done.is_set():
                guarded()

    reader = threading.Thread(target=guarded)
    reader.start()
    for turn in range(30):
        make_folder(final, versions[(turn + 1) % 2])
    done.set()
    reader.join(10)
    assert reader_errors == []
    assert set(found) <= {version["a"] for version in versions}


def test_a_link_is_replaced_and_its_target_untouched(tmp_path):
    target = tmp_path / "precious"
    target.write_bytes(b"mine")
    (tmp_path / "state.json").symlink_to(target)
    write_file_atomically(tmp_path / "state.json", b"new")
    assert target.read_bytes() == b"mine"
    assert not (tmp_path / "state.json").is_symlink()


def test_a_folder_with_a_link_in_it_is_not_committed(tmp_path):
    temporary = new_temporary_folder(tmp_path / "final")
    (temporary / "weights.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DurableError, match=r"weights\.bin is a link"):
        commit_folder(temporary, tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_a_folder_of_the_user_is_never_replaced(tmp_path):
    final = tmp_path / "mine"
    final.mkdir()
    (final / "thesis.tex").write_text("years")
    temporary = new_temporary_folder(final)
    with pytest.raises(DurableError, match="was not made by ssdtune") as caught:
        commit_folder(temporary, final)
    assert "output_dir" in str(caught.value)
    assert (final / "thesis.tex").read_text() == "years"


def test_an_empty_folder_of_the_user_may_become_the_run(tmp_path):
    final = tmp_path / "mine"
    final.mkdir()
    make_folder(final, NEW)
    assert content_of(final) == NEW


@pytest.mark.parametrize("kind", ["unmarked", "link to ours", "forged marker", "a file"])
def test_what_we_cannot_prove_to_have_made_is_not_removed(tmp_path, kind):
    victim = tmp_path / "victim"
    make_folder(tmp_path / "ours", OLD)
    if kind == "link to ours":
        victim.symlink_to(tmp_path / "ours")
    elif kind == "a file":
        victim.write_text("keep")
    else:
        victim.mkdir()
        (victim / "keep").write_text("keep")
        if kind == "forged marker":
            (victim / durable.MARKER_NAME).write_text('{"made_by": "someone"}')
    with pytest.raises(DurableError, match="was not made by ssdtune"):
        remove_folder_we_made(victim)
    assert os.path.lexists(victim)
    assert content_of(tmp_path / "ours") == OLD


def test_a_folder_with_a_file_of_the_user_is_not_removed(tmp_path):
    make_folder(tmp_path / "step-1", OLD)
    (tmp_path / "step-1" / "notes\n.txt").write_text("mine")
    with pytest.raises(DurableError) as caught:
        remove_folder_we_made(tmp_path / "step-1")
    assert "1 file(s) that ssdtune did not write: notes\\n.txt" in str(caught.value)
    assert (tmp_path / "step-1" / "a.bin").exists()


def test_removing_what_is_absent_is_no_error(tmp_path):
    remove_folder_we_made(tmp_path / "nothing")


def test_only_our_leftovers_are_cleaned(tmp_path):
    new_temporary_folder(tmp_path / "step-1")
    (tmp_path / ".ssdtune-0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / ".ssdtune-notes.tmp").write_bytes(b"a user's own name")
    foreign = tmp_path / ".ssdtune-fedcba9876543210.tmp"
    foreign.mkdir()
    (foreign / "keep").write_text("no marker here")
    assert len(remove_abandoned(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path)) == [foreign.name, ".ssdtune-notes.tmp"]


def test_a_committed_folder_lists_its_files_and_their_lengths(tmp_path):
    make_folder(tmp_path / "step-1", OLD)
    assert committed_files(tmp_path / "step-1") == {"a.bin": 5, "sub/b.bin": 5000}
    assert committed_files(new_temporary_folder(tmp_path / "step-2")) is None
    assert committed_files(tmp_path) is None


def test_a_private_folder_is_closed_to_others(tmp_path):
    folder = new_temporary_folder(tmp_path / "x", is_private=True)
    assert folder.stat().st_mode & 0o777 == 0o700


def _try_lock(folder, answers):
    try:
        with lock_folder(folder):
            answers.put("locked")
    except DurableError as error:
        answers.put(str(error))


def test_a_second_process_on_one_folder_is_refused_and_told_who_holds_it(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with lock_folder(tmp_path):
        second = context.Process(target=_try_lock, args=(tmp_path, answers))
        second.start()
        refusal = answers.get(timeout=20)
        second.join(20)
    assert f"pid {os.getpid()}" in refusal
    assert "choose another folder" in refusal
    _try_lock(tmp_path, answers)
    assert answers.get(timeout=20) == "locked"


@pytest.mark.parametrize("act", [write_file_atomically, commit_folder])
def test_a_missing_folder_is_a_message_and_not_a_traceback(tmp_path, act):
    argument = b"x" if act is write_file_atomically else tmp_path / "final"
    with pytest.raises(DurableError, match=r"nowhere"):
        act(tmp_path / "nowhere" / "x", argument)
