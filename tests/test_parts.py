"""data/parts.py: parts of a corpus on several machines. Run: pytest tests/test_parts.py"""

import collections
import json
import os
import random
import sys

import pytest
from corpora import SENTENCES, once, prose
from test_clean import jaccard, variant
from test_clean_runs import read_rows, write_rows

from data import clean, parts


def some_documents(count=300, seed=7):
    """Texts with copies, near copies, pages, other languages and private data."""
    rng, texts = random.Random(seed), []
    for number in range(count):
        kind = rng.randrange(8)
        texts.append(
            rng.choice(texts).replace(' ', rng.choice([' ', '\t'])) if kind < 2 and texts else
            rng.choice(texts) + ' and so on' if kind == 2 and texts else
            f'<html><body><nav><a href=/>Home</a></nav><p>{rng.choice(texts)}</p></body>' if kind == 3 and texts else
            f'Write to a{number % 5}@example.com today' if kind == 4 else
            '?! ...' if kind == 5 and rng.random() < 0.2 else
            prose(rng.randrange(60, 150), number))
    return texts


def run_parts(folder, count, steps, **options):
    (folder / 'parts').mkdir(exist_ok=True)
    for number in range(1, count + 1):
        clean.clean_to(folder / 'parts' / f'{number}.jsonl', folder / 'in.jsonl',
                       steps._replace(part=(number, count)), **options)
    return parts.part_files([str(folder / 'parts')])


STEPS = clean.Steps(normalize=True, mask=('email',), exact=True)


@pytest.mark.parametrize('steps, count, num_proc', [
    (STEPS, 1, 1), (STEPS, 3, 1), (STEPS, 40, 1), (STEPS, 3, 2), (clean.Steps(mask=('email',)), 3, 1),
    (STEPS._replace(html=True), 4, 1), (clean.Steps(gopher=True, gopher_skip=('stop_words',), exact=True), 3, 1)])
def test_joined_parts_are_the_bytes_of_one_machine(steps, count, num_proc, tmp_path, monkeypatch):
    if steps.html:
        pytest.importorskip('resiliparse')
    monkeypatch.setattr(clean, 'BATCH_CHARS', 3000)
    write_rows(tmp_path / 'in.jsonl', some_documents())
    expected = clean.clean_to(tmp_path / 'whole.jsonl', tmp_path / 'in.jsonl', steps)
    paths = run_parts(tmp_path, count, steps, num_proc=num_proc)
    sizes = [len(read_rows(path)) for path in paths]
    assert len(paths) == count and (count > 4 or min(sizes) > 0.5 * sum(sizes) / count)
    got = clean.clean_to(tmp_path / 'joined.jsonl', paths, clean.Steps(), num_proc=num_proc)
    assert (tmp_path / 'joined.jsonl').read_bytes() == (tmp_path / 'whole.jsonl').read_bytes()
    assert without_excerpts(got) == without_excerpts(expected)


def without_excerpts(report):
    """A report as JSON, without texts: of copies that met when joining, it shows the changed text."""
    report = json.loads(json.dumps(report))
    for entry in report['removed'].values():
        for example in entry['examples']:
            example.pop('text')
    return report


def test_near_duplicates_are_those_of_one_machine_if_they_are_dropped_when_joining(tmp_path):
    pytest.importorskip('datasketch')
    write_rows(tmp_path / 'in.jsonl', some_documents())
    report = clean.clean_to(tmp_path / 'whole.jsonl', tmp_path / 'in.jsonl', STEPS._replace(near=0.8))
    assert report['removed']['near']['documents'] > 10
    paths = run_parts(tmp_path, 3, STEPS)
    joined = clean.clean_to(tmp_path / 'joined.jsonl', paths, clean.Steps(near=0.8))
    assert (tmp_path / 'joined.jsonl').read_bytes() == (tmp_path / 'whole.jsonl').read_bytes()
    assert without_excerpts(joined) == without_excerpts(report)
    # in the parts: most are dropped there, and the rest when joining
    paths = run_parts(tmp_path, 3, STEPS._replace(near=0.8))
    within = sum(json.loads(open(parts.report_of(path)).read())['removed']['near']['documents'] for path in paths)
    joined = clean.clean_to(tmp_path / 'joined.jsonl', paths, clean.Steps())
    assert within > 0.7 * report['removed']['near']['documents']
    assert abs(joined['removed']['near']['documents'] - report['removed']['near']['documents']) <= 5


