"""Read multiple choice from a .jsonl, .csv or .parquet file, as ARC's or MMLU's.

    {"question": "...", "choices": {"text": ["...", ...], "label": ["A", ...]}, "answerKey": "B"}
    {"question": {"stem": "...", "choices": [{"text": "...", "label": "A"}, ...]}, "answerKey": "B"}
    {"question": "...", "choices": ["...", ...], "answer": 1, "subject": "..."}
    question,A,B,C,D,answer        # .csv, with or without this line; the answer is a letter

The kind of a question is its subject. Sources: "Think you have Solved Question Answering? Try ARC",
Clark et al. 2018; "Measuring Massive Multitask Language Understanding", Hendrycks et al. 2021.
posttrain/tasks/common.py describes tasks.
"""

from configurator import UserError
from posttrain.answers import LETTERS, letter_in
from posttrain.tasks import common

EXPECTED = 'a "question", "choices" and an "answerKey" or "answer"'
COLUMNS = ['question', 'A', 'B', 'C', 'D', 'answer']


def examples(split, n, seed=0, input='', kinds=()):
    """Return at most n examples of the file `input`."""
    questions = common.Questions(split, n, seed, input, kinds)
    return common.from_file(questions, EXPECTED, example_of, COLUMNS)


def example_of(row):
    """Make an example of a row of the file, in one of the shapes above."""
    question, choices = row['question'], row.get('choices')
    if isinstance(question, dict):
        question, choices = question['stem'], question['choices']
    if choices is None:
        choices = [row[letter] for letter in LETTERS if letter in row]
    if not isinstance(choices, (list, dict)) or not choices:
        raise UserError(f'the choices are {choices!r}')
    labels = None  # none in a plain list: the answer is a letter, or an index from 0
    if isinstance(choices, dict):
        choices, labels = choices['text'], choices['label']
    elif isinstance(choices[0], dict):
        choices, labels = [c['text'] for c in choices], [c['label'] for c in choices]
    if (not isinstance(choices, list) or not isinstance(labels, list | None)
            or len(labels or choices) != len(choices)):
        raise UserError(f'{choices!r} and {labels!r} are no list of choices with a label for each')
    answer = row['answerKey'] if 'answerKey' in row else row['answer']
    names = [str(label).strip() for label in labels or LETTERS[: len(choices)]]
    is_index = type(answer) is int and labels is None
    if not is_index and (type(answer) not in (int, str) or str(answer).strip() not in names):
        raise UserError(f'the answer is {answer!r}, and the choices are {", ".join(names)}')
    label = answer if is_index else names.index(str(answer).strip())
    question = question.strip()
    if not question:
        raise UserError('the question is empty')
    return common.choice_example(question, f'Question: {question}\nAnswer:', list(choices), label,
                                 row.get('subject') or 'multiple_choice')


extract, evaluate, reward = letter_in, common.evaluate_letter, common.reward_letter
