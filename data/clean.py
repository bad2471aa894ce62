r"""Clean a corpus: drop copies, other languages, and text of low quality.

    pip install -e '.[clean]'
    python -m data.clean --input=crawl/ --out=clean.jsonl --language=en \
        --gopher --exact --near=0.8
    python -m data.clean --input=notes.jsonl --out=clean.jsonl --exact
    python data/text/prepare.py --input=clean.jsonl   # the next step

Reads a folder of texts, .jsonl, .json, .csv, .tsv or .parquet. Writes lines
{"text": ...} in the order of the input, and clean.report.json, which counts the
texts that each rule removed, with examples: both whole or not at all.

Every step is optional. They run in this order:
    --html       keeps the main text of HTML pages, without menus and scripts:
                 .html files, and texts in tables that begin as a page
    --normalize  writes Unicode NFC, plain line ends, no control characters
    --lines=10   drops lines that 10 documents or more have, such as "Accept
                 cookies", but for the first. It reads the input twice. It is
                 not for source code.
    --language   keeps documents in these languages (ISO 639: en or en,de,fr;
                 Chinese is safer as zh,wuu,yue)
    --gopher     applies the length, prose and repetition rules of DeepMind's
                 Gopher, for English prose: they drop most source code, tables,
                 and languages written without spaces. For other languages add
                 --gopher_skip=stop_words.
    --quality=MODEL --quality_min=0.5
                 drops texts that a model scores lower; for a model of your own
                 texts: python -m data.clean train-quality --help
    --toxic=MODEL --toxic_max=0.5
                 drops texts that are more like the bad ones of a model
                 Both also take FOLDER:LABEL, a classifier of posttrain.classify
                 and the label to keep, or to drop with --toxic.
    --decontaminate=FILES
                 drops documents with 13 words in a row of an evaluation set:
                 texts, and tables with a task per row in any fields
    --mask=email,phone,ip
                 writes |||EMAIL_ADDRESS|||, |||PHONE_NUMBER||| and
                 |||IP_ADDRESS||| in their place
    --exact      drops copies, white space aside; the first one stays
    --near=0.8   drops documents that share about 80% of their runs of five
                 words with an earlier one that stays

Several machines: --part=2/8 does the second of 8 shares of the input, and
--join=FOLDER joins the parts; see data/README.md.

Speed, in MB of text per second and core: --near 7, --gopher 5, --language 8 (2
for documents of a few hundred characters), --html 7 of markup, --mask 5 to 8,
--quality 15, --decontaminate 12. Memory per document that stays: 0.2 kB for
--exact, 2 kB for --near=0.8; 50 to 150 MB per process, more by 160 MB for
--lines and 23 times the longest page for --html.
"""

import collections
import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import time
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import UserError, nearest
from data import classifier
from data.classifier import open_scorer
from data.clean_report import Tally, print_report
from data.decontaminate import EvaluationIndex
from data.documents import find_files, list_files, read_documents, text_size
from data.encode import make_parser, names_of, paths_of, positive, run
from data.gopher import GOPHER, gopher
from data.lines import LineCounts, line_keys, unique_keys
from data.mask import MASKS, mask
from data.minhash import NearDuplicates, load_minhash, signature
from data.pages import is_page, load_resiliparse, main_text
from data.parts import OTHER, Parts, Whole, find_part, part_files, part_of, report_of
from flatgpt import files
from tokenizer.patterns import batches, nfc
from tokenizer.workers import Workers, core_count

BATCH_CHARS = 1 << 19  # one task of a worker: costs more than its transfer, small in memory
BLANK = {'html': 'no main text', 'normalize': 'nothing but control characters',
         'lines': 'nothing but lines that many documents have'}


# Normalize --------------------------------------------------------------------------------------

LINE_ENDS = re.compile('\r\n|[\r\v\f\x85\u2028\u2029]')
# Control characters except tab and line end; zero-width space, word joiner, byte order mark. The
# zero-width joiners stay: Persian, Hindi and emoji need them.
INVISIBLE = re.compile('[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff]')


