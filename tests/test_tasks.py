"""tasks/: files of questions, prompts, likelihoods, intervals. Run: pytest tests/test_tasks.py"""

import dataclasses
import json
import random
import types

import pytest
import torch
from conftest import make_text
from torch.nn import functional as F

from config.presets import PRESETS
from model import GPT, GPTConfig
from posttrain.tasks import common, gsm8k, hellaswag, multiple_choice, tiny_chat
from posttrain.tools import SYSTEM
from tokenizer import BPETokenizer, ByteTokenizer, WordTokenizer, chat
from tokenizer.chat import OUTPUT, OUTPUT_END, PYTHON, PYTHON_END

TOKENIZER = BPETokenizer([], None, {token: 256 + i for i, token in enumerate(chat.SPECIAL_TOKENS)})  # one a byte
PIECES = BPETokenizer.train(make_text(3000), 290, special_tokens=chat.SPECIAL_TOKENS)


def write(path, *rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return str(path)


def only(task, path, **arguments):
    """The one example of a file."""
    example, = task.examples('all', 10, input=str(path), **arguments)
    return example


# which tasks there are ------------------------------------------------------------------------------------------------


def test_tasks_are_found_by_name(tmp_path, monkeypatch):
    assert [common.load(name) for name in ('tiny_chat', 'gsm8k')] == [tiny_chat, gsm8k]
    with pytest.raises(ValueError, match=r"no task 'gsm'; expected one of gsm8k, hellaswag, multiple_choice, tiny_chat,"
                       r' or a file tasks/gsm\.py'):
        common.load('gsm')
    with pytest.raises(ValueError, match="no task 'common'"):
        common.load('common')
    (tmp_path / 'tasks').mkdir()
    (tmp_path / 'tasks' / 'mine.py').write_text('def evaluate(example, text):\n    return text == "yes"\n')
    monkeypatch.chdir(tmp_path)
    assert common.load('mine').evaluate({}, 'yes')


# gsm8k ----------------------------------------------------------------------------------------------------------------


def test_gsm8k(tmp_path):
    """A line as the data set has it: the annotations become calls, or are left out where the answer is shown."""
    path = write(tmp_path / 'gsm.jsonl', {
        'question': 'Natalia sold clips to 48 of her friends. ', 'answer':
        'In May she sold 48/2 = <<48/2=24>>24 clips.\nAt $1.5 that is 24*1.5=$<<24*1.5=36.00>>36, of 20% <<20%*36=7>>7 '
        'and <<1/3=0.33>>0.33.\n#### 1,080'})
    example = only(gsm8k, path)
    assert example['messages'] == [{'role': 'user', 'content': 'Natalia sold clips to 48 of her friends.'}]
    assert example['context'] == 'Question: Natalia sold clips to 48 of her friends.\nAnswer:'
    assert example['solution'] == ('In May she sold 48/2 = 24 clips.\nAt $1.5 that is 24*1.5=$36, of 20% 7 and 0.33.\n'
                                   '#### 1,080')
    assert example['call'] == (f'In May she sold 48/2 = {PYTHON}48/2{PYTHON_END}{OUTPUT}24{OUTPUT_END}24 clips.\n'
                               f'At $1.5 that is 24*1.5=${PYTHON}24*1.5{PYTHON_END}{OUTPUT}36{OUTPUT_END}36, of 20% 7 '
                               'and 0.33.\n#### 1,080')
    ids, mask = chat.render_conversation([*example['messages'], {'role': 'assistant', 'content': example['call']}],
                                         chat.TEMPLATE, TOKENIZER)
    told = TOKENIZER.decode([i for i, said in zip(ids, mask, strict=True) if not said]).partition('<|assistant|>')[2]
    assert told == f'{OUTPUT}24{OUTPUT_END}{OUTPUT}36{OUTPUT_END}'
    assert (example['answer'], example['kind']) == ('1080', 'gsm8k')
    for text in (example['solution'], example['call'], '#### 1080', '#### $1,080.00', '#### 5\n#### 1080.', '1080'):
        assert gsm8k.evaluate(example, text) and gsm8k.reward(example, text) == 1.0, text
    for text in ('#### 1081', '#### 1080 #### 5', '#### x', '', '#### -1080', '#### 10,80.5'):
        assert not gsm8k.evaluate(example, text) and gsm8k.reward(example, text) == 0.0, text


# multiple choice ------------------------------------------------------------------------------------------------------

FOUR = ['air', 'iron', 'wood', 'glass']


@pytest.mark.parametrize('row', [
    {'question': 'What rusts?', 'choices': {'text': FOUR, 'label': ['A', 'B', 'C', 'D']}, 'answerKey': 'B'},
    {'question': 'What rusts?', 'choices': {'text': FOUR, 'label': ['1', '2', '3', '4']}, 'answerKey': '2'},
    {'question': 'What rusts?', 'choices': {'text': FOUR, 'label': ['1', '2', '3', '4']}, 'answerKey': 2},
    {'question': 'What rusts?', 'choices': {'text': FOUR, 'label': [1, 2, 3, 4]}, 'answerKey': '2'},
    {'question': {'stem': 'What rusts?', 'choices': [{'text': text, 'label': label} for text, label in zip(
        FOUR, 'ABCD', strict=True)]}, 'answerKey': 'B', 'id': 'x'},
    {'question': ' What rusts?\n', 'choices': FOUR, 'answer': 1, 'subject': 'multiple_choice'}])
def test_shapes_of_choices(tmp_path, row):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([row]), tmp_path / 'a.parquet')
    example = only(multiple_choice, write(tmp_path / 'a.jsonl', row))
    assert only(multiple_choice, tmp_path / 'a.parquet') == example == {
        'messages': [{'role': 'user', 'content': 'What rusts?\nA. air\nB. iron\nC. wood\nD. glass\nAnswer with the '
                      'letter alone.'}], 'context': 'Question: What rusts?\nAnswer:', 'solution': 'iron',
        'answer': 'B', 'kind': 'multiple_choice', 'choices': FOUR, 'label': 1}


