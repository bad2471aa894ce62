"""posttrain/tasks/tiny_chat.py and data/tiny_chat: answers, splits, files, an assistant.

Run: pytest tests/test_tiny_chat.py
"""

import hashlib
import json
import re
import sys

import numpy as np
import pytest
from conftest import ROOT, load_script

import tokenizer
from data import conversations, datasets, tokens
from flatgpt import checkpoint
from posttrain.tasks import tiny_chat
from posttrain.tools import calculate
from tokenizer import chat

EXAMPLES = {split: tiny_chat.examples(split, 1400, seed=1) for split in ('train', 'val', 'test')}
ALL = [example for examples in EXAMPLES.values() for example in examples]


def question_of(example):
    return example['messages'][0]['content']


def of_kind(kind):
    return [example for example in ALL if example['kind'] == kind]


# answers -----------------------------------------------------------------------------------------


def solve(kind, question):
    """The answer as somebody else would find it, who has nothing but the question."""
    numbers = [int(text) for text in re.findall(r'\d+', question)]
    words = re.findall(r'[a-z]+', question)
    if kind in ('addition', 'subtraction'):
        assert len(numbers) == 2
        return str(sum(numbers) if kind == 'addition' else max(numbers) - min(numbers))
    if kind == 'counting':
        letter, = (word for word in words if len(word) == 1)
        return str(sum(char == letter for char in words[-1]))
    if kind in ('reversing', 'spelling'):
        text = re.search(r'(?:word|What is|Write|How does|How do you spell|Spell|letters of) '
                         r'(?!the word)([a-z]+)', question)[1]
        backwards = ''.join(text[-i] for i in range(1, len(text) + 1))
        return '-'.join(text) if kind == 'spelling' else backwards
    if kind == 'sorting':
        items = re.search(r'((\w+, )+\w+)', question)[0].split(', ')
        return ', '.join(sorted(items, key=lambda item: int(item) if item.isdigit() else item))
    *rows, asked = re.split(r'\n', question)
    rows = rows if len(rows) > 1 else rows[0].rstrip('.').split(', ')
    table = dict(re.findall(r'\w+', row) for row in rows)
    (value,) = (value for key, value in table.items() if re.search(rf'\b{key}\b', asked))
    return value


@pytest.mark.parametrize('kind', tiny_chat.KINDS)
def test_answers(kind):
    examples = of_kind(kind)
    assert len(examples) == 600
    for example in examples:
        assert solve(kind, question_of(example)) == example['answer'], question_of(example)
        assert tiny_chat.extract(example['solution']) == example['answer']
    ways = {re.sub(r'\w*\d\w*|\b[a-z]\b', '#', question_of(example)).split(' ')[0]
            for example in examples}
    assert len(ways) > 1  # put in several ways


def test_mistakes_are_wrong_and_there_are_some():
    for example in ALL:
        assert len(set(example['mistakes'])) == len(example['mistakes']) >= 2, example
        for wrong in example['mistakes']:
            assert wrong and not tiny_chat.evaluate(example, f'The answer is {wrong}.')
    for example in of_kind('addition'):  # every column alone is one of them, where that is wrong
        numbers = [f'{int(text):03}' for text in re.findall(r'\d+', question_of(example))]
        alone = ''.join(str((int(x) + int(y)) % 10) for x, y in zip(*numbers, strict=True))
        assert str(int(alone)) in [*example['mistakes'], example['answer']]


def test_steps_of_sums():
    """Each is true, and their last digits, from the units on, are the answer."""
    for example in of_kind('addition') + of_kind('subtraction'):
        digits = []
        steps = example['steps'].split(', ')
        for step in steps:
            calculation, result = step.split('=')
            assert calculate(calculation) == result and int(result) >= 0
            digits.append(result[-1])
        first = steps[-1].split('=')[1][:-1] if example['kind'] == 'addition' else ''
        assert int(first + ''.join(reversed(digits))) == int(example['answer'])
        assert calculate(example['call']) == example['answer']


