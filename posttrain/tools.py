"""Let a model call tools: plain functions with annotations and a docstring.

    @tool
    def lookup(title: str) -> str:
        'Return the article with this title.'
        return articles[title]

    tools = toolbox('calculator,lookup')
    tools.run('2 + 3')  # -> '5'
    tools.run('lookup: Paris')
    answers, masks = tools.generate(model, tokenizer, prompts, Sampling(100))

The model writes a call between chat.PYTHON and chat.PYTHON_END. The output is inserted between
chat.OUTPUT and chat.OUTPUT_END, and the answer continues ("Toolformer", Schick et al. 2023). A call
has one of three forms:

    2 + 3                               an expression for the calculator
    lookup: Paris                       a tool whose one parameter is a text
    search: {"query": "cats", "n": 2}   any other: its arguments, a JSON object

A function's parameters are str, int, float, bool, Literal or lists of these.
"""

import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from configurator import UserError, nearest
from posttrain.calculator import calculate
from posttrain.python_tool import check_sandbox, run_python
from posttrain.rollouts import draw_answers
from tokenizer.chat import OUTPUT, OUTPUT_END, PYTHON, PYTHON_END, TOOL_TOKENS

SYSTEM = 'You have a calculator.'  # the system message that permits its calls
MOST_OUTPUT = 4000  # characters
TYPES = {str: 'string', int: 'integer', float: 'number', bool: 'boolean'}  # names in JSON schemas
CALL = re.compile(r'\s*([A-Za-z0-9_-]{1,64}): ?(.*)', re.DOTALL)


