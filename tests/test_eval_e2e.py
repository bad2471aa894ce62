"""eval.py against transformers, train.py and sums by hand. Run: pytest tests/test_eval_e2e.py"""

import json
import math
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import CHARS, Folder, encode, load_or_skip, make_text, write_dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import tokenizer
from config.presets import PRESETS
from data import documents, scoring
from data.scoring import sliding_windows
from data.tokens import whole_windows
from flatgpt import checkpoint
from model import GPT, GPTConfig
from posttrain import reward_model, tools
from posttrain.tasks import common as tasks
from posttrain.tasks import tiny_chat
from tokenizer import chat

CHAR = {'kind': 'char', 'chars': ''.join(CHARS)}
BYTE = {'kind': 'byte'}
SMALL = {'block_size': 16, 'n_layer': 2, 'n_head': 2, 'n_embd': 16}


# Windows ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n_tokens, block_size, stride, expected', [
    (10, 4, 4, [(0, 5, 1), (4, 9, 5), (8, 10, 9)]),
    (10, 4, 3, [(0, 4, 1), (3, 7, 4), (6, 10, 7)]),
    (7, 4, 1, [(0, 4, 1), (1, 5, 4), (2, 6, 5), (3, 7, 6)]),
    (4, 4, 2, [(0, 4, 1)]), (5, 4, 2, [(0, 4, 1), (2, 5, 4)]),
    (2, 4, 4, [(0, 2, 1)]), (1, 4, 4, []), (0, 4, 4, [])])
def test_windows_by_hand(n_tokens, block_size, stride, expected):
    windows = sliding_windows(n_tokens, block_size, stride)
    assert list(windows) == expected and len(windows) == len(expected)


@given(n_tokens=st.integers(2, 2000), block_size=st.integers(1, 100), data=st.data())
def test_windows_score_each_token_once(n_tokens, block_size, data):
    stride = data.draw(st.integers(1, block_size))
    windows = list(sliding_windows(n_tokens, block_size, stride))
    assert [i for _, end, first in windows for i in range(first, end)] == list(range(1, n_tokens))
    assert all(end - start <= block_size + (stride == block_size) for start, end, _ in windows)
    assert all(first - start >= max(1, block_size - stride)
               for start, _, first in windows[1:])  # tokens of context
    assert [start for start, _, _ in windows] == list(range(0, len(windows) * stride, stride))
    if stride == block_size:
        assert [start for start, _, _ in windows] == whole_windows(n_tokens, block_size).tolist()


# Runs ---------------------------------------------------------------------------------------------

def save(folder, model, tokenizer=CHAR, **changes):
    """Write a checkpoint of `model` to out/, with what evaluating needs."""
    (folder.path / 'out').mkdir(exist_ok=True)
    checkpoint.save(folder.path / 'out', {
        'model': model.state_dict(), 'model_args': asdict(model.config), 'iter_num': 7,
        'best_val_loss': 1.25, 'config': {'dataset': 'tiny'}, 'tokenizer': tokenizer, **changes},
        is_best=True)


def prepared(folder, name, ids, tokenizer, vocab_size):
    """Write the dataset data/name, whose splits are both these ids of a tokenizer."""
    path = folder.path / 'data' / name
    write_dataset(path, ids, ids)
    meta = {**json.loads((path / 'meta.json').read_text()), 'tokenizer': tokenizer,
            'vocab_size': vocab_size}
    (path / 'meta.json').write_text(json.dumps(meta))


def random_gpt(vocab_size, **changes):
    """Build a small model whose predictions differ from token to token."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, 'vocab_size': vocab_size, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model.eval()


def uniform_gpt(vocab_size, **changes):
    """Build a model to which all ids are equally likely."""
    return GPT(GPTConfig(**{**SMALL, 'vocab_size': vocab_size, 'tie_embeddings': False,
                            'zero_init': True, **changes}))


def start(folder, **settings):
    return folder.start('eval.py', **{'device': 'cpu', 'out_dir': 'out', **settings}).wait()


def evaluate(folder, **settings):
    """Run eval.py; -> its JSON line. Assert that the other lines fit a terminal."""
    *lines, last = start(folder, **settings).ok().out.splitlines()
    assert max(map(len, lines)) <= 80, lines
    return json.loads(last)


def nats(logits_of, ids, windows):
    """Sum each token's -log probability after those before it in its window."""
    total = 0.0
    for begin, end, first in windows:
        log_p = F.log_softmax(logits_of(torch.tensor(ids[begin : end - 1])[None])[0].double(),
                              dim=-1)
        total -= sum(log_p[i - begin - 1, ids[i]].item() for i in range(first, end))
    return total


