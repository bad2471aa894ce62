"""sample.py as its users run it. Run: pytest tests/test_sample_e2e.py"""

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import CHARS, ROOT, Folder, encode, make_text, write_dataset

from model import GPT, GPTConfig
from tokenizer import BPETokenizer

VOCAB = len(CHARS)


def save(folder, model, out_dir='out', name='ckpt.pt', **changes):
    """A checkpoint of `model` as train.py writes it, as far as sampling needs it."""
    (folder.path / out_dir).mkdir(exist_ok=True)
    torch.save({'version': 1, 'model': model.state_dict(), 'model_args': asdict(model.config), 'iter_num': 7,
                'best_val_loss': 1.25, 'config': {'dataset': 'tiny'},
                'tokenizer': {'kind': 'char', 'chars': ''.join(CHARS)}, **changes}, folder.path / out_dir / name)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a model trained until it writes words. No test changes it."""
    path = tmp_path_factory.mktemp('sample')
    write_dataset(path / 'data' / 'tiny', encode(make_text(3000)), encode(make_text(333, seed=1)))
    folder = Folder(path)
    folder.train(max_iters=200, lr_decay_iters=200, eval_interval=100, n_embd=32).ok()
    return folder


def samples(run):
    """The texts that a run printed, each with its prompt."""
    *_, out = re.split(r'^\S+/\w+[.]pt: step \d+.*\n', run.ok().out, maxsplit=1, flags=re.M)
    *texts, end = out.split('\n---------------\n')
    assert end == ''
    return texts


def test_samples(trained):
    run = trained.sample(num_samples=3, max_new_tokens=60, start='the cat')
    texts = samples(run)
    assert f'out/best.pt: step {trained.checkpoint(name="best.pt")["iter_num"]}, val loss' in run.out
    assert len(texts) == 3 and len(set(texts)) == 3
    assert all(text.startswith('the cat') and len(text) == 67 and set(text) <= set(CHARS) for text in texts)
    words = ' '.join(texts).split()
    known = set(make_text(3000).split())
    assert sum(word in known for word in words) > len(words) / 2  # it writes what it has read


def test_defaults(trained):
    texts = samples(trained.sample())
    assert len(texts) == 10 and all(text.startswith('\n') and len(text) == 501 for text in texts)


def test_seeds(trained):
    a, b, c = (samples(trained.sample(num_samples=2, max_new_tokens=40, seed=seed)) for seed in (1, 1, 2))
    assert a == b != c


@pytest.mark.parametrize('controls', [{'temperature': 0}, {'temperature': 1e-42}, {'top_k': 1},
                                      {'top_p': 1e-6, 'top_k': None},
                                      {'min_p': 1.0, 'top_k': None}])
def test_greedy(trained, controls):
    """All of these take the likeliest token, as the plain definition in model.py does, far beyond block_size."""
    state = trained.checkpoint(name='best.pt')
    model = GPT(GPTConfig(**state['model_args']))
    model.load_state_dict(state['model'])
    ids = model.eval().generate(torch.from_numpy(encode('the cat'))[None], 50, temperature=0)[0]
    expected = ''.join(CHARS[i] for i in ids)
    assert samples(trained.sample(start='the cat', num_samples=2, max_new_tokens=50, **controls)) == [expected] * 2


def test_prompt_longer_than_the_context(trained):
    prompt = make_text(100)
    kw = {'start': prompt, 'num_samples': 1, 'max_new_tokens': 30, 'temperature': 0}
    trained.sample(**kw).refused('the prompt has 100 tokens, the context of the model 16', '--crop_prompt=True')
    text, = samples(trained.sample(**kw, crop_prompt=True))
    end, = samples(trained.sample(**{**kw, 'start': prompt[-16:]}))
    assert text == prompt[:-16] + end and len(text) == 130


def test_prompt_from_a_file(trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('the\ncat', encoding='utf-8')
    text, = samples(trained.sample(start=f'FILE:{tmp_path}/prompt.txt', num_samples=1, max_new_tokens=5))
    assert text.startswith('the\ncat') and len(text) == 12
    trained.sample(start=f'FILE:{tmp_path}/none.txt').refused(f'{tmp_path}/none.txt', 'No such file')
    (tmp_path / 'binary').write_bytes(b'\xff\xfe')
    trained.sample(start=f'FILE:{tmp_path}/binary').refused(f'{tmp_path}/binary', 'utf-8')


@pytest.mark.parametrize('settings, said', [
    ({'start': 'the @ é'}, ["'@' (U+0040)", "'é' (U+00E9)"]), ({'start': ''}, ['the prompt is empty']),
    ({'out_dir': 'nowhere'}, ['no checkpoint at nowhere/ckpt.pt', 'python train.py --out_dir=nowhere']),
    ({'num_samples': 0}, ['num_samples=0: expected 1 or more']), ({'temperature': -1}, ['temperature=-1.0']),
    ({'top_k': -1}, ['top_k=-1']), ({'top_p': 0}, ['top_p=0.0']), ({'top_p': 1.5}, ['top_p=1.5']),
    ({'max_new_tokens': -1}, ['max_new_tokens=-1']), ({'which': 'worst'}, ["which='worst': expected 'best' or 'last'"]),
    ({'init_from': 'gpt5'}, ["'gpt5' is neither a folder nor one of gpt2"]), ({'dtype': 'int4'}, ["dtype='int4'"]),
    ({'min_p': 1.5}, ['min_p=1.5']), ({'repetition_penalty': 0}, ['repetition_penalty=0.0: expected 0.01 to 100']),
    ({'seed': -1}, ['seed=-1']), ({'best_of': -1}, ['best_of=-1']), ({'slide': 0}, ['slide=0']),
    ({'slide': 17}, ['slide=17: expected 1 to 16']), ({'quantize': 'int4'}, ["quantize='int4'"]),
    ({'quantize': 'int8', 'dtype': 'bfloat16'}, ["dtype='bfloat16': expected 'auto' with --quantize=int8"]),
    ({'compile': 'yes'}, ["compile='yes': expected True, False or 'auto'"]), ({'batch_size': 0}, ['batch_size=0']),
    ({'vote': '(a'}, ["vote='(a' is no regular expression"]), ({'system': 'You are'}, ['expected a chat, with --chat']),
    ({'chat': True, 'vote': 'a'}, ['chat=True', 'vote']), ({'regex': 'a', 'choices': 'b'}, ['only one of']),
    ({'stop': '["a", 1]'}, ['begins as a JSON list']), ({'stop': '[INST]'}, ["stop='[INST]' begins as a JSON list"]),
    ({'prompts': 'a.jsonl'}, ['--out=FILE.jsonl']), ({'out': 'a.jsonl'}, ['--prompts=FILE.jsonl']),
    ({'json_schema': 'none.json'}, ["json_schema='none.json'", 'No such file']), ({'number': 3}, ['unknown setting'])])
def test_refused(trained, settings, said):
    run = trained.sample(**settings).refused(*said)
    assert '---------------' not in run.out


def test_no_tokens(trained):
    assert samples(trained.sample(start='the', num_samples=2, max_new_tokens=0)) == ['the', 'the']


def test_stop(trained):
    """A sample ends before the stop text, which nothing printed on the way may show."""
    long, = samples(trained.sample(start='the', num_samples=1, max_new_tokens=80, temperature=0))
    new = long.removeprefix('the')
    stop = new[40:45]
    cut = new[: new.index(stop)]
    texts = samples(trained.sample(start='the', num_samples=2, max_new_tokens=80, temperature=0, stop=stop))
    assert texts == ['the' + cut] * 2


@pytest.mark.parametrize('stop', ['@', '@@', '@@@@@@', '@' * 20, '@' * 100])
def test_stop_that_never_comes(trained, stop):
    """What is held back, because it could be the beginning of the stop text, is printed in the end, and only once."""
    kw = {'start': 'the', 'num_samples': 1, 'max_new_tokens': 30, 'temperature': 0}
    assert samples(trained.sample(**kw, stop=stop)) == samples(trained.sample(**kw))


def test_stops(trained):
    """Of several the one that comes first."""
    long, = samples(trained.sample(start='the', num_samples=1, max_new_tokens=80, temperature=0))
    new = long.removeprefix('the')
    stops = [new[40:45], new[20:24], '@']
    cut = min(new.index(stop) for stop in stops[:2])
    kw = {'start': 'the', 'num_samples': 1, 'max_new_tokens': 80, 'temperature': 0}
    assert samples(trained.sample(**kw, stop=json.dumps(stops))) == ['the' + new[:cut]]


def test_repetition_penalty(trained):
    """Greedy under CTRL's rule, computed without a cache."""
    state = trained.checkpoint(name='best.pt')
    model = GPT(GPTConfig(**state['model_args'])).eval()
    model.load_state_dict(state['model'])
    ids = encode('the').tolist()
    for _ in range(12):
        logits = model(torch.tensor([ids]))[0][0, -1].tolist()
        for i in set(ids):
            logits[i] *= 1 / 1.7 if logits[i] > 0 else 1.7
        ids.append(logits.index(max(logits)))
    kw = {'start': 'the', 'num_samples': 1, 'max_new_tokens': 12, 'temperature': 0}
    text, = samples(trained.sample(**kw, repetition_penalty=1.7))
    assert [text] != samples(trained.sample(**kw)) and text == ''.join(CHARS[i] for i in ids)


