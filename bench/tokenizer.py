"""
Measure byte pair encoding: ours, minbpe, tokenizers, tiktoken, gigatoken.

    $ python -m bench.tokenizer --input=FILE                     # half a minute
    $ python -m bench.tokenizer --input=FILE --peer=../minbpe    # two minutes more

FILE is meant to be tiny Shakespeare, --peer a checkout of minbpe. Four parts, in
each of which the programs take turns:
  - small training: `merges` merges of the input with GPT-4's pattern, by
    minbpe's RegexTokenizer and ours. Ties are broken in different ways, so it
    prints how many merges agree;
  - large training: Python's standard library to 8,192 ids, GPT-2's pattern;
  - encoding: the input with GPT-4's vocabulary, in Python with an empty cache
    ('cold') and once more ('warm'), by minbpe's GPT4Tokenizer, which has no
    cache, by compiled code, and by encode_iterable(). All must return the same ids;
  - long pieces: a million letters, ten million random bytes.
Missing packages are left out. Expected: training at 300 times minbpe's speed,
encoding at 9 times cold and 20 times warm; the large training takes as long as
tokenizers, with gigatoken a fifth to a ninth. Prints tables, then a JSON line.
"""

import importlib.util
import os
import random
import site
import sysconfig
import time

import tokenizer
from bench import common
from configurator import Count, NonNegative, UserError, override
from data.python_stdlib.prepare import find_sources, read_sources
from tokenizer import BPETokenizer, bpe, fast
from tokenizer.bytepair import open_tiktoken
from tokenizer.patterns import PATTERNS

# Settings -----------------------------------------------------------------------------------------
input = 'data/shakespeare_char/input.txt'  # the text of the small training and of encoding
peer = ''  # path of a minbpe checkout; '': without it
merges: Count = 256  # of the small training; minbpe takes half a second for each
vocab_size: Count = 8192  # of the large training
rounds: Count = 1
wait: NonNegative = 0  # most seconds to wait for a quiet machine before each part
config = override(globals())
# --------------------------------------------------------------------------------------------------


def timed(times, name, work):
    """Return the result of work(), and append its seconds to times[name]."""
    t0 = time.perf_counter()
    result = work()
    times.setdefault(name, []).append(time.perf_counter() - t0)
    return result


def train_small(text, minbpe):
    """Return times, how many first merges agree with minbpe's, and common tokens."""
    times, n_same, n_common, pattern = {}, None, None, PATTERNS['gpt4']
    for _ in range(rounds):
        ours = timed(times, 'ours', lambda: bpe.learn(bpe.count_pieces([text], pattern), merges))
        if minbpe:
            trained = minbpe.RegexTokenizer(pattern)
            timed(times, 'minbpe', lambda trained=trained: trained.train(text, 256 + merges))
            theirs = list(trained.merges)
            n_same = next((i for i in range(merges) if ours[i] != theirs[i]), merges)
            n_common = len(set(bpe.token_bytes(ours)[256:]) & set(bpe.token_bytes(theirs)[256:]))
    return times, n_same, n_common


def train_large(documents):
    """Return the times of ours, ours with gigatoken, and tokenizers."""
    times = {}
    for _ in range(rounds):
        ours = timed(times, 'ours', lambda: bpe.learn(
            bpe.count_pieces(documents, PATTERNS['gpt2']), vocab_size - 256))
        if fast.has_gigatoken():
            faster = timed(times, 'ours with gigatoken',
                           lambda: BPETokenizer.train(documents, vocab_size, 'gpt2'))
            if faster.merges != bpe.in_bytes(ours):
                raise AssertionError('training with gigatoken gave other merges')
        if importlib.util.find_spec('tokenizers'):
            timed(times, 'tokenizers', lambda: train_tokenizers(documents))
    return times


