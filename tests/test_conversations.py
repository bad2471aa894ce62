"""data/conversations.py and data/chat: shapes, packing, masks, training. Run: pytest
tests/test_conversations.py"""

import gzip
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, same_tensors
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from data import conversations, datasets, encode
from data import tokens as dataloader
from data.shuffle import train_items
from flatgpt import pretrained
from tokenizer import BPETokenizer, ByteTokenizer, chat

TOKENIZER = BPETokenizer([], None, {token: 256 + i for i,
                                    token in enumerate(chat.SPECIAL_TOKENS)})  # one a byte


def talk(question, *answers):
    """user, assistant, user, assistant, ..."""
    messages = []
    for answer in answers:
        messages += [{'role': 'user', 'content': question},
                     {'role': 'assistant', 'content': answer}]
    return messages


# shapes ------------------------------------------------------------------------------------------


def test_shapes():
    expected = talk('Hello', 'Hi!')
    named = [{**message, 'name': 'Ann', 'weight': 1} for message in expected]
    assert conversations.messages_of({'messages': named, 'id': 7}) == expected
    turns = [{'from': 'human', 'value': 'Hello'}, {'from': 'gpt', 'value': 'Hi!'}]
    assert conversations.messages_of({'conversations': turns}) == expected
    system = [{'role': 'system', 'content': 'Be kind.'}]
    assert conversations.messages_of({'conversations': turns,
                                      'system': 'Be kind.'}) == system + expected
    assert conversations.messages_of({'conversations': turns, 'system': ''}) == expected
    expected[1]['weight'] = turns[1]['weight'] = 0
    assert conversations.messages_of({'messages': expected}) == expected
    assert conversations.messages_of({'conversations': turns}) == expected
    swapped = [dict(reversed(message.items())) for message in expected]
    # and so in the same split
    assert str(conversations.messages_of({'messages': swapped})) == str(expected)


@pytest.mark.parametrize('value, said', [
    ({'text': 'a'}, 'expected "messages" or "conversations", a list, but the object has'),
    ({}, 'the object has no keys'),
    ({'conversations': [{'from': 'bing', 'value': 'a'}]}, 'expected from, one of human, user, gpt'),
    ({'messages': [{'role': 'assistant', 'content': 'I look.', 'tool_calls': [{'id': 'a'}]}]},
     'has tool_calls, [{"id": "a"}], beside its content; write that into the content'),
    ({'conversations': ['a']}, '"a" is not a turn'),
    ({'conversations': [{'from': ['gpt'], 'value': 'a'}]}, 'is not a turn')])
def test_no_shape(value, said):
    with pytest.raises(ValueError) as error:
        conversations.messages_of(value)
    assert said in str(error.value)


# packing -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 90))
def test_packing(lengths, row):
    """Each once, no row too full, and no two rows that would fit into one."""
    rows = conversations.pack(lengths, row)
    assert sorted(i for members in rows for i in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= row for members in rows)
    filled = sorted(sum(lengths[i] for i in members) for members in rows)
    assert len(rows) < 2 or filled[0] + filled[1] > row


def test_packing_by_hand():
    """6 goes alone at first, 4 fits it exactly; 5 and 3 leave 2, where the second 2 no longer finds
    room."""
    assert [sorted([6, 5, 4, 3, 2, 2][i] for i in row)
            for row in conversations.pack([6, 5, 4, 3, 2, 2], 10)] == [
        [4, 6], [2, 3, 5], [2]]


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(20, 120, 5000).tolist()
    rows = conversations.pack(lengths, 257)
    assert sum(lengths) / (257 * len(rows)) > 0.99


def test_filling_by_hand():
    ids, masks = conversations.fill([([1, 2, 3], [0, 1, 1]), ([4, 5], [1, 1]),
                                     ([6, 7, 8, 9], [0, 0, 1, 1])], 6, 99)
    assert ids.tolist() == [[4, 5, 6, 7, 8, 9], [1, 2, 3, 99, 99, 99]]
    assert masks.tolist() == [[0, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0]]  # nothing precedes 4


def packing(row):
    return conversations.Packing(TOKENIZER, chat.TEMPLATE, row)