def test_slide(trained):
    """A context that drops 8 tokens at once still says what the model says as long as nothing was dropped."""
    kw = {'start': 'the', 'num_samples': 1, 'max_new_tokens': 60, 'temperature': 0}
    exact, fast = samples(trained.sample(**kw))[0], samples(trained.sample(**kw, slide=8))[0]
    assert len(fast) == 63 and fast[:17] == exact[:17]


def test_the_machine_is_named(trained):
    run = trained.sample(num_samples=1, max_new_tokens=5)
    assert re.search(r'device cpu \(threads: 1\), dtype float32 \(.*\), compile False\s+\(too short a run\)', run.out)
    assert max(map(len, run.out.splitlines())) <= 80
    assert 'dtype int8 (as set)' in trained.sample(num_samples=1, quantize='int8', compile=False).ok().out


def test_without_a_compiler(trained, tmp_path):
    """What was to be compiled is computed all the same, and that it is slower is said."""
    (tmp_path / 'config.py').write_text(
        'import torch._inductor.config\ntorch._inductor.config.cpp.cxx = ("/bin/false",)\n'
        'torch._inductor.config.force_disable_caches = True\n')
    kw = {'start': 'the', 'num_samples': 1, 'max_new_tokens': 30, 'temperature': 0}
    run = trained.start('sample.py', tmp_path / 'config.py', **kw, device='cpu', out_dir='out', compile=True).ok()
    assert re.search(r'WARNING: torch.compile failed \(.*\); going on without it, slower', run.out)
    text, = samples(trained.sample(**kw))
    assert run.out.endswith(f'\n{text}\n---------------\n')


