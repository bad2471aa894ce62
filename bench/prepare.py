"""
How fast text becomes token files, and in how much memory: corpus.write_dataset with GPT-2's vocabulary.

    $ python -m bench.prepare                     # two minutes
    $ python -m bench.prepare --gigatoken=False   # as on a machine without that package
    $ python -m bench.prepare --memory_mb=0       # without the long run that memory is measured in

The text is Python's standard library, a document per line of a .jsonl file: it is read, split, encoded, written and
synced inside one process that has the tokenizer at hand; `cpu` is what that costs in seconds of one core. Beside it
stand the floors: the encoder alone, the reading, splitting and hashing alone, and the disk. The bars: 12 MB/s with
tiktoken; 100 MB/s with gigatoken, which takes its place where it is installed. Then a larger text, made of the same
files with new words in each copy, so that what is kept of words seen would show, is prepared by a process of its own
whose memory is sampled; the bar is 1,000 MB, and that it doesn't grow: its peak in the second half of the run against
that in the first. Prints a table, then a JSON line.
"""

import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time

import tokenizer as tokenizers
from bench import common
from configurator import override
from data.documents import read_documents, split_documents
from data.encode import Corpus, read_batches, write_dataset
from flatgpt.files import write_synced

# settings ------------------------------------------------------------------------------------------------------------
tokenizer = 'gpt2'
gigatoken = True  # where it is installed; False: as if it were not
n = 5  # rounds
wait = 0  # seconds to wait at most, before each round, until others leave the machine alone
memory_mb = 1000  # of text to measure memory with
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

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
    """The standard library as .jsonl, again and again until there are n_bytes of text. In each copy but the first,
    every tenth word or so is one of 8 letters that hardly occurs anywhere else (26**8 are possible)."""
    import sysconfig

    from data.python_stdlib import prepare
    stdlib = sysconfig.get_paths()['stdlib']
    documents = list(prepare.read_sources(stdlib, prepare.find_sources(stdlib)))
    total, copy, rng = 0, 0, random.Random(0)
    with open(path, 'w', encoding='utf-8') as f:
        while total < n_bytes or copy == 0:
            for text in documents:
                if copy:
                    text = re.sub(r'(?:\w+\W+){10}', lambda ten: f'{ten[0]}{new_word(rng)} ', text)
                f.write(json.dumps({'text': text}) + '\n')
                total += len(text.encode())
            copy += 1
    return total


def new_word(rng):
    return ''.join(rng.choices('abcdefghijklmnopqrstuvwxyz', k=8))


def seconds(function, *arguments):
    """-> (wall seconds, CPU seconds of this process and its threads) of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu


def write_and_sync(path, n_bytes):
    content = os.urandom(n_bytes)
    t0 = time.perf_counter()
    write_synced(path, content)
    return time.perf_counter() - t0


def sample_memory(command):
    """-> [(seconds, resident MB), ...] of a command, twenty times a second; None where the system doesn't tell."""
    if not os.path.exists('/proc/self/statm'):
        return None
    process = subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.DEVNULL)
    t0, samples, page = time.perf_counter(), [], os.sysconf('SC_PAGE_SIZE')
    while process.poll() is None:
        with open(f'/proc/{process.pid}/statm', encoding='utf-8') as f:
            pages = f.read().split()
        if pages:  # a process that has just ended has none
            samples.append((time.perf_counter() - t0, int(pages[1]) * page / 1e6))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f'{" ".join(command)} failed with exit status {process.returncode}')
    return samples


if not gigatoken:
    sys.modules['gigatoken'] = None  # as an import that has failed
encoder = tokenizers.load(tokenizer)
whole, encoding, reading, disk = [], [], [], []
with tempfile.TemporaryDirectory(dir=os.path.join(common.ROOT, 'data')) as folder:  # the disk that datasets are on
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
        token_bytes = sum(os.path.getsize(os.path.join(out, f'{split}.bin')) for split in ('train', 'val'))
        disk.append((write_and_sync(os.path.join(folder, 'x'), token_bytes), 0.0))
    samples = None
    if memory_mb:
        large_bytes = write_sources(path, memory_mb * 1_000_000)
        samples = sample_memory([sys.executable, '-c', CHILD, path, os.path.join(folder, 'large'), tokenizer,
                                 str(gigatoken)])

rows = [['', 's', 'MB/s of text', 'cpu, s', 'bar, MB/s']]
figures = {}
for name, label, times, bar in (
        ('whole', 'text to token files', whole, '12, 100 with gigatoken'),
        ('encoding', '  the encoder alone', encoding, ''),
        ('reading', '  reading, splitting and hashing alone', reading, ''),
        ('disk', '  writing and syncing the token files alone', disk, '')):
    wall, cpu = zip(*times, strict=True)
    figures[f'{name}_s'], figures[f'{name}_cpu_s'] = common.spread(wall), common.spread(cpu)
    rate = common.spread([n_bytes / s / 1e6 for s in wall], 1)
    figures[f'{name}_mb_per_s'] = rate
    rows.append([label, common.show(figures[f'{name}_s'], form='{:.3f}'), common.show(rate),
                 common.show(figures[f'{name}_cpu_s'], form='{:.3f}') if name != 'disk' else '', bar])
print(common.heading(f'preparing {n_bytes / 1e6:.1f} MB with {tokenizer}'))
print(common.table(rows))
if samples:
    middle = samples[-1][0] / 2
    halves = [max(mb for t, mb in samples if (t >= middle) == late) for late in (False, True)]
    figures.update(large_bytes=large_bytes, large_s=round(samples[-1][0], 1), first_half_mb=round(halves[0]),
                   second_half_mb=round(halves[1]))
    print(f'\n{large_bytes / 1e6:,.0f} MB in {samples[-1][0]:.1f} s: peak memory {halves[0]:,.0f} MB in the first '
          f'half, {halves[1]:,.0f} MB in the second (bar: 1,000)')
common.finish('prepare', n, tokenizer=tokenizer, gigatoken=gigatoken and bool(importlib.util.find_spec('gigatoken')),
              text_bytes=n_bytes, **figures)