def train_tokenizers(documents):
    os.environ['TOKENIZERS_PARALLELISM'] = 'true'  # off after a fork, and our workers are forked
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(documents, trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def encode(text, minbpe):
    """Return the times of all encoders, which must return the same ids."""
    times, encoding = {}, open_tiktoken('cl100k_base')
    learnt = BPETokenizer.from_tiktoken('cl100k_base').to_dict()
    theirs = minbpe.GPT4Tokenizer() if minbpe else None
    for _ in range(rounds):
        ours, compiled = tokenizer.from_dict(learnt), tokenizer.TiktokenTokenizer('cl100k_base')
        ways = [('ours in Python cold', ours.encode_ordinary),
                ('ours in Python warm', ours.encode_ordinary)]
        if theirs:
            ways.append(('minbpe', theirs.encode_ordinary))
        ways.append(('tiktoken', encoding.encode_ordinary))
        if fast.has_gigatoken():
            compiled.encode_array('reads its files')
            ways += [('ours with gigatoken cold', compiled.encode_array),
                     ('ours with gigatoken warm', compiled.encode_array)]
        ways.append(('ours as a stream of lines', lambda text, tok=compiled: list(
            tok.encode_iterable(text.splitlines(keepends=True)))))
        expected = encoding.encode_ordinary(text)
        for name, way in ways:
            ids = timed(times, name, lambda way=way: way(text))
            if list(ids) != expected:
                raise AssertionError(f'{name} gave other ids')
    return times


def join_long_pieces():
    """Return the times of ours and tiktoken on long pieces, with the same ids."""
    times, encoding = {}, open_tiktoken('cl100k_base')
    ours = BPETokenizer.from_tiktoken('cl100k_base')
    ours.encode_piece(b'a' * 2000)  # makes its table
    pieces = {'a million letters': b'a' * 1_000_000,
              'ten million random bytes': random.Random(0).randbytes(10_000_000)}
    for _ in range(rounds):
        for name, piece in pieces.items():
            ids = timed(times, f'{name} in Python', lambda piece=piece: ours.encode_piece(piece))
            expected = timed(times, f'{name} in tiktoken', lambda piece=piece:
                             encoding._core_bpe.encode_single_piece(piece))
            if ids != expected:
                raise AssertionError(f'{name}: ours and tiktoken gave different ids')
    return times


def rows_of(times, n_bytes, base):
    """Return rows of seconds, MB/s, and the speed relative to `base`."""
    rows = []
    for name, seconds in times.items():
        speedup = '-'
        if base in times:
            pairs = zip(seconds, times[base], strict=True)
            speedup = common.show(common.spread([b / a for a, b in pairs]))
        rates = [n_bytes / s / 1e6 for s in seconds]
        rows.append([f'  {name}', common.show(common.spread(seconds), form='{:,.3f}'),
                     common.show(common.spread(rates), form='{:,.2f}'), speedup])
    return rows


def main():
    # read the texts
    os.chdir(common.ROOT)
    if not os.path.isfile(input):
        raise UserError(f'--input={input} does not exist; run '
                        f'python data/shakespeare_char/prepare.py, or use another text')
    minbpe = None
    if peer:
        if not os.path.isfile(os.path.join(peer, 'minbpe', 'regex.py')):
            raise UserError(f'--peer={peer}: there is no minbpe/regex.py; expected a checkout of '
                            f'github.com/karpathy/minbpe')
        site.addsitedir(os.path.abspath(peer))
        import minbpe
    with open(input, encoding='utf-8') as file:
        text = file.read()
    stdlib = sysconfig.get_paths()['stdlib']
    documents = list(read_sources(stdlib, find_sources(stdlib)))
    n_bytes, n_library = len(text.encode()), sum(len(document.encode()) for document in documents)

    # measure
    common.wait_for_quiet(wait)
    small, n_same, n_common = train_small(text, minbpe)
    common.wait_for_quiet(wait)
    large = train_large(documents)
    common.wait_for_quiet(wait)
    encoded = encode(text, minbpe)
    common.wait_for_quiet(wait)
    joined = join_long_pieces()

    # report
    print(common.heading('tokenizer'))
    print(common.table([
        ['', 's', 'MB/s', 'times as fast as *'],
        [f'{merges} merges of {n_bytes / 1e6:.1f} MB (* minbpe)', '', '', ''],
        *rows_of(small, n_bytes, 'minbpe'),
        [f'{vocab_size:,} ids of {n_library / 1e6:.0f} MB of Python code (* tokenizers)', '', '',
         ''],
        *rows_of(large, n_library, 'tokenizers'),
        [f'encoding {n_bytes / 1e6:.1f} MB with cl100k_base (* minbpe)', '', '', ''],
        *rows_of(encoded, n_bytes, 'minbpe'),
    ]) + '\n')
    print(common.table([['one piece', 's'], *(
        [name, common.show(common.spread(seconds), form='{:,.2f}')]
        for name, seconds in joined.items())]))
    if minbpe:
        after = '' if n_same == merges else ', then a tie is broken differently'
        print(f"\nthe first {n_same} of {merges} merges are minbpe's{after}; {n_common} tokens "
              f'are in both')
    parts = {'train_small_s': small, 'train_large_s': large, 'encode_s': encoded, 'join_s': joined}
    common.finish('tokenizer', rounds, bytes=n_bytes, library_bytes=n_library, merges=merges,
                  vocab_size=vocab_size, same_merges=n_same, same_tokens=n_common,
                  **{part: {name.replace(' ', '_'): common.spread(seconds)
                            for name, seconds in times.items()} for part, times in parts.items()})


if __name__ == '__main__':  # workers that are not forked import this file
    main()
