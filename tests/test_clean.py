"""clean.py: every rule just below and just above its threshold, near duplicates against exact similarities, and what a
run writes, refuses and leaves behind.

Run: pytest tests/test_clean.py (about 20 s on two cores, no network)
"""

import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import clean, encode

ROOT = Path(__file__).resolve().parent.parent
POSIX = pytest.mark.skipif(os.name != 'posix', reason='needs signals')
WIKITEXT = ROOT.parent / 'shared' / 'data' / 'wikitext2' / 'valid.txt'


def words(count, length=5, start=0):
    """Different words of `length` letters."""
    letters = itertools.product('bcdfghjklmnp', repeat=length)
    return [''.join(word) for word in itertools.islice(letters, start, start + count)]


def prose(count, seed):
    """A document that passes every rule: words drawn from many, in sentences and lines."""
    rng = random.Random(seed)
    vocabulary = words(3000, start=11) + sorted(clean.STOP_WORDS) * 30
    text = [rng.choice(vocabulary) for _ in range(count)]
    return '\n'.join(' '.join(text[i:i + 12]) + '.' for i in range(0, count, 12))


# normalize ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, expected', [
    ('cafe\u0301', 'caf\xe9'),
    ('a\r\nb\rc\fd\x85e\u2028f', 'a\nb\nc\nd\ne\nf'),
    ('\ufeffa\x00b\x1b[0m\u200bc\td', 'ab[0mc\td'),
    ('\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645', '\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645'),  # Persian
])
def test_normalize(text, expected):
    assert clean.normalize(text) == expected


@given(st.text())
def test_a_normalized_text_stays_as_it_is_and_holds_no_control_characters(text):
    once = clean.normalize(text)
    assert clean.normalize(once) == once
    assert unicodedata.is_normalized('NFC', once)
    assert {char for char in once if unicodedata.category(char) == 'Cc'} <= {'\n', '\t'}


# language -------------------------------------------------------------------------------------------------------------

SENTENCES = {
    'en': 'Nobody had expected the river to rise so quickly that spring, and the old bridge was closed for a week.',
    'de': 'Niemand hatte erwartet, dass der Fluss in jenem Frühling so schnell steigt, und die Brücke blieb gesperrt.',
    'fr': 'Personne ne pensait que la rivière monterait si vite ce printemps-là, et le vieux pont est resté fermé.',
    'es': 'Nadie esperaba que el río creciera tan rápido aquella primavera, y el viejo puente estuvo cerrado.',
    'it': 'Nessuno si aspettava che il fiume salisse così in fretta quella primavera, e il ponte rimase chiuso.',
    'nl': 'Niemand had verwacht dat de rivier dat voorjaar zo snel zou stijgen, en de oude brug bleef dicht.',
    'pl': 'Nikt się nie spodziewał, że tamtej wiosny rzeka wzbierze tak szybko, i stary most został zamknięty.',
    'ru': 'Никто не ожидал, что той весной река поднимется так быстро, и старый мост закрыли на неделю.',
    'zh': '没有人料到那年春天河水会涨得这么快，那座旧桥关闭了一个星期。',
    'ja': 'その春に川がこれほど速く増水するとは誰も予想しておらず、古い橋は一週間閉鎖された。',
}


@pytest.fixture(scope='module')
def identifier():
    pytest.importorskip('py3langid')
    return clean.load_identifier()


@pytest.mark.parametrize('language', SENTENCES)
def test_languages(language, identifier):
    found, probability = clean.find_language(SENTENCES[language], identifier)
    assert found == language and probability > 0.8
    # most of a long text decides, wherever its odd part is
    for parts in ([2, 98], [50, 50, 2], [98, 2]):
        other = SENTENCES['pl' if language == 'de' else 'de']
        long = ' '.join((other if count == 2 else SENTENCES[language] + ' ') * count for count in parts)
        assert clean.find_language(long, identifier)[0] == language


