"""A full disk, a file that vanishes, kill -9 where nothing was saved yet: a clear end, and nothing earlier lost."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker

from qrlora.adapter import BasisCache
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.models import LoadedModel
from qrlora.training import TrainConfig, loop, train
from qrlora.training import run as running
from tests.training.conftest import MakeConfig


class FullDisk:
    """A disk with `free` bytes left below `folder`: a write gets what still fits, the next one ENOSPC, as from the
    kernel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.free: float = float("inf")
        self.refused = 0

    def take(self, size: int) -> int:
        if self.free < 1 <= size:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = int(min(size, self.free))
        self.free -= taken
        return taken


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    """What `tmp_path` lies on; it has room until `free` is set."""
    disk, real = FullDisk(tmp_path), Path.open

    class OnDisk(io.FileIO):
        def write(self, data: Any, /) -> int:
            view = memoryview(data).cast("B")
            return super().write(view[: disk.take(len(view))])

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "b" in mode and "r" not in mode and path.is_relative_to(disk.folder):
            return io.BufferedWriter(OnDisk(path, mode.replace("b", "")))
        return real(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", opened)
    return disk


def _run(config: TrainConfig, model: LoadedModel, **more: Any) -> bytes:
    return train(config, loaded=model, progress=False, **more).path.read_bytes()


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _size(folder: Path) -> int:
    return sum(map(len, _files(folder).values()))


@pytest.fixture
def whole(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> Path:
    """The folder of an uninterrupted run."""
    return train(make_config(output_dir=str(tmp_path / "whole")), loaded=model, progress=False).path.parent


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 0.999])
def test_a_disk_that_fills_while_a_checkpoint_is_written(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, disk: FullDisk, whole: Path, share: float
) -> None:
    """It fills before, within the adapter, within the state, and within the index of the second checkpoint."""
    out = tmp_path / "out"

    def fill(done: int, _total: int) -> None:
        if done == 3:
            kept.update(_files(out))
            disk.free = int(share * _size(whole / "checkpoint-4"))

    kept: dict[Path, bytes] = {}
    with pytest.raises(QrloraError) as caught:
        _run(make_config(), model, on_step=fill)
    assert "checkpoint-4" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert (
        f"The last complete checkpoint is {out / 'checkpoint-2'}; make room and continue with resume: latest."
        in str(caught.value)
    )
    assert ".tmp" not in str(caught.value)
    assert disk.refused
    assert out / "checkpoint-2" / "state.json" in kept
    assert _files(out) == kept  # no half file takes up room that is short anyway
    disk.free = float("inf")
    assert _run(make_config(resume="latest"), model) == (whole / "adapter.safetensors").read_bytes()
    assert json.loads((out / "losses.json").read_text()) == json.loads((whole / "losses.json").read_text())


def test_a_disk_that_fills_before_the_first_checkpoint(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, disk: FullDisk
) -> None:
    def fill(_done: int, _total: int) -> None:
        disk.free = 100

    with pytest.raises(QrloraError, match=r"checkpoint-2.* No space left on device. No checkpoint was written before"):
        _run(make_config(), model, on_step=fill)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("going_back", [False, True])