@dataclass(frozen=True)
class Tool:
    """Describe a function that a model may call.

    parameters: the JSON schema of its arguments, an object. function: None where another program
    runs the tool.
    """

    name: str
    description: str
    parameters: dict
    function: Callable | None = None

    @property
    def text_parameter(self):
        """Return the name of the one parameter if it is a text, else None."""
        properties = self.parameters.get('properties', {})
        [(name, schema), *others] = [*properties.items()] or [('', {})]
        return name if not others and schema.get('type') == 'string' else None

    def to_json(self, text):
        """Return the arguments of a call's text as JSON, as OpenAI's tool_calls have them."""
        return json.dumps({self.text_parameter: text}, ensure_ascii=False
                          ) if self.text_parameter else text

    def from_json(self, arguments):
        """Return the text of a call with these arguments. Raises UserError."""
        values = self.read(arguments)
        if self.text_parameter is None:
            return arguments
        if not (values.keys() == {self.text_parameter}
                and isinstance(values[self.text_parameter], str)):
            raise UserError(f'{self.name}: expected arguments such as '
                            f'{{"{self.text_parameter}": "..."}}')
        return values[self.text_parameter]

    def read(self, arguments):
        """Return the dict of arguments in JSON. Raises UserError."""
        try:
            values = json.loads(arguments)
        except (TypeError, ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise UserError(f'{self.name}: expected a JSON object of '
                            f'{", ".join(self.parameters.get("properties", {}))}')
        return values

    def run(self, text):
        """Call the function with a call's text; -> its output. Raises UserError."""
        arguments = self.read(self.to_json(text))
        properties = self.parameters['properties']
        for name in self.parameters['required']:
            if name not in arguments:
                raise UserError(f'{self.name}: {name} is missing')
        for name, value in arguments.items():
            if name not in properties:
                raise UserError(f'{self.name}: there is no {name!r}{nearest(name, properties)}')
            if not fits(value, properties[name]):
                raise UserError(f'{self.name}: {name}={json.dumps(value)[:60]}; expected '
                                f'{words_of(properties[name])}')
        return str(self.function(**arguments))


# Schemas ------------------------------------------------------------------------------------------

def tool_of(function):
    """Return the Tool of a function. Raises TypeError for parameters without a schema."""
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    description = ' '.join((inspect.getdoc(function) or '').partition('\n\n')[0].split())
    if not description and sys.flags.optimize < 2:  # python -OO drops docstrings
        raise TypeError(f'{function.__name__}: expected a docstring, which describes the tool')
    if odd := [name for name, parameter in parameters.items() if name not in hints
               or parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]:
        raise TypeError(f'{function.__name__}: expected an annotation of {", ".join(odd)}')
    return Tool(function.__name__, description, {
        'type': 'object', 'properties': {name: schema_of(hints[name]) for name in parameters},
        'required': [name for name, parameter in parameters.items()
                     if parameter.default is parameter.empty],
        'additionalProperties': False}, function)


def schema_of(kind):
    """Return the JSON schema of an annotation. Raises TypeError for one without."""
    if kind in TYPES:
        return {'type': TYPES[kind]}
    if get_origin(kind) is Literal:
        return {'enum': list(get_args(kind))}
    if get_origin(kind) is list:
        return {'type': 'array', 'items': schema_of(*get_args(kind))}
    raise TypeError(f'{kind} has no schema; expected str, int, float, bool, Literal, or list of '
                    f'these, such as list[str]')


def fits(value, schema):
    """Return whether a JSON value satisfies a schema of schema_of()."""
    match schema:
        case {'enum': values}:
            return any(type(value) is type(other) and value == other for other in values)
        case {'type': 'array', 'items': items}:
            return isinstance(value, list) and all(fits(item, items) for item in value)
        case {'type': 'number'}:
            return type(value) in (int, float) and math.isfinite(value)
    return type(value) is {name: kind for kind, name in TYPES.items()}[schema['type']]


def words_of(schema):
    """Write what a schema allows, for an error."""
    if 'enum' in schema:
        return ' or '.join(map(json.dumps, schema['enum']))
    return f'list of {words_of(schema["items"])}' if 'items' in schema else schema['type']


# The tools ----------------------------------------------------------------------------------------

TOOLS = {}  # name in the setting `tools`: Tool


def tool(function):
    """Register a function as a tool of its name (decorator)."""
    TOOLS[function.__name__] = tool_of(function)
    return function


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression, such as (2 + 3) * 1.5."""
    return calculate(expression)


@tool
def python(code: str) -> str:
    """Run Python code; return what it prints, and the value of a last expression."""
    return run_python(code)


TOOLS['unsandboxed_python'] = replace(
    TOOLS['python'], function=lambda code: run_python(code, is_sandboxed=False))


def toolbox(setting):
    """Return the Toolbox of a setting: names with commas, True for the calculator, False.

    Raises UserError for an unknown name, and for python where it has no sandbox.
    """
    if isinstance(setting, Toolbox):
        return setting
    text = {True: 'calculator', False: '', None: ''}.get(setting, setting)
    tools = Toolbox()
    for name in filter(None, map(str.strip, text.split(','))):
        if name not in TOOLS:
            raise UserError(f'tools={setting!r}: there is no tool {name!r}; expected some of '
                            f'{", ".join(TOOLS)}{nearest(name, TOOLS)}')
        if name == 'python':
            check_sandbox()
        tools[TOOLS[name].name] = TOOLS[name]
    return tools


class Toolbox(dict):
    """Hold the Tools that a model may call, by name."""

    @property
    def system(self):
        """Return the sentences of the system message that permit calls."""
        sentences = [SYSTEM] if 'calculator' in self else []
        for name, tool in self.items():
            if name != 'calculator':
                parameters = ', '.join(tool.parameters.get('properties', {}))
                sentences.append(f'You have {name}({parameters}): {tool.description}')
        return ' '.join(sentences)

    def split(self, call):
        """Return the Tool of a call, and its text. Raises UserError if there is none."""
        named = CALL.fullmatch(call)
        if named and named[1] in self:
            return self[named[1]], named[2]
        if 'calculator' not in self:
            raise UserError(f'expected a call such as {next(iter(self), "name")}: ...')
        return self['calculator'], call

    def join(self, tool, text):
        """Return the call that split() splits into this tool and text."""
        named = CALL.fullmatch(text)
        is_plain = tool.name == 'calculator' and not (named and named[1] in self)
        return text if is_plain else f'{tool.name}: {text}'

    def run(self, call):
        """Run a call; -> the output. An error is 'error', or 'error: ' and the reason.

        The calculator alone gives no reason: models have learnt its 'error'.
        """
        try:
            tool, text = self.split(call)
            output = tool.run(text)
        except UserError as error:
            output = 'error' if [*self] == ['calculator'] else f'error: {error}'
        except Exception as error:  # of the tool's own; the model may try something else
            output = f'error: {type(error).__name__}: {error}'
        # a tool's text may not end its own output or begin a call
        return re.sub('|'.join(map(re.escape, TOOL_TOKENS)), ' ', output)[:MOST_OUTPUT]

    def output_of(self, ids, tokenizer):
        """Run the call that ends an answer's ids, up to PYTHON_END; -> output_ids()."""
        text = tokenizer.decode(ids).removesuffix(PYTHON_END)
        return self.output_ids(text.rpartition(PYTHON)[2], tokenizer)

    def output_ids(self, call, tokenizer):
        """Run a call; -> the ids that follow it: OUTPUT, the output, OUTPUT_END."""
        special, output = tokenizer.special_tokens, self.run(call)
        return [special[OUTPUT], *tokenizer.encode(output, allowed_special='none'),
                special[OUTPUT_END]]

    def generate(self, model, tokenizer, prompts, sampling, u=None):
        """Draw an answer to each prompt from a model that may call the tools.

        -> (answers, masks), a list for each prompt. An answer ends with one of sampling.stop_ids,
        or after max_new_tokens ids, outputs included. The mask is 0 from OUTPUT to OUTPUT_END and
        1 for ids that the model drew. u: (B, max_new_tokens) in [0, 1), fixes the draw at each
        position of the answers; None: random. Rows that have called are computed again from the
        prompt.
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
                    output = self.output_of(answers[row], tokenizer)[: most - len(answers[row])]
                    answers[row] += output
                    masks[row] += [0] * len(output)
                    calls.append(row)
            going = [row for row in calls if len(answers[row]) < most]
        return answers, masks


# Tokenizers ---------------------------------------------------------------------------------------

def calls_tools(tokenizer):
    """Return whether a tokenizer has the tokens of a call."""
    return all(token in tokenizer.special_tokens for token in TOOL_TOKENS)


def check_tokenizer(tokenizer):
    """Raise UserError if the tokenizer lacks the tokens of a call."""
    missing = [token for token in TOOL_TOKENS if token not in tokenizer.special_tokens]
    if missing:
        raise UserError(f'the tokenizer has no {", ".join(missing)}, with which a model calls a '
                        f'tool; train one with the special tokens of tokenizer/chat.py')