def test_logprobs_best_of_and_votes(trained, tmp_path):
    """The log-probabilities are those of the whole model; the best of 4 is the one with the largest mean of them."""
    kw = {'start': 'the cat', 'max_new_tokens': 8, 'temperature': 1.5}
    state = trained.checkpoint(name='best.pt')
    model = GPT(GPTConfig(**state['model_args']))
    model.load_state_dict(state['model'])
    out = re.split(r'^---------------\n', trained.sample(**kw, num_samples=4, logprobs=True).ok().out, flags=re.M)
    means = {}
    for part in out[:4]:
        lines = re.findall(r'^ +(-?\d+\.\d{4})  (.+)$', part, flags=re.M)
        text = ''.join(ast.literal_eval(token) for _, token in lines)
        assert f'the cat{text}\n' in part and len(text) == 8
        ids = torch.from_numpy(encode('the cat' + text))[None]
        logprobs = model.eval()(ids[:, :-1], ids[:, 1:])[0].log_softmax(-1)[0].gather(1, ids[0, 1:, None])[6:, 0]
        assert [float(logprob) for logprob, _ in lines] == pytest.approx(logprobs.tolist(), abs=1e-3)
        means['the cat' + text] = logprobs.mean().item()
    assert samples(trained.sample(**kw, num_samples=1, best_of=4)) == [max(means, key=means.get)]

    run = trained.sample(**kw, num_samples=4, vote=r'\w')
    letters = [found[-1] for text in means if (found := re.findall(r'\w', text.removeprefix('the cat')))]
    assert len(letters) == 4
    by_count = sorted(dict.fromkeys(letters), key=lambda letter: -letters.count(letter))
    assert [line.split() for line in run.ok().out.rpartition('---------------\n')[2].splitlines()] == [
        [str(letters.count(letter)), letter] for letter in by_count]
    run = trained.sample(**kw, num_samples=4, vote='(@)')
    assert run.ok().out.endswith('---------------\nno sample has an answer: (@)\n')