@pytest.mark.slow
def test_train_pys_val_loss(folder):
    folder.train().ok()
    found = evaluate(folder, which='last')
    assert found['loss'] == pytest.approx(folder.log()[-1]['val_loss'], rel=1e-6)
    assert found['perplexity'] == pytest.approx(math.exp(found['loss']))
    # a character is a byte here
    assert found['bits_per_byte'] == pytest.approx(found['loss'] / math.log(2))
    assert (found['tokens'], found['bytes'], found['windows']) == (332, 332, 21)
    assert (found['block_size'], found['stride'], found['text']) == (16, 16, 'data/tiny/val.bin')
    assert found['model'].startswith('out/ckpt.pt: step 20')
    assert evaluate(folder)['model'].startswith('out/best.pt')
    last_loss = found['loss']
    # the folder of a run, as --init_from
    found = evaluate(folder, split='train', init_from='out', out_dir='nowhere')
    assert found['tokens'] == 2999 and found['model'].startswith('out/best.pt')
    half = evaluate(folder, which='last', dtype='bfloat16')['loss']
    assert half != last_loss and half == pytest.approx(last_loss, rel=0.01)


@pytest.fixture
def gpt2(folder):
    """Build transformers' GPT-2 over bytes; the same weights are in out/."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=256, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        initializer_range=0.3)).eval()
    theirs.save_pretrained(folder.path / 'theirs')
    save(folder, GPT.from_pretrained(str(folder.path / 'theirs')), BYTE)
    (folder.path / 'text.txt').write_text(make_text(250) + 'Ünïcode, 안녕\n', encoding='utf-8')
    return theirs


@pytest.mark.parametrize('settings, block_size, stride', [
    ({}, 16, 16), ({'stride': 0}, 16, 16), ({'stride': 5}, 16, 5), ({'stride': 1}, 16, 1),
    ({'block_size': 9, 'stride': 4}, 9, 4), ({'stride': 7, 'batch_size': 3}, 16, 7)])
def test_transformers(folder, gpt2, settings, block_size, stride):
    """The loss is the exact sum over the same windows."""
    ids = list((folder.path / 'text.txt').read_bytes())
    windows = sliding_windows(len(ids), block_size, stride)
    with torch.no_grad():
        expected = nats(lambda x: gpt2(x).logits, ids, windows)
    found = evaluate(folder, input='text.txt', **settings)
    assert found['loss'] == pytest.approx(expected / (len(ids) - 1), rel=1e-6)
    assert found['bits_per_byte'] == pytest.approx(expected / math.log(2) / (len(ids) - 1),
                                                   rel=1e-6)
    assert (found['tokens'], found['windows']) == (len(ids) - 1, len(windows))
    assert (found['block_size'], found['stride'], found['text']) == (block_size, stride, 'text.txt')


@pytest.mark.parametrize('max_length, stride', [(16, 5), (16, 15), (10, 3)])
def test_transformers_recipe(folder, gpt2, max_length, stride):
    """The loss is that of transformers' windows, each weighted by its number of targets."""
    ids = torch.tensor(list((folder.path / 'text.txt').read_bytes()))[None]
    total, before = 0.0, 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + max_length, ids.size(1))
        labels = ids[:, begin:end].clone()
        labels[:, : before - begin] = -100
        with torch.no_grad():
            mean = gpt2(ids[:, begin:end], labels=labels).loss.item()
        total += mean * (labels[:, 1:] >= 0).sum().item()
        before = end
        if end == ids.size(1):
            break
    found = evaluate(folder, input='text.txt', block_size=max_length, stride=stride)
    assert found['loss'] == pytest.approx(total / (ids.size(1) - 1), rel=1e-6)


