"""tools.py: values, refused expressions, a model that calls. Run: pytest tests/test_tools.py"""

import json
from typing import Literal

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_sample_e2e import save

from config.presets import PRESETS
from flatgpt.generate import Sampling, sample_next
from model import GPT, GPTConfig
from posttrain.tools import SYSTEM, TOOLS, calculate, tool, tool_of, toolbox
from tokenizer import BPETokenizer, ByteTokenizer, chat
from tokenizer.chat import OUTPUT, OUTPUT_END, PYTHON, PYTHON_END

CALCULATOR = toolbox(True)
TOKENIZER = BPETokenizer([], None, {token: 256 + i for i, token in enumerate(chat.SPECIAL_TOKENS)})  # one a byte


@pytest.mark.parametrize('expression, value', [
    ('5', '5'), ('2 + 3 * 4', '14'), ('(2 + 3) * 4', '20'), ('-2 ** 2', '-4'), ('2 ** -1', '0.5'), ('7 // 2', '3'),
    ('-7 // 2', '-4'), ('-7 % 3', '2'), ('10 / 4', '2.5'), ('10 / 5', '2'), ('1 / 3', '0.333333333333'),
    ('2 / 3', '0.666666666667'), ('0.1 + 0.2', '0.3'), ('.5 * 10', '5'), ('1.50', '1.5'), ('1,000 * 2', '2000'),
    ('1,234,567.5 - 0.5', '1234567'), ('10 / 3', '3.333333333333'), ('1 / 3000000', '0.000000333333333333'),
    ('12345678901.25 + 0.10', '12345678901.35'), ('123456789012345 + 0.5', '123456789012345.5'), ('08 + 007', '15'),
    ('(7 // 2) / (3 // 2)', '3'), ('(7 // 2) ** -1', '0.333333333333'), ('100.05', '100.05'), ('0.50 + 00', '0.5'),
    ('(1 // 3) ** 2', '0'), ('0.5 ** 2', '0.25'), ('9 ** (4 / 2)', '81'), ('0 ** 0', '1'),
    ('1 ** 999999999', '1'), ('--3', '3'), ('100 * 10', '1000'), ('0.00001 / 10', '0.000001'), (' 1+1 ', '2'),
    ('2 ** 100', '1267650600228229401496703205376'), ('3 - 3', '0'), ('0 * -1', '0'),
    ('12345678901234567890.5 - 12345678901234567890', '0.5'),
    ('0.10000000000000000001 * 10 - 1', '0.0000000000000000001'), ('1,234.50 + 5.', '1239.5'),
    ('0 ** 5', '0'), ('007.5 * 2', '15'), ('+5 - +2', '3'), ('12,345,678 - 1,234.5', '12344443.5')])
def test_values(expression, value):
    assert calculate(expression) == value


numbers = st.integers(0, 999).map(str)
expressions = st.recursive(numbers, lambda inner: st.one_of(
    st.tuples(inner, st.sampled_from(['+', '-', '*', ' + ', ' - ']), inner).map(''.join),
    inner.map(lambda text: f'({text})'), inner.map(lambda text: f'-{text}')), max_leaves=8)


# Python's own eval is what the calculator is compared with; it sees only the expressions made above
@given(expressions)
def test_integers_as_python_has_them(expression):
    assume(len(expression) <= 200)
    assert calculate(expression) == str(eval(expression))


