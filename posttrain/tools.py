"""
A calculator, and the loop in which a model calls it: what it writes between chat.PYTHON and chat.PYTHON_END is computed
and told to it between chat.OUTPUT and chat.OUTPUT_END, and it goes on from there ("Toolformer", Schick et al. 2023).

    calculate('(2 + 3) * 1.5')                                                   # -> '7.5'
    answers, masks = generate_with_tools(model, tokenizer, prompts, max_new_tokens=100, stop_ids=stop_ids)
"""

import ast
import math
import operator
import re
from decimal import Context
from fractions import Fraction

import torch

from configurator import UserError
from flatgpt.generate import Sampling, generate
from tokenizer.chat import OUTPUT, OUTPUT_END, PYTHON, PYTHON_END

# said to a model that has one, so that it calls it then and not otherwise
SYSTEM = 'You have a calculator.'
MAX_LENGTH = 200  # characters of an expression
MAX_DEPTH = 100  # operators inside each other; a sum of 100 numbers is as deep
MAX_BITS = 128  # of a numerator and of a denominator: numbers of up to 38 digits
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: lambda a, b: Fraction(a // b), ast.Mod: operator.mod}
EXPECTED = 'expected integers, decimals, + - * / // % ** and parentheses, such as (2 + 3) * 1.5'


def calculate(expression):
    """
    The value of an arithmetic expression as a person would write it: '5', '2.5', '0.333333333333'. Numbers are exact
    until then (0.1 + 0.2 is 0.3), but for roots such as 2 ** 0.5, which have 12 digits. Thousands may have commas, and
    numbers zeros in front.

    Nothing is executed: Python's parser reads it, and only what is named here is computed. Raises ValueError for
    anything else, for what has no value, and for what is too long, too deep or too large.
    """
    if len(expression) > MAX_LENGTH:
        raise UserError(f'the expression has {len(expression):,} characters; expected at most {MAX_LENGTH}')
    if not re.fullmatch(r'[0-9.,+*/%() -]+', expression):
        raise UserError(f'{expression!r} is no calculation; {EXPECTED}')
    thousands = r'(?<![0-9.,])[0-9]{1,3}(,[0-9]{3})+(?![0-9,])'
    text = re.sub(thousands, lambda number: number[0].replace(',', ''), expression).strip()
    text = re.sub(r'(?<![0-9.])0+(?=[0-9])', '', text)  # 007, which Python does not take
    try:
        tree = ast.parse(text, mode='eval').body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise UserError(f'{expression!r} is no calculation; {EXPECTED}') from None
    return written(value_of(tree, text, MAX_DEPTH))


def value_of(node, expression, depth):
    """-> Fraction, of a node of the expression's syntax tree; depth: how many more may be inside each other."""
    if depth == 0:
        raise UserError(f'{expression!r} is nested too deeply; expected at most {MAX_DEPTH} levels')
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # all digits that were written: node.value, a float, has the first 17 or so
        value = Fraction(expression[node.col_offset : node.end_col_offset])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = value_of(node.operand, expression, depth - 1)
        value = -value if isinstance(node.op, ast.USub) else value
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (*OPERATORS, ast.Pow)):
        left, right = (value_of(side, expression, depth - 1) for side in (node.left, node.right))
        try:
            value = power(left, right) if isinstance(node.op, ast.Pow) else OPERATORS[type(node.op)](left, right)
        except ZeroDivisionError:
            raise UserError(f'{expression!r} divides by zero') from None
    else:
        raise UserError(f'{expression!r} is no calculation; {EXPECTED}')
    if bits(value) > MAX_BITS:
        raise UserError(f'{expression!r} has a value of too many digits; expected at most 38')
    return value


def power(base, exponent):
    """base ** exponent -> Fraction, without computing a number that would be refused for its size."""
    if exponent.denominator == 1:
        if (bits(base) - 1) * abs(exponent) > MAX_BITS:
            raise UserError('a power has a value of too many digits; expected at most 38')
        return base ** int(exponent)
    if base < 0:
        raise UserError(f'a negative number, {written(base)}, has no power {written(exponent)}')
    try:
        value = float(base) ** float(exponent)
    except OverflowError:
        value = math.inf
    if math.isinf(value) or base and not value:  # too large, or too small
        raise UserError('a power has a value of too many digits; expected at most 38')
    return Fraction(f'{value:.12g}')


