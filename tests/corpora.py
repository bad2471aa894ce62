"""Small corpora and datasets for the tests of data/."""

import itertools
import json
import os
import random
from pathlib import Path

import numpy as np

from data import documents, encode, gopher
from tokenizer import ByteTokenizer


def once(defaults, arguments):
    """Return options for a command line: the arguments, and the defaults that they do not set."""
    given = {argument.partition('=')[0] for argument in arguments}
    return [option for option in defaults if option.partition('=')[0] not in given] + list(arguments)


def words(count, seed=0):
    """Some lines of made-up text."""
    rng = random.Random(seed)
    some = ['lorem', 'ipsum', 'dölor', 'sit', '12', 'amet.', '日本']
    return ''.join(rng.choice(some) + rng.choice('   \n') for _ in range(count))


OLD = [words(30, seed) for seed in range(20)]
NEW = [words(50, seed) for seed in range(100, 150)]


def write_pieces(out_dir, pieces, tok=None, documents=True, val_fraction=0.3, **options):
    """Write a dataset of pieces, a function or a list of (split, text)."""
    corpus = encode.Corpus(pieces if callable(pieces) else lambda: pieces, documents=documents,
                           source='test', val_fraction=val_fraction, **options)
    return encode.write_dataset(out_dir, corpus, tok or ByteTokenizer())


def write(out_dir, texts, val_fraction=0.3, tok=None, **options):
    """Write a dataset of documents, a list or a function that returns an iterator of them."""
    def pieces():
        return documents.split_documents(texts() if callable(texts) else texts, val_fraction)

    return write_pieces(out_dir, pieces, tok, val_fraction=val_fraction, **options)


def ids(out_dir, split):
    """The ids of a split's first file."""
    meta = json.loads((Path(out_dir) / 'meta.json').read_text())
    return np.fromfile(Path(out_dir) / f'{split}.bin', dtype=meta['dtype'])


def names(folder):
    return sorted(os.listdir(folder))


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in names(folder)}


SENTENCES = {
    'en': 'Nobody had expected the river to rise so quickly that spring, and the '
          'old bridge was closed for a week.',
    'de': 'Niemand hatte erwartet, dass der Fluss in jenem Frühling so schnell '
          'steigt, und die Brücke blieb gesperrt.',
    'fr': 'Personne ne pensait que la rivière monterait si vite ce printemps-là, '
          'et le vieux pont est resté fermé.',
    'es': 'Nadie esperaba que el río creciera tan rápido aquella primavera, y el '
          'viejo puente estuvo cerrado.',
    'it': 'Nessuno si aspettava che il fiume salisse così in fretta quella '
          'primavera, e il ponte rimase chiuso.',
    'nl': 'Niemand had verwacht dat de rivier dat voorjaar zo snel zou stijgen, '
          'en de oude brug bleef dicht.',
    'pl': 'Nikt się nie spodziewał, że tamtej wiosny rzeka wzbierze tak szybko, '
          'i stary most został zamknięty.',
    'ru': 'Никто не ожидал, что той весной река поднимется так быстро, и старый '
          'мост закрыли на неделю.',
    'zh': '没有人料到那年春天河水会涨得这么快，那座旧桥关闭了一个星期。',
    'ja': 'その春に川がこれほど速く増水するとは誰も予想しておらず、古い橋は一週間閉鎖された。',
}


def distinct_words(count, length=5, start=0):
    """Different words of `length` letters."""
    letters = itertools.product('bcdfghjklmnp', repeat=length)
    return [''.join(word) for word in itertools.islice(letters, start, start + count)]


def prose(count, seed):
    """A document that passes every rule: words drawn from many, in sentences and lines."""
    rng = random.Random(seed)
    vocabulary = distinct_words(3000, start=11) + sorted(gopher.STOP_WORDS) * 30
    text = [rng.choice(vocabulary) for _ in range(count)]
    return '\n'.join(' '.join(text[i:i + 12]) + '.' for i in range(0, count, 12))