def normalize(text: str) -> str:
    """Return the text in NFC, with plain line ends and no control characters."""
    return nfc(INVISIBLE.sub('', LINE_ENDS.sub('\n', text)))


# Language ---------------------------------------------------------------------------------------
# py3langid against lingua 2.1, on sentences of 12 languages: both are right on all of 8 words, on
# 95 and 97% of 4 words. py3langid has 139 languages in 5 MB (75 in 96 MB), takes 0.1 GB per
# process (1.1), reads 3 MB/s (0.4), and has a class for text in no language, zxx.

SAMPLE_CHARS = 2000  # at beginning, middle and end: 200 characters of Wikipedia give 99.5% right
SURE = 0.5           # least probability of the language of a document that stays


@functools.cache
def load_identifier():
    """Load py3langid's model, in 0.5 s. .classify(text) -> (language, probability)."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("--language needs py3langid: pip install -e '.[clean]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def find_language(text: str) -> tuple[str, float]:
    """Return the main language, as ISO 639 ('zxx': none), and its probability."""
    if len(text) > 3 * SAMPLE_CHARS:
        middle = (len(text) - SAMPLE_CHARS) // 2
        text = '\n'.join([text[:SAMPLE_CHARS], text[middle:middle + SAMPLE_CHARS],
                          text[-SAMPLE_CHARS:]])
    language, probability = load_identifier().classify(text)
    return language, float(probability)


# Exact ------------------------------------------------------------------------------------------

def digest(text: str) -> bytes:
    """Hash a text to 16 bytes; texts that differ in white space alone share them."""
    return hashlib.blake2b(' '.join(text.split()).encode(), digest_size=16).digest()


# All steps --------------------------------------------------------------------------------------
# Workers do the steps that need one document alone. The steps that need the documents before it
# run here, in order, so the number of workers does not change the result.

class Steps(NamedTuple):
    """Hold the steps to do, in their order, as the options of the command name them."""

    html: bool = False
    normalize: bool = False
    lines: int | None = None
    language: tuple[str, ...] = ()
    gopher: bool = False
    gopher_skip: tuple[str, ...] = ()
    quality: str | None = None
    quality_min: float = 0.5
    toxic: str | None = None
    toxic_max: float = 0.5
    decontaminate: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    exact: bool = False
    near: float | None = None
    part: tuple[int, int] | None = None  # 2 of 8


class Finding(NamedTuple):
    """Hold what the steps of one document found."""

    text: str | None = None  # None: it is as it was
    rule: str | None = None  # of its removal; None: it passes
    reason: str | None = None
    digest: bytes | None = None  # None without --exact
    signature: np.ndarray | None = None  # None without --near
    changes: dict[str, int] = {}  # counts of the rewriting steps
    scores: dict[str, float] = {}  # of --quality and --toxic
    content: int = 0  # a hash, with --part


class Examiner:
    """Apply the steps that need one document alone. Each worker has a copy."""

    def __init__(self, steps: Steps):
        self.steps = steps
        self.evaluation = EvaluationIndex(steps.decontaminate)
        self.open_models()  # here, so that a mistake ends the main process

    def open_models(self):
        """Return the score functions of --quality and --toxic, None where it is off."""
        steps = self.steps
        return (open_scorer(steps.quality) if steps.quality else None,
                open_scorer(steps.toxic, of_good=False) if steps.toxic else None)

    def examine(self, text: str) -> Finding:
        """Apply all steps to a document; its rule is OTHER if it is of another part."""
        content = 0
        if self.steps.part:
            number, count = self.steps.part
            part, content = find_part(text, count)
            if part != number:
                return Finding(rule=OTHER, content=content)
        rewritten = self.rewrite(text)
        if not rewritten.rule:
            rewritten = combine(rewritten, self.judge(
                text if rewritten.text is None else rewritten.text))
        return rewritten._replace(content=content)

    def rewrite(self, text: str) -> Finding:
        """Apply the steps that change a text before others judge it."""
        original, changes = text, {}
        for step, is_on, function in (('html', self.steps.html and is_page(text), main_text),
                                      ('normalize', self.steps.normalize, normalize)):
            if is_on and (new := function(text)) != text:
                text, changes[f'changed by {step}'] = new, 1
                if not text or text.isspace():
                    return Finding(text, f'{step}: blank', BLANK[step])
        return Finding(None if text == original else text, changes=changes)

    def rewrite_lines(self, text: str) -> tuple[Finding, np.ndarray]:
        """Return rewrite(), and the keys of the lines of its text."""
        finding = self.rewrite(text)
        return finding, line_keys(text if finding.text is None else finding.text)

    def rewritten_keys(self, text: str) -> np.ndarray:
        """Return the keys of the lines of rewrite()'s text, each once."""
        finding = self.rewrite(text)
        return unique_keys('' if finding.rule else text if finding.text is None else finding.text)

    def judge(self, text: str | None) -> Finding:
        """Apply the steps that drop documents, and --mask. None: it is dropped already."""
        steps = self.steps
        if text is None:
            return Finding()
        if steps.language:
            language, probability = find_language(text)
            rule, reason = f'language: {language}', f'probability {probability:.2f}'
            if language not in steps.language:
                return Finding(None, rule, reason)
            if probability < SURE:
                return Finding(None, f'{rule}, unsure', f'{reason}, expected {SURE} or more')
        if steps.gopher and (broken := gopher(text, steps.gopher_skip)):
            rule, value = broken
            least, most = GOPHER[rule]
            reason = f'{value:,.6g}, expected {least:g} to {most:,g}'
            return Finding(None, f'gopher: {rule}', reason)
        scores, (quality, toxic) = {}, self.open_models()
        if quality:
            scores['quality'] = score = quality(text)
            if score < steps.quality_min:
                reason = f'score {score:.3f}, expected {steps.quality_min} or more'
                return Finding(None, 'quality', reason, scores=scores)
        if toxic:
            scores['toxic'] = score = toxic(text)
            if score > steps.toxic_max:
                reason = f'score {score:.3f}, expected {steps.toxic_max} or less'
                return Finding(None, 'toxic', reason, scores=scores)
        if steps.decontaminate and (common := self.evaluation.find(text)):
            return Finding(None, f'decontaminate: {common[0]}', common[1], scores=scores)
        changes, counts = {}, {}
        if steps.mask:
            text, counts = mask(text, steps.mask)
            changes = {'changed by mask': 1} if counts else {}
        return Finding(text if counts else None, None, None,
                       digest(text) if steps.exact else None,
                       signature(text) if steps.near is not None else None,
                       {**changes, **{f'masked {kind}': n for kind, n in counts.items()}}, scores)


