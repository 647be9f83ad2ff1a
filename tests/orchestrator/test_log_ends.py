"""Logs that are cut where a run goes on: no more of them is read than is cut off."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import runfolder
from orchestrator.jsonlines import records
from orchestrator.runfolder import METRICS, RunFolder
from orchestrator.storage import Folder


@given(
    st.lists(st.sampled_from(['{"step": %d}\n', "{\n", "\n", '{"step": %d, "x": "\\u00e9"}\n']), max_size=40),
    st.sampled_from(["", "{", '{"step": 99}', "\0\0\0"]),
    st.integers(-1, 45),
    st.integers(1, 20),
)
def test_a_cut_reads_the_end_and_comes_to_the_same(tmp_path_factory, parts, end, step, at_once):
    """As by reading all of it: records up to the step, and nothing torn."""
    written = "".join(part % number if "%d" in part else part for number, part in enumerate(parts)) + end
    folder = RunFolder(Folder(str(tmp_path_factory.mktemp("run"))))
    folder.folder.write(METRICS, written.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runfolder, "LAST_BYTES", at_once)
        folder.cut_metrics(step)
    left = folder.folder.read_text(METRICS)
    assert records(left) == [record for record in records(written + "\n") if record["step"] <= step]
    assert not left or left.endswith("\n")


def test_of_a_long_log_the_end_is_read(tmp_path, monkeypatch):
    """Workers, and the command, wait for a coordinator that goes back for some seconds only."""
    folder = RunFolder(Folder(str(tmp_path)))
    folder.folder.write(METRICS, "".join(f'{{"step": {number}}}\n' for number in range(1, 200_001)).encode())
    read, tail = [], Folder.tail
    monkeypatch.setattr(Folder, "tail", lambda *given: read.append(tail(*given)) or read[-1])
    monkeypatch.setattr(Folder, "read", lambda *given: pytest.fail("all of it is read"))
    folder.mend_logs()
    folder.cut_metrics(199_000)
    assert folder.last_step() == 199_000
    assert sum(map(len, read)) < 200_000
    monkeypatch.undo()
    assert len(records(folder.folder.read_text(METRICS))) == 199_000
