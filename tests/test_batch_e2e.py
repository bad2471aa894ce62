"""Run flatgpt.batch as its users do. Run: pytest tests/test_batch_e2e.py"""

import json
import re
import signal
import time

import pytest
import torch
from conftest import encode, make_text
from test_sample_e2e import samples, save

from model import GPT, GPTConfig
from tokenizer import BPETokenizer


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
            run = trained.batch(**kw, out=out, batch_size=batch_size, temperature=temperature).ok()
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
    trained.start('flatgpt.batch', **kw, out=tmp_path / 'whole.jsonl').ok()
    for number in (signal.SIGKILL, signal.SIGINT):
        run = trained.start('flatgpt.batch', **kw, out=out)
        before = part.read_bytes().count(b'\n') if part.exists() else 0
        while not part.exists() or part.read_bytes().count(b'\n') < before + 3:
            assert run.process.is_alive(), run.out
            time.sleep(0.005)
        run.kill(number).wait()
        assert not out.exists() and part.read_bytes().count(b'\n') < 19
    assert f'stopped by Ctrl-C; the same command continues from {part}' in run.out and 'Traceback' not in run.out
    trained.start('flatgpt.batch', **{**kw, 'seed': 3}, out=out).refused('out.jsonl.part has results of other',
                                                                         'settings')
    write_lines(tmp_path / 'other.jsonl', ASKED)
    trained.start('flatgpt.batch', **{**kw, 'prompts': tmp_path / 'other.jsonl'}, out=out).refused('other prompts')
    whole = read_lines(tmp_path / 'whole.jsonl')
    lines = read_lines(part)
    lines[1]['result'] = {'samples': 'as they were'}
    write_lines(part, lines)
    trained.start('flatgpt.batch', **{**kw, 'batch_size': 7}, out=out).ok()
    result = read_lines(out)
    assert result[lines[1]['line'] - 1].pop('samples') == 'as they were'
    del whole[lines[1]['line'] - 1]['samples']
    for a, b in zip(result, whole, strict=True):
        for one, other in zip(a.get('samples', []), b.get('samples', []), strict=True):
            assert one['text'] == other['text'] and one['tokens'] == other['tokens']
            assert one['logprobs'] == pytest.approx(other['logprobs'], abs=1e-4)
    assert not part.exists()
    trained.start('flatgpt.batch', **kw, out=out).refused('out.jsonl exists already')


@pytest.mark.parametrize('lines, said', [
    (['{"prompt": "the"}', '{"prompt": "the"'], ['line 2: not JSON', 'at character 17']),
    (['["the"]'], ['line 1: ["the"] is not an object']), ([''], ['in.jsonl has no prompts']),
    (['{"prompt": "the"}', '', '{"promt": "the"}'], ['line 3: expected "prompt", "ids" or "messages", the same']),
    (['{"prompt": "the"}', '{"ids": [1]}'], ['line 2: expected "prompt"']),
    (['{"prompt": "a", "ids": [1]}'], ['line 1: expected "prompt"']), (['{"a": "the"}'], ['line 1: expected "prompt"']),
    (['{"prompt": "a"}', '{"prompt": 3}'], ['line 2: "prompt": expected a text']),
    (['{"prompt": ""}'], ['line 1: "prompt" is empty']), (['{"ids": []}'], ['line 1: "ids" is empty']),
    (['{"ids": [1, 99]}'], ['line 1: "ids": expected a list of whole numbers from 0 to']),
    (['{"ids": 3}'], ['line 1: "ids": expected a list']), (['{"ids": [true]}'], ['line 1: "ids": expected a list']),
    (['{"messages": []}'], ['line 1: messages are a list']), (['{"prompt": "é"}'], ['line 1: ', "'é' (U+00E9)"]),
    (['{"prompt": "a", "samples": 1}'], ["line 1: 'samples' is a key of the results"]),
    ([json.dumps({'prompt': WHOLE})], ['line 1: the prompt has 200 tokens', '--crop_prompt=True'])])