def test_numbers_are_no_language(identifier):
    assert clean.find_language('3.14 2.71 1.41 1.73 ' * 20, identifier)[0] not in SENTENCES


# gopher ---------------------------------------------------------------------------------------------------------------

def only(rule, text):
    """What gopher says of the text by this rule alone."""
    return clean.gopher(text, set(clean.GOPHER) - {rule})


def lines_of(count, per_line=6, start=0):
    return [' '.join(words(per_line, start=start + i * per_line)) for i in range(count)]


def marked(count, mark, of=50):
    """`of` words, `count` of which carry the mark; none ends the line."""
    return ' '.join(word + mark * (i < count) for i, word in enumerate(words(of)))


def copies(count, line, others):
    """The lines `others`, and `line` count + 1 times."""
    return '\n'.join([line] * (count + 1) + others)


def often(gram, count, of=50):
    """`of` words of five letters, in which the words `gram` follow each other `count` times and nothing else repeats"""
    rest = words(of - count * len(gram), start=1000)
    return ' '.join(itertools.chain.from_iterable([*gram, rest.pop()] for _ in range(count))) + ' ' + ' '.join(rest)


def again(count, of=100):
    """`of` words of five letters, the last `count` of which are also the first ones; nothing else repeats."""
    first = words(of - count)
    return ' '.join(first + first[:count])


CASES = [  # rule, a text that just passes, its value, one that just does not, its value
    ('words', ' '.join(words(50)), 50, ' '.join(words(49)), 49),
    ('words', ' '.join(words(100_000)), 100_000, ' '.join(words(100_001)), 100_001),
    ('word_length', ' '.join(words(50, 3)), 3, ' '.join(words(49, 3) + ['xx']), 149 / 50),
    ('word_length', ' '.join(words(50, 10)), 10, ' '.join(words(49, 10) + ['x' * 11]), 501 / 50),
    ('hashes', marked(5, '#'), 0.1, marked(6, '#'), 0.12),
    ('ellipses', marked(5, '...'), 0.1, marked(6, '...'), 0.12),
    ('ellipses', marked(5, '…'), 0.1, marked(6, '…'), 0.12),
    ('bullet_lines', '\n'.join(['  • ' + line for line in lines_of(9)] + lines_of(1, start=60)), 0.9,
     '\n'.join('- ' + line for line in lines_of(10)), 1),
    ('ellipsis_lines', '\n\n'.join([line + '… ' for line in lines_of(3)] + lines_of(7, start=60)), 0.3,
     '\n\n'.join([line + '...' for line in lines_of(4)] + lines_of(6, start=60)), 0.4),
    ('alphabetic_words', ' '.join(words(40) + [str(i) for i in range(10)]), 0.8,
     ' '.join(words(39) + [f'{i}%' for i in range(11)]), 0.78),
    ('alphabetic_words', ' '.join(['1a'] * 4 + ['11']), 0.8, ' '.join(['1a'] * 3 + ['11'] * 2), 0.6),
    ('stop_words', 'The cat, of all things', 2, 'the cat and the dog, the mother bed'.replace('and ', ''), 1),
    ('stop_words', 'That, with it', 2, 'other andes tobe beof', 0),
    ('duplicate_lines', copies(3, 'b', lines_of(6)), 0.3, copies(4, 'b', lines_of(5)), 0.4),
    # 20 of 100 characters: copies of ten letters among lines of ten letters
    ('duplicate_line_chars', copies(2, 'q' * 10, words(7, 10)), 0.2, copies(3, 'q' * 10, words(6, 10)), 0.3),
    ('duplicate_paragraphs', '\n\n'.join(['b\nc'] * 4 + lines_of(6)), 0.3,
     '\n \n'.join(['b\nc'] * 5 + lines_of(5)), 0.4),
    ('duplicate_paragraph_chars', '\n\n'.join(['q' * 10] * 3 + words(7, 10)), 0.2,
     '\n\n\n'.join(['q' * 10] * 4 + words(6, 10)), 0.3),
    ('top_2gram', often(['qqqqq', 'rrrrr'], 5), 0.2, often(['qqqqq', 'rrrrr'], 6), 0.24),
    ('top_3gram', often(['qqqqq', 'rrrrr', 'sssss'], 3), 0.18, often(['qqqqq', 'rrrrr', 'sssss'], 4), 0.24),
    ('top_4gram', often(['qqqqq', 'rrrrr', 'sssss', 'ttttt'], 2), 0.16,
     often(['qqqqq', 'rrrrr', 'sssss', 'ttttt'], 3), 0.24),
    *((f'duplicate_{n}gram', again(most), most / 100, again(most + 1), (most + 1) / 100)
      for n, most in ((5, 15), (6, 14), (7, 13), (8, 12), (9, 11), (10, 10))),
]