def combine(rewritten: Finding, judged: Finding) -> Finding:
    """Return one finding for those of two steps after each other."""
    return judged._replace(
        text=rewritten.text if judged.text is None else judged.text,
        changes={**rewritten.changes, **judged.changes})


examiner = None  # in a worker process: its Examiner


def start_worker(received):
    """Keep the Examiner in a worker process."""
    global examiner
    examiner = received


def call_worker(method, batch) -> list:
    """Apply a method of the worker's Examiner to each (number, text)."""
    return [getattr(examiner, method)(text) for _, text in batch]


@contextlib.contextmanager
def mapping(examiner: Examiner, num_proc):
    """Yield map(method, batches), which yields (batch, results) in order."""
    if num_proc == 1:
        yield lambda method, tasks: (
            (batch, [getattr(examiner, method)(text) for _, text in batch]) for batch in tasks)
        return
    with Workers(num_proc, start_worker, examiner) as workers:
        yield lambda method, tasks: workers.map(functools.partial(call_worker, method), tasks)


def in_order(tasks, examiner: Examiner, num_proc, counts: LineCounts | None = None):
    """Yield (number, text, finding) for each (number, text) of batches, in order.

    counts: of the lines, for --lines; its step is between the others, here.
    """
    with mapping(examiner, num_proc) as work:
        if counts is None:
            for batch, findings in work('examine', tasks):
                yield from ((*pair, finding) for pair, finding in zip(batch, findings, strict=True))
            return
        waiting = collections.deque()  # batches, and their findings so far

        def without_lines():
            for batch, results in work('rewrite_lines', tasks):
                findings = [drop_lines(text, *result, counts)
                            for (_, text), result in zip(batch, results, strict=True)]
                waiting.append((batch, findings))
                yield [(None, None if finding.rule else
                        text if finding.text is None else finding.text)
                       for (_, text), finding in zip(batch, findings, strict=True)]

        for _, results in work('judge', without_lines()):
            for (number, text), finding, judged in zip(*waiting.popleft(), results, strict=True):
                yield number, text, finding if finding.rule else combine(finding, judged)


