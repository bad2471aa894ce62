"""
Run the quickstart as a newcomer does; measure its time, its loss and its Python.

    $ python -m bench.quickstart               # with an empty compile cache, then with a full one
    $ python -m bench.quickstart --rounds=3

A round trains the vocabulary, the model and prints the sample: python train.py config/quickstart.py
in a copy of the repository without data. The model then writes samples, and each line is parsed:
dedented, with a body if it ends with a colon. Lines of the val text give the share of real code,
whose strings and statements go on over several lines.
"""

import ast
import glob
import os
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from bench import common
from configurator import Count, override
from flatgpt import jsonl
from flatgpt.generate import Sampling, generate_texts
from flatgpt.pretrained import open_model

# settings -----------------------------------------------------------------------------------------
rounds: Count = 1  # each with an empty and a full compile cache
samples: Count = 64  # of the model, 200 tokens each
config = override(globals())
# --------------------------------------------------------------------------------------------------


def parses(line):
    """Return whether a line is Python by itself."""
    line = line.strip()
    before = 'if 1: pass\n' if line.startswith(('else', 'elif')) else (
        'try: pass\n' if line.startswith(('except', 'finally')) else '')
    after = ' pass' if line.endswith(':') else ''
    after += '\nfinally: pass' if line.startswith('try') else ''
    after += '\ndef f(): pass' if line.startswith('@') else ''
    try:
        ast.parse(before + line + after)
    except (SyntaxError, ValueError):
        return False
    return True


def share_that_parses(text):
    """Return the share of a text's lines of code that parse."""
    lines = [line for line in text.splitlines() if line.strip() and line.strip()[0] != '#']
    return sum(map(parses, lines)) / max(1, len(lines))


def measure(copy, cache):
    """Train in a copy of the repository.

    -> (seconds, val loss in bits per byte, share of lines that parse, the same of the val text).
    """
    data = os.path.join(copy, 'data', 'python_bpe')
    for path in glob.glob(f'{data}/*.bin'):
        os.remove(path)
    began = time.perf_counter()
    common.run([sys.executable, 'train.py', 'config/quickstart.py'], cwd=copy,
               TORCHINDUCTOR_CACHE_DIR=cache)
    seconds = time.perf_counter() - began
    run = os.path.join(copy, 'out-quickstart')
    records = jsonl.read_objects(os.path.join(run, 'log.jsonl')).values()
    bits = [record['bits_per_byte'] for record in records if 'bits_per_byte' in record][-1]
    model, tokenizer, _, _ = open_model('resume', run)
    sampling = Sampling(200, temperature=0.8, top_k=200, num_samples=samples)
    *_, drawn = generate_texts(model.eval(), tokenizer, ['def '], sampling)
    written = '\n'.join(sample.text.rpartition('\n')[0] for sample in drawn)
    val = tokenizer.decode(np.fromfile(os.path.join(data, 'val.bin'), np.uint16).tolist())
    return seconds, bits, share_that_parses(written), share_that_parses(val)


def main():
    figures = {'empty': [], 'full': []}
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, 'copy')
        files = subprocess.run(['git', 'ls-files'], check=True, text=True,
                               stdout=subprocess.PIPE).stdout.split()
        for path in files:
            os.makedirs(os.path.dirname(os.path.join(copy, path)), exist_ok=True)
            shutil.copy(path, os.path.join(copy, path))
        for number in range(rounds):
            for cache in figures:
                shutil.rmtree(os.path.join(copy, 'out-quickstart'), ignore_errors=True)
                figures[cache].append(measure(copy, os.path.join(folder, f'cache-{number}')))
                print('{} compile cache: {:.0f} s, {:.3f} bits a byte, {:.0%} of lines parse'
                      .format(cache, *figures[cache][-1]), flush=True)
    rows = [['compile cache', 'seconds', 'bits a byte', 'lines that parse', 'of the val text']]
    names = ('seconds', 'bits_per_byte', 'parse', 'val_parse')
    spreads = {cache: {name: common.spread(values) for name, values in zip(
        names, zip(*figures[cache], strict=True), strict=True)} for cache in figures}
    rows += [[cache, common.show(of['seconds'], form='{:.0f}'),
              common.show(of['bits_per_byte'], form='{:.3f}'),
              common.show(of['parse'], form='{:.0%}'), common.show(of['val_parse'], form='{:.0%}')]
             for cache, of in spreads.items()]
    print(common.heading('python train.py config/quickstart.py'))
    print(common.table(rows))
    common.finish('quickstart', rounds, **spreads)


if __name__ == '__main__':
    main()