# many prompts --------------------------------------------------------------------------------------------------------

def write_lines(path, values):
    path.write_text(''.join(json.dumps(value) + '\n' for value in values), encoding='utf-8')


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


WHOLE = make_text(200)
ASKED = [{'id': i, 'prompt': WHOLE[i : i + 1 + i * 7 % 16]} for i in range(9)]


def test_prompts(trained, tmp_path):
    """The same samples in whatever batches, in the order of the lines, and those of each prompt alone."""
    write_lines(tmp_path / 'in.jsonl', ASKED)
    kw = {'prompts': tmp_path / 'in.jsonl', 'num_samples': 2, 'max_new_tokens': 12}
    for temperature in (0, 1.0):
        results = []
        for batch_size in (1, 6, 100):
            out = tmp_path / f'{temperature}-{batch_size}.jsonl'
            run = trained.sample(**kw, out=out, batch_size=batch_size, temperature=temperature).ok()
            assert f'{out}: 9 prompts, 216 tokens' in run.out
            results.append(read_lines(out))
        assert results[0] == results[1] == results[2]
        assert [{'id': value['id'], 'prompt': value['prompt']} for value in results[0]] == ASKED
        assert {sample['finish'] for value in results[0] for sample in value['samples']} == {'length'}
        texts = [[sample['text'] for sample in value['samples']] for value in results[0]]
        assert all((one == other) == (temperature == 0) for one, other in texts)
    alone = samples(trained.sample(start=ASKED[4]['prompt'], num_samples=1, max_new_tokens=12, temperature=0))
    greedy = read_lines(tmp_path / '0-1.jsonl')[4]
    assert alone == [ASKED[4]['prompt'] + greedy['samples'][0]['text']]


def test_prompts_killed_and_resumed(trained, tmp_path):
    """What a killed run had is kept as it is, and the rest comes to what it would have been."""
    write_lines(tmp_path / 'in.jsonl', ASKED * 2)
    kw = {'prompts': tmp_path / 'in.jsonl', 'num_samples': 1, 'max_new_tokens': 80, 'batch_size': 1, 'device': 'cpu',
          'logprobs': True}
    part, out = tmp_path / 'out.jsonl.part', tmp_path / 'out.jsonl'
    trained.start('sample.py', **kw, out=tmp_path / 'whole.jsonl').ok()
    for number in (signal.SIGKILL, signal.SIGINT):
        run = trained.start('sample.py', **kw, out=out)
        before = part.read_bytes().count(b'\n') if part.exists() else 0
        while not part.exists() or part.read_bytes().count(b'\n') < before + 3:
            assert run.process.is_alive(), run.out
        run.kill(number).wait()
        assert not out.exists() and part.read_bytes().count(b'\n') < 19
    assert f'the results so far are in {part}, and the same command goes on' in run.out and 'Traceback' not in run.out
    trained.start('sample.py', **{**kw, 'seed': 3}, out=out).refused('out.jsonl.part has results of other', 'settings')
    write_lines(tmp_path / 'other.jsonl', ASKED)
    trained.start('sample.py', **{**kw, 'prompts': tmp_path / 'other.jsonl'}, out=out).refused('other prompts')
    whole = read_lines(tmp_path / 'whole.jsonl')
    lines = read_lines(part)
    lines[1]['result'] = {'samples': 'as they were'}
    write_lines(part, lines)
    trained.start('sample.py', **{**kw, 'batch_size': 7}, out=out).ok()
    result = read_lines(out)
    assert result[lines[1]['line'] - 1].pop('samples') == 'as they were'
    del whole[lines[1]['line'] - 1]['samples']
    for a, b in zip(result, whole, strict=True):
        for one, other in zip(a.get('samples', []), b.get('samples', []), strict=True):
            assert one['text'] == other['text'] and one['tokens'] == other['tokens']
            assert one['logprobs'] == pytest.approx(other['logprobs'], abs=1e-4)
    assert not part.exists()
    trained.start('sample.py', **kw, out=out).refused('out.jsonl exists already')


