"""What may be continued, and what must not be written over."""

from pathlib import Path

import pytest

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import write_safetensors
from qrlora.training.checkpoint import latest_checkpoint, open_checkpoint, save_checkpoint
from qrlora.training.folder import LOSSES, RESULT, find_start, forget, outdated_by, prepare_folder
from tests.training.conftest import MakeConfig


def _save(output: Path, step: int) -> Path:
    return save_checkpoint(output, step, {}, {}, lambda path: write_safetensors(path, {}))


def test_going_back_needs_overwrite(make_config: MakeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    early, late = _save(out, 2), _save(out, 4)
    with pytest.raises(QrloraError, match=r"its run went on to checkpoint-4; .* set overwrite: true"):
        find_start(make_config(resume=str(early)))
    start = find_start(make_config(resume=str(late)))
    assert start is not None
    assert start.step == 4
    (out / RESULT).touch()
    with pytest.raises(QrloraError, match="its run is finished"):
        find_start(make_config(resume=str(late)))
    start = find_start(make_config(resume=str(early), overwrite=True))
    assert start is not None
    assert start.step == 2


def test_latest_with_nothing_to_resume(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.warns(QrloraWarning, match="no checkpoint in .*out; starting at step 0"):
        assert find_start(make_config(resume="latest")) is None
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    with (
        pytest.warns(QrloraWarning, match="is incomplete"),
        pytest.raises(QrloraError, match=r"no checkpoint in .*out is complete; set overwrite"),
    ):
        find_start(make_config(resume="latest"))
    with pytest.warns(QrloraWarning, match="is incomplete"):
        assert find_start(make_config(resume="latest", overwrite=True)) is None


def test_an_earlier_run_goes_once_something_newer_is_written(make_config: MakeConfig, tmp_path: Path) -> None:
    out, config = tmp_path / "out", make_config(overwrite=True)
    earlier = [_save(out, 2), _save(out, 4), out / RESULT, out / LOSSES]
    for path in earlier[2:]:
        path.touch()
    prepare_folder(config)
    assert all(path.exists() for path in earlier)
    assert outdated_by(make_config(), None) == []
    outdated = outdated_by(config, None)
    assert outdated == earlier
    elsewhere = latest_checkpoint(_save(tmp_path / "elsewhere", 3).parent)
    assert outdated_by(config, elsewhere) == earlier
    assert outdated_by(config, open_checkpoint(earlier[0])) == earlier[1:]
    assert outdated_by(make_config(overwrite=True, resume="latest"), open_checkpoint(earlier[1])) == []
    forget(outdated, keep={"checkpoint-4"})
    assert [path.exists() for path in earlier] == [False, True, False, False]
