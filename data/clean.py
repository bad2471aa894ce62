r"""Clean a corpus: keep each document once, in the language you want, and
drop what is not running text. Every step is optional; one is needed.

    pip install -e '.[clean]'
    python -m data.clean --input=crawl/ --out=clean.jsonl --language=en --gopher \
        --exact --near=0.8
    python -m data.clean --input=notes.jsonl --out=clean.jsonl --exact
    python data/text/prepare.py --input=clean.jsonl   # what comes next

Reads what prepare.py reads: a folder of texts, .jsonl, .csv, .tsv, .parquet.
Writes {"text": ...} lines in the order of the input, and a report of what
each rule removed with examples (clean.report.json), all of it or nothing.

The steps, in the order in which they run whatever the order of the options:
    --normalize  Unicode NFC, plain line ends, no control characters
    --language   only documents in these languages (ISO 639: en or en,de,fr;
                 Chinese is safer as zh,wuu,yue)
    --gopher     the length, prose and repetition rules of DeepMind's Gopher.
                 For prose in English: they drop most source code, tables, and
                 languages written without spaces between words. For other
                 languages add --gopher_skip=stop_words.
    --exact      copies, white space aside; the first one stays
    --near=0.8   documents that share about 80% of their runs of five words
                 with an earlier one that stays

Speed, in MB of Wikipedia's text per second and core: --near 7, --gopher 5,
--language 8 (2 when documents have a few hundred characters); --exact and
--normalize go as fast as JSON is read and written, 25 to 50 MB/s in all.
Memory does not grow with the text, only with the documents kept: 0.2 kB each
for --exact, 2 kB each for --near=0.8. Each process takes 50 to 150 MB.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import os
import re
import time
import unicodedata
import zlib
import numpy as np
from tqdm import tqdm
from tokenizer import patterns
from flatgpt import files as files_module
import tokenizer as tokenizers
from flatgpt.files import NO_ROOM, lock_folder, remove, replace_file, sync_folder, unlock
from data.documents import find_files, read_documents, text_size
from data.encode import positive, run
from tokenizer.workers import Workers, core_count
from configurator import UserError


BATCH_CHARS = 1 << 19  # one task of a worker: large beside the cost of handing it over, small in memory
EXAMPLES = 3           # of removed documents, per rule
EXCERPT_CHARS = 150

INSTALL = "pip install -e '.[clean]'"


# ----------------------------------------------------------------------------------------------------------------------
# normalize

LINE_ENDS = re.compile('\r\n|[\r\v\f\x85\u2028\u2029]')
# Control characters but tab and line end, and the marks that show nothing: zero-width space, word joiner, byte order
# mark. The zero-width joiners stay: Persian, Hindi and emoji are written with them.
INVISIBLE = re.compile('[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff]')


def normalize(text: str) -> str:
    """The text in Unicode's composed form (NFC), with "\\n" for every line end and without control characters."""
    return unicodedata.normalize('NFC', INVISIBLE.sub('', LINE_ENDS.sub('\n', text)))


# ----------------------------------------------------------------------------------------------------------------------
# language, by py3langid. Against lingua 2.1 on sentences of 12 languages: both are right on all of 8 words, on 95 and
# 97% of 4 words; py3langid's wheel has 5 MB for 139 languages (lingua's 96 for 75), it takes 0.1 GB per process
# (lingua 1.1) and reads 3 MB/s (lingua 0.4), and it can say that something is no language at all (zxx).

SAMPLE_CHARS = 2000  # at the beginning, in the middle and at the end: 200 characters of Wikipedia give 99.5% right