@pytest.mark.parametrize('lines, said', [
    (['{"prompt": "the"}', '{"prompt": "the"'], ['line 2: not JSON', 'at character 17']),
    (['["the"]'], ['line 1: ["the"] is not an object']), ([''], ['in.jsonl has no prompts']),
    (['{"prompt": "the"}', '', '{"promt": "the"}'], ['line 3: expected either "prompt" or "ids" or "messages"']),
    (['{"prompt": "the"}', '{"ids": [1]}'], ['line 2: expected either']),
    (['{"prompt": "a", "ids": [1]}'], ['line 1: expected either']), (['{"a": "the"}'], ['line 1: expected either']),
    (['{"prompt": "a"}', '{"prompt": 3}'], ['line 2: "prompt" is a text']),
    (['{"prompt": ""}'], ['line 1: "prompt" is empty']), (['{"ids": []}'], ['line 1: "ids" is empty']),
    (['{"ids": [1, 99]}'], ['line 1: "ids" are a list of whole numbers from 0 to']),
    (['{"ids": 3}'], ['line 1: "ids" are a list']), (['{"ids": [true]}'], ['line 1: "ids" are a list']),
    (['{"messages": []}'], ['line 1: messages are a list']), (['{"prompt": "é"}'], ['line 1: ', "'é' (U+00E9)"]),
    (['{"prompt": "a", "samples": 1}'], ["line 1: the result has a 'samples' of its own"]),
    ([json.dumps({'prompt': WHOLE})], ['line 1: the prompt has 200 tokens', '--crop_prompt=True'])])
def test_prompts_refused(trained, tmp_path, lines, said):
    (tmp_path / 'in.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    trained.sample(prompts=tmp_path / 'in.jsonl', out=tmp_path / 'out.jsonl').refused(*said)
    assert [path.name for path in tmp_path.iterdir()] == ['in.jsonl']


def test_results_that_can_not_be_written(trained, tmp_path):
    write_lines(tmp_path / 'in.jsonl', ASKED)
    kw = {'prompts': tmp_path / 'in.jsonl', 'out': tmp_path / 'nowhere' / 'out.jsonl'}
    trained.sample(**kw).refused('nowhere/out.jsonl can not be written', 'No such file', 'another --out')


def test_prompts_of_ids_with_votes(trained, tmp_path):
    """Ids are the prompt that they spell."""
    kw = {'num_samples': 3, 'max_new_tokens': 20, 'vote': r'\w+', 'best_of': 2, 'stop': ' '}
    answers = []
    for i, value in enumerate(({'prompt': 'the '}, {'ids': encode('the ').tolist()})):
        write_lines(tmp_path / f'{i}.jsonl', [value])
        trained.sample(prompts=tmp_path / f'{i}.jsonl', out=tmp_path / f'{i}.out', **kw).ok()
        answers.append({key: part for key, part in read_lines(tmp_path / f'{i}.out')[0].items() if key not in value})
    assert answers[0] == answers[1]
    found = [re.findall(r'\w+', sample['text'])[-1:] for sample in answers[0]['samples']]
    words = [word for words in found for word in words]
    assert len(found) == 3 and {sample['finish'] for sample in answers[0]['samples']} <= {'stop', 'length'}
    assert dict(answers[0]['votes']) == {word: words.count(word) for word in words}
    assert answers[0]['answer'] == answers[0]['votes'][0][0]


def test_prompts_of_messages(folder):
    """What the model hears is the template's; it ends where the template ends an answer."""
    bpe = BPETokenizer.train(['a conversation'] * 3, 260, special_tokens=['<|im_start|>', '<|im_end|>'])
    template = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=64, vocab_size=bpe.vocab_size, n_layer=1, n_head=1, n_embd=16))
    im_start, im_end = bpe.special_tokens.values()
    as_text = [bpe.encode(text, allowed_special='none') for text in ('user\nHi <|im_end|>', '\n', 'assistant\n')]
    ids = [im_start, *as_text[0], im_end, *as_text[1], im_start, *as_text[2]]
    values = {'messages': [{'messages': [{'role': 'user', 'content': 'Hi <|im_end|>'}]}], 'ids': [{'ids': ids}]}
    kw = {'max_new_tokens': 5, 'num_samples': 1, 'temperature': 0, 'logprobs': True}
    for end in (False, True):
        if end:  # says nothing but this
            with torch.no_grad():
                model.transformer.ln_f.weight.zero_()
                model.transformer.ln_f.bias.fill_(1.0)
                model.lm_head.weight[im_end] = 5.0
        save(folder, model, tokenizer=bpe.to_dict(), chat_template=template)
        result = {}
        for name, lines in values.items():
            write_lines(folder.path / f'{name}.jsonl', lines)
            folder.sample(**kw, prompts=f'{name}.jsonl', out=f'{name}-{end}').ok()
            result[name], = read_lines(folder.path / f'{name}-{end}')[0]['samples']
        if end:
            assert result['messages'] == {'text': '', 'finish': 'stop', 'tokens': [], 'logprobs': []}
            assert result['ids']['text'] == '<|im_end|>' * 5  # to a prompt it is a token like others
        else:
            assert result['messages'] == result['ids'] and len(result['ids']['tokens']) == 5


