"""python -m posttrain.reward: learning, resuming, refusing. Run: pytest tests/test_reward_e2e.py"""

import json

import pytest
import torch
from chat_models import TOKENIZER, make_chats, save_chat_model
from conftest import same_tensors

from flatgpt import lora, pretrained
from posttrain import reward_model
from tokenizer import ByteTokenizer, chat

SMALL = {'init_from': 'chat', 'data': 'pairs.jsonl', 'device': 'cpu', 'dtype': 'float32', 'max_iters': 20,
         'batch_size': 8, 'eval_interval': 10, 'log_interval': 5, 'learning_rate': 3e-3, 'warmup_iters': 2}


@pytest.fixture
def chats(tmp_path):
    return make_chats(tmp_path)


def start(folder, **changes):
    return folder.start('posttrain.reward', **{**SMALL, 'out_dir': 'out', **changes})


def test_learns_and_says_so(chats):
    """From ln 2 and half of the held-out pairs to all; best.pt scores, and no script takes it for a language model."""
    run = start(chats, max_iters=60).ok()
    first, *_, last = [record for record in chats.log() if 'val_loss' in record]
    assert abs(first['val_loss'] - 0.6931) < 1e-4 and first['val_accuracy'] == 0.5
    assert last['val_loss'] < 0.5 and last['val_accuracy'] > 0.95
    assert 'pairs to learn from' in run.out and f'accuracy {last["val_accuracy"]:.1%} (' in run.out
    *_, printed = run.out.partition('lowest val loss')
    assert max(map(len, printed.splitlines())) <= 80
    model, line = reward_model.open_reward_model(str(chats.path / 'out'), TOKENIZER, chat.TEMPLATE)
    assert 'best.pt: step' in line
    ids = [256, 258, *b'7', 261, 259]
    vowels, others = model.scores(torch.tensor([[*ids, *b'aeo', 261], [*ids, *b'abc', 261]]), torch.tensor([9, 9]))
    assert vowels > others
    for script, settings in (('sample.py', {}), ('eval.py', {'input': 'pairs.jsonl'})):
        chats.start(script, out_dir='out', device='cpu', **settings).refused('out/best.pt is a reward model',
                                                                             'is in chat')
    with pytest.raises(ValueError, match='is a reward model'):
        pretrained.base_model(str(chats.path / 'out'))  # what train.py begins with
    with pytest.raises(ValueError, match='is a language model; expected a reward model'):
        reward_model.open_reward_model(str(chats.path / 'chat'), TOKENIZER, chat.TEMPLATE)
    for tokenizer, template, what in ((ByteTokenizer(), chat.TEMPLATE, 'tokenizer'),
                                      (TOKENIZER, chat.TEMPLATE + ' ', 'chat template')):
        with pytest.raises(ValueError, match=f'out has another {what} than the chat model'):
            reward_model.open_reward_model(str(chats.path / 'out'), tokenizer, template)


def state_of(folder, out_dir):
    state = folder.checkpoint(out_dir)
    moments = {f'{i}.{name}': value for i, of in state['optimizer']['state'].items() for name, value in of.items()}
    return {**state['model'], **moments}, {key: state[key] for key in ('iter_num', 'best_val_loss', 'chat_template')}


def test_adapters_score(chats, monkeypatch):
    """They and the head are saved alone; a score is that of the same critic with merged weights."""
    start(chats, lora_rank=4, lora_targets='c_attn', learning_rate=3e-2, max_iters=40).ok()
    accuracies = [record['val_accuracy'] for record in chats.log() if 'val_accuracy' in record]
    assert accuracies[0] == 0.5 and accuracies[-1] > 0.9
    state = chats.checkpoint()
    assert {name.split('.')[-1] for name in state['model']} == {'lora_a', 'lora_b', 'weight', 'bias'}
    monkeypatch.chdir(chats.path)
    judge, _ = reward_model.open_reward_model('out', TOKENIZER, chat.TEMPLATE)
    messages = [{'role': 'user', 'content': '7'}]
    adapted = reward_model.ratings_of(judge, messages, ['aeo', 'bcd'], chat.TEMPLATE, TOKENIZER)
    assert adapted[0] > adapted[1]
    merged = reward_model.ratings_of(lora.merge(judge), messages, ['aeo', 'bcd'], chat.TEMPLATE, TOKENIZER)
    assert merged == pytest.approx(adapted, abs=1e-4)
    start(chats, init_from='resume', lora_rank=2).refused('was trained with lora_rank=4; resume with that')
    start(chats, out_dir='other', optimizer='muon', lora_rank=2).refused("optimizer='muon' does not fit LoRA")
    chats.start('posttrain.rl', init_from='chat', task='vowels', reward_model='out', out_dir='rl', max_iters=1,
                max_new_tokens=4, eval_examples=4, device='cpu').ok()