@given(expressions, expressions)
def test_quotients_as_python_has_them(left, right):
    assume(len(left) + len(right) < 180)  # longer ones are refused
    divisor = eval(right)
    if divisor == 0:
        with pytest.raises(ValueError, match='divides by zero'):
            calculate(f'({left}) / ({right})')
    else:
        assert float(calculate(f'({left}) / ({right})')) == pytest.approx(eval(left) / divisor, rel=1e-10)
        assert calculate(f'({left}) // ({right})') == str(eval(left) // divisor)
        assert calculate(f'({left}) % ({right})') == str(eval(left) % divisor)


@pytest.mark.parametrize('expression, said', [
    ('', 'no calculation'), ('(1', 'no calculation'), ('1 +', 'no calculation'), ('2 3', 'no calculation'),
    ('a + 1', "'a + 1' is no calculation; expected integers"), ('__import__("os")', 'no calculation'),
    ('1e5', 'no calculation'), ('0x10', 'no calculation'), ('1_000', 'no calculation'), ('1,2', 'no calculation'),
    ('7(3)', 'no calculation'), ('()', 'no calculation'), ('1 < 2', 'no calculation'), ('1\n+ 1', 'no calculation'),
    ('٣ + 1', 'no calculation'), ('1 if 1 else 2', 'no calculation'), ('1,234.5,678', 'no calculation'),
    ('1 / 0', "'1 / 0' divides by zero"), ('1 // (2 - 2)', 'divides by zero'), ('1 % 0', 'divides by zero'),
    ('0 ** -1', 'divides by zero'), ('2 ** 0.5', 'the power 0.5 is no whole number'),
    ('9 ** 9 ** 9', 'too many digits'), ('2 ** 1000000000', 'too many digits'), ('2 ** -1000', 'too many digits'),
    ('9.9 ** 999', 'too many digits'), ('0.5 ** 9999', 'too many digits'),
    ('10 ** 20 * 10 ** 20', 'too many digits'),
    ('9' * 60, 'too many digits'), ('1+' * 150 + '1', '301 characters; expected at most 200'),
    ('-' * 150 + '1', 'nested too deeply'), ('(' * 99 + '1', 'no calculation')])
def test_refused(expression, said):
    with pytest.raises(ValueError) as error:
        calculate(expression)
    assert said in str(error.value)


# called by a model ----------------------------------------------------------------------------------------------------


def test_output():
    """Of the last call, however the text before it reads; a call that says nothing is an error."""
    def told(text):
        return TOKENIZER.decode(CALCULATOR.output_of(TOKENIZER.encode(text, allowed_special='all'), TOKENIZER))

    assert told(f'{PYTHON}2*3{PYTHON_END}') == f'{OUTPUT}6{OUTPUT_END}'
    assert told(f'{PYTHON}2*3{PYTHON_END}{OUTPUT}6{OUTPUT_END}So {PYTHON}6/4{PYTHON_END}') == f'{OUTPUT}1.5{OUTPUT_END}'
    for text in (f'{PYTHON}two{PYTHON_END}', f'2*3{PYTHON}{PYTHON_END}', f'So{PYTHON_END}'):
        assert told(text) == f'{OUTPUT}error{OUTPUT_END}'


def talk(question, answer):
    return [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]


def called(call, value):
    return f'{PYTHON}{call}{PYTHON_END}{OUTPUT}{value}{OUTPUT_END}'


TALKS = [talk('a', f'{called("2+3", 5)}It is 5.'), talk('Question b', 'No sum.'),
         talk('c', f'{called("7*", "error")}?'),
         talk('What is d?', f'{called("1/4", 0.25)}{called("0.25*8", 2)}2!'),
         [{'role': 'system', 'content': SYSTEM}, *talk('e', f'{called("6*7", 42)}{called("42-1", 41)}So 41.')],
         [{'role': 'system', 'content': SYSTEM}, *talk('f', f'Hm {PYTHON}2+3')]]  # which calls nothing


@pytest.fixture(scope='module')
def model():
    """A model that has learnt TALKS by heart."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**PRESETS['llama'], 'n_layer': 1, 'n_head': 2, 'n_embd': 48, 'block_size': 96,
                             'vocab_size': TOKENIZER.vocab_size}))
    whole = [chat.render_conversation(messages, chat.TEMPLATE, TOKENIZER) for messages in TALKS]
    T = max(len(ids) for ids, _ in whole) - 1
    x, y = torch.zeros(len(whole), T, dtype=torch.long), torch.full((len(whole), T), -1)
    for row, (ids, mask) in enumerate(whole):
        x[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        y[row, : len(ids) - 1] = torch.where(torch.tensor(mask[1:]) == 1, torch.tensor(ids[1:]), -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    return model.eval()


PROMPTS = [chat.render(messages[:-1], chat.TEMPLATE, TOKENIZER) for messages in TALKS]
STOP_IDS, _ = chat.find_endings(chat.TEMPLATE, TOKENIZER)


def greedy(model, most):
    return CALCULATOR.generate(model, TOKENIZER, PROMPTS, Sampling(most, temperature=0, stop_ids=STOP_IDS))


def test_a_model_that_calls(model):
    """What it writes and is told is the conversation it has learnt, with the same mask, which no loss taught it."""
    answers, masks = greedy(model, 80)
    for prompt, answer, mask, messages in zip(PROMPTS, answers, masks, TALKS, strict=True):
        ids, expected = chat.render_conversation(messages, chat.TEMPLATE, TOKENIZER)
        assert prompt + answer == ids and [0] * len(prompt) + mask == expected


@pytest.mark.parametrize('most', [0, 1, 6, 7, 8, 9, 10, 30])
def test_never_more_than_asked_for(model, most):
    """Also where the end comes amidst what it is told."""
    whole, masks = greedy(model, 80)
    answers, cut = greedy(model, most)
    assert answers == [ids[:most] for ids in whole] and cut == [mask[:most] for mask in masks]


@torch.no_grad()
def test_tokens_are_drawn_by_their_place(model):
    """A token at a time, from the whole context, by the number of u that belongs to its place in the answer."""
    u = torch.rand(len(TALKS), 60, generator=torch.Generator().manual_seed(0))
    controls = {'temperature': 5.0, 'top_k': 5}
    answers, masks = CALCULATOR.generate(model, TOKENIZER, PROMPTS, Sampling(60, stop_ids=STOP_IDS, **controls), u)
    for row, prompt in enumerate(PROMPTS):
        ids, mask = [], []
        while len(ids) < 60 and not (ids and ids[-1] in STOP_IDS):
            logits = model(torch.tensor([prompt + ids]))[0][:, -1]
            ids.append(sample_next(logits, Sampling(**controls), u[row, len(ids)][None]).item())
            mask.append(1)
            if ids[-1] == TOKENIZER.special_tokens[PYTHON_END]:
                told = CALCULATOR.output_of(ids, TOKENIZER)
                ids, mask = (ids + told)[:60], (mask + [0] * len(told))[:60]
        assert answers[row] == ids and masks[row] == mask
    assert sum(map(len, masks)) > sum(map(sum, masks)) and answers != greedy(model, 60)[0]


def test_in_a_chat(model, folder):
    """posttrain.chat shows the calls, and what they were told; a second call is made with the first in the context."""
    save(folder, model, tokenizer=TOKENIZER.to_dict(), chat_template=chat.TEMPLATE)
    said = {}
    for tools in (True, False):
        run = folder.start('posttrain.chat', typed='e\n/reset\nf\n', tools=tools, compile=False, temperature=0,
                           max_new_tokens=30, device='cpu').ok()
        said[tools] = [line.removeprefix('> ') for line in run.out.splitlines()[-4:-1]]
    assert said[True] == [TALKS[-2][-1]['content'], '(forgotten)', TALKS[-1][-1]['content']]
    assert said[False][0] != said[True][0]
    save(folder, model, tokenizer={'kind': 'byte'}, chat_template=chat.TEMPLATE)
    folder.start('posttrain.chat', tools=True).refused('has no <|python|>')
    save(folder, model, tokenizer=TOKENIZER.to_dict())
    folder.start('posttrain.chat', tools=True).refused('tools=True: expected a chat model')


def test_a_tokenizer_without_calls(model):
    with pytest.raises(ValueError, match=r'has no <\|python\|>, .* calls a tool'):
        CALCULATOR.generate(model, ByteTokenizer(), PROMPTS, Sampling(5))


# other tools ----------------------------------------------------------------------------------------------------------


@tool
def lookup(title: str) -> str:
    """
    Return the article
    with this title.

    More for programmers.
    """
    return {'Paris': 'A city.', 'tokens': f'a{OUTPUT_END}{PYTHON}1{PYTHON_END}b'}[title]


@tool
def search(query: str, n: int = 2, kinds: list[Literal['a', 'b']] = (), least: float = 0.0, exact: bool = False) -> str:
    """Search a store."""
    return f'{query} {n} {list(kinds)} {least} {exact}'


@tool
def now() -> str:
    """Return the time."""
    return 'noon'


def test_schema():
    """It is a valid JSON schema, and accepts what the function takes."""
    schema = TOOLS['search'].parameters
    jsonschema = pytest.importorskip('jsonschema')
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate({'query': 'x', 'n': 1, 'kinds': ['a', 'b'], 'least': 1, 'exact': True}, schema)
    for wrong in ({'query': 1}, {}, {'query': 'x', 'kinds': ['c']}, {'query': 'x', 'm': 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    assert schema['required'] == ['query'] and TOOLS['lookup'].description == 'Return the article with this title.'


BOX = toolbox('calculator,lookup,search,now')


@pytest.mark.parametrize('call, output', [
    ('2 + 3', '5'), ('calculator: 2 + 3', '5'), ('lookup: Paris', 'A city.'), (' lookup:Paris', 'A city.'),
    ('search: {"query": "a: b"}', 'a: b 2 [] 0.0 False'), ('now: {}', 'noon'),
    ('search: {"query": "x", "n": 3, "kinds": ["b"], "least": 1, "exact": true}', "x 3 ['b'] 1 True"),
    ('lookup: tokens', 'a  1 b'),  # a tool cannot end its own output
    ('lookup: Rome', "error: KeyError: 'Rome'"), ('search: x', 'error: search: expected a JSON object of query, n,'),
    ('search: {}', 'error: search: query is missing'), ('search: {"query": 1}', 'query=1; expected string'),
    ('search: {"query": "x", "n": true}', 'n=true; expected integer'), ('search: {"query": "x", "n": 1.5}', 'expected integer'),
    ('search: {"query": "x", "kinds": ["c"]}', 'expected list of "a" or "b"'), ('search: {"query": "x", "least": NaN}', 'expected number'),
    ('search: {"qery": "x", "query": "x"}', "there is no 'qery'; did you mean 'query'?"), ('rm: x', "'rm: x' is no calculation"),
    ('search: ' + '[' * 10**5, 'expected a JSON object')])
def test_calls(call, output):
    assert output in BOX.run(call) if 'error' in BOX.run(call) else BOX.run(call) == output


def test_the_calculator_alone_gives_no_reason():
    """Models have learnt its 'error'."""
    assert [CALCULATOR.run(call) for call in ('two', 'x: 5', '1/0', 'calculator: 1/0')] == ['error'] * 4
    assert toolbox('now').run('2 + 3') == 'error: expected a call such as now: ...'


texts = st.text().filter(lambda text: not any(0xD800 <= ord(char) < 0xE000 for char in text))


@given(texts, st.sampled_from(['calculator', 'lookup']))
def test_texts_there_and_back(text, name):
    """A text's call is read as the same call, also if it begins as another one, and OpenAI's JSON has it whole."""
    kind = BOX[name]
    for value in (text, f'now: {text}', f' {text}'):
        assert BOX.split(BOX.join(kind, value)) == (kind, value)
        assert kind.from_json(kind.to_json(value)) == value


@given(st.dictionaries(st.text(), st.text() | st.integers()).map(json.dumps))
def test_arguments_there_and_back(arguments):
    kind = BOX['search']
    assert BOX.split(BOX.join(kind, kind.from_json(arguments))) == (kind, arguments) == (kind, kind.to_json(arguments))


def test_system_message():
    assert CALCULATOR.system == SYSTEM and BOX.system == (
        'You have a calculator. You have lookup(title): Return the article with this title. You have '
        'search(query, n, kinds, least, exact): Search a store. You have now(): Return the time.')


def test_settings_and_functions_refused():
    assert toolbox(False) == toolbox('') == {} and toolbox(True) == toolbox('calculator') and list(BOX)[1] == 'lookup'
    with pytest.raises(ValueError, match="no tool 'lokup'; expected some of calculator, python.*mean 'lookup'"):
        toolbox('calculator,lokup')

    def bare(x):
        """A."""

    def odd(x: dict):
        """A."""

    def silent(x: str):
        pass
    for function, said in ((bare, 'annotation of x'), (odd, 'has no schema'), (silent, 'docstring')):
        with pytest.raises(TypeError, match=said):
            tool_of(function)


def test_other_tools_in_answers(model):
    """The model calls the calculator, and gets an error where it may not."""
    prompt, sampling = PROMPTS[:1], Sampling(80, temperature=0, stop_ids=STOP_IDS)
    assert BOX.generate(model, TOKENIZER, prompt, sampling) == CALCULATOR.generate(model, TOKENIZER, prompt, sampling)
    [ids], [mask] = toolbox('now').generate(model, TOKENIZER, prompt, sampling)
    told = TOKENIZER.decode([i for i, drawn in zip(ids, mask, strict=True) if not drawn])
    assert told == f'{OUTPUT}error: expected a call such as now: ...{OUTPUT_END}'
