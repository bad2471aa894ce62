"""Read GSM8K: word problems from a file of its lines, with calculator calls.

    {"question": "...", "answer": "He eats 3*2 = <<3*2=6>>6 eggs ...\\n#### 6"}

The number after #### is the answer. A model may mark its own in another way, see
posttrain/answers.py. An annotation in << >> becomes a call of the calculator, see
posttrain/tools.py. Source: "Training Verifiers to Solve Math Word Problems", Cobbe et al. 2021.
posttrain/tasks/common.py describes tasks.
"""

import re
from fractions import Fraction

from configurator import UserError
from posttrain.answers import number_in
from posttrain.tasks.common import Questions, from_file
from posttrain.tools import calculate
from tokenizer.chat import OUTPUT, OUTPUT_END, PYTHON, PYTHON_END

EXPECTED = 'a "question" and an "answer" that ends with a line such as #### 18'


def examples(split, n, seed=0, input='', kinds=()):
    """Return at most n examples of the file `input`."""
    return from_file(Questions(split, n, seed, input, kinds), EXPECTED, example_of)


def example_of(row):
    """Make an example of a line of the file."""
    question, solution = row['question'].strip(), row['answer'].strip()
    answer = number_in(solution) if '####' in solution else None
    if not question or answer is None:
        raise UserError(f'"question" or the line with #### is missing: {solution[-40:]!r}')
    return {'messages': [{'role': 'user', 'content': question}],
            'context': f'Question: {question}\nAnswer:',
            'solution': re.sub(r'<<[^<>]*>>', '', solution), 'answer': answer, 'kind': 'gsm8k',
            'call': re.sub(r'<<([^<>=]*)=([^<>]*)>>', as_call, solution)}


def as_call(match):
    """Turn <<48/2=24>> into a call, or into '' if the calculator's value differs."""
    expression, annotated = match.groups()
    try:
        value = calculate(expression)
        is_same = Fraction(value) == Fraction(annotated.replace(',', ''))
    except (ValueError, ZeroDivisionError):  # such as 20%*50, or =1/0
        return ''
    return f'{PYTHON}{expression}{PYTHON_END}{OUTPUT}{value}{OUTPUT_END}' if is_same else ''


def evaluate(example, text):
    """Return whether the final number is right, however it is marked."""
    return number_in(text) == example['answer']


def reward(example, text):
    """Return 1 for the right number, else 0."""
    return float(evaluate(example, text))


extract = number_in
