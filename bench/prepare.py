"""
Measure how fast text becomes token files, and in how much memory.

    $ python -m bench.prepare                     # two minutes
    $ python -m bench.prepare --gigatoken=False   # as on a machine without that package
    $ python -m bench.prepare --memory_mb=0       # without the long run that measures memory

The text is Python's standard library, one document per line of a .jsonl file.
One process, with the tokenizer loaded, reads, splits, encodes, writes and syncs
it; `cpu` is the cost in seconds of one core. Beside it are the floors: the
encoder alone; reading, splitting and hashing alone; the disk. The bars: 12 MB/s
with tiktoken, 100 MB/s with gigatoken.

Then a new process prepares a larger text, whose copies of the same files have
new words, so that a growing cache of words would show. Its memory is sampled.
The bar is 1,000 MB, and no growth from the first half of the run to the second.
Prints a table, then a JSON line.
"""

import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time

import tokenizer as tokenizers
from bench import common
from configurator import Count, Natural, NonNegative, UserError, override
from data.documents import read_documents, split_documents
from data.encode import Corpus, read_batches, write_dataset
from data.python_stdlib.prepare import find_sources, read_sources
from flatgpt.files import write_synced

# Settings -----------------------------------------------------------------------------------------
tokenizer = 'gpt2'
gigatoken = True  # where it is installed; False: as if it were not
n: Count = 5  # rounds
wait: NonNegative = 0  # most seconds to wait for a quiet machine before each round
memory_mb: Natural = 1000  # of text to measure memory with; 0: do not
config = override(globals())
# --------------------------------------------------------------------------------------------------

VAL_FRACTION = 0.01
CHILD = '''
import sys
path, out, name, gigatoken = sys.argv[1:]
if gigatoken == 'False':
    sys.modules['gigatoken'] = None
import tokenizer
from data.documents import read_documents, split_documents
from data.encode import Corpus, write_dataset
write_dataset(out, Corpus(lambda: split_documents(read_documents(path), 0.01), True, 'bench', 0.01),
              tokenizer.load(name))
'''


def write_sources(path, n_bytes):
    """Write the standard library as .jsonl, repeated until there are n_bytes of text.

    In each copy but the first, about every tenth word is a random one of 8 letters.
    """
    stdlib = sysconfig.get_paths()['stdlib']
    documents = list(read_sources(stdlib, find_sources(stdlib)))
    total, copy, rng = 0, 0, random.Random(0)

    def with_new_word(ten_words):
        return f'{ten_words[0]}{"".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8))} '

    with open(path, 'w', encoding='utf-8') as f:
        while total < n_bytes or copy == 0:
            for text in documents:
                if copy:
                    text = re.sub(r'(?:\w+\W+){10}', with_new_word, text)
                f.write(json.dumps({'text': text}) + '\n')
                total += len(text.encode())
            copy += 1
    return total


def seconds(function, *arguments):
    """Return the wall seconds and the CPU seconds, with all threads, of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu


def write_and_sync(path, n_bytes):
    """Return the seconds in which a file of random bytes is written and synced."""
    content = os.urandom(n_bytes)
    t0 = time.perf_counter()
    write_synced(path, content)
    return time.perf_counter() - t0


def sample_memory(command):
    """Return [(seconds, resident MB), ...] of a command; None if unknown."""
    if not os.path.exists('/proc/self/statm'):
        return None
    process = subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.DEVNULL)
    t0, samples, page = time.perf_counter(), [], os.sysconf('SC_PAGE_SIZE')
    while process.poll() is None:
        with open(f'/proc/{process.pid}/statm', encoding='utf-8') as f:
            pages = f.read().split()
        if pages:  # empty if it has just ended
            samples.append((time.perf_counter() - t0, int(pages[1]) * page / 1e6))
        time.sleep(0.05)
    if process.returncode:
        raise UserError(f'{" ".join(command)} failed with exit status {process.returncode}')
    return samples


# measure speed, then memory
if not gigatoken:
    sys.modules['gigatoken'] = None  # imports of it fail
encoder = tokenizers.load(tokenizer)
whole, encoding, reading, disk = [], [], [], []
with tempfile.TemporaryDirectory(dir=os.path.join(common.ROOT, 'data')) as folder:  # datasets' disk
    path, out = os.path.join(folder, 'stdlib.jsonl'), os.path.join(folder, 'out')
    n_bytes = write_sources(path, 0)

    def pieces():
        return split_documents(read_documents(path), VAL_FRACTION)

    def read():
        for _ in read_batches(pieces(), '', hashlib.sha256()):
            pass

    def prepare_once():
        write_dataset(out, Corpus(pieces, True, 'bench', VAL_FRACTION), encoder)

    batches = [[text for _, text, _ in batch]
               for batch in read_batches(pieces(), '', hashlib.sha256())]
    prepare_once()  # warms the file cache and the encoder
    for _ in range(n):
        common.wait_for_quiet(wait)
        whole.append(seconds(prepare_once))
        encoding.append(seconds(lambda: [encoder.encode_batch(batch) for batch in batches]))
        reading.append(seconds(read))
        token_bytes = sum(os.path.getsize(os.path.join(out, f'{split}.bin'))
                          for split in ('train', 'val'))
        disk.append((write_and_sync(os.path.join(folder, 'x'), token_bytes), 0.0))
    samples = None
    if memory_mb:
        large_bytes = write_sources(path, memory_mb * 1_000_000)
        samples = sample_memory([sys.executable, '-c', CHILD, path, os.path.join(folder, 'large'),
                                 tokenizer, str(gigatoken)])

# report
rows = [['', 's', 'MB/s of text', 'cpu, s', 'bar, MB/s']]
figures = {}
for name, label, times, bar in (
        ('whole', 'text to token files', whole, '12, 100 with gigatoken'),
        ('encoding', '  the encoder alone', encoding, ''),
        ('reading', '  reading, splitting and hashing alone', reading, ''),
        ('disk', '  writing and syncing the token files alone', disk, '')):
    wall, cpu = (common.spread(column) for column in zip(*times, strict=True))
    rate = common.spread([n_bytes / s / 1e6 for s, _ in times], 1)
    figures |= {f'{name}_s': wall, f'{name}_cpu_s': cpu, f'{name}_mb_per_s': rate}
    rows.append([label, common.show(wall, form='{:.3f}'), common.show(rate),
                 common.show(cpu, form='{:.3f}') if name != 'disk' else '', bar])
print(common.heading(f'preparing {n_bytes / 1e6:.1f} MB with {tokenizer}'))
print(common.table(rows))
if samples:
    end = samples[-1][0]
    first, second = (max(mb for t, mb in samples if (t >= end / 2) == is_late)
                     for is_late in (False, True))
    figures |= {'large_bytes': large_bytes, 'large_s': round(end, 1), 'first_half_mb': round(first),
                'second_half_mb': round(second)}
    print(f'\n{large_bytes / 1e6:,.0f} MB in {end:.1f} s: peak memory {first:,.0f} MB in the first '
          f'half, {second:,.0f} MB in the second (bar: 1,000)')
has_gigatoken = gigatoken and bool(importlib.util.find_spec('gigatoken'))
common.finish('prepare', n, tokenizer=tokenizer, gigatoken=has_gigatoken, text_bytes=n_bytes,
              **figures)