def drop_lines(text, finding: Finding, keys, counts) -> Finding:
    """Drop the frequent lines of a text, or of its rewritten form."""
    if finding.rule:
        return finding
    new = counts.drop(text if finding.text is None else finding.text, keys)
    if new is None:
        return finding
    if not new or new.isspace():
        return Finding(new, 'lines: blank', BLANK['lines'])
    return finding._replace(text=new, changes={**finding.changes, 'changed by lines': 1})


def count_lines(tasks, examiner: Examiner, num_proc) -> LineCounts:
    """Read the corpus a first time, to count its lines."""
    counts = LineCounts(examiner.steps.lines)
    with mapping(examiner, num_proc) as work, tqdm(
            desc='counting lines', unit=' documents', disable=None, leave=False) as bar:
        for batch, keys in work('rewritten_keys', tasks):
            counts.add(np.concatenate(keys))
            bar.update(len(batch))
    counts.check()
    return counts


def clean(path, file, steps: Steps, *, text_key: str = 'text', num_proc: int = 1) -> dict:
    """Write the documents that pass the steps, as JSON lines; -> the report.

    Raises UserError when none passes, and for input that read_documents() refuses.
    """
    def read_batches():
        return batches(enumerate(read_documents(path, text_key, html=steps.html), 1), BATCH_CHARS,
                       length=lambda numbered: len(numbered[1]))

    tally, examiner = Tally(steps), Examiner(steps)
    whole = Whole() if steps.part else None
    counts = count_lines(read_batches(), examiner, num_proc) if steps.lines else None
    bar = tqdm(desc='cleaning', total=text_size(find_files(path, text_key)[0]), unit='B',
               unit_scale=True, disable=None, leave=False, dynamic_ncols=True)

    def counted(results):
        """Yield the documents of this part, and count them."""
        for number, text, finding in results:
            size = len(text.encode())
            bar.update(size)
            if whole is not None:
                whole.add(number, finding.content)
            if finding.rule != OTHER:
                tally.read(size, finding.scores)
                yield number, text, size, finding

    with bar, contextlib.closing(in_order(read_batches(), examiner, num_proc, counts)) as results:
        write_kept(counted(results), file, tally)
    report = tally.report(os.path.basename(os.path.abspath(path)))
    if counts is not None:
        report['lines'] = counts.report()
    if steps.decontaminate:
        report['decontaminate'] = examiner.evaluation.report(tally)
    if steps.part:
        report['part'] = whole.report(tally)
    return report


def write_kept(documents, file, tally):
    """Do the steps that need earlier documents, and write what stays.

    documents: (number, text, bytes of the original, finding).
    """
    steps = tally.steps
    seen, near = set(), None if steps.near is None else NearDuplicates(steps.near)
    for number, original, size, finding in documents:
        rule, reason = finding.rule, finding.reason
        if rule is None and finding.digest is not None:
            if finding.digest in seen:
                rule, reason = 'exact', 'a copy of an earlier document'
            seen.add(finding.digest)
        if (rule is None and finding.signature is not None
                and (similar := near.find(finding.signature, number))):
            rule, reason = 'near', f'{similar[1]:.2f} like document {similar[0]:,}'
        if rule is None:
            text = original if finding.text is None else finding.text
            tally.keep(finding.changes, len(text.encode()))
            row = {'text': text}
            if steps.part:
                row.update({'document': number, 'bytes': size, 'changes': finding.changes})
            file.write(json.dumps(row, ensure_ascii=False).encode() + b'\n')
        else:
            tally.remove(rule, {'document': number, 'why': reason, 'text': original}, size)