def load_identifier():
    """py3langid's model. Use: language, probability = load_identifier().classify(text). Takes 0.5 s."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError(f'--language needs the package py3langid: {INSTALL}') from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_languages(languages, threshold: float):
    """ValueError for a language that py3langid does not know, or a threshold that is no probability."""
    known = sorted(load_identifier().labels)
    for language in languages:
        if language not in known:
            raise UserError(f'--language={",".join(languages)}: {language!r} is not a known language code'
                             f'{tokenizers.nearest(language, known)}; expected some of: {" ".join(known)}')
    if not 0 <= threshold <= 1:
        raise UserError(f'--language_threshold is {threshold}; expected a probability from 0 to 1, such as 0.5')


def find_language(text: str, identifier) -> tuple[str, float]:
    """The ISO 639 code of the language of most of the text and its probability; 'zxx' is text in no language."""
    if len(text) > 3 * SAMPLE_CHARS:
        middle = (len(text) - SAMPLE_CHARS) // 2
        text = '\n'.join([text[:SAMPLE_CHARS], text[middle:middle + SAMPLE_CHARS], text[-SAMPLE_CHARS:]])
    language, probability = identifier.classify(text)
    return language, float(probability)


# ----------------------------------------------------------------------------------------------------------------------
# gopher

# What a document may have, least and most, from Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights
# from Training Gopher" (arXiv 2112.11446), appendix A.1.1. In this order; the first rule that fails gets the document.
GOPHER = {
    # "Quality filtering"
    'words': (50, 100_000),          # white space separates words, here and below
    'word_length': (3, 10),          # characters, on average
    'hashes': (0, 0.1),              # "#" per word
    'ellipses': (0, 0.1),            # "..." and "…" per word
    'bullet_lines': (0, 0.9),        # share of lines that begin with a bullet
    'ellipsis_lines': (0, 0.3),      # share of lines that end with an ellipsis
    'alphabetic_words': (0.8, 1),    # share of words with a letter in them
    'stop_words': (2, 8),            # how many of the eight; English only
    # "Repetition removal", table A1: shares of lines, of paragraphs, or of the characters of the document
    'duplicate_lines': (0, 0.3),
    'duplicate_line_chars': (0, 0.2),
    'duplicate_paragraphs': (0, 0.3),
    'duplicate_paragraph_chars': (0, 0.2),
    'top_2gram': (0, 0.20),          # characters in the most frequent run of two words
    'top_3gram': (0, 0.18),
    'top_4gram': (0, 0.16),
    'duplicate_5gram': (0, 0.15),    # characters in runs of five words that came before
    'duplicate_6gram': (0, 0.14),
    'duplicate_7gram': (0, 0.13),
    'duplicate_8gram': (0, 0.12),
    'duplicate_9gram': (0, 0.11),
    'duplicate_10gram': (0, 0.10),
}
STOP_WORDS = {'the', 'be', 'to', 'of', 'and', 'that', 'have', 'with'}
BULLETS = ('•', '‣', '◦', '▪', '●', '*', '-')


def quality(text: str) -> dict[str, float]:
    """The values of Gopher's quality rules. The text must have a word; blank lines do not count."""
    words = text.split()
    lines = [line.strip() for line in text.split('\n') if line.strip()]
    return {
        'words': len(words),
        'word_length': sum(map(len, words)) / len(words),
        'hashes': text.count('#') / len(words),
        'ellipses': (text.count('...') + text.count('…')) / len(words),
        'bullet_lines': sum(line.startswith(BULLETS) for line in lines) / len(lines),
        'ellipsis_lines': sum(line.endswith(('...', '…')) for line in lines) / len(lines),
        'alphabetic_words': sum(word.isalpha() or any(map(str.isalpha, word)) for word in words) / len(words),
        'stop_words': len(STOP_WORDS.intersection(re.findall('[a-z]+', text.lower()))),
    }