def test_csv_of_choices(tmp_path):
    """MMLU's files have no header; commas, quotes and line ends stand in quotes."""
    line = '"What ""rusts"", mostly?\nSay.",air,iron,wood,glass,B\n'
    (tmp_path / 'plain.csv').write_text(line)
    (tmp_path / 'named.csv').write_text(f'question,A,B,C,D,answer\n{line}')
    example = only(multiple_choice, tmp_path / 'plain.csv')
    assert example == only(multiple_choice, tmp_path / 'named.csv')
    assert example['context'] == 'Question: What "rusts", mostly?\nSay.\nAnswer:' and example['choices'] == FOUR
    assert example['label'] == 1


def test_hellaswag(tmp_path):
    """The texts are those that lm-evaluation-harness gives to a model."""
    rows = [{'ctx_a': 'A man [header] is seen.', 'ctx_b': 'he', 'activity_label': 'Roof shingle removal', 'label': '3',
             'endings': ['runs [substeps] away.', ' stops.', 'sits  down.', 'jumps [title] High']},
            {'ctx_a': 'Two [title] How to cook [step] Take  it.', 'ctx_b': '', 'activity_label': 'Cooking', 'label': 0,
             'endings': ['one', 'two', 'three', 'four']}]
    examples = hellaswag.examples('all', 9, input=write(tmp_path / 'h.jsonl', *rows))
    assert {example['kind'] for example in examples} == {'Roof shingle removal', 'Cooking'}
    roof = next(example for example in examples if example['kind'] != 'Cooking')
    assert roof['context'] == 'Roof shingle removal: A man is seen. He'
    assert (roof['label'], roof['answer'], roof['solution']) == (3, 'D', 'jumps. High')
    assert roof['messages'][0]['content'].endswith('He\nA. runs away.\nB. stops.\nC. sits down.\nD. jumps. High\n'
                                                   'Answer with the letter alone.')
    short = only(hellaswag, write(tmp_path / 'c.jsonl', {'ctx': 'He', 'endings': ['a', 'b'], 'label': 0}))
    assert (short['context'], short['kind']) == ('He', 'hellaswag')
    theirs = pytest.importorskip('lm_eval.tasks.hellaswag.utils')
    datasets = pytest.importorskip('datasets')
    rows[1]['label'] = '0'
    for doc in theirs.process_docs(datasets.Dataset.from_list(rows)):
        ours = next(example for example in examples if example['kind'] == doc['activity_label'])
        assert (ours['context'], ours['choices'], ours['label']) == (doc['query'], doc['choices'], doc['gold'])


