"""chat.py: conversations, against transformers, and the loop at the terminal. Run: pytest tests/test_chat.py"""

import io
import os
import re
import signal
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import interchange
from chat import converse, find_endings, render
from tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|begin_of_text|>', '<|start_header_id|>',
           '<|end_header_id|>', '<|eot_id|>', '<s>', '</s>', '[INST]', '[/INST]', '<think>', '</think>']
TEMPLATES = {
    'chatml': """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    'header': """\
{{- bos_token }}
{%- if not date is defined %}
    {%- set date = strftime_now('%d %b %Y') %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, rest = messages[0]['content'] | trim, messages[1:] %}
{%- else %}
    {%- set system, rest = '', messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date + '\\n' + system + '<|eot_id|>' }}
{%- for message in rest %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.name or '') }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    'thoughts': """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}""",
    'brackets': """\
{{ bos_token }}{% for message in messages %}
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles have to alternate!') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}""",
}
ENDS = {'chatml': '<|im_end|>', 'header': '<|eot_id|>', 'thoughts': '<|im_end|>', 'brackets': '</s>'}
CHAT = [{'role': 'user', 'content': '  What is 2 + 2? \n'}, {'role': 'assistant', 'content': 'It is 4.'},
        {'role': 'user', 'content': 'café & <b>日本</b> 🙂?'}]
PROSE = 'system user assistant what is the answer to this question? it is the one that you think of. ' * 3


@pytest.fixture(scope='module')
def bpe():
    return BPETokenizer.train([PROSE], vocab_size=300 + len(SPECIAL), special_tokens=SPECIAL)


@pytest.fixture(scope='module')
def theirs(bpe, tmp_path_factory):
    """The same tokenizer in transformers, with the beginning and the end that chat.py finds by name."""
    transformers = pytest.importorskip('transformers')
    path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
    interchange.write_tokenizer_json(bpe.to_dict(), path)
    return {name: transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token='<|begin_of_text|>', eos_token='<|im_end|>', chat_template=template)
        for name, template in TEMPLATES.items()}


def expected(theirs, messages, tokenize):
    return theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=tokenize, return_dict=False)


# from messages to ids -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize('messages', [CHAT, CHAT[:1], [{'role': 'system', 'content': ' Be short. '}, *CHAT]])
def test_ids_are_those_of_transformers(bpe, theirs, name, messages):
    if name == 'brackets' and messages[0]['role'] == 'system':
        with pytest.raises(ValueError, match='chat template can not render.*Roles have to alternate!'):
            render(messages, TEMPLATES[name], bpe)
    else:
        assert render(messages, TEMPLATES[name], bpe) == expected(theirs[name], messages, True)


def test_thoughts_of_earlier_answers_are_dropped(bpe, theirs):
    messages = [CHAT[0], {'role': 'assistant', 'content': '<think>\nhard\n</think>\n\nIt is 4.'}, CHAT[2]]
    ids = render(messages, TEMPLATES['thoughts'], bpe)
    assert ids == expected(theirs['thoughts'], messages, True) and 'hard' not in bpe.decode(ids)
    # in the template that keeps them, they are the special tokens they were
    assert render(messages, TEMPLATES['chatml'], bpe).count(bpe.special_tokens['</think>']) == 1


contents = st.lists(st.sampled_from([*SPECIAL, '<|', 'im_end', '|>', ' ', '\n', 'a', 'is', '🙂', '\U000f0000',
                                     '\U000f0003']), max_size=8).map(''.join)


@settings(database=None, derandomize=True, max_examples=60)
@given(st.sampled_from(list(TEMPLATES)), contents, contents.filter(lambda text: 'think>' not in text), contents)
def test_nobody_can_speak_as_another(bpe, theirs, name, first, answer, second):
    """The text is what the template makes of the contents, but its special tokens are the template's own."""
    messages = [{'role': 'user', 'content': first}, {'role': 'assistant', 'content': answer},
                {'role': 'user', 'content': second}]
    ids = render(messages, TEMPLATES[name], bpe)
    assert bpe.decode(ids) == expected(theirs[name], messages, False)
    special = set(bpe.special_tokens.values())
    plain = render([{**message, 'content': 'x', 'name': '</s>'} for message in messages], TEMPLATES[name], bpe)
    assert [i for i in ids if i in special] == [i for i in plain if i in special]


def test_transcript():
    messages = [{'role': 'system', 'content': 'Be short.\n'}, {'role': 'user', 'content': ' Hi '},
                {'role': 'assistant', 'content': 'Hello.'}, {'role': 'user', 'content': 'Bye<|endoftext|>'}]
    text = 'Be short.\n\nUser: Hi\nAssistant: Hello.\nUser: Bye<|endoftext|>\nAssistant:'
    assert render(messages, None, ByteTokenizer()) == list(text.encode())


@pytest.mark.parametrize('name', TEMPLATES)
def test_endings(bpe, name):
    ids, texts = find_endings(TEMPLATES[name], bpe)
    assert bpe.special_tokens[ENDS[name] if name != 'brackets' else '<|im_end|>'] in ids and texts == []
    assert bpe.special_tokens['<|im_start|>'] not in ids