# constrained output --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('constraint, matches', [
    ({'choices': 'the cat, its den'}, 'the cat|its den'), ({'choices': '["go, no", "one"]'}, 'go, no|one'),
    ({'regex': 't(he|o)( cat){2,3}'}, 't(he|o)( cat){2,3}')])
def test_constraints(trained, constraint, matches):
    pytest.importorskip('llguidance')
    texts = samples(trained.sample(start='who ', num_samples=5, max_new_tokens=30, **constraint))
    assert all(re.fullmatch(matches, text.removeprefix('who ')) for text in texts)


def test_json(folder, tmp_path):
    pytest.importorskip('llguidance')
    schema = {'type': 'object', 'properties': {'name': {'type': 'string', 'maxLength': 5}, 'age': {'type': 'integer'}},
              'required': ['name', 'age'], 'additionalProperties': False}
    (tmp_path / 'schema.json').write_text(json.dumps(schema))
    model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    save(folder, model, tokenizer={'kind': 'byte'})
    for given in (json.dumps(schema), str(tmp_path / 'schema.json')):
        text, = samples(folder.sample(start='Who?', num_samples=1, max_new_tokens=60, json_schema=given))
        value = json.loads(text.removeprefix('Who?'))
        assert set(value) == {'name', 'age'} and type(value['age']) is int and len(value['name']) <= 5
    folder.sample(json_schema='{"type": "object"').refused('json_schema')
    folder.sample(json_schema=json.dumps(schema), stop=',').refused('stop', 'choices, regex or json_schema')
    folder.sample(json_schema=json.dumps(schema), max_new_tokens=5).refused('max_new_tokens=5')


def test_best_and_last(folder):
    """best.pt unless told otherwise; ckpt.pt where there is no other."""
    model = GPT(GPTConfig(block_size=8, vocab_size=VOCAB, n_layer=1, n_head=1, n_embd=8))
    save(folder, model, iter_num=100)
    kw = {'num_samples': 1, 'max_new_tokens': 3}
    assert 'out/ckpt.pt: step 100, lowest val loss so far 1.2500\n' in folder.sample(**kw).ok().out
    save(folder, model, name='best.pt', iter_num=50)
    assert 'out/best.pt: step 50, val loss 1.2500\n' in folder.sample(**kw).ok().out
    # the last state was never the best: the number is not of its own loss
    assert 'out/ckpt.pt: step 100, lowest val loss so far 1.2500\n' in folder.sample(**kw, which='last').ok().out
    for not_yet in (math.inf, 1e9):  # stopped before the first evaluation, by flatgpt and by nanoGPT
        save(folder, model, iter_num=3, best_val_loss=not_yet)
        assert 'out/ckpt.pt: step 3\n' in folder.sample(**kw, which='last').ok().out


def test_padded_vocabulary(folder):
    """Ids that the vocabulary is padded with are never drawn, however large their logits are."""
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[VOCAB:] = 50.0
    save(folder, model)
    for temperature in (0, 1.0, 50.0):
        texts = samples(folder.sample(num_samples=4, max_new_tokens=30, temperature=temperature, top_k=None))
        assert all(len(text) == 31 and set(text) <= set(CHARS) for text in texts)


def test_bytes(folder):
    """A byte model may say what is no UTF-8; its text still prints, in any locale."""
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    save(folder, model, tokenizer={'kind': 'byte'})
    assert len(samples(folder.sample(start='é🙂', num_samples=2, max_new_tokens=50, temperature=2.0))) == 2
    done = subprocess.run([sys.executable, str(ROOT / 'sample.py'), '--start=é', '--num_samples=1'], cwd=folder.path,
                          env={**os.environ, 'PYTHONIOENCODING': 'ascii'}, capture_output=True)
    assert done.returncode == 0 and done.stdout.endswith(b'---------------\n'), done.stderr