# files ----------------------------------------------------------------------------------------------------------------


def test_splits_of_a_file(tmp_path):
    """Each question is in one, whatever its row; together they are all; the seed orders them."""
    rows = [{'question': f'Number {i}?', 'choices': ['a', 'b'], 'answer': i % 2, 'subject': f's{i % 3}'}
            for i in range(300)]
    path = write(tmp_path / 'a.jsonl', *rows)
    found = {split: [e['context'] for e in multiple_choice.examples(split, 999, input=path)]
             for split in ('train', 'val', 'test', 'all')}
    assert sorted(found['all']) == sorted(found['train'] + found['val'] + found['test'])
    assert len(set(found['all'])) == 300 and 200 < len(found['train']) < 270 and len(found['test']) > 10
    random.Random(0).shuffle(rows)
    other = write(tmp_path / 'b.jsonl', *rows)
    assert set(found['test']) == {e['context'] for e in multiple_choice.examples('test', 999, input=other)}
    some = multiple_choice.examples('all', 20, seed=5, input=path)
    assert some == multiple_choice.examples('all', 20, seed=5, input=path) != multiple_choice.examples(
        'all', 20, seed=6, input=path)
    assert {e['kind'] for e in multiple_choice.examples('all', 99, input=path, kinds=('s1',))} == {'s1'}


@pytest.mark.parametrize('task, name, content, said', [
    (gsm8k, 'a.jsonl', '{"question": "q", "answer": "#### 1"}\n{"question": "q"}\n',
     "a.jsonl, line 2: there is no 'answer'; expected a"),
    (gsm8k, 'a.jsonl', '{"question": "q", "answer": "18"}', 'line 1: "question" or the line with ####'),
    (gsm8k, 'a.jsonl', '{"question": 3, "answer": "#### 18"}', 'expected a "question" and an "answer" that ends'),
    (gsm8k, 'a.jsonl', '', 'has no questions'), (gsm8k, 'a.csv', '', 'has no questions'),
    (gsm8k, 'a.jsonl', 'no', 'line 1: not JSON'),
    (gsm8k, 'a.txt', 'no', 'a.txt is no table; expected JSON lines'),
    (gsm8k, 'a.parquet', 'no', 'a.parquet cannot be read as Parquet'),
    (multiple_choice, 'a.csv', 'q,a,b,c,A\n', 'a.csv, line 1: 5 fields; expected 6: question, A, B, C, D, answer'),
    (multiple_choice, 'a.csv', 'q,a,b,c,d,E\n', "line 1: the answer is 'E', and the choices are A, B, C, D; expected"),
    (multiple_choice, 'a.jsonl', '{"question": "q", "choices": ["a", "b"], "answer": 2}', 'is number 2 of 2'),
    (multiple_choice, 'a.jsonl', '{"question": "q", "choices": ["a"], "answer": 0}', '2 to 10 texts'),
    (multiple_choice, 'a.jsonl', '{"question": "q", "choices": ["a", ""], "answer": 0}', '2 to 10 texts'),
    (multiple_choice, 'a.jsonl', '{"question": "q", "choices": [], "answer": 0}', '1: the choices are []; expected'),
    (multiple_choice, 'a.jsonl', '{"question": "q", "choices": "ab", "answer": 0}', "1: the choices are 'ab'; exp"),
    (multiple_choice, 'a.jsonl', '{"question": "q", "choices": ["a", "b"], "answer": true}', 'the answer is True, and'),
    (multiple_choice, 'a.jsonl', '{"question": "q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}',
     'are no list of choices with a label for each'),
    (multiple_choice, 'a.jsonl', '{"question": "q", "choices": {"text": "ab", "label": ["A", "B"]}, "answerKey": "A"}',
     'are no list of choices'),
    (multiple_choice, 'a.jsonl', '{"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, '
     '"answerKey": 0}', 'the answer is 0, and the choices are 1, 2'),
    (multiple_choice, 'a.jsonl', '{"question": " ", "choices": ["a", "b"], "answer": 0}', 'the question is empty'),
    (multiple_choice, 'a.jsonl', '{"question": "q", "choices": ["a", "b"], "answer": 0, "subject": ["x"]}',
     "the kind of the question is ['x'], not a text"),
    (gsm8k, 'a.jsonl', '{"question": "q", "answer": "<<1=1/0>> #### five"}', 'line 1: "question" or the line with ####'),
    (hellaswag, 'a.jsonl', '{"ctx": "q", "endings": "ab", "label": 0}', '"endings" are no list'),
    (hellaswag, 'a.jsonl', '{"ctx": " ", "endings": ["a", "b"], "label": 0}', 'line 1: the context is empty; expected'),
    (hellaswag, 'a.jsonl', '{"ctx": "q", "endings": ["a", "b"], "label": true}', '"label" is no number: True'),
    (hellaswag, 'a.jsonl', '{"ctx": "q", "endings": ["a", "b"], "label": 0.9}', '"label" is no number: 0.9'),
    (hellaswag, 'a.jsonl', '{"ctx": "q", "endings": ["a", "b"], "label": ""}', "\"label\" is no number: ''")])