def test_cut_to_a_row():
    ids, mask, was_cut = conversations.render(talk('a', 'bcd', 'e'), packing(8))
    assert TOKENIZER.decode(ids) == '<|endoftext|><|user|>a<|im_end|><|assistant|>bcd' and was_cut
    assert mask == [0, 0, 0, 0, 0, 1, 1, 1]
    assert not conversations.render(talk('a', 'bcd'), packing(9))[2]
    with pytest.raises(ValueError,
                       match='cut to 5 of its 9 tokens, it ends before.*--block_size=8'):
        conversations.render(talk('a', 'bcd'), packing(5))


# data/chat ---------------------------------------------------------------------------------------


def sums(n):
    return [{'messages': talk(f'{i}+{i + 3}?', f'{2 * i + 3}')} for i in range(n)]


@pytest.fixture
def data(folder):
    """A folder with data/sums, made by data/chat/prepare.py, and its JSON lines."""
    TOKENIZER.save(folder.path / 'chat.json')
    (folder.path / 'sums.jsonl').write_text(''.join(json.dumps(value) + '\n' for value in sums(60)))
    return folder


def prepare(folder, monkeypatch, capsys, **settings):
    """Run the script in this process with data/ in `folder`; -> (what it printed, exit message or
    None)."""
    script = load_script(ROOT / 'data/chat/prepare.py')
    monkeypatch.chdir(folder.path)
    settings = {'input': 'sums.jsonl', 'tokenizer': 'chat.json', 'out_dir': 'data/sums', **settings}
    argv = [f'--{key}={value}' if value is not True else f'--{key}' for key,
            value in settings.items()]
    monkeypatch.setattr('sys.argv', ['prepare.py', *argv])
    error = None
    try:
        encode.run(script.main)
    except SystemExit as exit:
        error = str(exit)
    return capsys.readouterr(), error


def test_prepare_and_read_back(data, monkeypatch, capsys):
    printed, error = prepare(data, monkeypatch, capsys, block_size=64)
    assert error is None and 'rows of 65 tokens' in printed.out
    assert '--init_from=FOLDER --dataset=data/sums\n' in printed.out
    data_dir = str(data.path / 'data' / 'sums')
    meta = datasets.load_meta(data_dir)
    assert meta['row'] == 65 and meta['chat_template'] == chat.TEMPLATE
    found = []
    for split in ('train', 'val'):
        tokens = dataloader.open_tokens(data_dir, split, meta, 64)
        starts = dataloader.whole_windows(len(tokens), 64, 65)
        x, y = dataloader.gather(tokens, starts, 64, TOKENIZER.vocab_size)
        assert (y >= 0).sum() == dataloader.count_targets(tokens, starts, 64) == tokens.mask.sum()
        for row_x, row_y in zip(x, y, strict=True):  # what is learnt, by the text of the row
            text = TOKENIZER.decode(row_x.tolist())
            answers = [part.split('<|assistant|>')[1] for part in text.split('<|endoftext|>')[1:]
                       if '<|user|>' in part]
            learnt = TOKENIZER.decode(row_y[row_y >= 0].tolist())
            expected = ''.join(answers)
            assert learnt.startswith(expected) and len(learnt) - len(expected) <= len('<|im_end|>')
            found += [part.split('<|im_end|>')[0].removeprefix('<|user|>')
                      for part in text.split('<|endoftext|>')
                      if '<|user|>' in part]
    assert sorted(found) == sorted(f'{i}+{i + 3}?' for i in range(60))


@pytest.mark.parametrize('line, said', [
    ('{"messages": [{"role": "robot", "content": "a"}]}',
     'line 3: {"role": "robot", "content": "a"} is no message'),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
     "line 3: messages 1 and 2 are both of role 'user'"),
    (json.dumps({'messages': talk('a', '')}),
     'line 3: message 2, an answer of the assistant, is empty'),
    (json.dumps({'messages': talk('a' * 200, 'b')}), 'line 3: cut to 65 of its 206 tokens'),
    ('{', 'line 3: not JSON')])
def test_bad_lines(data, monkeypatch, capsys, line, said):
    path = data.path / 'sums.jsonl'
    path.write_text(path.read_text().replace('\n', f'\n\n{line}\n', 1))
    printed, error = prepare(data, monkeypatch, capsys, block_size=64)
    assert said in error and not (data.path / 'data' / 'sums' / 'train.bin').exists()
    assert '--skip_bad' in error or line == '{'
    printed, error = prepare(data, monkeypatch, capsys, block_size=64, skip_bad=True)
    assert error is None and 'skipped 1: ' in printed.err


