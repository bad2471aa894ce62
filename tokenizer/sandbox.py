"""
Run chat templates, which come with models from anybody, within bounds.

    template = compile_template(source)
    text = render(template, messages, ...)

Jinja's sandbox keeps a template from files and code, but not from taking all memory and time:
'x' * 10**10, loops in loops, {% set x = x ~ x %}. Here each value that a template makes has a
bounded size, and so has the sum over all operations. An operation whose result may be larger than
the sum of what it reads, such as center(1000), is allowed where the product of the sizes is small.
"""

import functools
import json
import math
import re
from collections.abc import Collection, Mapping
from datetime import datetime
from operator import length_hint
from types import BuiltinMethodType, GeneratorType

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

LONGEST = 100_000  # characters of a template; published ones have up to 20,000
# In characters: an item of a list costs as much time as ITEM of them, a call as STEP. The limits of
# a value and of all work grow with the messages. The slowest templates end after seconds.
ITEM, STEP, MOST, WORK = 10, 200, 4_000_000, 40_000_000
# operations whose results are no larger than what they read, give or take a factor
LINEAR = frozenset("""
    + - / // strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith
    lower upper title capitalize casefold find rfind index rindex count removeprefix removesuffix
    isdigit isalpha isalnum isspace isupper islower isnumeric isdecimal encode get items keys values
    trim string length first last list select reject selectattr rejectattr map default d safe
    escape e reverse sort unique groupby dictsort attr abs int float min max tojson truncate
    wordcount strftime
""".split())
FLAT = str, bytes, range  # what has a length, and nothing else in it
SIZED = *FLAT, list, tuple, dict
COMPARING = ('in', 'eq', '==', 'equalto', 'ne', '!=', 'lt', '<', 'lessthan', 'le', '<=', 'gt', '>',
             'greaterthan', 'ge', '>=')


def size_of(value, most=math.inf) -> int:
    """Return the size of a value, at least 1.

    Where it exceeds `most`, any number above that.
    """
    if isinstance(value, str):  # nearly always
        return len(value) + 1
    size, waiting = 1, [value]
    while waiting and size <= most:
        value = waiting.pop()
        if isinstance(value, FLAT):
            size += len(value)
        elif isinstance(value, Mapping):
            size += ITEM * len(value)
            waiting += [*value, *value.values()]
        elif isinstance(value, Collection):
            size += ITEM * len(value)
            waiting += value
        elif hasattr(value, '__length_hint__'):  # an iterator, whose items were counted before
            size += ITEM * length_hint(value)
    return size


def bound_of(name, values) -> int:
    """Return a size that the result of an operation that multiplies does not exceed."""
    first, *others = values
    is_format = name in ('format', 'format_map') or name == '%' and isinstance(first, str)
    if name == 'replace' and len(others) > 1 and isinstance(first, str):
        return len(first) + first.count(str(others[0])) * len(str(others[1]))
    if is_format and not re.search(r'\d{4}|%[^a-zA-Z]*\*|:[^{}]*\{', str(first)):
        return len(first) + (first.count('%') + first.count('{')) * (1000 + size_of(others))
    if name in ('*', '**', '%') and not is_format and all(
            isinstance(value, int | float) and abs(value) < 2**64 for value in values):
        return 1 if name != '**' or values[1] <= 64 else math.inf
    return math.prod(abs(value) if isinstance(value, int) and value else size_of(value)
                     for value in values) if not is_format else math.inf


class Bounded(NodeTransformer):
    """Let a template count its loops, texts, lists, slices and comparisons."""

    def call(self, name, *values):
        return nodes.Call(nodes.EnvironmentAttribute(name), list(values), [], None, None)

    def checked(self, node):
        """Visit the parts of an expression, and check its value."""
        is_target = getattr(node, 'ctx', 'load') != 'load'
        return self.generic_visit(node) if is_target else self.call(
            'checked', self.generic_visit(node))

    visit_List = visit_Tuple = visit_Dict = checked

    def visit_Getitem(self, node):
        is_slice = isinstance(node.arg, nodes.Slice)
        return self.checked(node) if is_slice else self.generic_visit(node)

    def visit_For(self, node):
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self.call('step')))
        node.test = node.test and nodes.And(self.call('step'), node.test)
        return node

    def visit_Concat(self, node):
        return self.call('write_all', *self.generic_visit(node).nodes)

    def visit_TemplateData(self, node):
        return nodes.Const(node.data)  # which goes through finalize()

    def visit_Compare(self, node):
        self.generic_visit(node)
        operands = [node, *node.ops]
        if any(op.op in ('in', 'notin') or not isinstance(op.expr, nodes.Const)
               for op in node.ops):
            for operand in operands:
                if not isinstance(operand.expr, nodes.Const):
                    operand.expr = self.call('checked', operand.expr)
        return node


