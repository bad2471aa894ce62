"""
Training and encoding with byte pair encoding: ours in Python, ours with gigatoken, tokenizers, tiktoken, and minbpe.

    $ python -m bench.tokenizer --input=FILE                     # half a minute; tiny Shakespeare is meant
    $ python -m bench.tokenizer --input=FILE --peer=../minbpe    # against a checkout of minbpe; two minutes more

Four parts, and what is compared takes turns. Small training: `merges` merges of the input with GPT-4's pattern, in
minbpe's RegexTokenizer and here; both break ties in their own way, so it is said how far the merges are the same. Large
training: Python's standard library to 8,192 ids with GPT-2's pattern. Encoding: the input with GPT-4's vocabulary, in
Python, with no piece known ('cold') and once more ('warm'), beside minbpe's GPT4Tokenizer, which keeps nothing, and
compiled code; every way must give the same ids. Long pieces: a million letters, ten million random bytes. What is not
installed is left out. Expect 300 times minbpe's speed of training, and of encoding 9 times cold and 20 times warm; of
the large training what tokenizers take, and a fifth to a ninth of it with gigatoken. Prints tables, then a JSON line.
"""

import importlib.util
import os
import random
import site
import sysconfig
import time

import tokenizer
from bench import common
from configurator import override
from tokenizer import BPETokenizer
from tokenizer import bpe as bpe_module
from tokenizer import fast as bpe
from tokenizer.bytepair import open_tiktoken
from tokenizer.patterns import PATTERNS

# settings ------------------------------------------------------------------------------------------------------------
input = 'data/shakespeare_char/input.txt'  # the text of the small training and of encoding
peer = ''  # path of a minbpe checkout; '': without it
merges = 256  # of the small training; minbpe takes half a second for each
vocab_size = 8192  # of the large training
rounds = 1
wait = 0  # seconds to wait at most, before each part, until others leave the machine alone
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------


def timed(times, name, work):
    """What work() returns; the seconds it took join times[name]."""
    t0 = time.perf_counter()
    result = work()
    times.setdefault(name, []).append(time.perf_counter() - t0)
    return result


def read_standard_library():
    """The texts of the running Python's own modules."""
    from data.python_stdlib import prepare
    stdlib = sysconfig.get_paths()['stdlib']
    return list(prepare.read_sources(stdlib, prepare.find_sources(stdlib)))


def train_small(text, minbpe):
    """-> (times, merges until the first that differs from minbpe's, merges of both)"""
    times, same, common_to_both = {}, None, None
    for _ in range(rounds):
        ours = timed(times, 'ours', lambda: bpe_module.learn(bpe_module.count_pieces([text], PATTERNS['gpt4']), merges))
        if minbpe:
            trained = minbpe.RegexTokenizer(PATTERNS['gpt4'])
            timed(times, 'minbpe', lambda trained=trained: trained.train(text, 256 + merges))
            theirs = list(trained.merges)
            same = next((i for i in range(merges) if ours[i] != theirs[i]), merges)
            common_to_both = len(set(bpe_module.token_bytes(ours)[256:]) & set(bpe_module.token_bytes(theirs)[256:]))
    return times, same, common_to_both


def train_large(documents):
    """-> times"""
    times = {}
    for _ in range(rounds):
        ours = timed(times, 'ours', lambda: bpe_module.in_bytes(bpe_module.learn(
            bpe_module.count_pieces(documents, PATTERNS['gpt2']), vocab_size - 256)))
        if bpe.has_gigatoken():
            fast = timed(times, 'ours with gigatoken', lambda: BPETokenizer.train(documents, vocab_size, 'gpt2'))
            if fast.merges != ours:
                raise SystemExit('training with gigatoken gave other merges')
        if importlib.util.find_spec('tokenizers'):
            timed(times, 'tokenizers', lambda: train_tokenizers(documents))
    return times