def test_longer_context_than_trained(folder):
    """RoPE takes a longer context, learned positions do not."""
    model = random_gpt(len(CHARS), pos='rope')
    save(folder, model)
    model.crop_block_size(40)
    ids = encode(make_text(333, seed=1))
    windows = sliding_windows(len(ids), 40, 13)

    def logits_of(x):
        return model(x, targets=x)[0].detach()

    assert evaluate(folder, block_size=40, stride=13)['loss'] == pytest.approx(
        nats(logits_of, ids, windows) / (len(ids) - 1), rel=1e-6)
    save(folder, random_gpt(len(CHARS)))
    start(folder, block_size=40).refused('block_size=40', 'expected 1 to 16 positions')


def test_max_tokens(folder):
    """max_tokens gives the result of a text that ends there; a shorter text is read whole."""
    save(folder, random_gpt(len(CHARS)))
    (folder.path / 'long.txt').write_text(make_text(400))
    (folder.path / 'short.txt').write_text(make_text(100))
    short = evaluate(folder, input='short.txt', stride=3)
    found = [evaluate(folder, input='long.txt', stride=3, max_tokens=100)]
    write_dataset(folder.path / 'data' / 'long', encode(make_text(400)), encode(make_text(400)))
    found += [evaluate(folder, dataset='long', stride=3, max_tokens=100)]
    for name in ('loss', 'tokens', 'bytes', 'windows'):
        assert [a[name] for a in found] == [short[name]] * 2
    assert short['tokens'] == 99
    assert evaluate(folder, input='short.txt', stride=3, max_tokens=1000)['loss'] == short['loss']


def test_eval_tokens(folder):
    """It bounds the windows: evenly spaced ones, the same each time, the first and the last among them."""
    save(folder, model := random_gpt(len(CHARS)))
    ids = encode(make_text(333))
    (folder.path / 'text.txt').write_text(make_text(333))
    windows = list(sliding_windows(len(ids), 16, 8))  # 41
    some = [windows[i] for i in (0, 10, 20, 30, 40)]
    expected = nats(lambda x: model(x, targets=x)[0].detach(), ids, some)
    found = evaluate(folder, input='text.txt', stride=8, eval_tokens=47)
    assert found['tokens'] == sum(end - first for _, end, first in some) and found['windows'] == 5
    assert found['loss'] == pytest.approx(expected / found['tokens'], rel=1e-6)
    assert 'in 5 evenly spaced of 41 window(s) of 16' in start(
        folder, input='text.txt', stride=8, eval_tokens=47).ok().out.replace('\n  ', ' ')
    whole = evaluate(folder, input='text.txt', stride=8)
    assert evaluate(folder, input='text.txt', stride=8, eval_tokens=10**12)['loss'] == whole['loss']
    assert evaluate(folder, input='text.txt', stride=8, eval_tokens=1)['windows'] == 1


def test_windows_of_a_long_text_take_no_memory():
    tracemalloc.start()
    windows = sliding_windows(50_000_000, 1024, 1)
    assert len(windows) == 49_998_977
    x, _ = next(scoring.batches(np.zeros(50_000, np.uint16), windows, 1, batch_size=4))
    assert x.shape == (4, 1023)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_a_text_takes_2_bytes_a_token(tmp_path):
    (tmp_path / 'text.txt').write_text('The king said. ' * 20_000)
    text = scoring.open_file(tmp_path / 'text.txt', 'text', tokenizer.load('byte'))
    assert text.tokens.dtype == np.uint16 and len(text.tokens) == 300_000
    assert text.tokens.tobytes() == np.array(list(b'The king said. ' * 20_000), np.uint16).tobytes()


# Bytes --------------------------------------------------------------------------------------------

def test_bits_per_byte(folder):
    """256 equally likely bytes: 8 bits for each, whatever the text."""
    save(folder, uniform_gpt(256), BYTE)
    text = 'Ünïcode, 안녕 <|endoftext|>\n'
    (folder.path / 'text.txt').write_text(text, encoding='utf-8')
    found = evaluate(folder, input='text.txt')
    assert found['bytes'] == found['tokens'] == len(text.encode()) - 1
    assert found['bits_per_byte'] == pytest.approx(8)


