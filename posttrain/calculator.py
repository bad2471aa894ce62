"""Evaluate arithmetic exactly: the tool that a model calls for sums.

    calculate('(2 + 3) * 1.5')  # -> '7.5'
"""

import ast
import operator
import re
from decimal import Context
from fractions import Fraction

from configurator import UserError

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