def test_a_disk_that_fills_while_the_result_is_written(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, disk: FullDisk, whole: Path, going_back: bool
) -> None:
    """Also where an earlier result lies there, which goes only once there is a newer one."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"checkpointing_steps": 4}
    if going_back:
        shutil.copytree(whole, out)
        options |= {"resume": str(out / "checkpoint-4"), "overwrite": True}
    earlier = _files(out)

    def fill(done: int, total: int) -> None:
        if done == total:
            disk.free = _size(whole / "checkpoint-4") // 6

    with pytest.raises(QrloraError, match=r"cannot be written: No space left on device. The last .*checkpoint-4"):
        _run(make_config(**options), model, on_step=fill)
    assert disk.refused
    assert not list(out.rglob("*.tmp"))
    if going_back:
        kept = {path: content for path, content in earlier.items() if path.suffix in (".safetensors", ".json")}
        assert {path: path.read_bytes() for path in kept} == kept
    else:
        assert not (out / "adapter.safetensors").exists()
    disk.free = float("inf")
    again = make_config(**options) if going_back else make_config(**options, resume="latest")
    assert _run(again, model) == (whole / "adapter.safetensors").read_bytes()


def test_a_disk_that_fills_while_a_validation_picture_is_written(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, disk: FullDisk, whole: Path
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"validation_prompt": "a <c> cat", "validation_steps": 3}

    def fill(done: int, _total: int) -> None:
        if done == 2:
            disk.free = 50

    with pytest.raises(QrloraError, match=r"step-000003-0.png cannot be written: No space .* is .*checkpoint-2"):
        _run(make_config(**options), model, on_step=fill)
    assert not list((out / "validation").iterdir())
    disk.free = float("inf")
    assert _run(make_config(**options, resume="latest"), model) == (whole / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("first", ["the tracker", "a checkpoint"])
def test_a_disk_that_fills_while_a_tracker_logs(
    make_config: MakeConfig,
    model: LoadedModel,
    tmp_path: Path,
    disk: FullDisk,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
) -> None:
    """Trackers raise what their writing thread met. What went wrong first is what is told."""
    pytest.importorskip("tensorboard")

    def refuse(*_given: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(done: int, _total: int) -> None:
        if done == 3:
            disk.free = 0 if first == "a checkpoint" else disk.free
            monkeypatch.setattr(Accelerator, "log", refuse)
            monkeypatch.setattr(TensorBoardTracker, "finish", refuse)

    last = 2 if first == "a checkpoint" else 6
    told = "checkpoint-4" if first == "a checkpoint" else "report_to=tensorboard cannot log"
    with pytest.raises(
        QrloraError, match=rf"{told}.* No space left on device\. The last .*checkpoint-{last}; make room"
    ):
        _run(make_config(report_to="tensorboard"), model, on_step=fill)
    assert not (tmp_path / "out" / "adapter.safetensors").exists()


@pytest.mark.parametrize("free", [0, 3000])
def test_a_disk_that_fills_while_bases_are_kept(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, disk: FullDisk, whole: Path, free: int
) -> None:
    """The cache is a convenience: said once, and the run goes on."""
    cache = BasisCache(tmp_path / "bases")
    disk.folder = cache.folder
    disk.free = free
    BasisCache.forget()
    with pytest.warns(QrloraWarning, match="the bases are not kept for the next run: .*No space left") as caught:
        result = _run(make_config(), model, cache=cache)
    assert len(caught) == 1
    assert disk.refused
    assert not list(cache.folder.glob(".*"))
    entries = len(list(cache.folder.iterdir()))
    assert (entries > 0) == (free > 0)
    assert result == (whole / "adapter.safetensors").read_bytes()
    disk.free = float("inf")
    BasisCache.forget()
    assert _run(make_config(overwrite=True), model, cache=BasisCache(cache.folder)) == result
    assert len(list(cache.folder.iterdir())) > entries


TMPFS = """
import subprocess, sys
from pathlib import Path
from qrlora.errors import QrloraError
from qrlora.training import TrainConfig, train

given, out = sys.argv[1], Path(sys.argv[2])
try:
    train(TrainConfig.from_yaml(given), progress=False)
    sys.exit("the disk did not fill")
except QrloraError as error:
    print(error)
left = sorted(path.relative_to(out.parent).as_posix() for path in out.rglob("*"))
assert left == [f"out/{name}" for name in (
    "checkpoint-2", "checkpoint-2/adapter.safetensors", "checkpoint-2/state.json", "checkpoint-2/state.safetensors",
    "config.yaml")], left
subprocess.run(["mount", "-o", "remount,size=64m", out.parent], check=True)
print(train(TrainConfig.from_yaml(given, {"resume": "latest"}), progress=False).path.read_bytes().hex())
"""


def test_a_device_that_is_too_small(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """torch's own words, and what to do; the model is given back and what was saved is there."""
    real, calls = running.loss_of, 0

    def failing(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of"
            )
        return real(*given)

    monkeypatch.setattr(running, "loss_of", failing)
    told = r"out of memory\. Tried to allocate 2\.25 GiB\. Set memory: to what your card has \(it is not set; qrlora"
    with pytest.raises(QrloraError, match=told):
        _run(make_config(), model)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert _run(make_config(resume="latest"), model) == (whole / "adapter.safetensors").read_bytes()


UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