def test_bytes_of_characters(folder):
    """Characters of one to four bytes; the first, of two, is not predicted."""
    save(folder, uniform_gpt(8), {'kind': 'char', 'chars': 'aü안😀\nxyz'})
    (folder.path / 'text.txt').write_text('üaü안😀\n', encoding='utf-8')
    found = evaluate(folder, input='text.txt')
    assert (found['tokens'], found['bytes']) == (5, 1 + 2 + 3 + 4 + 1)
    assert found['bits_per_byte'] == pytest.approx(5 * 3 / 11)  # log2(8) a token


def test_special_tokens_have_no_bytes(folder):
    """In a dataset <|endoftext|> costs nats and has no bytes; in a text its name is text."""
    tok = tokenizer.BPETokenizer.train(make_text(3000), 290, special_tokens=['<|endoftext|>'])
    texts = [make_text(200, seed) for seed in range(3)]
    ids = [i for text in texts for i in [*tok.encode(text), tok.eot]]
    prepared(folder, 'documents', ids, tok.to_dict(), tok.vocab_size)
    save(folder, uniform_gpt(320), tok.to_dict())
    found = evaluate(folder, dataset='documents')
    assert found['tokens'] == len(ids) - 1
    assert found['bytes'] == 600 - len(tok.decode(ids[:1]))
    assert found['bits_per_byte'] == pytest.approx((len(ids) - 1) * math.log2(320) / found['bytes'])
    prepared(folder, 'boundaries', [0, tok.eot, tok.eot], tok.to_dict(), tok.vocab_size)
    found = evaluate(folder, dataset='boundaries')
    assert (found['bits_per_byte'], found['tokens']) == (None, 2)
    (folder.path / 'text.txt').write_text('<|endoftext|>' * 5)
    found = evaluate(folder, input='text.txt')
    first = tok.decode(tok.encode('<|endoftext|>', 'none')[:1])
    assert found['bytes'] == 65 - len(first) and found['tokens'] > 5


def test_bytes_that_are_not_known(folder):
    """A dataset without a tokenizer; a text with words that the vocabulary lacks."""
    save(folder, uniform_gpt(len(CHARS)))
    write_dataset(folder.path / 'data' / 'silent', encode(make_text(99)), encode(make_text(99)),
                  meta=None)
    run = start(folder, dataset='silent').ok()
    assert 'bits per byte unknown: data/silent names no tokenizer' in ' '.join(run.out.split())
    found = json.loads(run.out.splitlines()[-1])
    assert (found['bits_per_byte'], found['bytes'], found['tokens']) == (None, None, 98)
    words = tokenizer.WordTokenizer.train('the cat sat', vocab_size=5)
    save(folder, uniform_gpt(5), words.to_dict())
    for text, bits in (('the cat sat cat', math.log2(5) * 3 / 12), ('the cat ran', None)):
        (folder.path / 'text.txt').write_text(text)
        assert evaluate(folder, input='text.txt')['bits_per_byte'] == (bits and pytest.approx(bits))


# Tasks --------------------------------------------------------------------------------------------

WITH_SPECIALS = tokenizer.BPETokenizer([], None, {token: 256 + i
                                                  for i, token in enumerate(chat.SPECIAL_TOKENS)})
WORDS = {'task': 'tiny_chat', 'n': 4, 'kinds': 'counting,reversing,spelling,table'}
ASKED = tiny_chat.examples('test', 4, seed=1337, kinds=tuple(WORDS['kinds'].split(',')))
SUMS = tiny_chat.examples('test', 2, seed=1337, kinds=('addition', 'subtraction'))