def test_no_conversation_at_all(data, monkeypatch, capsys):
    (data.path / 'sums.jsonl').write_text('')
    _, error = prepare(data, monkeypatch, capsys)
    assert 'sums.jsonl has no conversation' in error
    _, error = prepare(data, monkeypatch, capsys, template='none.jinja')
    assert 'No such file' in error and 'none.jinja' in error


def test_a_weight_of_0_carries_no_loss(data, monkeypatch, capsys):
    """OpenAI's: such an answer is context alone. Of a conversation of only such ones nothing could
    be learnt."""
    def learnt(messages, template):
        ids, mask = chat.render_conversation(messages, template, TOKENIZER)
        plain = [{**message, 'weight': 1} for message in messages]
        assert ids == chat.render_conversation(plain, template, TOKENIZER)[0]
        return TOKENIZER.decode([i for i, counts in zip(ids, mask, strict=True) if counts])

    messages = talk('a', 'first', 'second', 'third')
    messages[3]['weight'] = 0
    without = chat.TEMPLATE.replace('{%- generation %}',
                                    '{%- if true %}').replace('{% endgeneration %}', '{% endif %}')
    for template in (chat.TEMPLATE, without):
        assert learnt(messages, template) == 'first<|im_end|>third<|im_end|>'
    messages[1]['weight'] = messages[5]['weight'] = messages[0]['weight'] = 0
    assert learnt(messages, chat.TEMPLATE) == ''
    (data.path / 'sums.jsonl').write_text(json.dumps({'messages': messages}) + '\n')
    _, error = prepare(data, monkeypatch, capsys)
    assert 'line 1: no token carries loss; expected an answer whose "weight"' in error
    messages[1]['weight'] = 0.5
    with pytest.raises(ValueError,
                       match='message 2 has a weight of 0.5; expected 0, not to be learnt, or 1'):
        chat.render_conversation(messages, chat.TEMPLATE, TOKENIZER)


def test_tokenizer_without_the_special_tokens(data, monkeypatch, capsys):
    _, error = prepare(data, monkeypatch, capsys, tokenizer='byte')
    assert 'has no <|endoftext|>, <|system|>' in error and 'python -m tokenizer train' in error
    (data.path / 'plain.jinja').write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")
    printed, error = prepare(data, monkeypatch, capsys, tokenizer='byte', block_size=64,
                             template=data.path / 'plain.jinja')
    assert error is None
    # </s> ends an answer of tokenizers that have it; of this one it is a word of the assistant's
    messages, tokens = talk('a', 'Write <s>old</s> and new.'), ByteTokenizer()
    ids, mask = chat.render_conversation(messages, (data.path / 'plain.jinja').read_text(), tokens)
    assert tokens.decode([i for i, counts in zip(ids, mask, strict=True)
                          if counts]) == messages[1]['content'] + '\n'


# training ----------------------------------------------------------------------------------------

SFT = {'dataset': 'sums', 'block_size': None, 'max_iters': 4, 'preset': 'modern',
       'optimizer': 'adamw',
       'eval_interval': 4}


@pytest.fixture
def trained(data, monkeypatch, capsys):
    """An out_dir 'base' of a run on running text with the same tokenizer, and data/sums packed for
    its context."""
    prepare(data, monkeypatch, capsys, block_size=32)
    (data.path / 'data' / 'plain').mkdir()
    ids = np.array(TOKENIZER.encode('3+4=7. ' * 400), dtype='uint16')
    for split in ('train', 'val'):
        ids.tofile(data.path / 'data' / 'plain' / f'{split}.bin')
    (data.path / 'data' / 'plain' / 'meta.json').write_text(json.dumps({
        'dtype': 'uint16', 'vocab_size': TOKENIZER.vocab_size,
        'tokens': {'train': len(ids), 'val': len(ids)},
        'tokenizer': TOKENIZER.to_dict()}))
    data.train(dataset='plain', out_dir='base', block_size=48, max_iters=4, preset='modern',
               optimizer='adamw').ok()
    return data


