"""Read HellaSwag: multiple choice of a scene's ending, from a file of its lines.

    {"ctx_a": "...", "ctx_b": "...", "activity_label": "...", "endings": ["...", ...], "label": 2}

"ctx" may replace the first two. The texts are cleaned as lm-evaluation-harness does, so accuracies
compare. Source: "HellaSwag: Can a Machine Really Finish Your Sentence?", Zellers et al. 2019.
posttrain/tasks/common.py describes tasks.
"""

import re

from configurator import UserError
from posttrain.answers import letter_in
from posttrain.tasks import common

EXPECTED = '"ctx", or "ctx_a" and "ctx_b", "endings" and a "label"'


def examples(split, n, seed=0, input='', kinds=()):
    """Return at most n examples of the file `input`."""
    return common.from_file(common.Questions(split, n, seed, input, kinds), EXPECTED, example_of)


def example_of(row):
    """Make an example of a line of the file. Its kind is the activity."""
    context = f'{row["ctx_a"]} {row["ctx_b"].capitalize()}' if 'ctx_a' in row else row['ctx']
    activity, label = row.get('activity_label', ''), row['label']
    if not isinstance(row['endings'], list) or not re.fullmatch(' *[0-9]+ *', str(label)):
        raise UserError(f'"endings" are no list, or "label" is no number: {label!r}')
    context = cleaned(f'{activity}: {context}' if activity else context)
    if not context:
        raise UserError('the context is empty')
    endings = [cleaned(text) for text in row['endings']]
    return common.choice_example(f'How does this go on?\n{context}', context, endings, int(label),
                                 activity or 'hellaswag')


def cleaned(text):
    """Remove the rest of WikiHow's markup."""
    text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
    return text.replace('  ', ' ')


extract, evaluate, reward = letter_in, common.evaluate_letter, common.reward_letter
