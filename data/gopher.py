"""Check the length, prose and repetition rules of Gopher, for data.clean --gopher.

    gopher(text)  # None, or (the first rule that the text breaks, its measure)

Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher"
(2112.11446), A.1.1.
"""

import re

import numpy as np

# Least and most of each measure, in the order in which they are checked.
GOPHER = {
    # "Quality filtering"
    'words': (50, 100_000),          # white space separates words, here and below
    'word_length': (3, 10),          # characters, on average
    'hashes': (0, 0.1),              # "#" per word
    'ellipses': (0, 0.1),            # "..." and "…" per word
    'bullet_lines': (0, 0.9),        # share of lines that begin with a bullet
    'ellipsis_lines': (0, 0.3),      # share of lines that end with an ellipsis
    'alphabetic_words': (0.8, 1),    # share of words with a letter in them
    'stop_words': (2, 8),            # number of the eight that occur; English only
    # "Repetition removal", table A1: shares of lines, of paragraphs, or of characters
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
    """Compute the measures of Gopher's quality rules. The text must have a word."""
    words = text.split()
    lines = [line.strip() for line in text.split('\n') if line.strip()]
    return {
        'words': len(words),
        'word_length': sum(map(len, words)) / len(words),
        'hashes': text.count('#') / len(words),
        'ellipses': (text.count('...') + text.count('…')) / len(words),
        'bullet_lines': sum(line.startswith(BULLETS) for line in lines) / len(lines),
        'ellipsis_lines': sum(line.endswith(('...', '…')) for line in lines) / len(lines),
        'alphabetic_words': sum(any(map(str.isalpha, word)) for word in words) / len(words),
        'stop_words': len(STOP_WORDS.intersection(re.findall('[a-z]+', text.lower()))),
    }


def repetition(text: str) -> dict[str, float]:
    """Compute the measures of Gopher's repetition rules. The text must have a word.

    Where the paper is open: only the later occurrences of a line, paragraph or run of words are
    duplicates. Characters are those of stripped lines, and of words without the space between
    them. The most frequent run occurs twice at least; of equally frequent ones the longest counts.
    """
    measures = {}
    for kind, pieces in (('line', text.split('\n')), ('paragraph', re.split(r'\n\s*\n', text))):
        pieces = [piece.strip() for piece in pieces if piece.strip()]
        once = set(pieces)  # all but the first of each are copies
        measures[f'duplicate_{kind}s'] = (len(pieces) - len(once)) / len(pieces)
        n_chars = sum(map(len, pieces))
        measures[f'duplicate_{kind}_chars'] = (n_chars - sum(map(len, once))) / n_chars

    words = text.split()
    ids = {}
    word_ids = np.array([ids.setdefault(word, len(ids)) for word in words], dtype=np.int64)
    ends = np.cumsum([0] + [len(word) for word in words])  # ends[j] - ends[i]: chars of words[i:j]
    measures.update((rule, 0.0) for rule in GOPHER if rule.endswith('gram'))
    grams = word_ids  # grams[i]: number of the run of n words at word i, the same for equal runs
    for n in range(2, min(10, len(words)) + 1):
        _, first, grams, counts = np.unique(grams[:-1] * len(ids) + word_ids[n - 1:],
                                            return_index=True, return_inverse=True,
                                            return_counts=True)
        if counts.max() == 1:  # then no longer run occurs twice either
            break
        if n <= 4:
            top = first[counts == counts.max()]
            longest = (ends[top + n] - ends[top]).max()
            measures[f'top_{n}gram'] = float(longest * counts.max() / ends[-1])
        else:
            is_copy = np.ones(len(grams), dtype=bool)
            is_copy[first] = False
            # a word counts once if a copy begins at it, or at most n - 1 words before
            covered = np.convolve(is_copy, np.ones(n, dtype=int)) > 0
            measures[f'duplicate_{n}gram'] = float(np.diff(ends)[covered].sum() / ends[-1])
    return measures


def gopher(text: str, skip=()) -> tuple[str, float] | None:
    """Return the first rule, not in skip, that the text breaks, and its measure."""
    for measure in (quality, repetition):  # the second takes most of the time
        measures = measure(text)
        for rule, (least, most) in GOPHER.items():
            if rule in measures and rule not in skip and not least <= measures[rule] <= most:
                return rule, measures[rule]
    return None
