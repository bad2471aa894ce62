"""preferences.py: reading, splitting and rendering pairs. Run: pytest tests/test_preferences.py"""

import json

import pytest
from chat_models import ASSISTANT, END, PAIR, START, TOKENIZER, USER, write_pairs

from posttrain.preferences import ending_of, read_pairs, render_answer, render_pair, to_pair
from tokenizer import chat


def read(path, block_size=32, val_fraction=0.5, template=chat.TEMPLATE):
    return read_pairs(path, template, TOKENIZER, block_size, val_fraction)


def test_a_pair_by_hand():
    (ids, mask), (other, _) = render_pair(PAIR, chat.TEMPLATE, TOKENIZER)
    assert ids == [START, USER, *b'2+2?', END, ASSISTANT, *b'4', END]
    assert mask == [0] * 8 + [1, 1]  # also the token that ends the answer
    assert other == ids[:8] + [*b'55', END]


def test_earlier_answers_do_not_count():
    messages = [{'role': role, 'content': text} for role, text in (('user', 'a'), ('assistant', 'b'), ('user', 'c'))]
    ids, mask = render_answer(messages, 'd', chat.TEMPLATE, TOKENIZER)
    assert [i for i, counts in zip(ids, mask, strict=True) if counts] == [*b'd', END]


def test_nothing_follows_the_end_of_an_answer():
    """Qwen's templates, for example, write a line break after it."""
    template = ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|im_end|>\n' }}{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    ids, mask = render_answer(PAIR['messages'], '4', template, TOKENIZER)
    assert ids[-2:] == [*b'4', END] and mask[-3:] == [0, 1, 1]


def test_where_an_answer_is_judged():
    """At the special token that ends it, also where a template has {% generation %} around more, or around less."""
    around = ("{% for m in messages %}<|user|>{% generation %}{{ m.content + END }}{% endgeneration %}{% endfor %}"
              "{% if add_generation_prompt %}<|user|>{% endif %}")
    more, less = around.replace('END', "'<|im_end|>\\n'"), around.replace('END', "''")
    ids, _ = render_answer(PAIR['messages'], '4', more, TOKENIZER)
    assert ids[-2:] == [*b'4', END] and ending_of(more, TOKENIZER) == END
    with pytest.raises(ValueError, match='ends an answer without a special token that carries loss'):
        ending_of(less, TOKENIZER)


def test_an_answer_of_which_nothing_counts():
    """A template that has earlier answers alone in {% generation %}: what it masks is not this one."""
    template = chat.TEMPLATE.replace("message.role == 'assistant'", "message.role == 'assistant' and not loop.last")
    messages = [{'role': role, 'content': text} for role, text in (('user', 'a'), ('assistant', 'b'), ('user', 'c'))]
    for asked in (messages, messages[:1]):
        with pytest.raises(ValueError, match='the chat template masks out every token of the answer "d"'):
            render_answer(asked, 'd', template, TOKENIZER)


def test_splits(tmp_path, capsys):
    """All pairs of a conversation are on one side; half of the conversations are held out; long ones are counted."""
    values = [{**PAIR, 'messages': [{'role': 'user', 'content': str(i % 100)}], 'chosen': f'n{i}'} for i in range(400)]
    too_long = [{**PAIR, 'chosen': 'x' * 40}, {**PAIR, 'rejected': 'x' * 40}]
    pairs = read(write_pairs(tmp_path / 'pairs.jsonl', values + too_long))
    assert '2 are longer than 32 tokens' in capsys.readouterr().out
    assert len(pairs['train']) + len(pairs['val']) == 400 and len(pairs['val']) % 4 == 0
    assert 120 < len(pairs['val']) < 280
    prompts = [{tuple(ids[: ids.index(ASSISTANT)]) for (ids, _), _ in pairs[split]} for split in pairs]
    assert len(prompts[0] | prompts[1]) == 100 and not prompts[0] & prompts[1]
    groups = [{**value, 'group': str(i % 5)} for i, value in enumerate(values)]
    pairs = read(write_pairs(tmp_path / 'pairs.jsonl', groups))
    assert len(pairs['train']) % 80 == len(pairs['val']) % 80 == 0 < len(pairs['val'])  # five groups of 80
    none = [{**value, 'group': None} for value in values]  # as a table writes what a row does not have
    assert read(write_pairs(tmp_path / 'pairs.jsonl', none)) == read(write_pairs(tmp_path / 'pairs.jsonl', values))


@pytest.mark.parametrize('change, said', [
    ({'rejected': '4'}, 'chosen equals rejected, "4"'), ({'chosen': ' '}, 'chosen is empty'),
    ({'rejected': ''}, 'rejected is empty'), ({'chosen': 4}, 'chosen is 4; expected {"messages"'),
    ({'messages': None}, 'there is no conversation before chosen and rejected'), ({'messages': []}, 'messages are a list of at least one'),
    ({'messages': [{'role': 'bot', 'content': '2'}]}, 'a role, one of system, user, assistant, tool'),
    ({'messages': [*PAIR['messages'], {'role': 'assistant', 'content': '4'}]}, "the assistant's own"),
    ({'messages': 2 * PAIR['messages']}, "both of role 'user'"),
    ({'rejected': '<|python|>2+2<|python_end|><|output|>4'}, 'has an <|output|> without an'),
])
def test_bad_pairs_are_named_by_line(tmp_path, change, said):
    path = write_pairs(tmp_path / 'pairs.jsonl', [PAIR, {**PAIR, **change}])
    with pytest.raises(ValueError) as error:
        read(path)
    assert f'{path}, line 2: ' in str(error.value) and said in str(error.value)