@pytest.mark.parametrize('rule, fine, value, bad, bad_value', CASES, ids=[f'{i}-{case[0]}' for i, case in
                                                                          enumerate(CASES)])
def test_gopher_thresholds(rule, fine, value, bad, bad_value):
    measure = clean.quality if rule in clean.quality(fine) else clean.repetition
    assert measure(fine)[rule] == pytest.approx(value, rel=1e-12)
    assert only(rule, fine) is None
    assert only(rule, bad) == (rule, pytest.approx(bad_value, rel=1e-12))


def test_every_rule_has_its_case():
    assert {case[0] for case in CASES} == set(clean.GOPHER)
    text = prose(100, seed=0)
    assert {*clean.quality(text), *clean.repetition(text)} == set(clean.GOPHER)


def test_gopher_names_the_first_rule_that_is_not_skipped():
    text = '# # #'
    assert clean.gopher(text)[0] == 'words'
    assert clean.gopher(text, ['words'])[0] == 'word_length'
    assert clean.gopher(text, ['words', 'word_length']) == ('hashes', 1)
    assert clean.gopher(text, clean.GOPHER) is None
    assert clean.gopher(prose(400, seed=1)) is None


@given(st.lists(st.sampled_from(['a', 'bb', 'ccc', 'dddd']), min_size=1, max_size=60))
def test_repeated_runs_of_words_against_counting_by_hand(text):
    found = clean.repetition(' '.join(text))
    chars = sum(map(len, text))
    for n in range(2, 11):
        runs = [tuple(text[i:i + n]) for i in range(len(text) - n + 1)]
        if n <= 4:
            most = max([runs.count(run) for run in runs], default=0)
            expected = max([most * len(''.join(run)) for run in runs if runs.count(run) == most > 1], default=0)
            assert found[f'top_{n}gram'] == pytest.approx(expected / chars)
        else:
            covered = {j for i, run in enumerate(runs) if run in runs[:i] for j in range(i, i + n)}
            assert found[f'duplicate_{n}gram'] == pytest.approx(sum(len(text[j]) for j in covered) / chars)


@pytest.mark.skipif(not WIKITEXT.exists(), reason='needs WikiText-2')
def test_articles_of_wikipedia_pass():
    # the benchmark's traces of tokenization undone: " @-@ " and spaces before punctuation count as words
    text = WIKITEXT.read_text(encoding='utf-8').replace(' @-@ ', '-').replace(' ,', ',').replace(' .', '.')
    articles = [part for part in text.split('\n = ') if len(part) > 3000]
    passed = sum(clean.gopher(article) is None for article in articles)
    assert len(articles) > 20 and passed > 0.8 * len(articles), f'{passed} of {len(articles)}'


# exact ----------------------------------------------------------------------------------------------------------------

@given(st.text(), st.text())
def test_texts_share_a_digest_when_they_differ_in_white_space_alone(one, two):
    assert (clean.digest(one) == clean.digest(two)) == (one.split() == two.split())
    assert clean.digest(one) == clean.digest('\n ' + '\t '.join(one.split()) + '\r\n')


