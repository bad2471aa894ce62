"""python -m posttrain.dpo: learning from pairs, resuming, refusing. Run: pytest tests/test_dpo_e2e.py"""

import math

import pytest
import torch
from chat_models import make_chats
from conftest import same_tensors

SMALL = {'init_from': 'chat', 'pairs': 'pairs.jsonl', 'task': 'vowels', 'device': 'cpu', 'dtype': 'float32',
         'max_new_tokens': 6, 'max_iters': 30, 'prompts_per_step': 8, 'minibatch_size': 8, 'learning_rate': 5e-3,
         'warmup_iters': 0, 'eval_examples': 16, 'eval_interval': 15}


@pytest.fixture
def chats(tmp_path):
    return make_chats(tmp_path)


def start(folder, **changes):
    return folder.start('posttrain.dpo', **{**SMALL, 'out_dir': 'out', **changes})


def steps_of(folder, out_dir='out'):
    return [record for record in folder.log(out_dir) if 'loss' in record]


def test_learns_what_is_preferred(chats):
    """The margin between the implicit rewards grows, held-out pairs and the task's answers come out right."""
    start(chats).ok()
    first, *_, last = steps_of(chats)
    assert abs(first['loss'] - math.log(2)) < 1e-6 and first['margin'] == 0
    assert last['loss'] < 0.3 and last['margin'] > 1 and last['preferred'] > 0.9
    before, *_, after = [record for record in chats.log() if 'val_loss' in record]
    assert after['val_dpo_loss'] < 0.4 and after['val_preferred'] > 0.9
    assert before['val_preferred'] == first['preferred'] == 0.5  # ties: the policy is the reference
    assert after['val_loss'] == 1 - after['val_accuracy']
    start(chats, task='', out_dir='alone', max_iters=2, eval_interval=1).ok()
    alone = [record for record in chats.log('alone') if 'val_loss' in record]
    assert alone[-1]['val_loss'] == alone[-1]['val_dpo_loss'] < alone[0]['val_loss']


def test_resumes_bit_for_bit(chats):
    """4 steps = 2 + resume 2, in the weights, the moments and the log."""
    changes = {'eval_interval': 2, 'minibatch_size': 4}
    start(chats, **changes, max_iters=4, out_dir='whole').ok()
    start(chats, **changes, max_iters=2).ok()
    start(chats, **changes, max_iters=4, init_from='resume').ok()
    whole, parts = chats.checkpoint('whole'), chats.checkpoint()
    assert whole['iter_num'] == parts['iter_num'] == 4
    same_tensors(whole['model'], parts['model'])
    for i, moments in whole['optimizer']['state'].items():
        same_tensors(moments, parts['optimizer']['state'][i])
    logs = [[{key: value for key, value in record.items() if key not in ('ms', 'train_time')}
             for record in chats.log(out_dir)] for out_dir in ('whole', 'out')]
    assert logs[0] == logs[1] and len(logs[0]) == 4 + 3


def test_micro_batches_change_nothing(chats):
    for size in (64, 3):
        start(chats, max_iters=3, eval_interval=3, micro_batch_size=size, out_dir=f'of{size}').ok()
    times = {'ms': 0, 'train_time': 0}
    for whole, parts in zip(steps_of(chats, 'of64'), steps_of(chats, 'of3'), strict=True):
        assert {**whole, **times} == pytest.approx({**parts, **times}, rel=1e-3, abs=1e-5)
    whole, parts = (chats.checkpoint(f'of{size}')['model'] for size in (64, 3))
    for name, weight in whole.items():
        torch.testing.assert_close(weight, parts[name], rtol=1e-3, atol=2e-4)


def test_a_resumed_run_keeps_its_pairs_and_questions(chats):
    """Otherwise best.pt would be chosen by numbers of two kinds."""
    start(chats, max_iters=1).ok()
    start(chats, init_from='resume', val_fraction=0.2).refused('resume with --val_fraction=0.1')
    start(chats, init_from='resume', task='').refused("task='', but out/ckpt.pt is of a run with task='vowels'")
    start(chats, init_from='resume', eval_examples=8).refused('of a run with eval_examples=16; resume with that')
    start(chats, init_from='resume', seed=5).refused('of a run with seed=1337; resume with that')
    run = chats.start('posttrain.rl', init_from='resume', out_dir='out', task='vowels', device='cpu')
    run.refused("algorithm='grpo', but out/ckpt.pt is of a run with algorithm='dpo'")
    (chats.path / 'data' / 'tiny').mkdir(parents=True)
    for split in ('train', 'val'):
        (chats.path / 'data' / 'tiny' / f'{split}.bin').write_bytes(bytes(200))
    chats.train(init_from='resume').refused('python -m posttrain.dpo --init_from=resume --out_dir=out')


@pytest.mark.parametrize('changes, said', [
    ({'pairs': ''}, "pairs='': expected a file of pairs: --pairs=FILE.jsonl"),
    ({'label_smoothing': 0.5}, 'label_smoothing=0.5: expected below 0.5'),
    ({'out_dir': 'chat'}, "out_dir='chat': expected another folder"),
    ({'learning_rate': 1e30}, 'Stopped without saving')])
def test_refuses(chats, changes, said):
    start(chats, **changes).refused(said)
    assert not (chats.path / 'out' / 'ckpt.pt').exists()
