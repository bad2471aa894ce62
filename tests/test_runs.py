"""runs.py: a log that can not be written. Run: pytest tests/test_runs.py"""

from flatgpt import checkpoint


def test_log(tmp_path):
    """A line each; a folder that takes no file costs the line, not the run."""
    said = []
    for step in range(2):
        checkpoint.log(str(tmp_path), said.append, step=step, loss=0.5)
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 0, "loss": 0.5}\n{"step": 1, "loss": 0.5}\n'
    assert not said
    checkpoint.log(str(tmp_path / 'none'), said.append, step=7)
    assert len(said) == 1 and 'log.jsonl lacks the line of step 7' in said[0]