# near -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def minhash():
    pytest.importorskip('datasketch')
    return clean.load_minhash()


def variant(text, changes, rng):
    """The words with `changes` of them, at places of their own, replaced by new ones."""
    text = list(text)
    for i in rng.sample(range(len(text)), changes):
        text[i] = f'new{rng.randrange(10**9)}'
    return text


def jaccard(one, two):
    one, two = ({tuple(text[i:i + 5]) for i in range(len(text) - 4)} for text in (one, two))
    return len(one & two) / len(one | two)


def pairs(count, seed):
    """Pairs of made-up texts (lists of words) of every similarity."""
    rng = random.Random(seed)
    for _ in range(count):
        text = [f'w{rng.randrange(5000)}' for _ in range(rng.randrange(60, 600))]
        yield text, variant(text, rng.choice([0, 1, 2, 5, 10, 40, 60]), rng)


@pytest.mark.parametrize('threshold, bands, rows', [(0.8, 14, 8), (0.5, 37, 3), (1, 1, 112)])
def test_buckets(threshold, bands, rows, minhash):
    near = clean.NearDuplicates(threshold)
    assert (near.bands, near.rows) == (bands, rows)  # 14 of 8 are FineWeb's
    assert 1 - (1 - threshold**rows)**bands >= 0.9
    text = ' '.join(words(100))
    assert near.find(clean.signature(text, minhash), 7) is None
    assert near.find(clean.signature(text.upper().replace(' ', ', '), minhash), 8) == (7, 1.0)


def test_similar_documents_are_found_and_others_are_not(minhash):
    found, errors = [], []
    for one, two in pairs(400, seed=3):
        near = clean.NearDuplicates(0.8)
        new = [clean.signature(' '.join(text), minhash) for text in (one, two)]
        near.find(new[0], 1)
        exact = jaccard(one, two)
        errors.append(np.mean(new[0] == new[1]) - exact)
        found.append((exact, near.find(new[1], 2) is not None))
    high, low = [hit for exact, hit in found if exact >= 0.95], [hit for exact, hit in found if exact <= 0.3]
    assert len(high) > 50 and all(high)
    assert len(low) > 50 and not any(low)
    # the estimate is a mean of 112 draws, so its error is that of a coin: at most 0.5 / sqrt(112) = 0.047
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.047


def test_of_alike_documents_the_first_stays_and_every_removed_one_is_like_a_kept_one(minhash):
    rng = random.Random(5)
    clusters = [words(300, start=1000 * i) for i in range(40)]
    texts = [(i, variant(text, rng.choice([0, 1, 2]), rng)) for _ in range(4) for i, text in enumerate(clusters)]
    rng.shuffle(texts)
    near, kept = clean.NearDuplicates(0.8), {}
    for number, (cluster, text) in enumerate(texts):
        like = near.find(clean.signature(' '.join(text), minhash), number)
        assert (like is None) == (cluster not in kept)
        if like is not None:
            assert like[0] == kept[cluster]
        kept.setdefault(cluster, number)
    assert near.numbers == list(kept.values())


def test_ends_of_a_chain_that_are_unlike_both_stay(minhash):
    first = words(400)
    middle, last = first[20:] + words(20, start=5000), first[120:] + words(120, start=5000)
    assert jaccard(first, middle) > 0.88 > 0.6 > jaccard(middle, last) > jaccard(first, last)
    near = clean.NearDuplicates(0.8)
    got = [near.find(clean.signature(' '.join(text), minhash), i) for i, text in enumerate([first, middle, last])]
    assert got[0] is None and got[1][0] == 0 and got[2] is None