def join_parts(paths, file, steps: Steps, num_proc: int = 1) -> dict:
    """Write the documents of all parts of a corpus in its order; -> the report.

    Drops copies if the parts' steps did, and what is near if these or `steps` do.
    """
    parts = Parts(paths, Steps._fields)
    last = Steps(exact=steps.exact or parts.steps['exact'], near=steps.near or parts.steps['near'])
    tally = Tally(Steps(**{**parts.steps, 'exact': last.exact, 'near': last.near}))
    parts.fill(tally)
    waiting = collections.deque()  # rows on their way through the workers

    def numbered():
        for row in parts.rows():
            waiting.append(row)
            yield row['document'], row['text']

    tasks = batches(numbered(), BATCH_CHARS, length=lambda pair: len(pair[1]))
    with contextlib.closing(in_order(tasks, Examiner(last), num_proc)) as results:
        write_kept(((number, text, waiting[0]['bytes'], finding._replace(
            changes=waiting.popleft()['changes'])) for number, text, finding in results),
            file, tally)
    return parts.complete(tally.report(parts.source))


def clean_to(out, path, steps: Steps, **options) -> dict:
    """Write clean() to `out`, with its report, both or neither; -> the report.

    path: the input, or a list of the parts to join. Only a crash between the two renames leaves
    the new report beside the old documents.
    """
    folder = os.path.dirname(os.path.abspath(out))
    lock = files.lock_folder(folder, 'cleaning a corpus into')
    write = join_parts if isinstance(path, list | tuple) else clean
    try:
        with files.explain_full_disk(folder, f'{out}, about the size of the input'):
            with files.replacing(out) as file:
                report = write(path, file, steps, **options)
                content = json.dumps(report, indent=1, ensure_ascii=False) + '\n'
                # first: where the documents are, their report is
                files.replace_file(report_of(out), content.encode())
            return report
    finally:
        files.unlock(lock)


# The command ------------------------------------------------------------------------------------

def check_out(out, path):
    """Raise UserError when `out` cannot be written, or is part of the input."""
    if os.path.splitext(out)[1] not in ('.jsonl', '.ndjson'):
        raise UserError(f'--out={out}: expected a name that ends in .jsonl, such as '
                        f'--out=clean.jsonl')
    if not os.path.isdir(folder := os.path.dirname(os.path.abspath(out))):
        raise UserError(f'--out={out}: the folder {folder} does not exist; make it: '
                        f'mkdir -p "{folder}"')
    source, target = os.path.realpath(path), os.path.realpath(out)
    if source == target or target.startswith(os.path.join(source, '')):
        raise UserError(f'--out={out} lies in the input, {path}, so the next run would read it; '
                        f'choose a name outside')


def check_steps(steps):
    """Raise UserError for no steps, unknown names, or values out of range."""
    if steps._replace(part=None) == Steps():
        raise UserError('no step to do; expected one or more of --html, --normalize, --lines=10, '
                        '--language=en, --gopher, --quality=MODEL, --decontaminate=FILES, '
                        '--mask=email,phone,ip, --exact, --near=0.8 (see --help)')
    if steps.gopher_skip and not steps.gopher:
        raise UserError(f'--gopher_skip={",".join(steps.gopher_skip)} needs --gopher')
    languages = sorted(load_identifier().labels) if steps.language else []
    for option, names, known in (('--language', steps.language, languages),
                                 ('--mask', steps.mask, MASKS),
                                 ('--gopher_skip', steps.gopher_skip, GOPHER)):
        for name in names:
            if name not in known:
                raise UserError(f'{option}={",".join(names)}: unknown {name!r}'
                                f'{nearest(name, known)}; expected some of: {" ".join(known)}')
    for option in ('quality_min', 'toxic_max'):
        model, value = option.partition('_')[0], getattr(steps, option)
        if not 0 <= value <= 1:
            raise UserError(f'--{option} is {value}; expected a score from 0 to 1, such as 0.5')
        if value != 0.5 and getattr(steps, model) is None:
            raise UserError(f'--{option}={value} needs --{model}=MODEL')
    if steps.part and steps.lines:
        raise UserError('--lines counts the lines of the whole corpus; leave it out with --part, '
                        'and do it on the joined file')
    if steps.lines == 1:
        raise UserError('--lines=1 would drop every line; expected 2 or more, such as --lines=10')
    if steps.html:
        load_resiliparse()  # raises where it is missing
    if steps.near is not None:
        # below 0.5, most documents of a kind are candidates of each other: n * n comparisons
        if not 0.5 <= steps.near <= 1:
            raise UserError(f'--near is {steps.near}; expected a similarity from 0.5 to 1, such as '
                            f'0.8: the share of runs of five words that two documents share')
        load_minhash()  # raises where datasketch is missing


