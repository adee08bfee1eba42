"""The one writer and the one reader: what they refuse, and that what stands there stays."""

import os
import resource
import signal
import stat
import subprocess
import sys

import pandas as pd
import pytest
import torch

from salvit_core import figures, workspace


def link(path):
    path.with_name("target").write_text("theirs")
    path.symlink_to("target")


def device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize(
    "make, what",
    [
        (link, "a link"),
        (lambda path: path.symlink_to("nowhere"), "a link"),
        (os.mkfifo, "a FIFO"),
        (device, "a device"),
        (os.mkdir, "a folder"),
    ],
)
@pytest.mark.parametrize("act", [lambda path: workspace.write(path, "ours"), workspace.try_out])
def test_what_is_no_plain_file_stays(tmp_path, make, what, act):
    path = tmp_path / "result.json"
    make(path)
    before = path.lstat().st_mode, sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match=f"cannot write .*result.json: it is {what}.*; name another file") as refused:
        act(path)
    assert "\n" not in str(refused.value)
    assert (path.lstat().st_mode, sorted(tmp_path.iterdir())) == before


def test_a_place_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path / "file").write_text("theirs")
    workspace.try_out(tmp_path / "file")
    workspace.try_out(tmp_path / "new" / "record.json")
    assert (tmp_path / "file").read_text() == "theirs" and not list((tmp_path / "new").iterdir())
    for act in (workspace.try_out, lambda path: workspace.write(path, "")):
        with pytest.raises(OSError, match="cannot write .*record.json .*: make room, or write elsewhere"):
            act(tmp_path / "file" / "record.json")
        with pytest.raises(OSError, match="cannot write .*File name too long"):
            act(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    "content, field",
    [
        ({"metrics": {"loss": float("nan")}}, "metrics.loss is nan"),
        ({"history": [{"lr": 1.0}, {"lr": float("-inf")}]}, r"history\[1\].lr is -inf"),
        (float("inf"), "the content is inf"),
    ],
)
def test_json_holds_no_number_that_is_none(tmp_path, content, field):
    with pytest.raises(ValueError, match=f"{field}, which .*result.json cannot hold"):
        workspace.write_json(tmp_path / "result.json", content)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_is_said(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "closed").write_text("sound")
    for name, reason in (("fifo", "no plain file"), (".", "no plain file"), ("none", "No such file")):
        with pytest.raises(OSError, match=f"cannot read .*{reason}"):
            workspace.readable(tmp_path / name)

    def closed(path, *mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(PermissionError, match="cannot read .*closed .Permission denied.: mend that") as refused:
        workspace.readable(tmp_path / "closed")
    assert "delete" not in str(refused.value)


FULL = """
import resource, signal, sys, torch
from pathlib import Path
from salvit_core import workspace
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
contents = {"text": "x" * 100_000, "torch": lambda file: torch.save(torch.zeros(100_000), file)}
try:
    workspace.write(Path(sys.argv[2]), contents[sys.argv[1]])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["text", "torch"])
def test_a_disk_that_takes_no_more_leaves_the_old_file(tmp_path, kind):
    """torch.save has words of its own for it, which name neither file nor reason."""
    path = tmp_path / "kept"
    path.write_text("before")
    done = subprocess.run([sys.executable, "-c", FULL, kind, path], capture_output=True, text=True)
    assert "cannot write" in done.stdout and "kept (File too large): make room" in done.stdout, done
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_a_table_on_a_full_disk_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    figures.save_table(pd.DataFrame({"a": [1]}), "table")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match="cannot write .*table.csv"):
            figures.save_table(pd.DataFrame({"a": range(10_000)}), "table")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [file.read_text() for file in (tmp_path / "figures").iterdir()] == [",a\n0,1\n"]


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    def broken(file):
        torch.zeros(2) + torch.zeros(3)

    with pytest.raises(RuntimeError, match="size of tensor"):
        workspace.write(tmp_path / "file", broken)
    assert not list(tmp_path.iterdir())