def test_steps_of_words():
    for example in of_kind('counting'):
        letter = example['content'].split(' ')[2]
        marks = re.findall(rf'{letter}(\d)', example['steps'])
        assert marks == [str(i) for i in range(1, int(example['answer']) + 1)]
        assert re.sub(r'[ \d]', '', example['steps']) == example['content'].split(' ')[1]
    for example in of_kind('reversing'):
        forth, back = example['steps'].split(', ')
        assert forth.split(' ') == back.split(' ')[::-1]
        assert re.sub(r'[ \d]', '', back) == example['answer']
    for example in of_kind('sorting'):
        given, in_order = (keys.split(' ') for keys in example['steps'].split(', '))
        items = example['answer'].split(', ')
        assert in_order == sorted(given) == [f'{int(item):02}' if item.isdigit() else item[0]
                                             for item in items]
        words = re.findall(r'\w+', example['messages'][0]['content'])
        assert given == sorted(in_order, key=lambda key: words.index(items[in_order.index(key)]))


def test_steps_of_tables():
    """The row that is asked for, as it stands in the question."""
    for example in of_kind('table'):
        shown, _, question = example['messages'][0]['content'].rpartition('\n')
        row = example['steps'].strip('| ')
        key, value = re.split(r'[ |:]+', row)
        assert example['steps'] in shown and key in question and value == example['answer']


def test_one_mistake_and_what_it_leads_to():
    """Steps with a mistake end in the answer that follows from them: what a model does that goes
    wrong."""
    n_wrong = n = 0
    for kind in tiny_chat.KINDS:
        for example in of_kind(kind):
            if kind == 'spelling':
                assert example['mistaken'] is None
                continue
            steps, answer = example['mistaken']
            same, others = steps.split(', '), example['steps'].split(', ')
            if kind in ('addition', 'subtraction'):
                results = [int(step.split('=')[1]) for step in same]
                if kind == 'addition':  # of which a column but the last keeps a digit
                    results[:-1] = [result % 10 for result in results[:-1]]
                assert sum(result * 10**i for i, result in enumerate(results)) == answer
                slips = [calculate(left) != right for left,
                         right in (step.split('=') for step in same)]
                assert sum(slips) == 1 or answer == int(example['answer'])  # 1-1=0 can be no less
            elif kind == 'counting':
                assert len(re.findall(r'\d', steps)) == answer
                assert abs(answer - int(example['answer'])) == 1
            elif kind == 'reversing':
                assert same[0] == others[0] and re.sub(r'[ \d]', '', same[1]) == answer
            elif kind == 'sorting':
                keys = [f'{int(item):02}' if item.isdigit() else item[0]
                        for item in answer.split(', ')]
                assert same == [others[0], ' '.join(keys)] and answer in example['mistakes']
            else:
                assert answer in example['mistakes']
                assert answer in steps or steps == example['steps']
            n_wrong += not tiny_chat.evaluate(example, f'{steps}. {tiny_chat.FORM} {answer}.')
            n += 1
    assert n_wrong > 0.95 * n > 0


def test_counts_are_not_guessed():
    """No count is so frequent that saying it always would do."""
    counts = [example['answer'] for example in of_kind('counting')]
    assert {'0', '1', '2', '3'} == set(counts)
    assert max(map(counts.count, set(counts))) < 0.35 * len(counts)


@pytest.mark.parametrize('text, answer, share', [
    ('The answer is 12.', '12', 1.0), (' 5+7=12. The answer is 12.\n', '12', 1.0),
    ('The answer is 13.', '13', 0.1),
    ('The answer is 13. The answer is 12.', '12', 1.0),
    ('The answer is 12. The answer is 13.', '13', 0.1),
    ('12', None, 0.0), ('12.', None, 0.0), ('The answer is 12', None, 0.0),
    ('The answer is .', None, 0.0),
    ('The answer is 12. I think so', None, 0.0), ('The answer is 12 or 13.', '12 or 13', 0.1),
    ('', None, 0.0),
    ('The answer is 012.', '012', 0.1), ('the answer is 12.', None, 0.0)])
def test_reward(text, answer, share):
    example = {'answer': '12'}
    assert tiny_chat.extract(text) == answer and tiny_chat.reward(example, text) == share
    assert tiny_chat.evaluate(example, text) == (share == 1.0)


# splits ------------------------------------------------------------------------------------------