def test_short_texts_texts_without_words_and_scripts_without_spaces(minhash):
    assert clean.signature('?! ...', minhash) is None
    one, two = clean.signature('Only three words', minhash), clean.signature('only three words!', minhash)
    assert np.array_equal(one, two) and not np.array_equal(one, clean.signature('only three', minhash))
    text = ''.join(chr(0x4e00 + i * 7) for i in range(300))
    changed = text[:150] + '東' + text[151:]
    assert np.mean(clean.signature(text, minhash) == clean.signature(changed, minhash)) > 0.9


def test_long_texts_are_hashed_in_slices(minhash):
    text = words(9000)
    whole = clean.signature(' '.join(text), minhash)
    parts = [clean.signature(' '.join(text[i:i + 1004]), minhash) for i in range(0, 9000, 1000)]
    assert np.array_equal(whole, np.min(parts, axis=0))


def test_pages_of_one_template_are_not_all_compared_with_one_another(monkeypatch):
    """Pairs share 64% of their signatures, so none is removed: twice as many take twice the comparisons, not four
    times. Still a near copy of each is found."""
    monkeypatch.setattr(clean, 'BUCKET_SIZE', 20)
    rng = np.random.default_rng(0)
    template = rng.integers(0, 2**32, clean.HASHES, dtype=np.uint32)
    near, compared = clean.NearDuplicates(0.8), []
    candidates = near.candidates

    def counted(keys):
        compared.append(len(candidates(keys)))
        return candidates(keys)

    near.candidates = counted

    def changed(page, share):
        other = rng.integers(0, 2**32, clean.HASHES, dtype=np.uint32)
        return np.where(rng.random(clean.HASHES) < share, other, page)

    pages = [changed(template, 0.2) for _ in range(2400)]
    kept = [number for number, page in enumerate(pages) if near.find(page, number) is None]
    assert len(kept) > 0.95 * len(pages)  # some are alike by chance
    assert max(compared) <= near.bands * 20
    assert 10 * len(pages) < sum(compared) < 2.5 * sum(compared[:1200])
    found = [near.find(changed(pages[number], 0.05), 10**6) for number in kept[::20]]
    assert sum(like is not None for like in found) > 0.95 * len(found)


@pytest.mark.parametrize('threshold, kilobytes', [(0.8, 2.2), (0.5, 5)])
def test_memory_per_document(threshold, kilobytes):
    rng, count = np.random.default_rng(0), 5000
    near, seen = clean.NearDuplicates(threshold), set()
    tracemalloc.start()
    for number in range(count):
        near.find(rng.integers(0, 2**32, clean.HASHES, dtype=np.uint32), number)
    used = tracemalloc.get_traced_memory()[0]
    for number in range(count):
        seen.add(clean.digest(str(number)))
    exact = tracemalloc.get_traced_memory()[0] - used
    tracemalloc.stop()
    assert len(near.numbers) == count
    assert used / count < 1000 * kilobytes and exact / count < 200


# all together ---------------------------------------------------------------------------------------------------------

ALL = clean.Steps(normalize=True, language=('en',), gopher=True, gopher_skip=('word_length',), exact=True, near=0.8)


def write_rows(path, texts):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts), encoding='utf-8')
    return path


def read_rows(path):
    return [json.loads(line)['text'] for line in Path(path).read_text(encoding='utf-8').splitlines()]