def test_loss_is_that_of_the_answers_alone(trained):
    """train.py's first loss is the mean over what the assistant says, each token predicted from
    those before it."""
    trained.train(init_from='base', out_dir='sft', **SFT, batch_size=5,
                  gradient_accumulation_steps=1).ok()
    data_dir = str(trained.path / 'data' / 'sums')
    tokens = dataloader.open_tokens(data_dir, 'train', datasets.load_meta(data_dir), 32)
    starts = train_items(0, 5, len(tokens) // 33, 1337) * 33
    assert (starts % 33 == 0).all()
    model, _, _, _ = pretrained.open_model('resume', str(trained.path / 'base'))
    total, count = 0.0, 0
    for start in starts:
        ids, mask = (torch.from_numpy(part[start : start + 33].astype(np.int64))
                     for part in (tokens.ids, tokens.mask))
        logits = model(ids[None, :-1], ids[None, 1:])[0][0]
        for i in range(1, 33):
            if mask[i]:
                total, count = total + F.cross_entropy(logits[i - 1], ids[i]).item(), count + 1
    assert trained.log('sft')[1]['loss'] == pytest.approx(total / count, abs=1e-5)
    # the rows are shorter, the context stays
    assert trained.checkpoint('sft')['model_args']['block_size'] == 48
    assert trained.checkpoint('sft')['chat_template'] == chat.TEMPLATE
    shown = trained.start('posttrain.chat', out_dir='sft', device='cpu', max_new_tokens=4, typed='').ok()
    assert 'chat model' in shown.out
    loss = json.loads(trained.start('eval.py', out_dir='sft',
                                    device='cpu').ok().out.splitlines()[-1])['loss']
    assert loss == pytest.approx(trained.log('sft')[-1]['val_loss'], abs=1e-4)


def test_one_batch_is_many_small_ones_is_two_processes(trained):
    """However unevenly the answers fall on them."""
    one = {**SFT, 'init_from': 'base', 'grad_clip': 0.0}
    trained.train(**one, out_dir='one', batch_size=8, gradient_accumulation_steps=1).ok()
    trained.train(**one, out_dir='many', batch_size=1, gradient_accumulation_steps=8).ok()
    trained.train_two(**one, out_dir='two', batch_size=2, gradient_accumulation_steps=4)
    losses = {name: [entry['loss'] for entry in trained.log(name) if 'loss' in entry]
              for name in ('one', 'many', 'two')}
    assert losses['many'] == pytest.approx(losses['one'], abs=2e-5)
    assert losses['two'] == pytest.approx(losses['one'], abs=2e-5)
    for name in ('many', 'two'):
        for key, tensor in trained.checkpoint('one')['model'].items():
            torch.testing.assert_close(trained.checkpoint(name)['model'][key], tensor, rtol=0,
                                       atol=2e-4)


def test_batches_without_an_answer_are_skipped(trained):
    path = trained.path / 'data' / 'sums' / 'train_mask.bin'
    path.write_bytes(bytes(path.stat().st_size))
    trained.train(init_from='base', out_dir='sft', **{**SFT, 'weight_decay': 0.5}).ok()
    same_tensors(trained.checkpoint('sft')['model'], trained.checkpoint('base', 'best.pt')['model'])
    path = path.with_name('val_mask.bin')
    path.write_bytes(bytes(path.stat().st_size))
    trained.train(init_from='base', out_dir='none', **SFT).refused('no token of val carries loss')


def test_what_does_not_fit(trained):
    short = trained.train(init_from='base', **{**SFT, 'block_size': 16})
    short.refused('packed for 32 tokens', '--block_size=32')
    trained.train(init_from='base', dataset='tiny',
                  block_size=None).refused('prepared for a vocabulary')
    trained.start('eval.py', out_dir='base', dataset='sums', stride=4,
                  device='cpu').refused('are evaluated whole')
    (trained.path / 'data' / 'sums' / 'val_mask.bin').write_bytes(b'1')
    trained.train(init_from='base', **SFT).refused(
        'val_mask.bin has 1 bytes', 'data/chat/prepare.py --input=FILE')


# what a conversation may hold --------------------------------------------------------------------


def turns(**keys):
    return {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b', **keys}]}


@pytest.mark.parametrize('keys, weight', [
    ({}, None), ({'weight': 1}, None), ({'loss': True, 'train': True, 'weight': None}, None), ({'weight': 1.0}, None),
    ({'weight': 0}, 0), ({'weight': 0.0}, 0), ({'loss': False}, 0), ({'train': False}, 0), ({'training': 0}, 0),
    ({'weight': 1, 'loss': False}, 0), ({'loss': 'false'}, 'false'), ({'weight': 0.5}, 0.5)])
def test_weights(keys, weight):
    """0 and false are a weight of 0; another value stays, and is refused when the loss mask is made."""
    assert conversations.messages_of(turns(**keys))[1].get('weight') == weight
    shared = {'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b', **keys}]}
    assert conversations.messages_of(shared) == conversations.messages_of(turns(**keys))
    if weight:
        with pytest.raises(ValueError, match='message 2 has a weight of'):
            chat.check_conversation(conversations.messages_of(turns(**keys)))