def main():
    if sys.argv[1:2] == ['train-quality']:
        return classifier.main(sys.argv[2:])
    parser = make_parser(__doc__, usage='python -m data.clean --input=IN --out=OUT.jsonl STEPS')
    parser.prog = 'python -m data.clean'
    add = parser.add_argument
    add('--input',
        help='a text, a folder, or a .jsonl, .json, .csv, .tsv, .parquet file')
    add('--out', required=True, help='the .jsonl file to write')
    add('--text_key', default='text', help='field of a table that holds the text')
    add('--html', action='store_true', help='the main text of HTML pages')
    add('--normalize', action='store_true', help='NFC, plain line ends, no control characters')
    add('--lines', type=positive, nargs='?', const=10,
        help='drop lines that this many documents have, but for the first (10)')
    add('--language', type=names_of, default=(), help='languages to keep: en, or en,de,fr')
    add('--gopher', action='store_true', help='length, prose and repetition rules')
    add('--gopher_skip', type=names_of, default=(), help='rules to skip: stop_words,hashes')
    add('--quality', help='a model of good and bad texts, or FOLDER:LABEL')
    add('--quality_min', type=float, default=0.5, help='least score to keep (0.5)')
    add('--toxic', help='a model whose bad texts are toxic, or FOLDER:LABEL')
    add('--toxic_max', type=float, default=0.5, help='greatest toxic score to keep (0.5)')
    add('--decontaminate', type=paths_of, default=(),
        help='evaluation sets of which no document may hold 13 words in a row')
    add('--mask', type=names_of, default=(), help='kinds to replace: email,phone,ip')
    add('--exact', action='store_true', help='drop copies')
    add('--near', type=float, nargs='?', const=0.8, help='drop documents this similar (0.8)')
    add('--part', type=part_of, help='do a share of the input: 2/8 is the second of 8')
    add('--join', type=paths_of, help='parts to join: files, or a folder of them')
    add('--num_proc', type=positive, default=core_count(), help='processes (one per core)')
    args = parser.parse_args()

    started = time.time()
    steps = Steps(*(getattr(args, name) for name in Steps._fields))
    if (args.input is None) == (args.join is None):
        raise UserError('expected either --input=FILE, to clean, or --join=FOLDER, of the parts of '
                        'a corpus')
    if args.join:
        if steps != Steps(exact=steps.exact, near=steps.near):
            raise UserError('--join does no step but --exact and --near; the parts had the others')
        paths = part_files(args.join)
        options = {'num_proc': args.num_proc}
    else:
        check_steps(steps)
        list_files(args.input, args.text_key)
        paths, options = args.input, {'text_key': args.text_key, 'num_proc': args.num_proc}
    for path in paths if args.join else [paths]:
        check_out(args.out, path)
    report = clean_to(args.out, paths, steps, **options)
    print_report(report)
    print(f'wrote  {args.out} and {report_of(args.out)} in {time.time() - started:.1f} s')
    if steps.part:
        print(f'next:  python -m data.clean --join={os.path.dirname(args.out) or "."} '
              f'--out=FILE.jsonl, when all {steps.part[1]} parts are in that folder')
    else:
        print(f'next:  python data/text/prepare.py --input={args.out}')


if __name__ == '__main__':
    run(main)
