"""Processes that are killed while they write, at each of their writes."""

import os
import signal
import sys


def killed_at(number, write, target):
    """A fork that SIGKILL ends before its change ``number``; the changes of a whole run.

    A change is a file or folder that is created, renamed or removed below ``target`` or in what
    takes its place.
    """
    kinds = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
    counted = target.parent.with_name("counted")
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return None
        assert status == 0
        return int(counted.read_text())
    seen = 0

    def count(event, args):
        nonlocal seen
        opens = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wx+")
        if (event in kinds or opens) and target.name in str(args[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(count)
        write()
        counted.write_text(str(seen))
        os._exit(0)
    finally:
        os._exit(1)


def check_whole_or_not_there(write, target, check, least=10):
    """Kills ``write()`` at each of its changes of ``target``, one run after another.

    Afterwards ``target`` is not there, or holds every file of a whole run, and ``check()`` passes.
    What a killed run leaves is hidden, and the next run removes it.
    """
    target.parent.mkdir()
    write()  # what is imported once
    expected = contents(target)
    number, changes = 0, None
    while changes is None:
        number += 1
        for path in target.rglob("*"):
            path.unlink()
        if target.exists():
            target.rmdir()
        changes = killed_at(number, write, target)
        left = list(target.parent.iterdir())
        assert len(left) <= 1  # what the run before left is gone
        if target.exists():
            assert contents(target) == expected
            check()
        else:
            assert changes is None
            assert all(path.name.startswith(f".{target.name}.lrqat-") for path in left)
    assert changes == number - 1
    assert number > least


def contents(folder):
    """The bytes of every file by its name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