def run(*args, cwd, **options):
    return subprocess.run([sys.executable, '-m', 'data.clean', *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          encoding='utf-8', timeout=120, **options)


def refused(result, *said):
    assert result.returncode not in (0, None)
    for text in said:
        assert text in result.stderr, result.stderr
    assert 'Traceback' not in result.stderr


ENGLISH = '''The committee met on a cold evening in the small hall behind the church, because the roof of the town hall
had begun to leak again. There were nine of them, and most had walked. They talked about the price of coal, about the
road to the mill that nobody would mend, and about a letter from the county that none of them quite understood.
It was late when the oldest member stood up and said that they should have fixed the roof with the money for a band.'''


def test_from_a_folder_to_a_dataset_for_prepare(tmp_path):
    pytest.importorskip('py3langid')
    pytest.importorskip('datasketch')
    folder = tmp_path / 'in'
    folder.mkdir()
    (folder / 'a.txt').write_text(ENGLISH, encoding='utf-8')
    (folder / 'b.txt').write_text(SENTENCES['de'] * 3, encoding='utf-8')
    (folder / 'c.txt').write_text(ENGLISH.replace(' ', '\t'), encoding='utf-8')
    (folder / 'd.txt').write_text(ENGLISH.replace('nine', 'eight'), encoding='utf-8')
    (folder / 'e.txt').write_text('Too short to be of any use.', encoding='utf-8')
    second = ('\0She had never been to the sea, and the stories that her uncle used to tell made it sound like a field '
              'of grey wheat. So when the train came out of the tunnel and there it was, far below, blue and full of '
              'boats, she did not have a word for it; she only took the hand of the child who was travelling with her.')
    write_rows(folder / 'f.jsonl', ['\0\0', second])
    (folder / 'g.bin').write_bytes(b'\0')

    result = run('--input=in', '--out=clean.jsonl', '--normalize', '--language=en', '--gopher', '--exact', '--near=0.8',
                 '--num_proc=1', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_rows(tmp_path / 'clean.jsonl') == [ENGLISH, second[1:]]
    report = json.loads((tmp_path / 'clean.report.json').read_text(encoding='utf-8'))
    assert report['documents'] == {'read': 7, 'kept': 2, 'changed by normalize': 1}
    assert report['bytes']['kept'] == len((ENGLISH + second[1:]).encode())
    removed = {rule: (entry['documents'], entry['examples'][0]['document']) for rule, entry in
               report['removed'].items()}
    assert removed == {'language: de': (1, 2), 'exact': (1, 3), 'near': (1, 4), 'gopher: words': (1, 5),
                       'normalize: blank': (1, 6)}
    assert report['removed']['gopher: words']['examples'][0]['why'] == '7, expected 50 to 100,000'
    assert report['removed']['near']['examples'][0]['why'].endswith('like document 1')
    assert report['bytes']['read'] == report['bytes']['kept'] + 1 + sum(
        entry['bytes'] for entry in report['removed'].values())  # 1: the \0 that normalize took out
    for said in ('gopher: words', 'kept', 'next:  python data/text/prepare.py --input=clean.jsonl', '1 more were left'):
        assert said in result.stdout
    assert sorted(os.listdir(tmp_path)) == ['clean.jsonl', 'clean.report.json', 'in']


def some_documents():
    rng = random.Random(11)
    texts = []
    for seed in range(300):
        kind = rng.randrange(6)
        texts.append(rng.choice(texts) if kind == 0 and texts
                     else rng.choice(texts) + ' and so on' if kind == 1 and texts
                     else rng.choice(list(SENTENCES.values())) * 3 if kind == 2
                     else ENGLISH + '\r\n' + prose(rng.randrange(30, 300), seed))
    return texts


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, monkeypatch):
    pytest.importorskip('py3langid')
    pytest.importorskip('datasketch')
    source = write_rows(tmp_path / 'in.jsonl', some_documents())
    monkeypatch.setattr(clean, 'BATCH_CHARS', 3000)  # of this process, which makes the batches: some 60 of them
    got = {}
    for num_proc in (1, 2):
        file = io.BytesIO()
        got[num_proc] = clean.clean(source, file, ALL, num_proc=num_proc), file.getvalue()
    assert got[1] == got[2]
    assert {'exact', 'near', 'language: de'} <= set(got[1][0]['removed'])
    kept = [json.loads(line)['text'] for line in got[1][1].splitlines()]
    order = [clean.normalize(text) for text in some_documents()]
    places = [order.index(text) for text in kept]
    assert places == sorted(places) and len(set(places)) == len(places) > 50


def test_a_step_alone_needs_no_library_of_another(tmp_path):
    write_rows(tmp_path / 'in.jsonl', [prose(80, 1), prose(80, 2), prose(80, 1), 'b'])
    block = 'import sys; sys.modules.update(datasketch=None, py3langid=None); sys.argv[0] = "clean.py"; '
    code = f'{block} sys.path.insert(0, {str(ROOT)!r}); from data import clean, encode; encode.run(clean.main)'

    def without_libraries(*steps):
        return subprocess.run([sys.executable, '-c', code, '--input=in.jsonl', '--out=out.jsonl', '--num_proc=1',
                               *steps], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert without_libraries('--normalize', '--gopher', '--exact').returncode == 0
    assert read_rows(tmp_path / 'out.jsonl') == [prose(80, 1), prose(80, 2)]
    refused(without_libraries('--near'), 'datasketch', "pip install -e '.[clean]'")
    refused(without_libraries('--language=en'), 'py3langid', "pip install -e '.[clean]'")


@pytest.mark.parametrize('args, said', [
    ([], ['no step', '--exact', '--near=0.8']),
    (['--near=0'], ['--near is 0', '0.5 to 1']),
    (['--near=1.1'], ['--near is 1.1', '0.5 to 1']),
    (['--near=nan'], ['--near is nan']),
    (['--language=en,gr'], ["'gr' is not a known language", 'did you mean']),
    (['--language=en', '--language_threshold=2'], ['--language_threshold is 2', '0 to 1']),
    (['--exact', '--language_threshold=0.5'], ['--language_threshold=0.5 needs a language']),
    (['--gopher', '--gopher_skip=word'], ["no rule 'word' (did you mean words"]),
    (['--exact', '--gopher_skip=words'], ['needs --gopher']),
    (['--exact', '--out=clean.txt'], ['--out=clean.txt', 'ends in .jsonl']),
    (['--exact', '--out=in.jsonl'], ['--out=in.jsonl lies in the input']),
    (['--exact', '--report=clean.jsonl'], ['--report=clean.jsonl is --out as well']),
    (['--exact', '--out=nowhere/clean.jsonl'], ['nowhere', 'does not exist', 'mkdir -p']),
    (['--exact', '--input=im.jsonl'], ['im.jsonl does not exist (did you mean in.jsonl']),
    (['--exact', '--text_key=body'], ["no field 'body'"]),
    (['--gopher'], ['all 2 documents would be removed', "2, by the rule 'gopher: words' (the first: 1, expected 50",
                    '--gopher_skip=words']),
])
def test_refusals(args, said, tmp_path, monkeypatch, capsys):
    if any(arg.startswith('--language=') for arg in args):
        pytest.importorskip('py3langid')
    write_rows(tmp_path / 'in.jsonl', ['b', 'c'])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['clean.py', '--input=in.jsonl', '--out=clean.jsonl', '--num_proc=1', *args])
    with pytest.raises(ValueError) as error:
        clean.main()
    for text in said:
        assert text in str(error.value)
    assert os.listdir(tmp_path) == ['in.jsonl']


@pytest.mark.parametrize('count', ['0', '-1', '1.5', 'two'])
def test_a_number_of_processes_that_is_none(count, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['clean.py', '--input=in.jsonl', '--out=out.jsonl', f'--num_proc={count}'])
    with pytest.raises(SystemExit):
        clean.main()
    assert f"--num_proc: '{count}' is not a whole number of 1 or more" in capsys.readouterr().err


def test_output_inside_the_input_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / 'in').mkdir()
    write_rows(tmp_path / 'in' / 'a.jsonl', ['b'])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['clean.py', '--input=in', '--out=in/clean.jsonl', '--exact'])
    with pytest.raises(ValueError, match='would be read as part of it'):
        clean.main()