def repetition(text: str) -> dict[str, float]:
    """The values of Gopher's repetition rules. The text must have a word.

    The paper leaves some of it open. Here the first occurrence of a line, a paragraph or a run of words is no
    duplicate, only the later ones are. Characters are those of lines without their margins, of words without the space
    between them. The most frequent run must occur twice; of several equally frequent ones the longest counts.
    """
    values = {}
    for kind, pieces in (('line', text.split('\n')), ('paragraph', re.split(r'\n\s*\n', text))):
        pieces = [piece.strip() for piece in pieces if piece.strip()]
        seen, copies = set(), []
        for piece in pieces:
            if piece in seen:
                copies.append(piece)
            seen.add(piece)
        values[f'duplicate_{kind}s'] = len(copies) / len(pieces)
        values[f'duplicate_{kind}_chars'] = sum(map(len, copies)) / sum(map(len, pieces))

    words = text.split()
    ids = {}
    word_ids = np.array([ids.setdefault(word, len(ids)) for word in words], dtype=np.int64)
    ends = np.cumsum([0] + [len(word) for word in words])  # ends[j] - ends[i]: the characters of words[i:j]
    values.update((rule, 0.0) for rule in GOPHER if rule.endswith('gram'))
    grams = word_ids  # grams[i]: the number of the run of n words that begins at word i; equal runs, equal numbers
    for n in range(2, min(10, len(words)) + 1):
        _, first, grams, counts = np.unique(grams[:-1] * len(ids) + word_ids[n - 1:], return_index=True,
                                            return_inverse=True, return_counts=True)
        if counts.max() == 1:  # then no longer run occurs twice either
            break
        if n <= 4:
            top = first[counts == counts.max()]
            values[f'top_{n}gram'] = float((ends[top + n] - ends[top]).max() * counts.max() / ends[-1])
        else:
            again = np.ones(len(grams), dtype=bool)
            again[first] = False
            # a word belongs to a duplicate when one begins at it or at most n - 1 words before: each counts once
            covered = np.convolve(again, np.ones(n, dtype=int)) > 0
            values[f'duplicate_{n}gram'] = float(np.diff(ends)[covered].sum() / ends[-1])
    return values


def gopher(text: str, skip=()) -> tuple[str, float] | None:
    """The first of the rules GOPHER, without those in skip, that the text breaks and its value; None if it is fine."""
    for measure in (quality, repetition):  # the second only when needed: it takes most of the time
        values = measure(text)
        for rule, (least, most) in GOPHER.items():
            if rule in values and rule not in skip and not least <= values[rule] <= most:
                return rule, values[rule]
    return None


def check_gopher_skip(skip):
    for rule in skip:
        if rule not in GOPHER:
            raise UserError(f'--gopher_skip={",".join(skip)}: there is no rule {rule!r}'
                             f'{tokenizers.nearest(rule, GOPHER)}; expected some of: {" ".join(GOPHER)}')


# ----------------------------------------------------------------------------------------------------------------------
# exact

def digest(text: str) -> bytes:
    """16 bytes that stand for the text; texts that differ in white space alone share them."""
    return hashlib.blake2b(' '.join(text.split()).encode(), digest_size=16).digest()


# ----------------------------------------------------------------------------------------------------------------------
# near: MinHash signatures of the runs of five words, as FineWeb makes them (arXiv 2406.17557: 112 hashes, five words).
# The share of equal numbers in two signatures estimates the Jaccard similarity of the two sets of runs, to 0.04.

HASHES = 112
SHINGLE_WORDS = 5
FOUND = 0.9  # chance, at least, that two documents exactly as similar as the threshold meet in a bucket
BUCKET_SIZE = 100  # documents, of those in one bucket, that a new one is compared with: the first ones
# Scripts without spaces between words (Thai, Lao, Burmese, Khmer, Japanese, Chinese): every character is a word.
SPACELESS = '\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff'
WORD = re.compile(rf'[{SPACELESS}]|[^\W{SPACELESS}]+')
# odd, for multiplications that lose nothing; RandomState draws the same in every version of NumPy
FACTORS = np.random.RandomState(1).randint(0, 2**63, SHINGLE_WORDS + HASHES, dtype=np.uint64) * 2 + 1


def check_near(threshold: float):
    """ValueError for a threshold that is not a similarity from 0.5 to 1."""
    # Below, most documents of a kind are candidates of each other, and comparing them all would take forever.
    if not 0.5 <= threshold <= 1:
        raise UserError(f'--near is {threshold}; expected a similarity from 0.5 to 1, such as 0.8: the share of their '
                         f'runs of five words that two documents have in common')