@pytest.mark.parametrize('settings', [{'dtype': 'bfloat16'}, {'dtype': 'float16'}, {'quantize': 'int8',
                                                                                   'compile': False}])
def test_precisions(trained, settings):
    """In half the bits the text is another, but still words."""
    words = samples(trained.sample(num_samples=1, max_new_tokens=200, temperature=0.5, **settings))[0].split()
    known = set(make_text(3000).split())
    assert sum(word in known for word in words) > len(words) / 2


def test_bad_checkpoint(trained, folder):
    whole = (trained.path / 'out' / 'best.pt').read_bytes()
    (folder.path / 'out').mkdir()
    (folder.path / 'out' / 'best.pt').write_bytes(whole[:5000])
    folder.sample().refused('out/best.pt can not be read')
    (folder.path / 'out' / 'best.pt').write_bytes(b'not a checkpoint')
    folder.sample().refused('out/best.pt can not be read')
    state = trained.checkpoint(name='best.pt')
    del state['model']['transformer.ln_f.weight'], state['iter_num']
    torch.save(state, folder.path / 'out' / 'best.pt')
    folder.sample().refused('out/best.pt holds no checkpoint', 'it has no iter_num')
    torch.save({**state, 'iter_num': 5}, folder.path / 'out' / 'best.pt')
    folder.sample().refused('out/best.pt', '"transformer.ln_f.weight"')


def test_checkpoint_without_a_tokenizer(folder):
    """nanoGPT's way: the vocabulary is in the dataset's meta.pkl; without that, what to do is said."""
    save(folder, GPT(GPTConfig(block_size=8, vocab_size=VOCAB, n_layer=1, n_head=1, n_embd=8)), tokenizer=None)
    for name in ('meta.json', 'train.bin', 'val.bin'):
        (folder.path / 'data' / 'tiny' / name).unlink()
    (folder.path / 'data' / 'tiny' / 'prepare.py').write_text('')
    folder.sample().refused('no tokenizer in it', 'python data/tiny/prepare.py')
    write_dataset(folder.path / 'data' / 'tiny', [], [], meta='pkl')
    assert len(samples(folder.sample(num_samples=1, max_new_tokens=20))[0]) == 21


def huggingface_folder(path, **changes):
    """A small GPT-2 as transformers would save it, written without it."""
    safetensors_torch = pytest.importorskip('safetensors.torch')
    torch.manual_seed(0)
    config = {'model_type': 'gpt2', 'n_positions': 16, 'n_layer': 1, 'n_head': 1, 'n_embd': 8, 'vocab_size': 50257}
    config.update(changes)
    model = GPT(GPTConfig(16, config['vocab_size'], 1, 1, 8))
    state = {name: t.t().contiguous() if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) else t
             for name, t in model.state_dict().items() if name != 'lm_head.weight'}
    path.mkdir()
    safetensors_torch.save_file(state, path / 'model.safetensors')
    (path / 'config.json').write_text(json.dumps(config))


def test_huggingface_folder(folder):
    huggingface_folder(folder.path / 'small', vocab_size=300)
    folder.sample(init_from='small').refused('small has no tokenizer.json', 'vocab_size of 300')
    folder.sample(init_from='data').refused('data has no config.json')
    whole = (folder.path / 'small' / 'model.safetensors').read_bytes()
    (folder.path / 'small' / 'model.safetensors').write_bytes(whole[:1000])
    folder.sample(init_from='small').refused('small/model.safetensors, 1,000 bytes, cannot be read', 'copy it again')
    huggingface_folder(folder.path / 'gpt2-like')
    run = folder.sample(init_from='gpt2-like', num_samples=1, max_new_tokens=20, start='Hello there')
    if "cannot get the vocabulary 'gpt2'" in run.out:
        pytest.skip("GPT-2's vocabulary cannot be had here")
    text = run.ok().out
    assert 'Hello there' in text and text.endswith('\n---------------\n')


def test_nanogpts_commands(trained):
    """As nanoGPT's README gives them, by python itself."""
    done = subprocess.run([sys.executable, str(ROOT / 'sample.py'), '--out_dir=out', '--device=cpu', '--num_samples=2',
                           '--max_new_tokens=10', '--init_from=resume'],
                          cwd=trained.path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count('---------------') == 2, done.stderr