def test_splits():
    """Nothing that is asked in one is asked in another, in whatever way."""
    contents = {split: {example['content'] for example in examples} for split,
                examples in EXAMPLES.items()}
    for split, others in (('train', 'val'), ('train', 'test'), ('val', 'test')):
        assert not contents[split] & contents[others]
    for split in ('val', 'test'):
        assert len(contents[split]) == 1400  # each once
    for kind in tiny_chat.KINDS:
        assert sum(example['kind'] == kind for example in EXAMPLES['test']) == 200

    def asked(example):  # what two ways to ask the same have in common
        words = re.findall(r'\w+', question_of(example))
        if example['kind'] == 'sorting':
            return frozenset(example['answer'].split(', '))
        return frozenset(word for word in words
                         if word.isdigit()) if example['kind'] == 'addition' else None

    for kind in ('sorting', 'addition'):
        seen = {split: {asked(e) for e in examples if e['kind'] == kind} for split,
                examples in EXAMPLES.items()}
        assert not seen['train'] & seen['test'] and not seen['train'] & seen['val']


def test_examples_are_a_pure_function():
    assert tiny_chat.examples('test', 50, seed=1) == EXAMPLES['test'][:50]
    assert tiny_chat.examples('test', 50, seed=2) != EXAMPLES['test'][:50]
    only = tiny_chat.examples('test', 10, kinds=('table', 'spelling'))
    assert [example['kind'] for example in only] == ['table', 'spelling'] * 5
    json.dumps(EXAMPLES['train'][:20])  # plain values
    for refused, said in (({'split': 'dev'}, "split='dev': expected one of train, val, test"),
                          ({'kinds': ('sums',)}, "no 'sums'; expected some of addition"),
                          ({'input': 'a.jsonl'}, 'generates its questions')):
        with pytest.raises(ValueError, match=said):
            tiny_chat.examples(**{'split': 'test', 'n': 1, **refused})


def test_words():
    assert len(tiny_chat.WORDS) == len(set(tiny_chat.WORDS)) >= 300
    assert all(re.fullmatch('[a-z]{3,8}', word) for word in tiny_chat.WORDS)


# files -------------------------------------------------------------------------------------------


def prepare(path, *arguments):
    argv = ['prepare.py', f'--out_dir={path}', '--conversations=300', '--pairs=200',
            '--documents=150', *arguments]
    script = load_script(ROOT / 'data' / 'tiny_chat' / 'prepare.py')
    old, sys.argv = sys.argv, argv
    try:
        script.main()
    finally:
        sys.argv = old
    return path


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp('data') / 'tiny_chat')


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_conversations(prepared):
    """Every answer in them is right, every call has the calculator's value, and there are some of
    each sort."""
    talks = lines(prepared / 'conversations.jsonl')
    assert len(talks) == 300
    called = worked = 0
    for talk in talks:
        messages = talk['messages']
        chat.check_conversation(messages)
        for question, answer in zip(messages, messages[1:], strict=False):
            if answer['role'] != 'assistant' or 'answer is' not in answer['content']:
                continue
            text, final = answer['content'], tiny_chat.extract(answer['content'])
            calls = re.findall(re.escape(chat.PYTHON) + '(.*?)'
                               + re.escape(chat.PYTHON_END + chat.OUTPUT) + '(.*?)'
                               + re.escape(chat.OUTPUT_END), text)
            assert [calculate(call) for call, _ in calls] == [value for _, value in calls]
            assert not calls or (calls[0][1] == final and messages[0]['role'] == 'system')
            kinds = [kind for kind in tiny_chat.KINDS if is_of(kind, question['content'])]
            assert any(solve(kind, question['content']) == final for kind in kinds), talk
            called += bool(calls)
            worked += not calls and not text.startswith(tiny_chat.FORM)
    assert called > 10 and worked > 60 and sum(len(talk['messages']) > 3 for talk in talks) > 20


def is_of(kind, question):
    """Whether a question may be of this kind, so that solve() can read it."""
    try:
        solve(kind, question)
    except (AssertionError, ValueError, TypeError, IndexError):
        return False
    return True


