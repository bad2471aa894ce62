"""Draw answers from a model that may call a calculator.

The model writes an expression between chat.PYTHON and chat.PYTHON_END. The value is inserted
between chat.OUTPUT and chat.OUTPUT_END, and the answer continues ("Toolformer", Schick et al.
2023).

    calculate('(2 + 3) * 1.5')  # -> '7.5'
    answers, masks = generate_with_tools(model, tokenizer, prompts, Sampling(100))
"""

import ast
import operator
import re
from dataclasses import replace
from decimal import Context
from fractions import Fraction

import torch

from configurator import UserError
from posttrain.rollouts import draw_answers
from tokenizer.chat import OUTPUT, OUTPUT_END, PYTHON, PYTHON_END, TOOL_TOKENS

SYSTEM = 'You have a calculator.'  # the system message that permits calls
MAX_LENGTH = 200  # characters of an expression
MAX_DEPTH = 100  # nested operators; a sum of 100 numbers is as deep
MAX_BITS = 128  # in a numerator or denominator: numbers of up to 38 digits
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: lambda a, b: Fraction(a // b),
             ast.Mod: operator.mod, ast.Pow: lambda a, b: power(a, b)}
EXPECTED = 'expected integers, decimals, + - * / // % ** and parentheses, such as (2 + 3) * 1.5'


def calculate(expression):
    """Evaluate an arithmetic expression; -> text such as '5' or '0.333333333333'.

    Numbers are exact fractions until they are written: 0.1 + 0.2 is 0.3. They may have commas
    between thousands, and leading zeros. Nothing is executed: Python's parser reads the expression,
    and only the operators above are evaluated. Raises UserError for any other expression, for one
    without a value, and for one that is too long, too deep or too large.
    """
    if len(expression) > MAX_LENGTH:
        raise UserError(f'the expression has {len(expression):,} characters; expected at most '
                        f'{MAX_LENGTH}')
    if not re.fullmatch(r'[0-9.,+*/%() -]+', expression):
        raise UserError(f'{expression!r} is no calculation; {EXPECTED}')
    thousands = r'(?<![0-9.,])[0-9]{1,3}(,[0-9]{3})+(?![0-9,])'
    text = re.sub(thousands, lambda number: number[0].replace(',', ''), expression).strip()
    text = re.sub(r'(?<![0-9.])0+(?=[0-9])', '', text)  # Python refuses 007
    try:
        tree = ast.parse(text, mode='eval').body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise UserError(f'{expression!r} is no calculation; {EXPECTED}') from None
    return written(value_of(tree, text, MAX_DEPTH))


def value_of(node, expression, depth):
    """Evaluate a node of a syntax tree; -> Fraction. depth: levels that may follow."""
    if depth == 0:
        raise UserError(f'{expression!r} is nested too deeply; expected at most {MAX_DEPTH} levels')
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # every digit of the text: node.value, a float, keeps about 17
        value = Fraction(expression[node.col_offset : node.end_col_offset])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = value_of(node.operand, expression, depth - 1)
        value = -value if isinstance(node.op, ast.USub) else value
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = (value_of(side, expression, depth - 1) for side in (node.left, node.right))
        try:
            value = OPERATORS[type(node.op)](left, right)
        except ZeroDivisionError:
            raise UserError(f'{expression!r} divides by zero') from None
    else:
        raise UserError(f'{expression!r} is no calculation; {EXPECTED}')
    if bits(value) > MAX_BITS:
        raise UserError(f'{expression!r} has a value of too many digits; expected at most 38')
    return value


def power(base, exponent):
    """Return base ** exponent as a Fraction, unless it would be too large to compute."""
    if exponent.denominator != 1:
        raise UserError(f'the power {written(exponent)} is no whole number; expected 2 ** 3')
    if (bits(base) - 1) * abs(exponent) > MAX_BITS:
        raise UserError('a power has a value of too many digits; expected at most 38')
    return base ** int(exponent)


def bits(value):
    """Return the bits of a Fraction's larger part."""
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def written(value):
    """Write a Fraction: whole part and 12 decimals, below 1 12 digits; no end zeros."""
    if value.denominator == 1:
        return str(value.numerator)
    whole = abs(value) // 1
    precision = 12 + len(str(whole)) * (whole > 0)
    text = f'{Context(prec=precision).divide(value.numerator, value.denominator):f}'
    return text.rstrip('0').rstrip('.') if '.' in text else text


TOOLS = {'calculator': calculate}  # name: function of a text


# Calls by a model ---------------------------------------------------------------------------------

def output_of(ids, tokenizer):
    """Return the ids that follow a call: OUTPUT, the value, OUTPUT_END.

    ids: the answer up to PYTHON_END. The value is 'error' for a call that calculate() refuses.
    """
    call = re.split(re.escape(PYTHON), tokenizer.decode(ids).removesuffix(PYTHON_END))[-1]
    try:
        value = calculate(call)
    except UserError:
        value = 'error'
    special = tokenizer.special_tokens
    return [special[OUTPUT], *tokenizer.encode(value, allowed_special='none'), special[OUTPUT_END]]


def calls_tools(tokenizer):
    """Return whether a tokenizer has the tokens of a call."""
    return all(token in tokenizer.special_tokens for token in TOOL_TOKENS)


def check_tokenizer(tokenizer):
    """Raise UserError if the tokenizer lacks the tokens of a call."""
    missing = [token for token in TOOL_TOKENS if token not in tokenizer.special_tokens]
    if missing:
        raise UserError(f'the tokenizer has no {", ".join(missing)}, with which a model calls the '
                        f'calculator; train one with the special tokens of tokenizer/chat.py')


def generate_with_tools(model, tokenizer, prompts, sampling, u=None):
    """Draw an answer to each prompt from a model that may call the calculator.

    -> (answers, masks), a list for each prompt. An answer ends with one of sampling.stop_ids, or
    after max_new_tokens ids, outputs included. The mask is 0 from OUTPUT to OUTPUT_END and 1 for
    ids that the model drew. u: (B, max_new_tokens) in [0, 1), fixes the draw at each position of
    the answers; None: random. Rows that have called are computed again from the prompt.
    """
    check_tokenizer(tokenizer)
    most = sampling.max_new_tokens
    u = torch.rand(len(prompts), most) if u is None else u
    call_end = tokenizer.special_tokens[PYTHON_END]
    stop_ids, n_ids = {*sampling.stop_ids, call_end}, tokenizer.vocab_size
    answers, masks = [[] for _ in prompts], [[] for _ in prompts]
    going = list(range(len(prompts))) if most else []
    while going:
        # each row's numbers from its next position on
        rolled = torch.stack([u[row].roll(-len(answers[row])) for row in going])
        longest = most - min(len(answers[row]) for row in going)
        until_call = replace(sampling, max_new_tokens=longest, stop_ids=stop_ids, n_ids=n_ids)
        contexts = [prompts[row] + answers[row] for row in going]
        parts = draw_answers(model, contexts, until_call, rolled)
        calls = []
        for row, part in zip(going, parts, strict=True):
            part = part[: most - len(answers[row])]
            answers[row] += part
            masks[row] += [1] * len(part)
            if part[-1] == call_end:
                output = output_of(answers[row], tokenizer)[: most - len(answers[row])]
                answers[row] += output
                masks[row] += [0] * len(output)
                calls.append(row)
        going = [row for row in calls if len(answers[row]) < most]
    return answers, masks