class Sandbox(ImmutableSandboxedEnvironment):
    """Compile and run templates of which every operation is counted."""

    has_marks = False  # whether the template has {% generation %} (chat.compiled)
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **options):
        super().__init__(optimized=False, finalize=finalize, **options)
        self.allow([])
        del self.globals['lipsum']
        self.globals |= {'namespace': Names, 'raise_exception': raise_exception,
                         'strftime_now': strftime_now}
        self.filters['tojson'] = tojson
        for table, names in ((self.filters, list(self.filters)), (self.tests, COMPARING)):
            table.update({name: self.counted(name, table[name]) for name in names})

    def allow(self, messages):
        """Set the limits for one rendering of messages."""
        size = size_of(messages)
        self.most = MOST + 4 * size
        self.left = WORK + 100 * (size + STEP * len(messages))

    def spend(self, size):
        """Count work. Raises TemplateError beyond the limit."""
        self.left -= size
        if self.left < 0:
            raise jinja2.TemplateError(f'its work exceeds {WORK // STEP:,} steps')

    def checked(self, value):
        """Return a value, counted. Raises TemplateError for one that is too large."""
        if value is not True and value is not False and value is not None:
            size = size_of(value, self.most)
            if size > self.most:
                raise self.too_large()
            self.spend(size)
        return value

    def too_large(self):
        return jinja2.TemplateError(f'it makes a text or a list of more than {self.most:,} '
                                    f'characters, or as many items')

    def apply(self, name, values, function):
        """Return function(), an operation of a template on values, if its result is small."""
        self.spend(STEP)
        for value in values:
            if isinstance(value, SIZED):
                self.spend(len(value))
        if name in COMPARING:
            values = [self.checked(value) for value in values]
        elif name not in LINEAR and bound_of(name, values) > self.most:
            raise self.too_large()
        result = function()
        if isinstance(result, GeneratorType):  # lazy work is done, and counted, at once
            return iter(self.checked(list(result)))
        return self.checked(result)

    def step(self):
        return True  # call() counts it

    def write_all(self, *values):
        return self.checked(''.join(str(self.checked(value)) for value in values))

    def counted(self, name, function):
        """Return a filter or test that goes through apply()."""
        @functools.wraps(function)
        def counting(*args, **kwargs):
            return self.apply(name, [*args[hasattr(function, 'jinja_pass_arg'):], *kwargs.values()],
                              lambda: function(*args, **kwargs))
        return counting

    def call(self, context, function, /, *args, **kwargs):
        method = getattr(function, '__wrapped__', function)  # Jinja wraps str.format
        if isinstance(method, BuiltinMethodType):
            return self.apply(method.__name__, [method.__self__, *args, *kwargs.values()],
                              lambda: super(Sandbox, self).call(context, function, *args, **kwargs))
        self.spend(STEP)
        return self.checked(super().call(context, function, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        return self.apply(operator, [left, right],
                          lambda: self.binop_table[operator](left, right))

    def _generate(self, source, *args, **kwargs):
        return super()._generate(Bounded().visit(source), *args, **kwargs)


@jinja2.pass_context
def finalize(context, value):
    """Count a value that is written."""
    return context.environment.checked(value)


class Names(jinja2.utils.Namespace):
    """Write a namespace without its content, which may be itself."""

    __repr__ = object.__repr__


def raise_exception(message):
    raise jinja2.TemplateError(message)


def strftime_now(format):
    if len(format) > 100:
        raise jinja2.TemplateError(f'it writes a date in {len(format):,} characters; expected 100')
    return datetime.now().strftime(format)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Write JSON; Jinja's own filter escapes HTML."""
    width = 0 if indent is None else indent if isinstance(indent, int) else len(indent)
    if size_of(value) * width * 20 > MOST:
        raise jinja2.TemplateError(f'it indents JSON by {width:,}; expected at most {MOST:,} '
                                   f'characters')
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def compile_template(text, extensions=()):
    """Compile a template with the functions that transformers gives it."""
    if len(text) > LONGEST:
        raise jinja2.TemplateError(f'it has {len(text):,} characters; expected {LONGEST:,} or '
                                   f'fewer')
    return Sandbox(trim_blocks=True, lstrip_blocks=True,
                   extensions=[*extensions, 'jinja2.ext.loopcontrols']).from_string(text)


def render(template, messages, **values):
    """Render messages, within limits that depend on their size."""
    template.environment.allow(messages)
    return template.render(messages=messages, **values)
