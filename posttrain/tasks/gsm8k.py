"""Read GSM8K: word problems from a file of its lines, with calculator calls.

    {"question": "...", "answer": "He eats 3*2 = <<3*2=6>>6 eggs ...\\n#### 6"}

The number after #### is the answer. An annotation in << >> becomes a call of the calculator, see
posttrain/tools.py. Source: "Training Verifiers to Solve Math Word Problems", Cobbe et al. 2021.
posttrain/tasks/common.py describes tasks.
"""

import re
from fractions import Fraction

from configurator import UserError
from posttrain.tasks.common import Questions, from_file
from posttrain.tools import calculate
from tokenizer.chat import OUTPUT, OUTPUT_END, PYTHON, PYTHON_END

EXPECTED = 'a "question" and an "answer" that ends with a line such as #### 18'
NUMBER = r'-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+'


def examples(split, n, seed=0, input='', kinds=()):
    """Return at most n examples of the file `input`."""
    return from_file(Questions(split, n, seed, input, kinds), EXPECTED, example_of)


def example_of(row):
    """Make an example of a line of the file."""
    question, solution = row['question'].strip(), row['answer'].strip()
    answer = extract(solution)
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
        is_same = Fraction(value) == Fraction(plain(annotated))
    except (ValueError, ZeroDivisionError):  # such as 20%*50, or =1/0
        return ''
    return f'{PYTHON}{expression}{PYTHON_END}{OUTPUT}{value}{OUTPUT_END}' if is_same else ''


def plain(number):
    """Normalize a number: '1,080' -> '1080', '18.00' -> '18', '.5' -> '0.5'."""
    number = number.strip().replace(',', '')
    sign, digits = ('-', number[1:]) if number.startswith('-') else ('', number)
    whole, _, decimals = digits.partition('.')
    decimals = decimals.rstrip('0')
    return f'{sign}{whole.lstrip("0") or "0"}{"." * bool(decimals)}{decimals}'


def extract(text):
    """Return the number after the last ####, or None, also for 5/6 and 1e3."""
    numbers = re.findall(rf'####\s*(-?)\$?({NUMBER})(?![0-9,.]*[/eE][0-9])', text)
    return plain(''.join(numbers[-1])) if numbers else None


def evaluate(example, text):
    """Return whether the number after #### is right."""
    return extract(text) == example['answer']


def reward(example, text):
    """Return 1 for the right number, else 0."""
    return float(evaluate(example, text))