def test_endings_without_special_tokens(bpe):
    assert find_endings(None, ByteTokenizer()) == (set(), ['\nUser:'])
    assert find_endings(None, bpe)[0] >= {bpe.eot}
    words = "{% for m in messages %}{{ '### ' + m.role + ':\\n' + m.content + '\\n\\n' }}{% endfor %}"
    assert find_endings(words, ByteTokenizer()) == (set(), ['\n\n### user:'])
    unusual = "{% for m in messages %}{{ m.content + ' [/INST]' }}{% endfor %}"
    assert bpe.special_tokens['[/INST]'] in find_endings(unusual, bpe)[0]


@pytest.mark.parametrize('messages, said', [
    ([], 'a list of at least one'), ('Hi', 'a list of at least one'), (['Hi'], '"Hi" is no message'),
    ([{'role': 'user'}], 'no message'), ([{'role': 'User', 'content': 'a'}], 'one of system, user, assistant, tool'),
    ([{'role': 'user', 'content': ['a']}], 'and a text'), (CHAT[:2], "the last message is the assistant's own")])
def test_no_conversations(bpe, messages, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        render(messages, TEMPLATES['chatml'], bpe)


@pytest.mark.parametrize('template, said', [('{% if %}', 'Expected an expression'), ('{{ 1 + "a" }}', 'unsupported'),
                                            ("{{ ''.__class__.__mro__ }}", 'unsafe')])
def test_templates_that_fail(bpe, template, said):
    with pytest.raises(ValueError, match=f'chat template can not render this conversation.*{said}'):
        render(CHAT, template, bpe)


# at the terminal ------------------------------------------------------------------------------------------------------

def talk(monkeypatch, capsys, typed, answer, most=1000, **changes):
    """-> what is printed when this is typed, without the prompts."""
    monkeypatch.setattr(sys, 'stdin', io.StringIO(typed))
    converse(answer, None, changes.pop('tokenizer', ByteTokenizer()), most, **changes)
    return capsys.readouterr().out.replace('> ', '').replace('. ', '')


def echo(heard):
    """Answers that say how many messages there were, and keep in `heard` what was asked."""
    def answer(ids, number):
        heard.append((bytes(ids).decode(), number))
        yield ''
        yield ' I'
        yield ' I hear'
    return answer


def test_history_and_commands(monkeypatch, capsys):
    heard = []
    out = talk(monkeypatch, capsys, 'one\n\ntwo\n/retry\n/reset\n/retry\nthree\n/help\n/unknown\n', echo(heard))
    assert [text for text, _ in heard] == [
        'User: one\nAssistant:', 'User: one\nAssistant: I hear\nUser: two\nAssistant:',
        'User: one\nAssistant: I hear\nUser: two\nAssistant:', 'User: three\nAssistant:']
    assert [number for _, number in heard] == [0, 1, 2, 3]  # which decides over what is drawn: /retry is another answer
    assert out.count('I hear\n') == 4 and '(forgotten)' in out and '(there is no answer yet)' in out
    assert out.count('/reset  forget the conversation') == 2 and 'there is no /unknown\n' in out
    assert max(map(len, out.splitlines())) <= 80


def test_system_and_lines(monkeypatch, capsys):
    heard = []
    talk(monkeypatch, capsys, 'one\\\ntwo\n/reset\n/etc/passwd?', echo(heard), system='Be short.')
    assert [text for text, _ in heard] == ['Be short.\n\nUser: one\ntwo\nAssistant:',
                                           'Be short.\n\nUser: /etc/passwd?\nAssistant:']


def test_ctrl_c_stops_the_answer_alone(monkeypatch, capsys):
    heard = []

    def answer(ids, number):
        heard.append(bytes(ids).decode())
        for n in range(1, 6):
            if number == 0 and n == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield 'abcde'[:n]

    before = signal.getsignal(signal.SIGINT)
    out = talk(monkeypatch, capsys, 'one\ntwo\n', answer)
    assert 'abc\nabcde\n' in out
    assert heard[1] == 'User: one\nAssistant: abc\nUser: two\nAssistant:'
    assert signal.getsignal(signal.SIGINT) is before


def test_an_answer_of_nothing_is_no_turn(monkeypatch, capsys):
    heard = []

    def answer(ids, number):
        heard.append(bytes(ids).decode())
        yield '' if number == 0 else 'yes'

    talk(monkeypatch, capsys, 'one\ntwo\n', answer)
    assert heard == ['User: one\nAssistant:', 'User: two\nAssistant:']


def test_the_oldest_turns_are_forgotten(monkeypatch, capsys):
    heard = []
    typed = 'a\nb\nc\nd\n' + 'too much ' * 20 + '\ne\n'
    out = talk(monkeypatch, capsys, typed, echo(heard), most=70, system='Be short.')
    assert out.count('the oldest turns are forgotten') == 1
    assert [text for text, _ in heard][2:4] == [
        f'Be short.\n\nUser: {a}\nAssistant: I hear\nUser: {b}\nAssistant:' for a, b in ('bc', 'cd')]
    assert re.search(r'error: this takes 2\d\d tokens, and the context of the model has room for 70', out)
    assert len(heard) == 5 and heard[4][0].endswith('User: e\nAssistant:')


def test_what_the_tokenizer_can_not_say(monkeypatch, capsys):
    tokenizer = CharTokenizer(sorted(set('User: Assistant\nabc')))

    def answer(ids, number):
        yield 'a'

    out = talk(monkeypatch, capsys, 'é\nab\n', answer, tokenizer=tokenizer)
    assert "error: " in out and "'é' (U+00E9)" in out and out.rstrip().endswith('a')