def test_no_questions(tmp_path, task, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        task.examples('all', 5, input=str(tmp_path / name))
    assert said in str(error.value)


@pytest.mark.parametrize('arguments, said', [
    ({'split': 'all'}, 'no questions of its own; name a file, --input=FILE, with a "question"'),
    ({'split': 'dev', 'input': 'a.jsonl'}, "split='dev': expected one of train, val, test, all"),
    ({'split': 'all', 'input': 'none.jsonl'}, 'none.jsonl can'),
    ({'split': 'all', 'input': 'none.csv'}, 'none.csv cannot be read: No such file')])
def test_no_file(arguments, said):
    with pytest.raises(ValueError) as error:
        multiple_choice.examples(n=5, **arguments)
    assert said in str(error.value)


# prompts --------------------------------------------------------------------------------------------------------------


def shot(name, kind='a'):
    return {'context': f'Q: {name}?\nA:', 'solution': f'{name}!', 'kind': kind,
            'messages': [{'role': 'user', 'content': f'{name}?'}]}


def test_few_shot():
    assert common.few_shot(shot('c'), [shot('a'), shot('b')]) == 'Q: a?\nA: a!\n\nQ: b?\nA: b!\n\nQ: c?\nA:'
    assert common.few_shot(shot('c'), []) == 'Q: c?\nA:'


def test_few_shot_prompts():
    """Of the own kind, without the question itself, and as many as there is room for."""
    pool = [shot(name, kind) for kind in 'ab' for name in 'uvwxyz']

    def text(example, shots, room):
        text, ids, count = common.few_shot_prompt(example, pool, shots, TOKENIZER, room)
        found = TOKENIZER.decode(ids)
        assert found.endswith(example['context']) and found.count('\n\n') == count and len(ids) <= room
        return found

    example = shot('x', 'b')
    found = text(example, 4, 500)
    assert found.count('\n\n') == 4 and found.count('x?') == 1 and found == text(example, 4, 500)
    one = len(common.few_shot(example, []))  # 8 characters, and 13 more with each that is solved
    for room in range(one, one + 60):
        assert text(example, 4, room).count('\n\n') == min(4, (room - one) // 13)
    with pytest.raises(ValueError, match='a question has 8 tokens, and the context has room for 7'):
        text(example, 4, one - 1)
    assert text(shot('x', 'none'), 20, 500).count('\n\n') == 10  # of a kind that the pool lacks: any
    assert common.few_shot_prompt(example, [], 4, TOKENIZER, 500)[2] == 0


def test_chat_prompts():
    example = shot('x')
    ids = common.chat_prompt(example, chat.TEMPLATE, TOKENIZER, 99)
    assert TOKENIZER.decode(ids) == '<|endoftext|><|user|>x?<|im_end|><|assistant|>'
    ids = common.chat_prompt(example, chat.TEMPLATE, TOKENIZER, 99, tools=True)
    assert TOKENIZER.decode(ids) == f'<|endoftext|><|system|>{SYSTEM}<|im_end|><|user|>x?<|im_end|><|assistant|>'
    with pytest.raises(ValueError, match='a question has 6 tokens, and the context has room for 5'):
        common.chat_prompt(example, chat.TEMPLATE, TOKENIZER, 5)


# models ---------------------------------------------------------------------------------------------------------------


def tiny(tokenizer, block_size=32):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**PRESETS['llama'], 'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': block_size,
                             'vocab_size': tokenizer.vocab_size}))
    for p in model.parameters():
        p.data *= 3  # so that it prefers something
    return model.eval()