@pytest.fixture(scope='module')
def learnt():
    """
    Train a model to know its answers by heart.

    In chats all but the last are right. In plain text all are, and another question follows. Sums
    are wrong unless the model has a calculator.
    """
    texts = []
    for example in ASKED:
        answer = 'The answer is 0.5.' if example is ASKED[-1] else example['solution']
        texts.append((example['messages'], answer))
    for example in SUMS:
        called = (f'{chat.PYTHON}{example["call"]}{chat.PYTHON_END}'
                  f'{chat.OUTPUT}{example["answer"]}{chat.OUTPUT_END}')
        texts.append(([{'role': 'system', 'content': tools.SYSTEM}, *example['messages']],
                      called + example['solution']))
        texts.append((example['messages'], f'{tiny_chat.FORM} 1.'))
    rows = [chat.render_conversation([*messages, {'role': 'assistant', 'content': answer}],
                                     chat.TEMPLATE,
                                     WITH_SPECIALS) for messages, answer in texts]
    for example, between in zip(ASKED, ('\n', '\n\n', '\n', '\n\n'), strict=True):
        context = WITH_SPECIALS.encode(example['context'])
        ids = context + WITH_SPECIALS.encode(f' {example["solution"]}{between}Q: What')
        rows.append((ids, [0] * len(context) + [1] * (len(ids) - len(context))))
    T = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in rows])
    mask = torch.tensor([mask + [0] * (T - len(mask)) for _, mask in rows])
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**PRESETS['llama'], **SMALL, 'n_layer': 1, 'n_embd': 48,
                             'block_size': 256, 'vocab_size': WITH_SPECIALS.vocab_size}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(200):
        loss = model(ids[:, :-1], ids[:, 1:].masked_fill(mask[:, 1:] == 0, -1))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    return model


def test_task_of_a_chat_model(folder, learnt):
    save(folder, learnt, WITH_SPECIALS.to_dict(), chat_template=chat.TEMPLATE)
    found = evaluate(folder, **WORDS)
    assert (found['n'], found['right'], found['accuracy'], found['asked']) == (4, 3, 0.75, 'chat')
    assert (found['low'], found['high']) == pytest.approx((0.3006, 0.9544),
                                                          abs=1e-4)  # Wilson's by hand
    assert {kind: row['right'] for kind, row in found['kinds'].items()} == {
        **{example['kind']: int(example is not ASKED[-1]) for example in ASKED}, 'all': 3}
    sampled = evaluate(folder, **WORDS, num_samples=3, temperature=0.1)
    assert (sampled['right'], sampled['accuracy_of_one'],
            sampled['accuracy_of_any']) == (3, 0.75, 0.75)
    rounded = evaluate(folder, **WORDS, dtype='bfloat16')
    assert rounded['right'] == 3 and rounded['dtype'] == 'bfloat16'


def test_task_with_a_calculator(folder, learnt):
    save(folder, learnt, WITH_SPECIALS.to_dict(), chat_template=chat.TEMPLATE)
    sums = {'task': 'tiny_chat', 'n': 2, 'kinds': 'addition,subtraction'}
    assert evaluate(folder, **sums)['right'] == 0
    assert evaluate(folder, **sums, tools=True)['right'] == 2