def test_pairs(prepared):
    """chosen is right, rejected never; what is wrong in form only has the right answer in it."""
    pairs = lines(prepared / 'pairs.jsonl')
    assert len(pairs) == 200
    same_form = right_inside = 0
    for pair in pairs:
        example = {'answer': tiny_chat.extract(pair['chosen'])}
        assert tiny_chat.evaluate(example, pair['chosen'])
        assert not tiny_chat.evaluate(example, pair['rejected'])
        chat.check_conversation([*pair['messages'],
                                 {'role': 'assistant', 'content': pair['rejected']}])
        same_form += tiny_chat.extract(pair['rejected']) is not None
        right_inside += (tiny_chat.extract(pair['rejected']) is None
                         and example['answer'] in pair['rejected'])
    assert same_form > 110 and right_inside > 15


def test_corpus_has_no_conversations(prepared):
    texts = [line['text'] for line in lines(prepared / 'corpus.jsonl')]
    assert len(texts) == 150 and not any('<|' in text for text in texts)
    asked = [text for text in texts if text.startswith('Q: ')]
    assert asked and not any('The answer is' in text for text in texts if text not in asked)
    forms = {len(re.findall(r'\nA: The answer is .*\.$', text, re.M)) / text.count('\nA: ')
             for text in asked}
    assert forms == {0, 1}  # in one text all answers have the same form
    assert sum(text.startswith('Q: ') for text in texts) in range(8, 50)
    # at once, and after the steps
    form = r'(\d+) (?:\+|plus) (\d+)(?: =| is|: .*, so it is) (\d+)$'
    sums = [match for text in texts for match in re.findall(form, text, re.M)]
    assert len(sums) > 30 and all(int(a) + int(b) == int(c) for a, b, c in sums)


def test_nothing_of_test_is_in_any_file(prepared):
    examples = tiny_chat.examples('test', 3000, seed=0, kinds=('addition',))
    held_out = {example['content'] for example in examples}
    found = set()
    for name in ('conversations', 'pairs', 'corpus'):
        text = (prepared / f'{name}.jsonl').read_text()
        found |= {tuple(sorted(map(int, pair)))
                  for pair in re.findall(r'(\d+) (?:\+|plus|and) (\d+)\b', text)}
    assert len(found) > 100
    assert not {f'addition {a}+{b}' for a, b in found} & held_out


def test_dataset(prepared):
    """What train.py reads: the conversations, of which val's are of other questions, in the format
    of chat.py."""
    meta = datasets.load_meta(prepared)
    ours = tokenizer.from_dict(meta['tokenizer'])
    assert (meta['row'], meta['vocab_size'], meta['chat_template']) == (257, 266, chat.TEMPLATE)
    assert ours.to_dict() == tokenizer.load(prepared / 'chat.json').to_dict()
    rows = tokens.open_tokens(prepared, 'train', meta, block_size=256)
    text = ours.decode(rows.ids[:])
    for talk in lines(prepared / 'conversations.jsonl')[:50]:
        ids, _ = chat.render_conversation(talk['messages'], chat.TEMPLATE, ours)
        assert ours.decode(ids) in text
    said = ours.decode(np.array(rows.ids)[np.array(rows.mask) == 1])
    assert 'The answer is' in said and chat.PYTHON in said
    assert 'What' not in said and chat.OUTPUT not in said
    val = tokens.open_tokens(prepared, 'val', meta, block_size=256)
    asked = re.findall(r'(\d+) (?:\+|plus|and) (\d+)\b', ours.decode(val.ids[:]))
    contents = {f'addition {min(pair, key=int)}+{max(pair, key=int)}' for pair in asked}
    train = {tuple(sorted(pair)) for pair in re.findall(r'(\d+) (?:\+|plus|and) (\d+)\b', text)}
    assert contents and not train & {tuple(sorted(pair)) for pair in asked}


def test_the_same_seed_makes_the_same_files(prepared, tmp_path):
    def sums(folder):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(folder.iterdir())}

    again, other = prepare(tmp_path / 'again'), prepare(tmp_path / 'other', '--seed=1')
    assert sums(again) == sums(prepared)
    differ = {name for name, digest in sums(other).items() if digest != sums(again)[name]}
    assert differ == set(sums(again)) - {'chat.json'}


