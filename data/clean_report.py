"""Count and show what data.clean reads, changes, keeps and removes.

    tally = Tally(steps)
    tally.keep(finding.changes, n_bytes)  # or: tally.remove(rule, example, n_bytes)
    report = tally.report(source)         # of *.report.json
    print_report(report)
"""

import collections

from configurator import UserError
from data.classifier import Scores

EXAMPLES = 3  # removed documents shown per rule
EXCERPT_CHARS = 150
REWRITING = ('html', 'normalize', 'lines', 'mask')  # steps that change documents


class Tally:
    """Add up counts, sizes and examples of a run."""

    def __init__(self, steps):
        self.steps = steps
        self.documents, self.sizes = (collections.Counter(read=0, kept=0) for _ in range(2))
        self.changes = collections.Counter({f'changed by {step}': 0 for step in REWRITING
                                            if getattr(steps, step) or step == 'normalize'})
        self.masked = collections.Counter(dict.fromkeys(steps.mask, 0))
        self.scores = collections.defaultdict(Scores)
        self.removed = {}

    def read(self, size, scores):
        """Count a document of `size` bytes as read. scores: {model: score} that it got."""
        for model, score in scores.items():
            self.scores[model].add(score)
        self.documents['read'] += 1
        self.sizes['read'] += size

    def keep(self, changes, size):
        """Count a document as kept. changes: {name: count} of its rewriting steps."""
        self.documents['kept'] += 1
        self.sizes['kept'] += size
        for name, count in changes.items():
            step, _, kind = name.partition(' ')
            if step == 'masked':
                self.masked[kind] += count
            else:
                self.changes[name] += count

    def remove(self, rule, example, size):
        """Count a document of `size` bytes as removed.

        example: its number, the reason and its text, of which an excerpt is kept.
        """
        text = ' '.join(example['text'][:4 * EXCERPT_CHARS].split())
        text = text[:EXCERPT_CHARS] + '...' * (len(text) > EXCERPT_CHARS)
        self.add_removed(rule, {'documents': 1, 'bytes': size,
                                'examples': [{**example, 'text': text}]})

    def add_removed(self, rule, new):
        """Add an entry of `removed`. The examples are those of the first documents."""
        entry = self.removed.setdefault(rule, {'documents': 0, 'bytes': 0, 'examples': []})
        entry['documents'] += new['documents']
        entry['bytes'] += new['bytes']
        entry['examples'] = sorted(entry['examples'] + new['examples'],
                                   key=lambda example: example['document'])[:EXAMPLES]

    def count(self, rule) -> int:
        """Return the number of documents that a rule removed."""
        return self.removed.get(rule, {'documents': 0})['documents']

    def report(self, source) -> dict:
        """Return the report. Raises UserError where no document is kept."""
        removed = dict(sorted(self.removed.items(),
                              key=lambda item: (-item[1]['documents'], item[0])))
        if not self.documents['kept'] and not self.steps.part:
            rule, entry = next(iter(removed.items()))
            step, _, name = rule.partition(': ')
            remedy = (f'--gopher_skip={name} skips that rule' if step == 'gopher' else
                      f'leave out --{step}, or relax it')
            raise UserError(f'all {self.documents["read"]:,} documents would be removed, so '
                            f'nothing was written. The rule {rule!r} removes '
                            f'{entry["documents"]:,}, the first for: '
                            f'{entry["examples"][0]["why"]}; {remedy}')
        for entry in removed.values():
            entry['share of documents'] = entry['documents'] / self.documents['read']
            entry['share of bytes'] = entry['bytes'] / self.sizes['read']
        return {'version': 1, 'source': source, 'steps': self.steps._asdict(),
                'documents': {**self.documents, **self.changes}, 'bytes': dict(self.sizes),
                **({'masked': dict(self.masked)} if self.steps.mask else {}),
                **({'scores': {model: {
                    'documents': int(scores.counts.sum()), 'removed': self.count(model),
                    'quantiles': scores.quantiles()} for model, scores in self.scores.items()}}
                   if self.scores else {}),
                'removed': removed}


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
    share = documents['kept'] / max(1, documents['read'])
    print(f'{"kept":32} {documents["kept"]:>12,} {share:>9.2%} '
          f'{size["kept"] / 1e6:>12,.2f} MB')
    for name, count in documents.items():
        if name.startswith('changed by ') and count:
            print(f'{count:,} of them were changed by --{name.removeprefix("changed by ")}')
    for kind, count in report.get('masked', {}).items():
        print(f'{f"masked: {kind}":32} {count:>12,}')
    if lines := report.get('lines'):
        print(f'{"lines dropped":32} {lines["dropped"]:>12,}, of {lines["kept once"]:,} that stay '
              f'once')
    for name, counts in report.get('decontaminate', {}).items():
        print(f'{counts["documents"]:,} documents had 13 words in a row of {name} '
              f'({counts["texts"]:,} texts, {counts["texts of fewer than 13 words"]:,} of them too '
              f'short to match)')
    for model, entry in report.get('scores', {}).items():
        quantiles = ', '.join(f'{name} {score:.3f}' for name, score in entry['quantiles'].items()
                              if name in ('5%', '25%', '50%', '75%', '95%'))
        print(f'{f"{model} scores":18} of {entry["documents"]:,} documents: {quantiles}')