def test_best_of_n(folder, learnt):
    """The answer with the highest reward counts, not the most frequent one."""
    save(folder, learnt, WITH_SPECIALS.to_dict(), chat_template=chat.TEMPLATE)
    torch.manual_seed(1)
    judge = reward_model.Critic.from_gpt(learnt)
    torch.nn.init.normal_(judge.value_head.weight)
    settings = {**WORDS, 'num_samples': 5, 'temperature': 2.0, 'max_new_tokens': 40}
    alone = evaluate(folder, **settings)
    found = {}
    for sign in (1, -1):  # the reward model, and its opposite
        (folder.path / 'judge').mkdir(exist_ok=True)
        judge.value_head.weight.data *= sign
        checkpoint.save(folder.path / 'judge', {
            'model': judge.state_dict(), 'reward_model': True, 'model_args': asdict(judge.config),
            'iter_num': 1, 'best_val_loss': 0.5, 'config': {},
            'tokenizer': WITH_SPECIALS.to_dict(), 'chat_template': chat.TEMPLATE}, is_best=True)
        found[sign] = evaluate(folder, **settings, reward_model='judge')
        assert found[sign]['accuracy_of_majority'] == alone['accuracy']
        assert [found[sign][key] for key in ('accuracy_of_one', 'accuracy_of_any')] == [
            alone[key] for key in ('accuracy_of_one', 'accuracy_of_any')]
        # the same by hand
        judge.eval()
        prompts = [tasks.chat_prompt(example, chat.TEMPLATE, WITH_SPECIALS, 256)
                   for example in ASKED]
        texts = tasks.answer(learnt, WITH_SPECIALS, prompts, tasks.Answering(
            chat.TEMPLATE, max_new_tokens=40, num_samples=5, temperature=2.0))
        n_right = 0
        for i, example in enumerate(ASKED):
            rated = []
            for text in texts[5 * i : 5 * i + 5]:
                ids = prompts[i] + WITH_SPECIALS.encode(f'{text}<|im_end|>', allowed_special='all')
                rated.append((judge(torch.tensor([ids]))[0, -1].item(),
                              tiny_chat.evaluate(example, text)))
            n_right += max(rated)[1]
        assert found[sign]['right'] == n_right
    refused = {'n': 2, 'task': 'tiny_chat', 'reward_model': 'judge'}
    start(folder, **refused).refused("reward_model='judge': expected several answers")
    start(folder, **refused, num_samples=2, temperature=1,
          shots=1).refused('expected a chat model', 'no --shots')
    start(folder, **{**refused, 'reward_model': 'out'}, num_samples=2,
          temperature=1).refused('is a language model')


def test_task_of_a_base_model(folder, learnt):
    """An answer in plain text ends where the next question begins; shots are as many as fit."""
    save(folder, learnt, WITH_SPECIALS.to_dict())
    found = evaluate(folder, **WORDS, shots=0)
    assert (found['right'], found['asked'], found['shots']) == (4, 'plain text', 0)
    found = evaluate(folder, **WORDS, max_new_tokens=60)
    assert (found['asked'], found['n']) == ('few-shot', 4) and 1 < found['shots'] <= 4