@pytest.mark.parametrize('changes', [{}, {'optimizer': 'muon'}, {'lora_rank': 4}])
def test_resumes_bit_for_bit(chats, changes):
    """6 steps = 3 + resume 3, with dropout; the rates are constant, so max_iters does not move them."""
    changes = {'dropout': 0.1, 'min_lr': 3e-3, 'log_interval': 1, 'eval_interval': 3, **changes}
    start(chats, out_dir='whole', **changes, max_iters=6).ok()
    start(chats, out_dir='a b', **changes, max_iters=3).ok()
    start(chats, out_dir='a b', **changes, max_iters=6, init_from='resume').ok()
    (tensors, values), (expected, expected_values) = state_of(chats, 'a b'), state_of(chats, 'whole')
    same_tensors(tensors, expected)
    assert values == expected_values
    assert any('momentum_buffer' in name for name in tensors) == ('optimizer' in changes)
    steps = [record['step'] for record in chats.log('a b') if 'loss' in record]
    assert steps == list(range(6))
    config = json.loads((chats.path / 'a b' / 'config.json').read_text())
    assert config['init_from'] == 'chat'  # where the model is from, resumed or not


def test_goes_on_with_the_same_pairs_and_optimizer(chats):
    """Others, or another share of them held out, would mix what it has learnt from with what it is measured by."""
    start(chats, max_iters=1).ok()
    start(chats, init_from='resume', optimizer='muon').refused("out/ckpt.pt is that of 'adamw'", '--optimizer=adamw')
    start(chats, init_from='resume', val_fraction=0.3).refused('out/ckpt.pt held out 0.1', '--val_fraction=0.1')
    with open(chats.path / 'pairs.jsonl', 'a') as file:
        file.write(json.dumps({'messages': [{'role': 'user', 'content': 'a'}], 'chosen': 'b', 'rejected': 'c'}))
    start(chats, init_from='resume').refused('pairs.jsonl is not the file of pairs that out/ckpt.pt learned from')


def test_micro_batches_are_the_same_step(chats):
    """Seen in the losses and gradients: weights of a gradient that is but rounding may move either way."""
    start(chats, out_dir='one', max_iters=4, log_interval=1).ok()
    start(chats, out_dir='four', max_iters=4, log_interval=1, micro_batch_size=2).ok()
    one, four = ([(record['loss'], record['grad_norm']) for record in chats.log(out_dir) if 'loss' in record]
                 for out_dir in ('one', 'four'))
    assert len(one) == 4 and len(set(one)) == 4
    torch.testing.assert_close(torch.tensor(four), torch.tensor(one), atol=0, rtol=1e-3)


@pytest.mark.parametrize('changes, said', [
    ({'data': ''}, ["data='': expected a file of pairs: --data=FILE.jsonl"]),
    ({'data': 'none.jsonl'}, ['none.jsonl cannot be read']),
    ({'optimizer': 'sgd'}, ["optimizer=sgd: expected 'adamw' or 'muon'"]),
    ({'optimizer': 'muon', 'learning_rate': 0.0}, ['learning_rate=0: expected above 0']),
    ({'max_iters': 0}, ['max_iters=0: expected 1 or more']),
    ({'learning_rate': 1e-5}, ['min_lr=3e-05: expected at most learning_rate=1e-05']),
    ({'val_fraction': 1.0}, ['none of the others is in train', '--val_fraction']),
    ({'dtype': 'float16'}, ["dtype=float16: expected 'auto', 'float32' or 'bfloat16'"]),
    ({'out_dir': 'chat'}, ["out_dir='chat': expected another folder"]),
    ({'init_from': 'resume'}, ['no checkpoint at out/ckpt.pt']),
    ({'init_from': 'plain'}, ['the tokenizer of plain has no', '<|assistant|>']),
    ({'learning_rate': 1e30, 'warmup_iters': 0}, ['Stopped without saving']),
])
def test_refuses(chats, changes, said):
    if changes.get('init_from') == 'plain':
        save_chat_model(chats.path, 'plain', tokenizer={'kind': 'byte'}, chat_template=None)
    start(chats, **changes).refused(*said)
    assert not (chats.path / 'out' / 'ckpt.pt').exists()


def test_bad_line(chats):
    with open(chats.path / 'pairs.jsonl', 'a') as file:
        file.write(json.dumps({'messages': [{'role': 'user', 'content': 'a'}], 'chosen': 'b', 'rejected': 'b'}))
    start(chats).refused('pairs.jsonl, line 201: chosen equals rejected')


def test_too_long_pairs_are_counted(chats):
    with open(chats.path / 'pairs.jsonl', 'a') as file:
        file.write(json.dumps({'messages': [{'role': 'user', 'content': 'a'}], 'chosen': 'b' * 90, 'rejected': 'c'}))
    assert '; 1 are longer than 32 tokens, left out' in start(chats, max_iters=1).ok().out