def train_tokenizers(documents):
    os.environ['TOKENIZERS_PARALLELISM'] = 'true'  # or it uses one core, as our processes were forked from this one
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(documents, trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def encode(text, minbpe):
    """-> times. SystemExit unless all give the same ids."""
    times, encoding = {}, open_tiktoken('cl100k_base')
    learnt = tokenizer.BPETokenizer.from_tiktoken('cl100k_base').to_dict()
    theirs = minbpe.GPT4Tokenizer() if minbpe else None
    for _ in range(rounds):
        ours, fast = tokenizer.from_dict(learnt), tokenizer.TiktokenTokenizer('cl100k_base')
        ways = [('ours in Python cold', ours.encode_ordinary), ('ours in Python warm', ours.encode_ordinary)]
        if theirs:
            ways.append(('minbpe', theirs.encode_ordinary))
        ways.append(('tiktoken', encoding.encode_ordinary))
        if bpe.has_gigatoken():
            fast.encode_array('its files are read now')
            ways += [('ours with gigatoken cold', fast.encode_array), ('ours with gigatoken warm', fast.encode_array)]
        expected = encoding.encode_ordinary(text)
        for name, way in ways:
            ids = timed(times, name, lambda way=way: way(text))
            if list(ids) != expected:
                raise SystemExit(f'{name} gave other ids')
    return times


def join_long_pieces():
    """-> times. SystemExit unless ours and tiktoken's ids are the same."""
    times, encoding = {}, open_tiktoken('cl100k_base')
    ours = tokenizer.BPETokenizer.from_tiktoken('cl100k_base')
    ours.encode_piece(b'a' * 2000)  # its table is made now
    pieces = {'a million letters': b'a' * 1_000_000, 'ten million random bytes': random.Random(0).randbytes(10_000_000)}
    for _ in range(rounds):
        for what, piece in pieces.items():
            ids = timed(times, f'{what} in Python', lambda piece=piece: ours.encode_piece(piece))
            if ids != timed(times, f'{what} in tiktoken', lambda piece=piece:
                            encoding._core_bpe.encode_single_piece(piece)):
                raise SystemExit(f'{what}: ours and tiktoken gave different ids')
    return times


def rows_of(times, n_bytes, base):
    """A row for each way of doing the same: seconds, MB/s, how many times as fast as `base` in the same round."""
    rows = []
    for name, seconds in times.items():
        ratio = [b / a for a, b in zip(seconds, times[base], strict=True)] if base in times else None
        rows.append([f'  {name}', common.show(common.spread(seconds), form='{:,.3f}'),
                     common.show(common.spread([n_bytes / a / 1e6 for a in seconds]), form='{:,.2f}'),
                     common.show(common.spread(ratio)) if ratio else '-'])
    return rows


def main():
    os.chdir(common.ROOT)
    if not os.path.isfile(input):
        raise SystemExit(f'--input={input} does not exist; make it with python data/shakespeare_char/prepare.py, or '
                         f'give another text')
    minbpe = None
    if peer:
        if not os.path.isfile(os.path.join(peer, 'minbpe', 'regex.py')):
            raise SystemExit(f'--peer={peer}: there is no minbpe/regex.py; expected a checkout of '
                             f'github.com/karpathy/minbpe')
        site.addsitedir(os.path.abspath(peer))
        import minbpe
    with open(input, encoding='utf-8') as file:
        text = file.read()
    documents = read_standard_library()
    n_bytes, n_library = len(text.encode()), sum(len(document.encode()) for document in documents)

    common.wait_for_quiet(wait)
    small, same, common_to_both = train_small(text, minbpe)
    common.wait_for_quiet(wait)
    large = train_large(documents)
    common.wait_for_quiet(wait)
    encoded = encode(text, minbpe)
    common.wait_for_quiet(wait)
    joined = join_long_pieces()

    print(common.heading('tokenizer'))
    print(common.table([
        ['', 's', 'MB/s', 'times as fast as *'],
        [f'{merges} merges of {n_bytes / 1e6:.1f} MB (* minbpe)', '', '', ''], *rows_of(small, n_bytes, 'minbpe'),
        [f'{vocab_size:,} ids of {n_library / 1e6:.0f} MB of Python code (* tokenizers)', '', '', ''],
        *rows_of(large, n_library, 'tokenizers'),
        [f'encoding {n_bytes / 1e6:.1f} MB with cl100k_base (* minbpe)', '', '', ''],
        *rows_of(encoded, n_bytes, 'minbpe'),
    ]))
    print()
    print(common.table([['one piece', 's'], *([name, common.show(common.spread(seconds), form='{:,.2f}')]
                                              for name, seconds in joined.items())]))
    if minbpe:
        after = '' if same == merges else ', then a tie is broken in another way'
        print(f"\nthe first {same} of {merges} merges are minbpe's{after}; {common_to_both} tokens are in both")
    common.finish('tokenizer', rounds, bytes=n_bytes, library_bytes=n_library, merges=merges, vocab_size=vocab_size,
                  same_merges=same, same_tokens=common_to_both,
                  **{name: {way.replace(' ', '_'): common.spread(seconds) for way, seconds in times.items()}
                     for name, times in [('train_small_s', small), ('train_large_s', large), ('encode_s', encoded),
                                         ('join_s', joined)]})


if __name__ == '__main__':  # counting starts processes, which import this file where they are not forked
    main()