def load_minhash():
    """datasketch's MinHash with nothing in it yet.

    Of datasketch only the signatures: its table of buckets would take 5.4 kB per document, that of NearDuplicates
    takes 2. rensa, in Rust, is no faster than `signature` (13 MB/s of source code, this 15) and much younger.
    """
    try:
        from datasketch import MinHash
    except ImportError:
        raise UserError(f'--near needs the package datasketch: {INSTALL}') from None
    return MinHash(HASHES, seed=1, hashfunc=int, scheme='affine32')


def signature(text: str, minhash) -> np.ndarray | None:
    """The HASHES uint32 of a text: a pure function of its words, case aside. None for a text without any words.

    minhash: from load_minhash(); it is emptied first.
    """
    words = WORD.findall(text.lower())
    if not words:
        return None
    hashes = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    # The hash of a run is that of its words, each times a factor for its place: words are hashed once, not five times.
    # A shorter text is one run.
    runs = max(1, len(hashes) - SHINGLE_WORDS + 1)
    shingles = sum(hashes[i:i + runs] * factor for i, factor in enumerate(FACTORS[:min(SHINGLE_WORDS, len(hashes))]))
    shingles >>= np.uint64(32)
    minhash.clear()
    for i in range(0, runs, 2048):  # 2048 * HASHES numbers of 4 bytes fit into a core's cache
        minhash.update_batch(shingles[i:i + 2048])
    return minhash.digest()