@pytest.mark.parametrize('content, text', [
    ('a', 'a'), (None, None), ([], ''), ([{'type': 'text', 'text': 'a'}], 'a'), (['a', {'text': 'b', 'type': None}], 'ab')])
def test_contents(content, text):
    value = {'messages': [{'role': 'user', 'content': content}]}
    assert conversations.messages_of(value) == [{'role': 'user', 'content': text}]


@pytest.mark.parametrize('value, said', [
    (turns(reasoning_content='hm'), 'a message has reasoning_content, "hm", beside its content'),
    (turns(tool_calls=[{'id': b'x'}]), 'a message has tool_calls'), (turns(refusal='no'), 'has refusal'),
    ({'conversations': [{'from': 'gpt', 'value': 'a', 'tool_calls': [1]}]}, 'has tool_calls, [1], beside'),
    ({'conversations': [{'from': 'function_call', 'value': '{}'}]}, 'is not a turn'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': 'x'}}]}]},
     'a part of a content is no text: {"type": "image_url"'),
    ({'messages': [{'role': 'user', 'content': 5}]}, 'a content is no text: 5'),
    *(({'messages': [{'role': 'user', 'content': [part]}]}, 'a part of a content is no text') for part in (
        {'type': 'image_url', 'text': '', 'image_url': {'url': 'x'}}, {'type': 'reasoning', 'text': 'hm'},
        {'type': 'text', 'text': 'x', 'weight': 0})),
    ({**turns(), 'conversations': [{'from': 'human', 'value': 'a'}]}, 'has messages and conversations; expected one'),
    (turns(value='b'), 'a message has content and value; expected one'),
    (turns(**{'from': 'human'}), 'a message has role and from; expected one'),
    ({'messages': [{'role': 'user', 'content': b'x'}]}, 'a content is no text'),
    ({'messages': None, 'prompt': 'a'}, 'no conversation; expected "messages" or "conversations"')])
def test_contents_that_are_refused(value, said):
    with pytest.raises(ValueError) as error:
        conversations.messages_of(value)
    assert said in str(error.value)


def test_roles_and_system():
    value = {'messages': [{'role': 'developer', 'content': 's'}, {'role': 'function', 'content': 't'}]}
    assert [message['role'] for message in conversations.messages_of(value)] == ['system', 'tool']
    with_system = {'system': 's', **turns()}
    assert conversations.messages_of(with_system)[0] == {'role': 'system', 'content': 's'}
    nulls = {'messages': None, 'conversations': [{'role': None, 'from': 'human', 'value': 'a', 'tool_calls': None}]}
    assert conversations.messages_of(nulls) == [{'role': 'user', 'content': 'a'}]


def test_other_files_and_unread_keys(data, monkeypatch, capsys):
    """An array, gzip and Parquet give the bytes of the lines. What is not read is named."""
    rows = [json.loads(line) for line in (data.path / 'sums.jsonl').read_text().splitlines()]
    prepare(data, monkeypatch, capsys, out_dir='data/lines')
    (data.path / 'array.json').write_text(json.dumps([{**row, 'tools': ['x'], 'score': float('nan')} for row in rows]))
    (data.path / 'lines.gz').write_bytes(gzip.compress((data.path / 'sums.jsonl').read_bytes()))
    names = ['array.json', 'lines.gz']
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(rows), data.path / 'rows.parquet')
        names.append('rows.parquet')
    except ImportError:
        pass
    for name in names:
        printed, error = prepare(data, monkeypatch, capsys, input=name, out_dir=f'data/{name}')
        assert error is None
        for file in ('train.bin', 'val.bin', 'train_mask.bin', 'val_mask.bin'):
            assert (data.path / 'data' / name / file).read_bytes() == (data.path / 'data/lines' / file).read_bytes()
        assert (f'not read: tools ({len(rows)}), score ({len(rows)})' in printed.err or
                f'not read: score ({len(rows)}), tools ({len(rows)})' in printed.err) == (name == 'array.json')