def test_a_file_system_that_is_really_full(make_config: MakeConfig, whole: Path, tmp_path: Path) -> None:
    """In a child of its own, which mounts a small one where only it can see it."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    trial = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    if trial.returncode:
        pytest.skip("no file system can be mounted here without being root")
    small = tmp_path / "small"
    small.mkdir()
    room = int(1.6 * _size(whole / "checkpoint-4")) // 4096 * 4096
    given = make_config(output_dir=str(small / "out")).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    run = [sys.executable, "-c", TMPFS, str(tmp_path / "config.yaml"), str(small / "out")]
    mount = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'
    child = subprocess.run(
        [*UNSHARE, "sh", "-c", mount, "sh", str(room), str(small), *run],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    sentence, result = child.stdout.splitlines()
    assert "checkpoint-4" in sentence
    assert "No space left on device" in sentence
    assert "The last complete checkpoint is" in sentence
    assert bytes.fromhex(result) == (whole / "adapter.safetensors").read_bytes()


def _vanishing(monkeypatch: pytest.MonkeyPatch, *gone: Path) -> None:
    """The files are deleted while the model is loaded."""
    real = loop.load_model

    def loading(*given: Any) -> Any:
        for path in gone:
            path.unlink()
        return real(*given)

    monkeypatch.setattr(loop, "load_model", loading)


@pytest.mark.parametrize("single", [False, True])
def test_a_picture_that_vanishes_while_the_model_is_loaded(
    make_config: MakeConfig,
    model: LoadedModel,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    single: bool,
) -> None:
    """Training on the two that are left would be another run than the one asked for."""
    gone = pictures / "b.png"
    _vanishing(monkeypatch, gone)
    data = {"instance_data_dir": str(gone)} if single else {}
    with pytest.raises(QrloraError, match=r"instance_data_dir: .*b\.png"):
        _run(make_config(**data), model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["a picture", "the only picture", "a caption", "a mask"])
def test_a_file_that_vanishes_between_a_run_and_its_resume(
    make_config: MakeConfig, model: LoadedModel, pictures: Path, tmp_path: Path, what: str
) -> None:
    gone, data = pictures / "a.png", {}
    if what == "the only picture":
        data = {"instance_data_dir": str(gone)}
    elif what == "a caption":
        gone = pictures / "a.txt"
        gone.write_text("a <c> cat")
    elif what == "a mask":
        gone = pictures / "a.mask.png"
        shutil.copy(pictures / "c.png", gone)
    out = tmp_path / "out"
    _run(make_config(**data, max_train_steps=4), model)
    kept = _files(out)
    contents = gone.read_bytes()
    gone.unlink()
    told = r"there is no picture .*a\.png" if data else r"instance_data_dir \(the pictures, masks or captions\) differs"
    with pytest.raises(QrloraError, match=told):
        _run(make_config(**data, resume="latest"), model)
    assert _files(out) == kept
    gone.write_bytes(contents)
    resumed = _run(make_config(**data, resume="latest"), model)
    assert resumed == _run(make_config(**data, output_dir=str(tmp_path / "again")), model)


CHILD = """
import os, signal, sys
from qrlora.adapter import _cache
from qrlora.formats import _write_safetensors
from qrlora.models.flux import Flux
from qrlora.training import TrainConfig, loop, train
from qrlora.training import run as running

moment, calls = sys.argv[2], 0
real_bytes = _write_safetensors._bytes_of

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def dying(*given):
    global calls
    calls += 1
    if calls == 5:
        die()
    return real_bytes(*given)

def arm():
    _write_safetensors._bytes_of = dying

if moment == "while encoding":
    real = Flux.encode_pictures
    def encoding(self, *given, **more):
        global calls
        calls += 1
        return die() if calls == 2 else real(self, *given, **more)
    Flux.encode_pictures = encoding
elif moment == "in the cache of bases":
    arm()

def on_step(done, total):
    if (done, moment) in ((3, "in a checkpoint"), (total, "in the result")):
        arm()

train(TrainConfig.from_yaml(sys.argv[1]), on_step=on_step, progress=False)
"""


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("moment", ["while encoding", "in the cache of bases", "in a checkpoint", "in the result"])
def test_killed(
    make_config: MakeConfig,
    model: LoadedModel,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """kill -9 half-way through a file, and before there is any."""
    bases = tmp_path / "bases"
    monkeypatch.setenv("QRLORA_CACHE", str(bases))
    out, early = tmp_path / "out", moment in ("while encoding", "in the cache of bases")
    options: dict[str, Any] = {"checkpointing_steps": 2 if moment == "in a checkpoint" else 4}
    if early:  # an earlier result, which this run may overwrite
        shutil.copytree(whole, out)
        options["overwrite"] = True
    earlier = _files(out)
    given = make_config(**options).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "config.yaml"), moment],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == -9, child.stderr
    if early:
        assert _files(out) == earlier
    else:
        assert not (out / "adapter.safetensors").exists()
        assert list(out.rglob("*.tmp"))
    BasisCache.forget()
    again = make_config(**options) if early else make_config(**options, resume="latest")
    assert _run(again, model) == (whole / "adapter.safetensors").read_bytes()
    assert not list(out.rglob("*.tmp"))
    assert len(list(bases.glob("*.safetensors"))) > 4