def test_task_of_choices(folder):
    """The likeliest choice counts, by its whole text and by character."""
    rows = [{'question': text, 'choices': ['on a mat', 'it', 'me'], 'answer': i % 3,
             'subject': f'part {i % 2}'}
            for i, text in enumerate(('the cat sat', 'who saw it go', 'and ran', 'no one',
                                      'but me'))]
    (folder.path / 'q.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    model = random_gpt(256, block_size=64)
    save(folder, model, BYTE)
    right, right_by_length, contexts = [], [], [f'Question: {row["question"]}\nAnswer:'
                                                for row in rows]
    for row, context in zip(rows, contexts, strict=True):
        scores = []
        for choice in row['choices']:
            ids = list(f'{context} {choice}'.encode())
            log_p = F.log_softmax(model(torch.tensor([ids]),
                                        torch.tensor([ids]))[0][0].detach().double(), dim=-1)
            scores.append(sum(log_p[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
        per_char = [score / len(choice)
                    for score, choice in zip(scores, row['choices'], strict=True)]
        right.append(scores.index(max(scores)) == row['answer'])
        right_by_length.append(per_char.index(max(per_char)) == row['answer'])
    found = evaluate(folder, task='multiple_choice', input='q.jsonl', shots=0)
    assert (found['right'], found['n']) == (sum(right), 5)
    assert found['accuracy_norm'] == pytest.approx(sum(right_by_length) / 5)
    assert {kind: row['n']
            for kind, row in found['kinds'].items()} == {'part 0': 3, 'part 1': 2, 'all': 5}
    assert evaluate(folder, task='multiple_choice', input='q.jsonl', kinds=' part 1,',
                    shots=0)['n'] == 2
    # those of one split alone, of which posttrain.rl learns from train
    by_split = {split: evaluate(folder, task='multiple_choice', input='q.jsonl', split=split,
                                shots=0)['n']
                for split in ('train', 'val', 'test', 'all')
                if any(split in ('all', tasks.split_of(context)) for context in contexts)}
    assert by_split['all'] == 5 == sum(by_split.values()) - 5
    for name, value in (('temperature', 0.8), ('tools', True)):  # for written answers
        run = start(folder, task='multiple_choice', input='q.jsonl', **{name: value})
        run.refused(f'{name}={value} is for written answers, not for --task=multiple_choice')


# Which text ---------------------------------------------------------------------------------------

def test_inputs(folder):
    """A blank line follows each document of a folder or table; a text file is as it stands."""
    save(folder, random_gpt(256), BYTE)
    (folder.path / 'texts').mkdir()
    (folder.path / 'texts' / 'a.txt').write_text('the cat')
    (folder.path / 'texts' / 'b.md').write_text('sat\non it')
    (folder.path / 'rows.jsonl').write_text('{"text": "the cat"}\n{"text": "sat\\non it"}\n')
    (folder.path / 'joined.text').write_bytes(b'\xef\xbb\xbfthe cat\r\n\r\nsat\r\non it\r\n\r\n')
    found = [evaluate(folder, input=name) for name in ('texts', 'rows.jsonl', 'joined.text')]
    assert [a['tokens'] for a in found] == [19] * 3 and len({a['loss'] for a in found}) == 1


def test_long_input_is_encoded_whole(folder):
    """Ids are those of the whole text: here a token of 8 newlines lies across a cut."""
    tok = tokenizer.BPETokenizer.train((make_text(100) + '\n' * 8) * 20, 290)
    text = make_text(documents.PIECE_CHARS - 3) + '.' + '\n' * 8 + 'the cat'
    assert tok.encode('\n' * 8) != tok.encode('\n' * 2) + tok.encode('\n' * 6)
    save(folder, uniform_gpt(320, n_layer=1, n_embd=2, n_head=1), tok.to_dict())
    (folder.path / 'text.txt').write_text(text)
    assert evaluate(folder, input='text.txt')['tokens'] == len(tok.encode(text)) - 1


def test_gpt2s_tokenizer_by_name_and_from_a_file(folder):
    named = load_or_skip('gpt2')
    save(folder, uniform_gpt(50257, n_layer=1, n_embd=2, n_head=1), named.bpe.to_dict())
    ids = named.encode_array(make_text(300))
    prepared(folder, 'gpt2', ids, named.to_dict(), 50257)
    found = evaluate(folder, dataset='gpt2')
    assert found['bytes'] == 300 - len(named.decode(ids[:1]))


@pytest.mark.parametrize('settings, said', [
    ({'split': 'test'}, ["split='test': expected 'train' or 'val'"]),
    ({'which': 'worst'}, ["expected 'best', 'last' or int"]),
    ({'stride': 17, 'input': 'good'}, ['stride=17: expected at most block_size=16']),
    ({'stride': -1}, ['stride=-1: expected 0 or more']),
    ({'stride': 9, 'block_size': 8, 'input': 'good'}, ['stride=9: expected at most block_size=8']),
    ({'block_size': 0}, ['block_size=0: expected 1 or more']),
    ({'block_size': 17}, ['block_size=17', 'expected 1 to 16 positions']),
    ({'max_tokens': 1}, ['max_tokens=1: expected 2 or more']),
    ({'batch_size': 0}, ['batch_size=0: expected 1']),
    ({'dtype': 'int4'}, ["expected 'auto'"]),
    ({'out_dir': 'nowhere'}, ['no checkpoint at nowhere/ckpt.pt']),
    ({'init_from': 'gpt5'}, ["'gpt5' is neither a folder nor one of gpt2"]),
    ({'dataset': 'none'},
     ['no data/none/val.bin', 'data/text/prepare.py --input=FILE --name=none', '--input=FILE']),
    ({'dataset': 'tiny', 'input': 'text'}, ["input='text': expected this or --dataset=tiny"]),
    ({'input': 'none.txt'}, ['none.txt does not exist']), ({'input': 'empty'}, ['empty is empty']),
    ({'input': 'one'}, ['one has 1 token(s); expected 2 or more']),
    ({'input': 'bom'}, ['bom has 0 token(s)']),
    ({'input': 'latin'}, ['latin is not UTF-8: at byte 1', 'iconv']),
    ({'input': 'foreign'}, ["'é' (U+00E9)"]),
    ({'dataset': 'bytes'}, ['(byte, 256 ids)', f'(char, {len(CHARS)} ids)', '--input=FILE']),
    ({'dataset': 'wrong'}, ['token 3 of the data has id 60', 'prepare it again']),
    ({'dataset': 'one'}, ['one/val.bin has 1 tokens']),
    ({'task': 'riddles'},
     ["no task 'riddles'; expected one of gsm8k, hellaswag, multiple_choice, tiny_chat"]),
    ({'shots': 2}, ['shots=2 is for tasks; name one: --task=tiny_chat']),
    ({'task': 'tiny_chat', 'stride': 3}, ['stride=3 is for texts, not for --task=tiny_chat']),
    ({'task': 'tiny_chat', 'tools': True}, ['tools, reward_model: expected a chat model']),
    ({'task': 'tiny_chat', 'num_samples': 3},
     ['temperature=0.0: expected above 0 with several samples']),
    ({'reward_model': 'judge'}, ["reward_model='judge' is for tasks"]),
    ({'task': 'tiny_chat', 'n': 0}, ['n=0: expected at least 1 and at most 1000000']),
    ({'task': 'tiny_chat', 'split': 'all'}, ["split='all': expected one of train, val, test"]),
    ({'task': 'tiny_chat', 'shots': -1}, ['shots=-1: expected 0 or more']),
    ({'task': 'tiny_chat', 'kinds': 'sums'}, ["there is no 'sums'; expected some of addition"]),
    ({'task': 'tiny_chat', 'input': 'one'}, ['tiny_chat generates its questions']),
    ({'task': 'gsm8k'}, ['name a file, --input=FILE, with a "question"']),
    ({'task': 'gsm8k', 'input': 'none.jsonl'}, ['none.jsonl cannot be read: No such file']),
    ({'task': 'hellaswag', 'input': 'scenes.jsonl'},
     ['a question has 20 tokens, and the context has room for 16'])])
def test_refused(refusing, settings, said):
    run = start(refusing, **settings).refused(*said)
    assert '"loss"' not in run.out


@pytest.fixture(scope='module')
def refusing(tmp_path_factory):
    """A good checkpoint and data that it cannot be evaluated on. No test changes the folder."""
    folder = Folder(tmp_path_factory.mktemp('refusing'))
    save(folder, uniform_gpt(len(CHARS)))
    for name, content in (('good', b'the cat'), ('empty', b''), ('one', b't'),
                          ('bom', b'\xef\xbb\xbf'), ('latin', b't\xe9'),
                          ('foreign', 'the é'.encode())):
        (folder.path / name).write_bytes(content)
    (folder.path / 'scenes.jsonl').write_text(
        '{"ctx": "the cat sat on a mat", "endings": ["and", "a"], "label": 1}')
    data = folder.path / 'data'
    write_dataset(data / 'wrong', [0, 1], [0, 1, 2, 60])
    write_dataset(data / 'one', [0, 1], [0])
    prepared(folder, 'bytes', [0, 1], BYTE, 256)
    return folder


def test_the_dataset_it_was_trained_on(folder):
    save(folder, uniform_gpt(len(CHARS)))
    assert evaluate(folder)['text'] == 'data/tiny/val.bin'
    save(folder, uniform_gpt(len(CHARS)), config={'dataset': 'shakespeare'})
    start(folder, split='train').refused('shakespeare/train.bin', 'prepare.py')
    save(folder, uniform_gpt(len(CHARS)), config={})
    start(folder).refused('out/best.pt does not name the dataset', '--dataset=NAME', '--input')


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_broken_weights(folder, value):
    model = uniform_gpt(len(CHARS))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 3] = value
    save(folder, model)
    for script, settings in (('eval.py', {'device': 'cpu'}), ('flatgpt.export', {'out': 'hf'}),
                             ('sample.py', {'device': 'cpu'})):
        folder.start(script, **settings, out_dir='out').wait().refused(
            'out/best.pt: the weight transformer.h.1.mlp.c_fc.weight has NaN or infinity in it')
    assert not (folder.path / 'hf').exists()
