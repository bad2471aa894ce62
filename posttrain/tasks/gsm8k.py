"""
GSM8K ("Training Verifiers to Solve Math Word Problems", Cobbe et al. 2021): sums in words, from a file of its lines,

    {"question": "...", "answer": "He eats 3*2 = <<3*2=6>>6 eggs ...\\n#### 6"}

The number behind #### is the answer. What stands in << >> becomes a call of the calculator, whose result the
model is told; see calculator.py. See common.py for what a task is.
"""

import re
from fractions import Fraction

from configurator import UserError
from posttrain.tasks.common import from_file
from posttrain.tools import calculate
from tokenizer.chat import OUTPUT, OUTPUT_END, PYTHON, PYTHON_END

WHAT = 'a "question" and an "answer" that ends with a line such as #### 18'
NUMBER = r'-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+'


def examples(split, n, seed=0, input='', kinds=()):
    """n examples of the file `input`."""
    return from_file(input, WHAT, example_of, split, n, seed, kinds)


def example_of(row):
    """A line of the file -> an example."""
    question, solution = row['question'].strip(), row['answer'].strip()
    answer = extract(solution)
    if not question or answer is None:
        raise UserError(f'"question" or the line with #### is missing: {solution[-40:]!r}')
    return {'messages': [{'role': 'user', 'content': question}], 'context': f'Question: {question}\nAnswer:',
            'solution': re.sub(r'<<[^<>]*>>', '', solution), 'answer': answer, 'kind': 'gsm8k',
            'call': re.sub(r'<<([^<>=]*)=([^<>]*)>>', as_call, solution)}


def as_call(match):
    """<<48/2=24>> -> a call of the calculator; '' where the annotation says something else than the calculator."""
    expression, said = match.groups()
    try:
        value = calculate(expression)
        is_same = Fraction(value) == Fraction(plain(said))
    except (ValueError, ZeroDivisionError):  # such as 20%*50, or =1/0
        return ''
    return f'{PYTHON}{expression}{PYTHON_END}{OUTPUT}{value}{OUTPUT_END}' if is_same else ''


def plain(number):
    """A number as it is compared: '1,080' -> '1080', '18.00' -> '18', '.5' -> '0.5'."""
    number = number.strip().replace(',', '')
    sign, digits = ('-', number[1:]) if number.startswith('-') else ('', number)
    whole, _, decimals = digits.partition('.')
    decimals = decimals.rstrip('0')
    return f'{sign}{whole.lstrip("0") or "0"}{"." * bool(decimals)}{decimals}'


def extract(text):
    """The number behind the last ####, such as '1080' of '#### $1,080.00'; None without one, and for 5/6 or 1e3."""
    found = re.findall(rf'####\s*(-?)\$?({NUMBER})(?![0-9,.]*[/eE][0-9])', text)
    return plain(''.join(found[-1])) if found else None


def evaluate(example, text):
    """Whether the number behind #### is right."""
    return extract(text) == example['answer']


def reward(example, text):
    """1 for the right number, else 0."""
    return float(evaluate(example, text))
