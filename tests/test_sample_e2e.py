"""Run sample.py as its users do. Run: pytest tests/test_sample_e2e.py"""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import CHARS, ROOT, encode, load_or_skip, make_text, write_dataset

from model import GPT, GPTConfig

VOCAB = len(CHARS)


def save(folder, model, out_dir='out', name='ckpt.pt', **changes):
    """A checkpoint of `model` as train.py writes it, as far as sampling needs it."""
    (folder.path / out_dir).mkdir(exist_ok=True)
    torch.save({'version': 1, 'model': model.state_dict(), 'model_args': asdict(model.config), 'iter_num': 7,
                'best_val_loss': 1.25, 'config': {'dataset': 'tiny'},
                'tokenizer': {'kind': 'char', 'chars': ''.join(CHARS)}, **changes}, folder.path / out_dir / name)


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


def test_lookup(trained):
    """Guesses leave the text as it is."""
    texts = [samples(trained.sample(start='the cat', num_samples=1, max_new_tokens=100, slide=8, temperature=t, lookup=n))
             for t in (0, 0.8) for n in (0, 8)]
    assert texts[0] == texts[1] and texts[2] == texts[3]


def test_lookup_is_measured(trained):
    (trained.path / 'text.txt').write_text(make_text(200))
    run = trained.start('bench.lookup', out_dir='out', input='text.txt', n=3, rounds=1, device='cpu').wait().ok()
    figures = json.loads(run.out.splitlines()[-1])
    assert figures['temperature 0.0']['same'] == 3 and figures['temperature 0.0']['ratio']['median'] > 0
    run = trained.start('bench.lookup', out_dir='out', input='text.txt', n=300, rounds=1, device='cpu').wait()
    run.refused('text.txt has 200 tokens: expected')


def test_prompt_longer_than_the_context(trained):
    prompt = make_text(100)
    kw = {'start': prompt, 'num_samples': 1, 'max_new_tokens': 30, 'temperature': 0}
    trained.sample(**kw).refused('the prompt has 100 tokens: expected at most 16', '--crop_prompt=True')
    text, = samples(trained.sample(**kw, crop_prompt=True))
    end, = samples(trained.sample(**{**kw, 'start': prompt[-16:]}))
    assert text == prompt[:-16] + end and len(text) == 130


def test_prompt_from_a_file(trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('the\ncat', encoding='utf-8')
    text, = samples(trained.sample(start=f'FILE:{tmp_path}/prompt.txt', num_samples=1, max_new_tokens=5))
    assert text.startswith('the\ncat') and len(text) == 12
    trained.sample(start=f'FILE:{tmp_path}/none.txt').refused(f'{tmp_path}/none.txt', 'No such file')
    (tmp_path / 'binary').write_bytes(b'\xff\xfa')
    trained.sample(start=f'FILE:{tmp_path}/binary').refused(f'{tmp_path}/binary', 'utf-8')


@pytest.mark.parametrize('settings, said', [
    ({'start': 'the @ é'}, ["'@' (U+0040)", "'é' (U+00E9)"]), ({'start': ''}, ['the prompt is empty']),
    ({'out_dir': 'nowhere'}, ['no checkpoint at nowhere/ckpt.pt', 'python train.py CONFIG --out_dir=nowhere']),
    ({'num_samples': 0}, ['num_samples=0: expected 1 or more']), ({'temperature': -1}, ['temperature=-1: expected 0 or more']),
    ({'top_k': -1}, ['top_k=-1']), ({'top_p': 0}, ['top_p=0: expected']), ({'top_p': 1.5}, ['top_p=1.5']),
    ({'max_new_tokens': -1}, ['max_new_tokens=-1']), ({'which': 'worst'}, ["which=worst: expected 'best', 'last' or int"]),
    ({'init_from': 'gpt5'}, ["'gpt5' is neither a folder nor one of gpt2"]), ({'dtype': 'int4'}, ['dtype=int4: expected']),
    ({'min_p': 1.5}, ['min_p=1.5']), ({'repetition_penalty': 0}, ['repetition_penalty=0: expected above 0']),
    ({'seed': -1}, ['seed=-1']), ({'slide': 0}, ['slide=0']),
    ({'slide': 17}, ['slide=17: expected 1 to 16']), ({'quantize': 'int4'}, ['quantize=int4: expected']),
    ({'quantize': 'int8', 'dtype': 'bfloat16'}, ["dtype='bfloat16': expected 'auto' with --quantize=int8"]),
    ({'compile': 'yes'}, ["compile=yes: expected bool or 'auto'"]),
    ({'regex': 'a', 'choices': 'b'}, ['choices and regex are set: expected only one of']),
    ({'stop': '["a", 1]'}, ['begins like a JSON list']),
    ({'stop': '[INST]'}, ["stop='[INST]' begins like a JSON list"]),
    ({'json_schema': 'none.json'}, ['none.json cannot be read', 'No such file']), ({'number': 3}, ['unknown setting'])])
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
    (tmp_path / 'config.py').write_text("import os\nos.environ['CXX'] = '/bin/false'\n")
    kw = {'start': 'the', 'num_samples': 1, 'max_new_tokens': 30, 'temperature': 0}
    run = trained.start('sample.py', tmp_path / 'config.py', **kw, device='cpu', out_dir='out', compile=True).ok()
    assert re.search(r'WARNING: products.cpp was not compiled \(.*\); continuing without it, slower', run.out)
    text, = samples(trained.sample(**kw))
    assert run.out.endswith(f'\n{text}\n---------------\n')


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
    folder.sample(json_schema=json.dumps(schema), stop=',').refused('json_schema and stop are set', 'no stop')
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
    """A byte model may say what is no UTF-8; its text still prints."""
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    save(folder, model, tokenizer={'kind': 'byte'})
    assert len(samples(folder.sample(start='é🙂', num_samples=2, max_new_tokens=50, temperature=2.0))) == 2


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
    folder.sample().refused('out/best.pt is damaged')
    (folder.path / 'out' / 'best.pt').write_bytes(b'not a checkpoint')
    folder.sample().refused('out/best.pt is damaged')
    state = trained.checkpoint(name='best.pt')
    del state['model']['transformer.ln_f.weight'], state['iter_num']
    torch.save(state, folder.path / 'out' / 'best.pt')
    folder.sample().refused('out/best.pt is no checkpoint', 'it has no iter_num')
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
    load_or_skip('gpt2')
    run = folder.sample(init_from='gpt2-like', num_samples=1, max_new_tokens=20, start='Hello there')
    if "cannot get the vocabulary 'gpt2'" in run.out:
        pytest.skip("GPT-2's vocabulary cannot be had here")
    text = run.ok().out
    assert 'Hello there' in text and text.endswith('\n---------------\n')


def test_nanogpts_commands(folder):
    """As nanoGPT's README gives them, by python itself, in a locale that lacks the characters."""
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    save(folder, model, tokenizer={'kind': 'byte'})
    done = subprocess.run([sys.executable, str(ROOT / 'sample.py'), '--out_dir=out', '--device=cpu', '--num_samples=2',
                           '--max_new_tokens=10', '--init_from=resume', '--start=é'],
                          cwd=folder.path, capture_output=True, env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert done.returncode == 0 and done.stdout.count(b'---------------\n') == 2, done.stderr
