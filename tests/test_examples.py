"""The example targets: useful as they stand, and clear about arguments that they cannot use."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from workerd.examples import Demo

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Five files in three folders, one name that is no text, a link, a FIFO and an empty folder."""
    root = tmp_path / "tree"
    (root / "a" / "b").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "a" / "b" / "large.LOG").write_bytes(b"x" * 3_000_000)
    (root / "a" / "small.log").write_bytes(b"y" * 10)
    (root / "a.txt").write_bytes(b"z" * 20)
    (root / "none").touch()
    with open(os.fsencode(root) + b"/bad\xff\n.txt", "wb") as file:
        file.write(b"!")
    (root / "link").symlink_to(root / "a.txt")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "fifo")
    return root


def test_every_target_is_documented() -> None:
    """`workerd check` shows a target by its signature and docstring, so each has one."""
    targets = {name: getattr(Demo, name) for name in vars(Demo) if not name.startswith("_")}
    assert list(targets) == ["noop", "echo", "hello", "sleep", "fail", "checksum_tree", "report"]
    assert all(target.__doc__ for target in targets.values())


def test_small_targets(capsys: pytest.CaptureFixture[str]) -> None:
    """Each does what its name says, and hello also prints."""
    demo = Demo()
    demo.noop({"anything": 1})
    assert demo.echo([1, None]) == [1, None]
    assert demo.hello(None) == "Hello, World!"
    assert demo.hello({"name": "Ada"}) == "Hello, Ada!"
    assert capsys.readouterr().out == "Hello, World!\nHello, Ada!\n"
    assert demo.sleep(0) == 0.0
    assert demo.sleep({"seconds": 0.001}) == 0.001
    with pytest.raises(RuntimeError, match="failed as asked: 'why'"):
        demo.fail("why")


def test_checksum_is_what_sha256sum_says(tree: Path) -> None:
    """The digest can be had with other tools, files with odd names included; links and FIFOs are left out."""
    script = r"find . -type f -printf '%P\0' | LC_ALL=C sort -z | xargs -0 sha256sum --zero | sha256sum"
    expected = subprocess.check_output(["sh", "-c", script], cwd=tree, text=True).split()[0]
    result = Demo().checksum_tree({"path": str(tree)})
    assert result == {"files": 5, "bytes": 3_000_031, "sha256": expected, "unreadable": []}


def test_checksum_depends_on_names_and_contents_only(tree: Path) -> None:
    """A copied tree has the same digest elsewhere, and another once a file is renamed or changed."""
    copy = tree.with_name("copy")
    subprocess.check_call(["cp", "-a", tree, copy])

    def digest() -> str:
        return Demo().checksum_tree({"path": str(copy)})["sha256"]

    first = digest()
    assert first == Demo().checksum_tree({"path": str(tree)})["sha256"]
    (copy / "a.txt").rename(copy / "b.txt")
    second = digest()
    (copy / "b.txt").write_bytes(b"other")
    assert len({first, second, digest()}) == 3


def test_checksum_names_what_it_could_not_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be read does not fail the job: it is named in the result, with the reason."""
    missing = os.fsencode(tree / "a.txt")
    lstat = os.lstat

    def vanished(path: Any) -> os.stat_result:
        if path == missing:
            raise FileNotFoundError(2, "No such file or directory", path)
        return lstat(path)

    monkeypatch.setattr(os, "lstat", vanished)
    result = Demo().checksum_tree({"path": str(tree)})
    assert result["files"] == 4
    assert result["unreadable"] == [f"{tree}/a.txt: No such file or directory"]


def test_report_tells_the_largest(tree: Path) -> None:
    """Files and suffixes come by size, and the result is JSON, also where a name is no text."""
    result = Demo().report({"path": str(tree), "top": 3})
    assert (result["files"], result["bytes"]) == (5, 3_000_031)
    assert result["largest"] == [("a/b/large.LOG", 3_000_000), ("a.txt", 20), ("a/small.log", 10)]
    assert result["suffixes"] == [(".log", 3_000_010), (".txt", 21), ("", 0)]
    everything = Demo().report({"path": str(tree)})
    assert ("bad\ufffd\n.txt", 1) in everything["largest"]
    json.dumps(everything).encode()


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("hello", {"name": 3}, "name must be a string, not 3"),
        ("hello", "Ada", "arguments must be an object with name, not 'Ada'"),
        ("hello", {"nmae": "Ada"}, "unknown in arguments: nmae; there is name"),
        ("sleep", None, "seconds must be a number, not None"),
        ("sleep", True, "seconds must be a number, not True"),
        ("sleep", -1, "seconds must be from 0 to 86400, not -1"),
        ("sleep", {"seconds": 1e9}, "seconds must be from 0 to 86400, not 1000000000.0"),
        ("sleep", float("nan"), "seconds must be from 0 to 86400, not nan"),
        ("checksum_tree", None, "arguments must be an object with path, not None"),
        ("checksum_tree", {}, "path must be a string, not None"),
        ("checksum_tree", {"path": "here"}, "path must be absolute"),
        ("report", {"path": "/no/such"}, "path is no directory that this user can see: '/no/such'"),
        ("report", {"path": "/", "top": True}, "top must be a whole number from 0 to 1000, not True"),
        ("report", {"path": "/", "top": 1001}, "top must be a whole number from 0 to 1000, not 1001"),
    ],
)
def test_wrong_arguments_are_told(target: str, arguments: Any, message: str) -> None:
    """What cannot be used is refused in one line that names it, before anything is done."""
    with pytest.raises((TypeError, ValueError, NotADirectoryError)) as caught:
        getattr(Demo(), target)(arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