def test_copies_meet_and_alike_documents_meet_as_often_as_they_are_alike():
    rng, met = random.Random(2), collections.defaultdict(list)
    for _ in range(600):
        text = [f'w{rng.randrange(5000)}' for _ in range(100)]
        other = variant(text, rng.choice([1, 3, 10]), rng)
        part, content = parts.find_part(' '.join(text), 64)
        assert 1 <= part <= 64 and parts.find_part('\n\t '.join(text) + '\n', 64) == (part, content)
        alike = jaccard(text, other)
        met[round(alike, 1)].append((alike, parts.find_part(' '.join(other), 64)[0] == part))
    for pairs in met.values():
        if len(pairs) > 100:
            expected, share = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            assert abs(share - (expected + (1 - expected) / 64)) < 0.12
    assert len({parts.find_part(f'?{"!" * i}', 8)[0] for i in range(99)}) == 8  # without words


@pytest.fixture
def two(tmp_path):
    write_rows(tmp_path / 'in.jsonl', some_documents(40))
    return tmp_path, run_parts(tmp_path, 2, STEPS)


def change(path, edit):
    report = json.loads(open(parts.report_of(path)).read())
    edit(report)
    with open(parts.report_of(path), 'w') as file:
        json.dump(report, file)


EDITS = {
    'has another steps': lambda report: report['steps'].update(mask=[]),
    'has another input': lambda report: report['part'].update({'hash of all parts': '0'}),
    'has another source': lambda report: report.update(source='other'),
    'has another count': lambda report: report['steps'].update(part=[2, 3]),
    'are both part 1': lambda report: report['steps'].update(part=[1, 2]),
    'is no part': lambda report: report.pop('part'),
    'is damaged': lambda report: report['steps'].update(part='2'),
    'is damaged ': lambda report: report['steps'].update(more=2),
    'is damaged  ': lambda report: report.update(removed={'exact': {}}),
    'is damaged   ': lambda report: report['part'].update(scores={'quality': [1, 2]}),
    'documents; expected 99': lambda report: report['documents'].update(kept=99)}


@pytest.mark.parametrize('said', EDITS)
def test_parts_that_do_not_belong_together(said, two):
    folder, paths = two
    change(paths[1], EDITS[said])
    with pytest.raises(ValueError, match=said.strip()):
        clean.clean_to(folder / 'joined.jsonl', paths, clean.Steps())
    assert not (folder / 'joined.jsonl').exists()


@pytest.mark.parametrize('line', ['{"text": "a"}', '{"text": "a", "document": 0, "bytes": 1, "changes": {}}',
                                  '{"text": "a", "document": 10000, "bytes": 1, "changes": {"masked email": "1"}}',
                                  '{"text": 1, "document": 10000, "bytes": 1, "changes": {}}', 'x'])
def test_damaged_rows(line, two):
    folder, paths = two
    with open(paths[0], 'a') as file:
        file.write(line + '\n')
    with pytest.raises(ValueError, match=r'1\.jsonl, line \d+'):
        clean.clean_to(folder / 'joined.jsonl', paths, clean.Steps())


def test_a_missing_part(two):
    folder, paths = two
    with pytest.raises(ValueError, match='1 of 2 parts are missing: 2/2'):
        clean.clean_to(folder / 'joined.jsonl', paths[:1], clean.Steps())


@pytest.mark.parametrize('args, said', [
    (['--join=parts', '--gopher'], '--join does no step but --exact and --near'),
    (['--join=parts', '--input=in.jsonl'], 'expected either --input=FILE'),
    ([], 'expected either --input=FILE'),
    (['--join=.'], 'has no parts'),
    (['--input=in.jsonl', '--part=1/2', '--lines', '--exact'], '--lines counts the lines of the whole corpus'),
    (['--input=in.jsonl', '--part=1/2'], 'no step to do'),
    (['--join=parts', '--out=parts/1.jsonl'], 'lies in the input')])
def test_refusals(args, said, two, monkeypatch):
    folder, _ = two
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', ['clean.py', *once(['--out=joined.jsonl', '--num_proc=1'], args)])
    with pytest.raises(ValueError, match=said):
        clean.main()
    assert sorted(os.listdir()) == ['in.jsonl', 'parts']


@pytest.mark.parametrize('text', ['0/2', '3/2', '2', '1/0', 'a/b', '1/2/3', '-1/2'])
def test_no_part(text):
    with pytest.raises(Exception, match='is not a part such as 2/8'):
        parts.part_of(text)


def test_the_commands(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / 'in.jsonl', [*SENTENCES.values(), SENTENCES['en']])
    monkeypatch.chdir(tmp_path)
    os.mkdir('parts')
    for number in (1, 2):
        monkeypatch.setattr(sys, 'argv', ['clean.py', '--input=in.jsonl', f'--part={number}/2', '--exact',
                                          f'--out=parts/{number}.jsonl', '--num_proc=1'])
        clean.main()
        assert 'next:  python -m data.clean --join=parts --out=FILE.jsonl' in capsys.readouterr().out
    monkeypatch.setattr(sys, 'argv', ['clean.py', '--join=parts', '--out=clean.jsonl', '--num_proc=1'])
    clean.main()
    assert read_rows('clean.jsonl') == list(SENTENCES.values())
