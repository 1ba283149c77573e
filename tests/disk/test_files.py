"""Directories that cannot be written, and unusual ones: what was there stays, and nothing temporary is left behind."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from genft_modules import WeGeFTConfig, export_lora, files, load_adapter, save_adapter
from tests.support.cases import llama, logits, randomize
from tests.support.disks import small_files

pytestmark = pytest.mark.filterwarnings("ignore:.*not updated with the adapter.s description")  # costs no adapter


def adapted(seed: int = 0) -> PeftModel:
    config = WeGeFTConfig(r=2, wegeft_alpha=4 + seed, target_modules=["q_proj", "v_proj"])
    return randomize(get_peft_model(llama(), config), seed=seed)


def content(directory: Path) -> dict[str, bytes]:
    """All files below a directory, hidden ones too."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def fails_at(step: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> OSError | None:
    """Calls `act` on a disk that is full from write number `step` on; the error that it raises."""
    left = [step]

    def counted(really):
        def call(*args, **kwargs):
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= 1
            return really(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", counted(os.replace))
        patch.setattr(files.os, "fsync", counted(os.fsync))
        patch.setattr(files.shutil, "copyfileobj", counted(files.shutil.copyfileobj))
        for name in ("mkdir", "write_bytes", "write_text"):
            patch.setattr(files.Path, name, counted(getattr(Path, name)))
        try:
            act()
        except OSError as error:
            return error
    return None


@pytest.mark.parametrize("target", ["new", "empty", "adapter"])
def test_a_full_disk_at_every_write_of_a_save(target, tmp_path, monkeypatch):
    old, new = adapted(), adapted(seed=5)
    whole = [logits(new), logits(old)]
    for step in itertools.count():
        directory = tmp_path / str(step) / target
        directory.parent.mkdir()
        if target == "empty":
            directory.mkdir()
        elif target == "adapter":
            save_adapter(old, directory)
        before = content(directory.parent)
        error = fails_at(step, lambda where=directory: save_adapter(new, where), monkeypatch)
        after = content(directory.parent)
        assert not any(files.PARTIAL in name for name in after)
        if error is None:
            break
        assert (error.errno, error.filename) == (errno.ENOSPC, str(directory))
        if after != before:  # the new adapter was complete already, or the old configuration could not be put back
            found = logits(load_adapter(llama(), directory))
            assert any(torch.equal(found, one) for one in whole[: 2 if target == "adapter" else 1])
    assert torch.equal(logits(load_adapter(llama(), directory)), whole[0])
    assert step > 5


@pytest.mark.parametrize("target", ["new", "empty"])
def test_a_full_disk_at_every_write_of_an_export(target, tmp_path, monkeypatch):
    model = adapted()
    for step in itertools.count():
        directory = tmp_path / str(step) / target
        (directory if target == "empty" else directory.parent).mkdir(parents=True)
        error = fails_at(step, lambda where=directory: export_lora(model, where), monkeypatch)
        if error is None:
            break
        assert (error.errno, error.filename) == (errno.ENOSPC, str(directory))
        found = content(directory.parent)
        assert files.CONFIG not in {Path(name).name for name in found} or len(found) == 3
        assert not any(files.PARTIAL in name for name in found)
    assert len(content(directory)) == 3
    assert step > 4


def test_what_the_system_refuses_to_write(tmp_path):
    """The errors of safetensors and torch are the system's, with the name of the directory."""
    old = adapted()
    save_adapter(old, tmp_path / "adapter")
    before = content(tmp_path)
    with small_files(64):
        for save in (save_adapter, export_lora):
            with pytest.raises(OSError, match="File too large") as caught:
                save(adapted(seed=3), tmp_path / "new")
            assert caught.value.filename == str(tmp_path / "new")
        with pytest.raises(OSError, match="File too large"):
            save_adapter(adapted(seed=3), tmp_path / "adapter")
        with pytest.raises(OSError, match="Input/output error"), files.writing(tmp_path):  # torch gives no reason
            torch.save(torch.zeros(999), tmp_path / "state.pt")
    (tmp_path / "state.pt").unlink()
    assert content(tmp_path) == before
    with pytest.raises(FileNotFoundError) as caught, files.writing(tmp_path / "gone"):
        torch.save(torch.zeros(9), tmp_path / "gone" / "state.pt")
    assert caught.value.filename == str(tmp_path / "gone")


def test_other_errors_pass(tmp_path):
    for error in (ValueError("no"), RuntimeError("no"), FileNotFoundError(2, "no such file", "/elsewhere/base")):
        with pytest.raises(type(error)) as caught, files.writing(tmp_path / "place"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("new", [True, False])
def test_a_crash_while_a_directory_is_written(new, tmp_path, monkeypatch):
    """There is no configuration before everything else is there; what was left behind does not stop the next time."""

    class Killed(BaseException):
        pass

    for step in itertools.count():
        directory = tmp_path / str(step) / "model"
        (directory.parent if new else directory).mkdir(parents=True)
        left = [step]

        def replace(*names, really=os.replace, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            really(*names)

        def write(where=directory):
            with files.new_directory(where) as partial:
                for name in ("config.json", "a.json", "model.safetensors"):
                    (partial / name).write_text(name)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", replace)
            patch.setattr(files.shutil, "rmtree", lambda *args, **kwargs: None)
            try:
                write()
                break
            except Killed:
                pass
        names = {path.name for path in directory.iterdir() if path.is_file()} if directory.exists() else set()
        assert "config.json" not in names
        if not names:
            write()
            assert {path.name for path in directory.iterdir()} == {"config.json", "a.json", "model.safetensors"}
            assert [path.name for path in directory.parent.iterdir()] == ["model"]
    assert step == (1 if new else 3)


@pytest.mark.parametrize("save", [save_adapter, export_lora])
def test_targets(save, tmp_path, monkeypatch):
    """An empty directory, which may be a mount point, stays itself; a link stays a link; "." is like any other."""
    model = adapted()
    for name in ("empty", "mount", "linked", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "mount" / "lost+found").mkdir()
    inodes = {name: (tmp_path / name).stat().st_ino for name in ("empty", "mount", "linked", "here")}
    (tmp_path / "link").symlink_to("linked")
    (tmp_path / "dangling").symlink_to("target")
    replaced = []
    really = os.replace
    monkeypatch.setattr(files.os, "replace", lambda old, new: (replaced.append((old, new)), really(old, new)))
    for name in ("empty", "mount", "link", "dangling"):
        save(model, tmp_path / name)
    for old, new in replaced:  # none from outside a mount point into it
        if Path(new).is_relative_to(tmp_path / "mount"):
            assert Path(old).is_relative_to(tmp_path / "mount")
    monkeypatch.chdir(tmp_path / "here")
    save(model, ".")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert inodes == {name: (tmp_path / name).stat().st_ino for name in inodes}
    for name in ("empty", "mount", "linked", "target", "here"):
        loaded = logits(PeftModel.from_pretrained(llama(), str(tmp_path / name)))
        torch.testing.assert_close(loaded, logits(model), rtol=1e-4, atol=1e-5)
        assert {path.name for path in (tmp_path / name).iterdir()} - {"lost+found"} == {
            files.CONFIG, files.WEIGHTS, "README.md",
        }  # fmt: skip


def test_files_are_added_to_those_that_are_there(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with small_files(8), pytest.raises(OSError, match="File too large"), files.added_files(tmp_path) as partial:
        save_file({"a": torch.ones(1)}, partial / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")["a"] == 0
    with files.added_files(tmp_path) as partial:
        save_file({"a": torch.ones(1)}, partial / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")["a"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "model.safetensors"}