def logprob(model, context, continuation):
    """By its definition, one token after the other."""
    total, ids = 0.0, list(context)
    for i in continuation:
        logits = model(torch.tensor([ids[-model.config.block_size :]]))[0][0, -1]
        total += F.log_softmax(logits.double(), dim=-1)[i].item()
        ids.append(i)
    return total


@torch.no_grad()
def test_loglikelihoods():
    """Of any lengths, in batches of any size, also where the context is cut; in the order of the pairs."""
    model, rng = tiny(TOKENIZER), random.Random(0)
    pairs = [([rng.randrange(266) for _ in range(rng.randint(1, 20))],
              [rng.randrange(266) for _ in range(rng.randint(1, 10))]) for _ in range(20)]
    expected = [logprob(model, *pair) for pair in pairs]
    for batch_size in (1, 7, 64):
        assert common.loglikelihoods(model, pairs, batch_size) == pytest.approx(expected, rel=1e-5)
    long = ([rng.randrange(266) for _ in range(90)], [5, 6, 7])
    whole = long[0] + long[1]
    cut = (whole[-33:-3], long[1])  # what block_size + 1 tokens hold
    assert common.loglikelihoods(model, [long]) == pytest.approx([logprob(model, *cut)], rel=1e-5)
    for continuation in ([], [1] * 33):
        with pytest.raises(ValueError, match='expected 1 to 32, the context'):
            common.loglikelihoods(model, [([1], continuation)])


@pytest.mark.parametrize('tokenizer', [TOKENIZER, PIECES, ByteTokenizer()], ids=['bytes', 'pieces', 'plain'])
@torch.no_grad()
def test_multiple_choice_by_likelihood(tmp_path, tokenizer):
    """The choices that the sums by hand prefer, whole and by character; of a chat, the letters."""
    rng = random.Random(1)
    rows = [{'question': f'Where the {word}?', 'choices': [make_text(rng.randint(1, 9), seed=i + 9 * k).strip() or 'mat'
             for k in range(3)], 'answer': i % 3} for i, word in enumerate('cat den one me sat go ran it'.split())]
    examples = multiple_choice.examples('all', 9, input=write(tmp_path / 'a.jsonl', *rows))
    model = tiny(tokenizer, 99)
    best, best_by_length = [], []
    for example in examples:
        context = tokenizer.encode(example['context'])
        scores = []
        for choice in example['choices']:
            ids = tokenizer.encode(f'{example["context"]} {choice}')
            assert ids[: len(context)] == context
            scores.append(logprob(model, context, ids[len(context) :]))
        best.append(max(range(3), key=lambda k: scores[k]) == example['label'])
        best_by_length.append(max(range(3), key=lambda k: scores[k] / len(example['choices'][k])) == example['label'])
    found = common.measure(multiple_choice, examples, model, tokenizer, common.Answering())
    assert found['kinds']['all']['right'] == sum(best)
    assert found['others'] == {'accuracy_norm': sum(best_by_length) / 8}
    if tokenizer is TOKENIZER:
        letters = [tokenizer.encode(letter) for letter in 'ABC']
        right = [max(range(3), key=lambda k: logprob(model, chat.render(  # noqa: B023
            example['messages'], chat.TEMPLATE, tokenizer), letters[k])) == example['label'] for example in examples]
        found = common.measure(multiple_choice, examples, model, tokenizer, common.Answering(chat.TEMPLATE))
        assert found['kinds']['all']['right'] == sum(right)