def test_equal_in_the_template(tmp_path):
    """A template that strips contents makes these equal."""
    template = chat.TEMPLATE.replace('message.content', 'message.content.strip()')
    with pytest.raises(ValueError, match='line 1: chosen equals rejected'):
        read(write_pairs(tmp_path / 'pairs.jsonl', [{**PAIR, 'rejected': ' 4'}]), template=template)


def test_nothing_left(tmp_path):
    path = write_pairs(tmp_path / 'pairs.jsonl', [PAIR, {**PAIR, 'chosen': '5'}])
    with pytest.raises(ValueError, match='of 2 pairs 2 are longer than the context of 8 tokens'):
        read(path, block_size=8)
    with pytest.raises(ValueError, match='none of the others is in val'):
        read(path, val_fraction=0.001)


SYSTEM, USER_TURN = {'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'q'}


def answer(text):
    return {'role': 'assistant', 'content': text}


@pytest.mark.parametrize('record', [
    {'prompt': 'q', 'chosen': 'x', 'rejected': 'y'}, {'prompt': [USER_TURN], 'chosen': 'x', 'rejected': 'y'},
    {'prompt': [USER_TURN], 'chosen': [answer('x')], 'rejected': [answer('y')]},
    {'chosen': [USER_TURN, answer('x')], 'rejected': [USER_TURN, answer('y')]},
    {'prompt': 'q', 'messages': [USER_TURN, answer('x')], 'chosen': [USER_TURN, answer('x')],
     'rejected': [USER_TURN, answer('y')]},
    {'prompt': 'q', 'chosen': answer('x'), 'rejected': answer('y')},
    {'prompt': 'q', 'chosen': [{'role': 'assistant', 'content': [{'type': 'text', 'text': 'x'}]}],
     'rejected': 'y'},
    {'conversations': [{'from': 'human', 'value': 'q'}], 'chosen': {'from': 'gpt', 'value': 'x'},
     'rejected': {'from': 'gpt', 'value': 'y'}}])
def test_shapes_of_others(record):
    pair = to_pair(record)
    assert (pair['messages'], pair['chosen'], pair['rejected']) == ([USER_TURN], 'x', 'y')


def test_longer_conversations_of_others():
    before = [USER_TURN, answer('1'), {'role': 'user', 'content': 'r'}]
    pair = to_pair({'prompt': 'q', 'chosen': [*before, answer('x')], 'rejected': [*before, answer('y')]})
    assert pair['messages'] == before
    answers = {'chosen': [answer('x')], 'rejected': [answer('y')]}
    for record in ({'prompt': [SYSTEM, USER_TURN]}, {'messages': [SYSTEM, USER_TURN]},
                   {'prompt': 'q', 'system': SYSTEM['content']}):
        assert to_pair({**record, **answers})['messages'] == [SYSTEM, USER_TURN]


@pytest.mark.parametrize('record, said', [
    ({'chosen': 'x', 'rejected': 'y'}, 'no conversation before chosen and rejected, only chosen, rejected'),
    ({'prompt': 'q', 'chosen': 'x'}, 'rejected is null; expected {"messages"'),
    ({'prompt': 'q', 'chosen': [], 'rejected': 'y'}, 'chosen is []'),
    ({'prompt': 'q', 'chosen': b'x', 'rejected': 'y'}, 'chosen is "b\'x\'"'),
    ({'chosen': [USER_TURN], 'rejected': [USER_TURN]}, 'is not of the assistant'),
    ({'chosen': [USER_TURN, answer('x')], 'rejected': [SYSTEM, USER_TURN, answer('y')]}, 'differ before their last'),
    ({'prompt': 'q', 'chosen': ['x'], 'rejected': ['y']}, '"x" is not a turn'),
    ({'prompt': 'q', 'messages': [USER_TURN], 'chosen': 'x', 'rejected': 'y'}, 'a pair has messages and prompt'),
    ({'prompt': [SYSTEM, USER_TURN], 'chosen': [USER_TURN, answer('x')], 'rejected': [USER_TURN, answer('y')]},
     'that are not those of "prompt"'),
    ({'prompt': 'q', 'chosen': {**answer('x'), 'weight': 0}, 'rejected': 'y'}, 'has a weight')])
def test_shapes_of_nobody(record, said):
    with pytest.raises(ValueError) as error:
        to_pair(record)
    assert said in str(error.value)


def test_pairs_from_other_files(tmp_path):
    """An array of JSON gives the pairs of the lines."""
    values = [{**PAIR, 'messages': [{'role': 'user', 'content': str(i)}]} for i in range(20)]
    expected = read(write_pairs(tmp_path / 'pairs.jsonl', values))
    (tmp_path / 'pairs.json').write_text(json.dumps(values, indent=1))
    assert read(tmp_path / 'pairs.json') == expected