def bits(value):
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def written(value):
    """Fraction -> text: all digits of its whole part and 12 decimals; below 1 12 digits; no needless zero."""
    if value.denominator == 1:
        return str(value.numerator)
    whole = abs(value) // 1
    text = f'{Context(prec=12 + len(str(whole)) * (whole > 0)).divide(value.numerator, value.denominator):f}'
    return text.rstrip('0').rstrip('.') if '.' in text else text


# Called by a model ----------------------------------------------------------------------------------------------------


def output_of(ids, tokenizer):
    """
    What follows a call: the ids of OUTPUT, the value and OUTPUT_END. ids: of an answer so far, up to PYTHON_END; what
    can't be computed is told the model as 'error'.
    """
    call = re.split(re.escape(PYTHON), tokenizer.decode(ids).removesuffix(PYTHON_END))[-1]
    try:
        value = calculate(call)
    except ValueError:
        value = 'error'
    special = tokenizer.special_tokens
    return [special[OUTPUT], *tokenizer.encode(value, allowed_special='none'), special[OUTPUT_END]]


def check_tokenizer(tokenizer):
    """ValueError if it has no tokens to call with."""
    missing = [token for token in (PYTHON, PYTHON_END, OUTPUT, OUTPUT_END) if token not in tokenizer.special_tokens]
    if missing:
        raise UserError(f'the tokenizer has no {", ".join(missing)}, by which a model calls the calculator; train it '
                         f'with the special tokens of chat.py')


def generate_with_tools(model, tokenizer, prompts, max_new_tokens, stop_ids=(), u=None, **controls):
    """
    Answers to the prompts, lists of ids, of a model that may call the calculator; all as one batch, which is computed
    anew, from the prompts, each time that rows of it have called.

    -> (answers, masks), lists of ids and of 0 or 1 for each prompt. An answer ends with the one of stop_ids that ended
    it, or after max_new_tokens, those that it was told included. Its mask is 0 for what it was told, from OUTPUT to
    OUTPUT_END, and 1 for what the model drew, which alone can be to its credit, or its fault. u: (B, max_new_tokens)
    of [0, 1), which decide over the tokens at these places of the answers; None: random ones. controls: of generate.Sampling.
    Raises ValueError if the tokenizer has no tokens to call with.
    """
    check_tokenizer(tokenizer)
    u = torch.rand(len(prompts), max_new_tokens) if u is None else u
    called, stop_ids = tokenizer.special_tokens[PYTHON_END], set(stop_ids)
    answers, masks = [[] for _ in prompts], [[] for _ in prompts]
    going = list(range(len(prompts))) if max_new_tokens else []
    while going:
        # of each row the numbers from its next place on; those behind its last are never used
        rolled = torch.stack([u[row].roll(-len(answers[row])) for row in going])
        most, ended, calls = max_new_tokens - min(len(answers[row]) for row in going), [False] * len(going), []
        sampling = Sampling(most, stop_ids={*stop_ids, called}, n_ids=tokenizer.vocab_size, **controls)
        for next_id, _, now_ended in generate(
                model, [prompts[row] + answers[row] for row in going], sampling, rolled):
            for i, row in enumerate(going):
                if ended[i]:
                    continue
                answers[row].append(next_id[i].item())
                masks[row].append(1)
                ended[i] = now_ended[i] or len(answers[row]) == max_new_tokens
                if answers[row][-1] == called:
                    calls.append(row)
            if all(ended):
                break
        for row in calls:
            told = output_of(answers[row], tokenizer)[: max_new_tokens - len(answers[row])]
            answers[row] += told
            masks[row] += [0] * len(told)
        going = [row for row in calls if len(answers[row]) < max_new_tokens]
    return answers, masks