class NearDuplicates:
    """The documents kept so far, and which of them a new one resembles.

    A new document is compared with those that share a bucket with it: a bucket is `rows` numbers of the signature at a
    given place, and there are as many as fit, the more numbers in each the fewer documents meet by chance. At 0.8 that
    gives FineWeb's 14 buckets of 8. Only kept documents are in the table. So every removed document resembles one that
    stays, which joining pairs to chains would not promise: their ends can be unlike.

    Time per document: one comparison of arrays with at most BUCKET_SIZE documents of each of its buckets. A bucket of
    more holds what pages of one template have in common, and the document that it does not list is met in its others;
    without that bound, n pages just below the threshold would take n * n comparisons.

    Memory per kept document: its signature, 0.5 kB, and 0.11 kB per bucket, so 2 kB at 0.8, 4.6 kB at 0.5.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.rows = max(rows for rows in range(1, HASHES + 1)
                        if 1 - (1 - threshold**rows)**(HASHES // rows) >= FOUND)
        self.bands = HASHES // self.rows
        self.factors = FACTORS[SHINGLE_WORDS:][:self.bands * self.rows].reshape(self.bands, self.rows)
        self.numbers, self.buckets = [], {}
        self.signatures = np.empty((1024, HASHES), dtype=np.uint32)  # one per number, and room for more

    def find(self, new: np.ndarray, number: int) -> tuple[int, float] | None:
        """The number of the first of them that is at least `threshold` like the new one, and how much it is.

        None when there is none; then the new document, a signature and its number, is kept.
        """
        # a bucket's key: 64 bits of its numbers, mixed with factors of its own
        keys = (new[:self.factors.size].reshape(self.factors.shape) * self.factors).sum(axis=1).tolist()
        candidates = self.candidates(keys)
        alike = np.mean(self.signatures[candidates] == new, axis=1)
        if (alike >= self.threshold).any():
            first = int(np.argmax(alike >= self.threshold))
            return self.numbers[candidates[first]], float(alike[first])
        if len(self.numbers) == len(self.signatures):  # by an eighth: the room for more costs little memory
            self.signatures.resize((len(self.signatures) * 9 // 8, HASHES), refcheck=False)
        self.signatures[len(self.numbers)] = new
        alone = (len(self.numbers),)  # one tuple for all buckets in which it is the first
        for key in keys:
            bucket = self.buckets.get(key)
            if bucket is None:
                self.buckets[key] = alone
            elif len(bucket) < BUCKET_SIZE:
                self.buckets[key] = bucket + alone
        self.numbers.append(number)
        return None

    def candidates(self, keys) -> list[int]:
        """The kept documents in the buckets with these keys, as indices, the earliest first."""
        return sorted({i for key in keys for i in self.buckets.get(key, ())})


# ----------------------------------------------------------------------------------------------------------------------
# all steps together. What needs one document alone happens in the workers, what needs those before it here, in order:
# so the result is the same for any number of workers.

Steps = collections.namedtuple('Steps', 'normalize language language_threshold gopher gopher_skip exact near',
                               defaults=(False, (), 0.5, False, (), False, None))
# text: the normalized one, None when that is the same. rule, why: of its removal, None for a text that passes. digest,
# signature: None without the step that needs them.
Finding = collections.namedtuple('Finding', 'text rule why digest signature')

models = {}  # of this process: loaded at the first document that needs them


def examine(texts: list[str], steps: Steps) -> list[Finding]:
    """What the steps find out about each text alone."""
    if steps.language and 'identifier' not in models:
        models['identifier'] = load_identifier()
    if steps.near is not None and 'minhash' not in models:
        models['minhash'] = load_minhash()
    return [examine_one(text, steps) for text in texts]


def examine_batch(batch, steps):
    """examine() of a batch of (number, text)."""
    return examine([text for _, text in batch], steps)


def examine_one(text, steps):
    changed = None
    if steps.normalize and (new := normalize(text)) != text:
        text = changed = new
        if not text or text.isspace():
            return Finding(changed, 'normalize: blank', 'nothing but control characters', None, None)
    if steps.language:
        language, probability = find_language(text, models['identifier'])
        if language not in steps.language:
            return Finding(changed, f'language: {language}', f'probability {probability:.2f}', None, None)
        if probability < steps.language_threshold:
            return Finding(changed, f'language: {language}, unsure',
                           f'probability {probability:.2f}, expected {steps.language_threshold:g} or more', None, None)
    if steps.gopher and (broken := gopher(text, steps.gopher_skip)):
        rule, value = broken
        least, most = GOPHER[rule]
        return Finding(changed, f'gopher: {rule}', f'{value:,.6g}, expected {least:g} to {most:,g}', None, None)
    return Finding(changed, None, None, digest(text) if steps.exact else None,
                   signature(text, models['minhash']) if steps.near is not None else None)


def in_order(batches, steps, num_proc):
    """Yield (batch, its findings) for every batch of (number, text), in order, made by num_proc processes."""
    work = functools.partial(examine_batch, steps=steps)
    if num_proc == 1:
        for batch in batches:
            yield batch, work(batch)
        return
    with Workers(num_proc) as workers:
        yield from workers.map(work, batches)


def excerpt(text):
    text = ' '.join(text[:4 * EXCERPT_CHARS].split())
    return text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS] + '...'


def clean(path, file, steps: Steps, *, text_key: str = 'text', num_proc: int = 1) -> dict:
    """Write the documents below path that pass the steps to the binary file, as JSON lines; returns the report.

    ValueError when none would be left, and for what corpus.read_documents refuses.
    """
    read, kept, normalized, removed = [0, 0], [0, 0], 0, {}  # [documents, bytes]
    seen, near = set(), None if steps.near is None else NearDuplicates(steps.near)
    batches = patterns.batches(enumerate(read_documents(path, text_key), 1), BATCH_CHARS,
                          length=lambda numbered: len(numbered[1]))
    with tqdm(desc='cleaning', total=text_size(find_files(path)[0]), unit='B', unit_scale=True,
              disable=None, leave=False, dynamic_ncols=True) as bar, \
            contextlib.closing(in_order(batches, steps, num_proc)) as results:
        for batch, findings in results:
            for (number, original), (changed, rule, why, key, new) in zip(batch, findings, strict=True):
                text = original if changed is None else changed
                size = len(original.encode())
                read[0] += 1
                read[1] += size
                bar.update(size)
                if rule is None and key is not None:
                    if key in seen:
                        rule, why = 'exact', 'a copy of an earlier document'
                    seen.add(key)
                if rule is None and new is not None and (like := near.find(new, number)):
                    rule, why = 'near', f'{like[1]:.2f} like document {like[0]:,}'
                if rule is None:
                    kept[0] += 1
                    kept[1] += len(text.encode())
                    normalized += changed is not None
                    file.write(json.dumps({'text': text}, ensure_ascii=False).encode() + b'\n')
                else:
                    entry = removed.setdefault(rule, {'documents': 0, 'bytes': 0, 'examples': []})
                    entry['documents'] += 1
                    entry['bytes'] += size
                    if len(entry['examples']) < EXAMPLES:
                        entry['examples'].append({'document': number, 'why': why, 'text': excerpt(original)})
    removed = dict(sorted(removed.items(), key=lambda item: (-item[1]['documents'], item[0])))
    if not kept[0]:
        rule, entry = next(iter(removed.items()))
        step, _, name = rule.partition(': ')
        remedy = f'--gopher_skip={name} skips that rule' if step == 'gopher' else f'leave out --{step}, or relax it'
        raise UserError(f'all {read[0]:,} documents would be removed, so nothing was written. Most of them, '
                         f'{entry["documents"]:,}, by the rule {rule!r} (the first: {entry["examples"][0]["why"]}); '
                         f'{remedy}')
    return {'version': 1, 'source': os.path.basename(os.path.abspath(path)), 'steps': steps._asdict(),
            'documents': {'read': read[0], 'kept': kept[0], 'changed by normalize': normalized},
            'bytes': {'read': read[1], 'kept': kept[1]},
            'removed': {rule: {'documents': entry['documents'], 'share of documents': entry['documents'] / read[0],
                               'bytes': entry['bytes'], 'share of bytes': entry['bytes'] / read[1],
                               'examples': entry['examples']} for rule, entry in removed.items()}}


def clean_to(out, report_path, path, steps: Steps, **options) -> dict:
    """`clean` into the file `out` with the report in report_path: both new and complete, or both as they were.

    Only a crash in the instant between the two renames leaves the new report beside the old documents.
    """
    folder = os.path.dirname(os.path.abspath(out))
    temporary = os.path.join(folder, f'.{os.path.basename(out)}.tmp')
    lock = lock_folder(folder, 'cleaning a corpus into')
    try:
        with open(temporary, 'wb') as file:
            report = clean(path, file, steps, **options)
            file.flush()
            os.fsync(file.fileno())
        # the documents come last: whoever finds them finds their report
        replace_file(report_path, (json.dumps(report, indent=1, ensure_ascii=False) + '\n').encode())
        os.replace(temporary, out)
        sync_folder(folder)
        return report
    except OSError as error:
        if error.errno in NO_ROOM:
            raise UserError(f'{folder} has no room for {os.path.basename(out)} ({error.strerror}); it takes about as '
                             f'much as the text of the input. Nothing was changed; free some space, or write to '
                             f'another disk: --out=FILE') from None
        raise
    finally:
        remove([temporary])
        unlock(lock)


def check_out(option, out, path):
    """ValueError when `out` cannot be written, or would be read as input by the next run."""
    folder = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(folder):
        raise UserError(f'{option}={out}: the folder {folder} does not exist; make it: mkdir -p "{folder}"')
    if os.path.isdir(out):
        raise UserError(f'{option}={out} is a folder; expected the name of a file in it')
    source, target = os.path.realpath(path), os.path.realpath(out)
    if source == target or target.startswith(os.path.join(source, '')):
        raise UserError(f'{option}={out} lies in the input, {path}, and would be read as part of it; choose a name '
                         f'outside')


def print_report(report):
    documents, size, removed = report['documents'], report['bytes'], report['removed']
    print(f'{"read":32} {documents["read"]:>12,} documents {size["read"] / 1e6:>12,.2f} MB')
    for rule, entry in list(removed.items())[:20]:
        print(f'- {rule:30} {entry["documents"]:>12,} {entry["share of documents"]:>9.2%} '
              f'{entry["bytes"] / 1e6:>12,.2f} MB')
        example = entry['examples'][0]
        line = f'    document {example["document"]:,} ({example["why"]}): {example["text"]!r}'
        print(line if len(line) <= 80 else f'{line[:77]}...')
    if len(removed) > 20:
        print(f'- and {len(removed) - 20} rules more, in the report')
    print(f'{"kept":32} {documents["kept"]:>12,} {documents["kept"] / documents["read"]:>9.2%} '
          f'{size["kept"] / 1e6:>12,.2f} MB')
    if documents['changed by normalize']:
        print(f'{documents["changed by normalize"]:,} of them were changed by --normalize')


def names(text):
    return tuple(name for name in text.split(',') if name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--input', required=True, help='a text file, a folder, or a .jsonl, .csv, .tsv, .parquet file')
    parser.add_argument('--out', required=True, help='the .jsonl file to write')
    parser.add_argument('--report', help='the .json file with what was removed (beside --out)')
    parser.add_argument('--text_key', default='text', help='field of .jsonl, .csv, .tsv and .parquet with the text')
    parser.add_argument('--normalize', action='store_true', help='NFC, plain line ends, no control characters')
    parser.add_argument('--language', type=names, default=(), help='languages to keep: en, or en,de,fr')
    parser.add_argument('--language_threshold', type=float, default=None, help='probability to ask for (0.5)')
    parser.add_argument('--gopher', action='store_true', help='length, prose and repetition rules')
    parser.add_argument('--gopher_skip', type=names, default=(), help='rules to leave out: stop_words,hashes')
    parser.add_argument('--exact', action='store_true', help='drop copies')
    parser.add_argument('--near', type=float, nargs='?', const=0.8, help='drop documents this similar (0.8)')
    parser.add_argument('--num_proc', type=positive, default=core_count(), help='processes (one per core)')
    args = parser.parse_args()

    started = time.time()
    if not (args.normalize or args.language or args.gopher or args.exact or args.near is not None):
        raise UserError('there is no step to do; expected one or more of --normalize, --language=en, --gopher, '
                         '--exact, --near=0.8 (--help says what they are)')
    if args.language_threshold is not None and not args.language:
        raise UserError(f'--language_threshold={args.language_threshold} needs a language: --language=en')
    if args.gopher_skip and not args.gopher:
        raise UserError(f'--gopher_skip={",".join(args.gopher_skip)} needs --gopher')
    steps = Steps(args.normalize, args.language, 0.5 if args.language_threshold is None else args.language_threshold,
                  args.gopher, args.gopher_skip, args.exact, args.near)
    if steps.language:
        check_languages(steps.language, steps.language_threshold)
    check_gopher_skip(steps.gopher_skip)
    if steps.near is not None:
        check_near(steps.near)
        load_minhash()  # says so when it is not installed
    if os.path.splitext(args.out)[1] not in ('.jsonl', '.ndjson'):
        raise UserError(f'--out={args.out}: expected a name that ends in .jsonl, such as --out=clean.jsonl')
    report_path = args.report or os.path.splitext(args.out)[0] + '.report.json'
    files, skipped = find_files(args.input)
    for option, name in (('--out', args.out), ('--report', report_path)):
        check_out(option, name, args.input)
    if os.path.realpath(report_path) == os.path.realpath(args.out):
        raise UserError(f'--report={report_path} is --out as well; choose another name')
    if skipped:
        print(f'{len(files_module):,} files; {skipped:,} more were left out because their suffix is not that of a text file')

    report = clean_to(args.out, report_path, args.input, steps, text_key=args.text_key, num_proc=args.num_proc)
    print_report(report)
    print(f'wrote  {args.out} and {report_path} in {time.time() - started:.1f} s')
    print(f'next:  python data/text/prepare.py --input={args.out}')


if __name__ == '__main__':
    run(main)