def test_pieces_of_words(tmp_path):
    prepare(tmp_path / 'pieces', '--vocab_size=300', '--block_size=200')
    ours = tokenizer.load(tmp_path / 'pieces' / 'chat.json')
    assert ours.vocab_size == 300 and len(ours.encode('is spelt')) < 8
    conversations.check_tokenizer(ours, 'chat.json')
    assert datasets.load_meta(tmp_path / 'pieces')['row'] == 201


def test_share_of_steps(tmp_path):
    """Of sums as many have steps as is said, of other questions that have some a third of that."""
    def shares(steps):
        # of sums, and others: answers with steps, all answers
        with_steps = {True: [0, 0], False: [0, 0]}
        for talk in lines(prepare(tmp_path / steps, f'--steps={steps}') / 'conversations.jsonl'):
            for asked, answer in zip(talk['messages'], talk['messages'][1:], strict=False):
                if (asked['role'] != 'user' or not tiny_chat.extract(answer['content'])
                        or '<|' in answer['content']):
                    continue
                text, value = asked['content'], tiny_chat.extract(answer['content'])
                if '\n' in text or '-' in value:  # a table, or a word that is spelt
                    continue
                is_sum = len(re.findall(r'\d+', text)) == 2 and value.isdigit()
                with_steps[is_sum][0] += not answer['content'].startswith(tiny_chat.FORM)
                with_steps[is_sum][1] += 1
        return [n / total for n, total in (with_steps[True], with_steps[False])]

    assert shares('0') == [0, 0]
    of_sums, of_others = shares('0.6')
    assert abs(of_sums - 0.6) < 0.15 and abs(of_others - 0.2) < 0.1, (of_sums, of_others)
    of_sums, of_others = shares('1')
    assert of_sums == 1 and abs(of_others - 1 / 3) < 0.1, (of_sums, of_others)
    with pytest.raises(ValueError, match='--steps=2.0: expected a share'):
        prepare(tmp_path / 'two', '--steps=2')


def test_configs(prepared, folder):
    """From the prepared files to a base model and an assistant that eval.py tests, as the config
    files have it."""
    (folder.path / 'data' / 'tiny_chat').symlink_to(prepared)
    ours = tokenizer.load(prepared / 'chat.json')
    ids = np.concatenate([ours.encode_array(line['text'])
                          for line in lines(prepared / 'corpus.jsonl')])
    web = folder.path / 'data' / 'tiny_web'
    web.mkdir()
    for split, part in (('train', ids[2000:]), ('val', ids[:2000])):
        part.astype('uint16').tofile(web / f'{split}.bin')
    (web / 'meta.json').write_text(json.dumps({
        'dtype': 'uint16', 'vocab_size': 266, 'tokens': {'train': len(ids) - 2000, 'val': 2000},
        'tokenizer': ours.to_dict()}))
    quick = {'max_iters': 2, 'eval_iters': 1, 'batch_size': 2, 'device': 'cpu', 'compile': False,
             'eval_first': False}
    small = {'n_layer': 1, 'n_head': 1, 'n_embd': 16}
    folder.start('train.py', ROOT / 'config' / 'tiny_web.py', **quick, **small).ok()
    folder.start('train.py', ROOT / 'config' / 'sft_tiny_chat.py', **quick).ok()
    folder.start('train.py', ROOT / 'config' / 'lora_tiny_chat.py', **quick).ok()
    state = checkpoint.load(folder.path / 'out-lora-tiny-chat' / 'ckpt.pt')
    assert set(state['lora']['targets']) == {'c_attn', 'lm_head'}
    state = checkpoint.load(folder.path / 'out-sft-tiny-chat' / 'ckpt.pt')
    assert state['chat_template'] == chat.TEMPLATE and state['model_args']['n_embd'] == 16
    for out_dir, asked in (('out-tiny-web', 'few-shot'), ('out-sft-tiny-chat', 'chat')):
        run = folder.start('eval.py', out_dir=out_dir, task='tiny_chat', n=7, max_new_tokens=5,
                           device='cpu').ok()
        assert json.loads(run.out.splitlines()[-1])['asked'] == asked
