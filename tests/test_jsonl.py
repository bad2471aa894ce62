"""flatgpt/jsonl.py: objects in, results out, nothing lost. Run: pytest tests/test_jsonl.py"""

import datetime
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from flatgpt.jsonl import Results, iter_objects, read_objects

OBJECTS = {1: {'a': 'é🙂'}, 3: {'b': '\ud800'}}


@pytest.mark.parametrize('content, said', [
    (b'{"a": 1}\n{"a": }\n', 'line 2: not JSON: Expecting value at character 7'),
    (b'[1]', 'line 1: [1] is not an object'), (b'[\n{"a": 1}\n]', 'line 1: an array of several lines'),
    (b'\n\n{"a": "\xff"}', "line 3: 'utf-8' codec can't decode"), (b'[' * 200_000, 'line 1: '),
    (b'{"a": 1} {"a": 2}', 'line 1: not JSON: Extra data'),
    (b'{"b": {"a": 1, "a": 2}}', 'line 1: the key "a" stands')])
def test_lines_that_are_no_objects(tmp_path, content, said):
    (tmp_path / 'in.jsonl').write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f'in.jsonl, {said}')):
        read_objects(tmp_path / 'in.jsonl')


def test_bad_lines_are_collected(tmp_path):
    (tmp_path / 'in.jsonl').write_bytes(b'{"a": 1}\n{\n\n{"b": 2}')
    bad = []
    assert list(iter_objects(tmp_path / 'in.jsonl', bad)) == [(1, {'a': 1}), (4, {'b': 2})]
    assert len(bad) == 1 and bad[0].startswith('not JSON')


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match='none.jsonl cannot be read.*No such file'):
        read_objects(tmp_path / 'none.jsonl')


def test_results_come_in_the_order_of_the_objects(tmp_path):
    (tmp_path / 'in.jsonl').write_bytes('{"a": "é🙂"}\r\n \n{"b": "\\ud800"}'.encode())
    out = tmp_path / 'out.jsonl'
    assert read_objects(tmp_path / 'in.jsonl') == OBJECTS
    results = Results(out, 'd')
    results.add(3, {'x': 3})
    results.add(1, {'x': '\ud800'})
    assert not out.exists()
    results.finish(OBJECTS)
    assert [json.loads(line) for line in out.read_text(encoding='utf-8').splitlines()] == [
        {'a': 'é🙂', 'x': '\ud800'}, {'b': '\ud800', 'x': 3}]
    assert [path.name for path in tmp_path.iterdir() if path.suffix != '.jsonl'] == []
    with pytest.raises(ValueError, match='out.jsonl exists already; delete it'):
        Results(out, 'd')


def test_killed_anywhere(tmp_path):
    """Whatever of the file was written, what is whole in it is kept, and what comes next is
    appended to that."""
    results = Results(tmp_path / 'out', 'd')
    results.add(1, {'x': 'é'})
    results.add(3, {'x': 3})
    results.file.close()
    whole = (tmp_path / 'out.part').read_bytes()
    for n in range(len(whole) + 1):
        path = tmp_path / f'{n}'
        (tmp_path / f'{n}.part').write_bytes(whole[:n])
        results = Results(path, 'd')
        assert results.done == {number: result for number,
                                result in {1: {'x': 'é'}, 3: {'x': 3}}.items()
                                if whole[:n].count(b'\n') > {1: 1, 3: 2}[number]}
        for number in {1, 3} - set(results.done):
            results.add(number, {'x': 'new'})
        results.finish(OBJECTS)
        assert len(path.read_bytes().splitlines()) == 2


def test_killed_at_its_end(tmp_path):
    """After the last result, and on both sides of the rename, the same run ends in the same file."""
    out, part = tmp_path / 'out', tmp_path / 'out.part'
    results = Results(out, 'd')
    results.add(1, {'x': 1})
    results.add(3, {'x': 3})
    whole = part.read_bytes()
    results.finish(OBJECTS)
    content = out.read_bytes()
    for has_out in (False, True):
        part.write_bytes(whole)
        if not has_out:
            out.unlink()
        results = Results(out, 'd')
        assert set(results.done) == set(OBJECTS)
        results.finish(OBJECTS)
        assert out.read_bytes() == content and not part.exists()