def test_help_fits_a_terminal(tmp_path):
    result = run('--help', cwd=tmp_path, env={**os.environ, 'COLUMNS': '80'})
    assert result.returncode == 0 and max(map(len, result.stdout.splitlines())) <= 80


# what a broken run leaves behind --------------------------------------------------------------------------------------

def big(path):
    """A corpus that takes seconds."""
    return write_rows(path, [prose(2000, seed) for seed in range(40)] * 40)


@POSIX
@pytest.mark.parametrize('wait', [0, 0.2, None], ids=['at its start', 'while workers start', 'while it writes'])
def test_interrupted(wait, tmp_path):
    pytest.importorskip('datasketch')
    big(tmp_path / 'in.jsonl')
    (tmp_path / 'out.jsonl').write_text('old')
    process = subprocess.Popen([sys.executable, '-m', 'data.clean', '--input=in.jsonl', '--out=out.jsonl', '--gopher',
                                '--near', '--num_proc=2'], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    temporary = tmp_path / '.out.jsonl.tmp'
    wait_for(lambda: temporary.exists() and (wait is not None or temporary.stat().st_size))
    time.sleep(wait or 0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes at once
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in errors, errors
    assert (tmp_path / 'out.jsonl').read_text() == 'old'
    assert sorted(os.listdir(tmp_path)) == ['in.jsonl', 'out.jsonl']


@POSIX
def test_another_process_that_writes_there(tmp_path):
    lock = encode.lock_folder(tmp_path)
    small = write_rows(tmp_path / 'in.jsonl', ['b'])
    with pytest.raises(encode.Busy, match='cleaning a corpus into'):
        clean.clean_to(tmp_path / 'out.jsonl', tmp_path / 'report.json', small, clean.Steps(exact=True))
    os.close(lock)
    assert os.listdir(tmp_path) == ['in.jsonl']


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc')
def test_workers_end_when_the_main_process_was_killed(tmp_path):
    pytest.importorskip('datasketch')
    big(tmp_path / 'in.jsonl')
    process = subprocess.Popen([sys.executable, '-m', 'data.clean', '--input=in.jsonl', '--out=out.jsonl', '--gopher',
                                '--near', '--num_proc=2'], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / '.out.jsonl.tmp').exists() and (tmp_path / '.out.jsonl.tmp').stat().st_size)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_running(pid) for pid in children))
    assert not (tmp_path / 'out.jsonl').exists()
    small = write_rows(tmp_path / 'small.jsonl', ['b'])
    clean.clean_to(tmp_path / 'out.jsonl', tmp_path / 'report.json', small, clean.Steps(exact=True))
    assert sorted(os.listdir(tmp_path)) == ['in.jsonl', 'out.jsonl', 'report.json', 'small.jsonl']  # no .out.jsonl.tmp


def is_running(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.01)


def test_a_worker_that_was_ended_from_outside(tmp_path):
    def batches():
        yield [(1, 'b')]
        for number in range(2, 10_000):
            for child in multiprocessing.active_children():
                child.kill()
            yield [(number, 'b')]

    with pytest.raises(ValueError, match='--num_proc=1'):
        for _ in clean.in_order(batches(), clean.Steps(exact=True), 2):
            pass


@POSIX
def test_a_full_disk(tmp_path):
    import resource
    write_rows(tmp_path / 'in.jsonl', [prose(2000, seed) for seed in range(20)])
    (tmp_path / 'out.jsonl').write_text('old')

    def limit():  # the disk takes 50 kB of a file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    refused(run('--input=in.jsonl', '--out=out.jsonl', '--exact', '--num_proc=1', cwd=tmp_path, preexec_fn=limit),
            'has no room for out.jsonl', '--out=FILE')
    assert (tmp_path / 'out.jsonl').read_text() == 'old'
    assert sorted(os.listdir(tmp_path)) == ['in.jsonl', 'out.jsonl']