def test_only_the_choice_counts_where_the_question_has_unknown_words():
    """An id of <|unk|> does not say which word it was."""
    tokenizer = WordTokenizer.train('Q : A where is the cat dog ? \n', 12)
    example = {'context': 'Q: where is the zebra?\nA:', 'choices': ['the cat', 'dog']}
    text, ids, _ = common.few_shot_prompt(example, [], 0, tokenizer, 500)
    assert tokenizer.special_tokens['<|unk|>'] in ids
    for choice, (context, continuation) in zip(example['choices'], common.choice_prompts(example, text, ids, tokenizer),
                                               strict=True):
        assert context == ids and tokenizer.decode(continuation) == f' {choice}'


def test_answers_end_and_do_not_depend_on_their_batch():
    """Plain text ends before a blank line or another question, and samples are those of their number."""
    model = tiny(ByteTokenizer(), 64)
    model.lm_head.weight.data[:256] *= 0.3
    prompts = [list(f'Q: {name}?\nA:'.encode()) for name in ('a', 'bb', 'ccc', 'd')]
    answering = common.Answering(max_new_tokens=40, num_samples=3)
    together = common.answer(model, ByteTokenizer(), prompts, answering)
    assert together == common.answer(model, ByteTokenizer(), prompts, dataclasses.replace(answering, batch_size=3))
    assert len(together) == 12 == len(set(together))
    done = []
    common.answer(model, ByteTokenizer(), prompts, common.Answering(
        max_new_tokens=5, batch_size=3, progress=done.append, temperature=0))
    assert done == [3, 1]


@pytest.mark.parametrize('answers, chosen', [
    (['1', '2', '2'], 1), (['1', '2', '2', '1'], 0), ([None, None, '3'], 2), ([None, None], 0), (['7'], 0),
    ([None, '4', None, '5', '5'], 3)])
def test_majority(answers, chosen):
    texts = [f'{i}: {answer or "?"}' for i, answer in enumerate(answers)]
    task = types.SimpleNamespace(extract=lambda text: text[3:] if text[3:] != '?' else None)
    assert common.majority_text(task, texts) == texts[chosen]


# accuracy -------------------------------------------------------------------------------------------------------------


def test_what_lacks_something_is_refused(tmp_path, monkeypatch):
    """A task of one's own without a function, or whose examples have no kind, is named."""
    (tmp_path / 'tasks').mkdir()
    text = ('def extract(text):\n    return text\ndef evaluate(example, text):\n    return True\n'
            "def examples(split, n, seed=0, input='', kinds=()):\n"
            "    return [{'messages': [], 'context': '', 'solution': '', 'answer': ''}]\n")
    (tmp_path / 'tasks' / 'half.py').write_text(text)
    (tmp_path / 'tasks' / 'unkind.py').write_text(text + 'def reward(example, text):\n    return 1.0\n')
    monkeypatch.chdir(tmp_path)
    for name, said in (('half', 'half.py has no reward'), ('unkind', 'unkind.py: an example has no kind')):
        with pytest.raises(ValueError, match=said):
            common.examples_of(common.load(name), common.Questions('val', 1))


@pytest.mark.parametrize('n_right, n', [(0, 10), (10, 10), (1, 3), (250, 500), (499, 500), (0, 1)])
def test_wilson(n_right, n):
    stats = pytest.importorskip('scipy.stats')
    theirs = stats.binomtest(n_right, n).proportion_ci(method='wilson')
    assert common.wilson(n_right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    low, high = common.wilson(n_right, n)
    assert (low == 0.0) == (n_right == 0) and (high == 1.0) == (n_right == n)


def test_accuracies():
    found = common.accuracies(['b', 'a', 'b', 'b'], [True, False, False, True])
    assert list(found) == ['a', 'b', 'all']
    assert [(row['right'], row['n']) for row in found.values()] == [(0, 1), (2, 3), (2, 4)]
    assert found['b']['accuracy'] == pytest.approx(2 / 3) and found['b']['low'] < 2 / 3 < found['b']['high']