def test_prompts_refused(trained, tmp_path, lines, said):
    (tmp_path / 'in.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    trained.batch(prompts=tmp_path / 'in.jsonl', out=tmp_path / 'out.jsonl').refused(*said)
    assert [path.name for path in tmp_path.iterdir()] == ['in.jsonl']


def test_results_that_can_not_be_written(trained, tmp_path):
    write_lines(tmp_path / 'in.jsonl', ASKED)
    kw = {'prompts': tmp_path / 'in.jsonl', 'out': tmp_path / 'nowhere' / 'out.jsonl'}
    trained.batch(**kw).refused('nowhere/out.jsonl cannot be written', 'No such file', 'another --out')


def test_prompts_of_ids_with_votes(trained, tmp_path):
    """Ids are the prompt that they spell."""
    kw = {'num_samples': 3, 'max_new_tokens': 20, 'vote': r'\w+', 'best_of': 2, 'stop': ' '}
    answers = []
    for i, value in enumerate(({'prompt': 'the '}, {'ids': encode('the ').tolist()})):
        write_lines(tmp_path / f'{i}.jsonl', [value])
        trained.batch(prompts=tmp_path / f'{i}.jsonl', out=tmp_path / f'{i}.out', **kw).ok()
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
            folder.batch(**kw, prompts=f'{name}.jsonl', out=f'{name}-{end}').ok()
            result[name], = read_lines(folder.path / f'{name}-{end}')[0]['samples']
        if end:
            assert result['messages'] == {'text': '', 'finish': 'stop', 'tokens': [], 'logprobs': []}
            assert result['ids']['text'] == '<|im_end|>' * 5  # to a prompt it is a token like others
        else:
            assert result['messages'] == result['ids'] and len(result['ids']['tokens']) == 5


def test_logprobs_best_of_and_votes(trained, tmp_path):
    """Log-probabilities are the model's own; the best of 4 has their largest mean; votes are counted."""
    write_lines(tmp_path / 'in.jsonl', [{'prompt': 'the cat'}])

    def result(**settings):
        (tmp_path / 'out').unlink(missing_ok=True)
        trained.batch(prompts=tmp_path / 'in.jsonl', out=tmp_path / 'out', max_new_tokens=8,
                      temperature=1.5, **settings).ok()
        return read_lines(tmp_path / 'out')[0]

    state = trained.checkpoint(name='best.pt')
    model = GPT(GPTConfig(**state['model_args']))
    model.load_state_dict(state['model'])
    means = {}
    for sample in result(num_samples=4, logprobs=True)['samples']:
        assert encode(sample['text']).tolist() == sample['tokens'] and len(sample['text']) == 8
        ids = torch.from_numpy(encode('the cat' + sample['text']))[None]
        logits = model.eval()(ids[:, :-1], ids[:, 1:])[0]
        expected = logits.log_softmax(-1)[0].gather(1, ids[0, 1:, None])[6:, 0]
        assert sample['logprobs'] == pytest.approx(expected.tolist(), abs=1e-3)
        means[sample['text']] = expected.mean().item()
    [best] = result(num_samples=1, best_of=4)['samples']
    assert best['text'] == max(means, key=means.get)

    voted = result(num_samples=4, vote=r'\w')
    letters = [re.findall(r'\w', text)[-1] for text in means]
    by_count = sorted(dict.fromkeys(letters), key=lambda letter: -letters.count(letter))
    assert voted['votes'] == [[letter, letters.count(letter)] for letter in by_count]
    assert voted['answer'] == by_count[0]
    voted = result(num_samples=4, vote='(@)')
    assert voted['votes'] == [] and voted['answer'] is None


@pytest.mark.parametrize('settings, expected', [
    ({'vote': '(a'}, ["vote='(a' is no regular expression"]), ({'batch_size': 0}, ['batch_size=0']),
    ({'best_of': -1}, ['best_of=-1']), ({'out': ''}, ['--prompts=IN.jsonl --out=OUT.jsonl']),
    ({'prompts': ''}, ['--prompts=IN.jsonl --out=OUT.jsonl']), ({'slide': 17}, ['slide=17: expected 1 to 16'])])
def test_refused(trained, settings, expected):
    trained.batch(**{'prompts': 'in.jsonl', 'out': 'out.jsonl', **settings}).refused(*expected)