def test_a_file_of_that_name_that_came_meanwhile(tmp_path):
    results = Results(tmp_path / 'out', 'd')
    results.add(1, {'x': 1})
    results.add(3, {'x': 3})
    (tmp_path / 'out').write_bytes(b'mine')
    with pytest.raises(ValueError, match='out exists by now; move it away'):
        results.finish(OBJECTS)
    assert (tmp_path / 'out').read_bytes() == b'mine' and (tmp_path / 'out.part').exists()


def test_no_link_is_followed(tmp_path):
    (tmp_path / 'victim').write_bytes(b'')
    (tmp_path / 'out.part').symlink_to(tmp_path / 'victim')
    with pytest.raises(ValueError, match='is a symbolic link'):
        Results(tmp_path / 'out', 'd')
    assert (tmp_path / 'victim').read_bytes() == b''


@pytest.mark.parametrize('line', [b'7', b'{"line": 1}', b'{"line": [], "result": {}}',
                                  b'{"line": 1, "result": 7}'])
def test_a_damaged_part(tmp_path, line):
    (tmp_path / 'out.part').write_bytes(b'{"digest": "d"}\n' + line + b'\n')
    with pytest.raises(ValueError, match='out.part is damaged'):
        Results(tmp_path / 'out', 'd')


@pytest.mark.parametrize('content', [b'{"digest": "other"}\n', b'{"dog', b'notes of mine\n',
                                     b'\xff\x00'])
def test_a_part_of_another_run_is_left_alone(tmp_path, content):
    (tmp_path / 'out.part').write_bytes(content)
    with pytest.raises(ValueError, match='out.part has results of other prompts.*another --out'):
        Results(tmp_path / 'out', 'd')
    assert (tmp_path / 'out.part').read_bytes() == content


def test_two_at_the_same_time(tmp_path):
    pytest.importorskip('fcntl')
    results = Results(tmp_path / 'out', 'd')
    done = subprocess.run([sys.executable, '-c',
                           'from flatgpt import jsonl; jsonl.Results("out", "d")'], cwd=tmp_path,
                          env={'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert 'another process is writing out.part right now' in done.stderr
    results.finish({})
    assert (tmp_path / 'out').read_bytes() == b''


def test_what_is_written_on_the_way_may_be_replaced(tmp_path):
    """By the run that goes on from there, and by no other content."""
    out = tmp_path / 'out'
    results = Results(out, 'd')
    results.add(1, {'x': 1})
    results.write(b'one\n')
    whole = (tmp_path / 'out.part').read_bytes()
    results.close()
    (tmp_path / 'out.part').write_bytes(whole)
    results = Results(out, 'd')
    assert results.done == {1: {'x': 1}}
    results.write(b'one\ntwo\n')
    out.write_bytes(b'mine')
    with pytest.raises(ValueError, match='out exists by now; move it away'):
        results.write(b'three\n')
    assert out.read_bytes() == b'mine'


def test_deleted_meanwhile(tmp_path):
    """A part or a folder that somebody deletes while results come: they are in memory, and are written."""
    for delete in (lambda: (tmp_path / 'a/out.part').unlink(), lambda: shutil.rmtree(tmp_path / 'a')):
        (tmp_path / 'a').mkdir(exist_ok=True)
        results = Results(str(tmp_path / 'a/out'), 'x')
        results.add(1, {'n': 1})
        delete()
        results.add(2, {'when': datetime.date(2026, 12, 1)})
        results.finish({1: {}, 2: {}})
        assert (tmp_path / 'a/out').read_text() == '{"n": 1}\n{"when": "2026-12-01"}\n'
        assert os.listdir(tmp_path / 'a') == ['out']
        (tmp_path / 'a/out').unlink()
