"""python -m posttrain.rl: GRPO and PPO on a toy task, resuming, refusing. Run: pytest tests/test_rl_e2e.py"""

import json
import math
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
from chat_models import END, TASK, make_chats, save_chat_model, tiny
from conftest import ROOT, same_tensors, write_dataset
from test_reward_e2e import SMALL as SMALL_REWARD

from flatgpt import checkpoint
from flatgpt.pretrained import build, open_model
from model import GPT, GPTConfig
from posttrain.policy import open_policy

SMALL = {'init_from': 'chat', 'task': 'vowels', 'device': 'cpu', 'dtype': 'float32', 'max_new_tokens': 6,
         'max_iters': 30, 'prompts_per_step': 8, 'group_size': 8, 'minibatch_size': 32, 'learning_rate': 5e-3,
         'critic_lr': 5e-3, 'warmup_iters': 0, 'train_examples': 50, 'eval_examples': 16, 'eval_interval': 15,
         'critic_warmup': 0}
REINFORCE = {'algorithm': 'reinforce', 'minibatch_size': 64}
DR_GRPO = {'reduction': 'constant', 'divide_by_std': False}
LORA = {'lora_rank': 4, 'lora_targets': 'c_attn,lm_head', 'learning_rate': 3e-2}
GRPO_SKIPS = {'algorithm': 'grpo', 'epochs': 2, 'skip_equal': True, 'group_size': 2, 'max_new_tokens': 1}


@pytest.fixture
def chats(tmp_path):
    return make_chats(tmp_path)


def start(folder, **changes):
    return folder.start('posttrain.rl', **{**SMALL, 'out_dir': 'out', **changes})


def steps_of(folder, out_dir='out'):
    return [record for record in folder.log(out_dir) if 'loss' in record]


@pytest.mark.parametrize('changes', [{'algorithm': 'grpo'}, LORA, *(pytest.param(changes, marks=pytest.mark.slow) for changes in (
    {'algorithm': 'ppo'}, REINFORCE, DR_GRPO, {'minibatch_size': 64}))])
def test_what_is_rewarded_becomes_likelier(chats, changes):
    """From 5 of 26 letters to most, away from the reference, with less doubt; greedy answers come out right."""
    run = start(chats, **changes).ok()
    first, *_, last = steps_of(chats)
    assert first['reward'] < 0.3 and last['reward'] > 0.6
    assert first['kl'] == 0 < last['kl'] and abs(first['entropy'] - math.log(27)) < 0.1 > last['entropy'] - 2.5
    assert 1 <= first['length'] <= 6 and {'accuracy', 'grad_norm', 'lr'} <= first.keys()
    # the first update of a step is of the policy that drew the answers; the second one is not
    assert any(record.get('clipped') for record in steps_of(chats)) == (changes.get('minibatch_size') != 64)
    assert ('value_loss' in first) == (changes.get('algorithm') == 'ppo')
    evaluations = [record for record in chats.log() if 'val_accuracy' in record]
    assert [record['step'] for record in evaluations] == [0, 15, 30]
    assert evaluations[0]['val_accuracy'] == 0 and evaluations[-1]['val_accuracy'] > 0.8
    *_, printed = run.out.partition('lowest val loss')
    assert max(map(len, printed.splitlines())) <= 80
    assert chats.checkpoint(name='best.pt')['best_val_loss'] == 1 - max(e['val_accuracy'] for e in evaluations)
    shown = chats.sample(start='a', num_samples=1, max_new_tokens=3).ok().out  # a checkpoint like any other
    assert ', share of wrong answers 0.' in shown and 'val loss' not in shown


@pytest.mark.slow
def test_learned_reward(chats):
    """Pairs -> reward model -> PPO: the true checker finds more of the answers right, too."""
    chats.start('posttrain.reward', **{**SMALL_REWARD, 'out_dir': 'judge', 'max_iters': 40, 'batch_size': 16}).ok()
    run = start(chats, algorithm='ppo', reward_model='judge', critic_warmup=5, max_iters=35).ok()
    assert 'reward model: judge/best.pt' in run.out
    first, *_, last = steps_of(chats)
    assert last['reward'] > first['reward'] + 0.5
    assert first['accuracy'] < 0.2 and last['accuracy'] > 0.5
    # an answer that was cut off has one token more there, and the shortest prompts have 7
    start(chats, reward_model='judge', max_new_tokens=25, max_iters=1).refused('in a context of 31 tokens')
    start(chats, reward_model='judge', max_new_tokens=24, max_iters=1).ok()
    save_chat_model(chats.path, 'other', tokenizer={'kind': 'byte'}, chat_template='{{ messages[0].content }}')
    start(chats, reward_model='other').refused('other/ckpt.pt is a language model; expected a reward model')


@pytest.mark.parametrize('changes', [GRPO_SKIPS, {'algorithm': 'ppo'}, {**REINFORCE, **LORA}])
def test_resumes_bit_for_bit(chats, changes):
    """4 steps = 2 + resume 2; and what the log says of them."""
    changes = {**changes, 'eval_interval': 2}
    start(chats, **changes, max_iters=4, out_dir='whole').ok()
    start(chats, **changes, max_iters=2).ok()
    start(chats, **changes, max_iters=4, init_from='resume').ok()
    whole, parts = chats.checkpoint('whole'), chats.checkpoint()
    assert whole['iter_num'] == parts['iter_num'] == 4
    for key in ('model', 'value_model') if changes['algorithm'] == 'ppo' else ('model',):
        same_tensors(whole[key], parts[key])
    for key in ('optimizer', 'value_optimizer') if changes['algorithm'] == 'ppo' else ('optimizer',):
        for i, moments in whole[key]['state'].items():
            same_tensors(moments, parts[key]['state'][i])
    logs = [[{key: value for key, value in record.items() if key not in ('ms', 'train_time')}
             for record in chats.log(out_dir)] for out_dir in ('whole', 'out')]
    assert logs[0] == logs[1] and len(logs[0]) == 4 + 3


@pytest.mark.parametrize('changes', [{'algorithm': 'grpo', 'kl_coef': 0.5, 'clip': 0.02}, {'algorithm': 'ppo'},
                                     REINFORCE, {'reduction': 'token-mean', 'kl_coef': 0.5}, DR_GRPO])
def test_micro_batches_change_nothing(chats, changes):
    changes = {'minibatch_size': 32, **changes, 'max_iters': 3, 'eval_interval': 3}
    for size in (64, 5):
        start(chats, **changes, micro_batch_size=size, rollout_batch_size=size, out_dir=f'of{size}').ok()
    times = {'ms': 0, 'train_time': 0}
    for whole, parts in zip(steps_of(chats, 'of64'), steps_of(chats, 'of5'), strict=True):
        assert {**whole, **times} == pytest.approx({**parts, **times}, rel=1e-3, abs=1e-5)
    whole, parts = (chats.checkpoint(f'of{size}')['model'] for size in (64, 5))
    for name, weight in whole.items():
        torch.testing.assert_close(weight, parts[name], rtol=1e-3, atol=2e-4)


def test_groups_of_equal_answers_are_skipped(chats):
    """They have no share in the gradient, but in the mean that it is of; without others nothing is learnt."""
    changes = {'group_size': 2, 'max_new_tokens': 1, 'kl_coef': 0.0, 'minibatch_size': 16, 'max_iters': 1}
    norms = []
    for skip_equal in (False, True):
        start(chats, **changes, skip_equal=skip_equal, out_dir=f'skips{skip_equal}').ok()
        norms.append(steps_of(chats, f'skips{skip_equal}')[0]['grad_norm'])
    n_kept = 16 * norms[0] / norms[1]
    assert 2 <= n_kept < 15 and n_kept == pytest.approx(2 * round(n_kept / 2), abs=0.01)
    (chats.path / 'tasks' / 'vowels.py').write_text(f'{TASK}\n\ndef reward(example, text):\n    return 1.0\n')
    start(chats, **{**changes, 'max_iters': 2, 'weight_decay': 0.1}, skip_equal=True).ok()
    same_tensors(chats.checkpoint()['model'], chats.checkpoint('chat')['model'])


def test_adapters_learn_beside_a_base_that_is_the_reference(chats, monkeypatch):
    """A checkpoint holds the adapters alone; without them the policy has the base's log-probabilities."""
    run = start(chats, **LORA, max_iters=3, eval_interval=3).ok()
    assert f'{4 * (2 * (32 + 96) + 32 + 266):,} of them are trained' in run.out  # rank * (inputs + outputs)
    state, base = chats.checkpoint(), chats.checkpoint('chat')
    assert sorted(state['model']) == sorted(f'{layer}.lora_{part}' for part in 'ab' for layer in (
        'lm_head', 'transformer.h.0.attn.c_attn', 'transformer.h.1.attn.c_attn'))
    monkeypatch.chdir(chats.path)
    policy = open_policy({'init_from': 'chat'}, checkpoint.load('out/ckpt.pt'), 'out/ckpt.pt', 'cpu', nullcontext())
    whole = build(GPT, base, 'chat/ckpt.pt', 0.0).eval()
    batch = torch.randint(256, (3, 9)), torch.arange(9) >= torch.tensor([[3], [5], [8]])
    with torch.no_grad():
        expected, _ = policy.logprobs(whole, *batch)
        assert torch.equal(policy.reference_logprobs(*batch), expected) and expected.any()
        learned, _ = policy.logprobs(policy.model, *batch)
        merged, _ = policy.logprobs(open_model('resume', 'out', 'last')[0], *batch)
    assert policy.reference is None and (learned - expected).abs().max() > 0.01
    torch.testing.assert_close(merged, learned, rtol=1e-4, atol=1e-5)


def test_adapters_that_are_refused(chats):
    start(chats, algorithm='ppo', **LORA).refused('lora_rank=4: expected 0 with algorithm=ppo, whose value function')
    start(chats, lora_alpha=3.0).refused('lora_alpha needs --lora_rank')
    start(chats, **LORA, lora_bits=8, max_iters=1).ok()
    start(chats, init_from='resume', max_iters=2).ok()  # what the checkpoint has need not be given
    assert chats.checkpoint()['lora']['bits'] == 8 and chats.checkpoint()['iter_num'] == 2
    start(chats, init_from='resume', lora_rank=8).refused('was trained with lora_rank=4; resume with that')


def test_rewards_of_a_form(chats):
    """Of a model that always answers <answer>e</answer>: it attends to nothing, and each position has its token."""
    answer, prompt_length = [*b'<answer>e</answer>', END], 7
    model = tiny(n_embd=32, tie_embeddings=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(32))
        model.transformer.ln_f.weight.fill_(1.0)
        model.lm_head.weight[answer, torch.arange(len(answer)) + prompt_length - 1] = 9.0
    save_chat_model(chats.path, 'tags', model=model.state_dict(), model_args=asdict(model.config))
    (chats.path / 'tasks' / 'tags.py').write_text(TASK.replace("f'{split[0]} {i}'", "f'{split[0]}{i:02}'"))
    means = []
    for form in ('any', 'boxed', 'answer'):
        start(chats, init_from='tags', task='tags', answer_form=form, form_reward=0.5, max_new_tokens=25, max_iters=1).ok()
        means.append(steps_of(chats)[0]['reward'])
    assert means == pytest.approx([5 / 18, 5 / 18, 5 / 18 + 0.5])  # vowels


def test_recipe_for_gsm8k(chats):
    """With a tiny model in place of the published one."""
    save_chat_model(chats.path, 'long', block_size=128)
    (chats.path / 'train.jsonl').write_text(''.join(json.dumps(
        {'question': f'What is {i} + 1?', 'answer': f'#### {i + 1}'}) + '\n' for i in range(60)))
    chats.start('posttrain.rl', ROOT / 'config' / 'dr_grpo_gsm8k.py', input='train.jsonl', init_from='long', out_dir='out',
                max_iters=1, max_new_tokens=8, prompts_per_step=2, group_size=2, device='cpu').ok()
    config = chats.checkpoint()['config']
    assert (config['reduction'], config['divide_by_std'], config['answer_form']) == ('constant', False, 'boxed')


@pytest.mark.parametrize('script', ['rl', 'reward'])
def test_wandb_offline(chats, script):
    pytest.importorskip('wandb')
    settings = {**(SMALL if script == 'rl' else SMALL_REWARD), 'out_dir': 'out', 'max_iters': 2, 'wandb_log': True}
    env = {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true', 'WANDB_DIR': str(chats.path)}
    chats.start(f'posttrain.{script}', **settings, env=env).wait(90).ok()
    runs = list((chats.path / 'wandb').glob('offline-run-*/run-*.wandb'))
    assert len(runs) == 1 and b'val_accuracy' in runs[0].read_bytes()
    assert chats.checkpoint()['wandb_id'] in runs[0].name


def test_the_value_function_learns_first(chats):
    """The policy stays what it was for as long as critic_warmup says."""
    start(chats, algorithm='ppo', critic_warmup=2, max_iters=2).ok()
    same_tensors(chats.checkpoint()['model'], chats.checkpoint('chat')['model'])
    assert chats.checkpoint()['value_model']['value_head.weight'].any()
    start(chats, algorithm='ppo', critic_warmup=2, max_iters=3, init_from='resume').ok()
    before, after = (chats.checkpoint(out_dir)['model']['lm_head.weight'] for out_dir in ('chat', 'out'))
    assert not torch.equal(before, after)


def test_signal_saves_and_says_how_to_go_on(chats):
    run = start(chats, max_iters=500, eval_interval=500, out_dir='a b')
    run.wait_for('iter 3:')
    stopped, settings = run.stop()
    assert 3 < stopped < 500 and chats.checkpoint('a b')['iter_num'] == stopped
    chats.start('posttrain.rl', **{**settings, 'max_iters': stopped + 1}).ok()
    assert [record['step'] for record in steps_of(chats, 'a b')] == list(range(stopped + 1))


def test_reference_must_be_the_same(chats):
    start(chats, max_iters=1).ok()
    resumed = start(chats, init_from='resume', algorithm='ppo')
    resumed.refused("algorithm='ppo', but out/ckpt.pt is of a run with algorithm='grpo'")
    state = chats.checkpoint('chat')
    state['model']['transformer.ln_f.weight'] *= 2
    torch.save(state, chats.path / 'chat' / 'ckpt.pt')
    start(chats, init_from='resume').refused('began with the model that was in chat, which now has other weights')
    start(chats, init_from='resume', out_dir='chat').refused('chat/ckpt.pt is a language model of another script')


def test_a_run_is_not_gone_on_with_by_train(chats):
    """Which would take the share of wrong answers for a loss, and overwrite it."""
    write_dataset(chats.path / 'data' / 'tiny', [0, 1] * 50, [1, 0] * 20)
    start(chats, max_iters=1).ok()
    before = (chats.path / 'out' / 'ckpt.pt').read_bytes()
    chats.train(init_from='resume', max_iters=3).refused('out/ckpt.pt is a run of posttrain.rl',
                                                         'python -m posttrain.rl --init_from=resume --out_dir=out')
    assert (chats.path / 'out' / 'ckpt.pt').read_bytes() == before


def test_the_best_is_one_that_was_saved(chats):
    """A model that is right from the start, and is rewarded for what is wrong."""
    (chats.path / 'tasks' / 'forgets.py').write_text(TASK.replace('> 0.5', '< 0.5'))
    start(chats, task='forgets', max_iters=20, eval_interval=10).ok()
    of_steps = {record['step']: record['val_accuracy'] for record in chats.log() if 'val_accuracy' in record}
    assert of_steps[0] > max(of_steps[10], of_steps[20])
    assert chats.checkpoint(name='best.pt')['best_val_loss'] == pytest.approx(1 - max(of_steps[10], of_steps[20]))


def test_rewards_must_be_the_same(chats):
    for seed, judge in enumerate(('judge', 'other')):
        chats.start('posttrain.reward', **{**SMALL_REWARD, 'out_dir': judge, 'max_iters': 1, 'seed': seed}).ok()
    start(chats, init_from='resume', out_dir='judge').refused('judge/ckpt.pt is a reward model')
    start(chats, reward_model='judge', max_iters=1).ok()
    for reward_model in ('other', ''):
        run = start(chats, reward_model=reward_model, init_from='resume')
        run.refused('out/ckpt.pt was rewarded by the reward model that was in judge, not by',
                    f'reward_model={reward_model!r}')


def test_the_held_out_questions_must_be_the_same(chats):
    """Otherwise best.pt would be chosen by numbers of two kinds."""
    start(chats, max_iters=1).ok()
    start(chats, init_from='resume', eval_examples=8).refused('of a run with eval_examples=16; resume with that')
    start(chats, init_from='resume', max_new_tokens=5).refused('of a run with max_new_tokens=6; resume with that')
    path = chats.path / 'tasks' / 'vowels.py'
    path.write_text(path.read_text().replace('split[0]', 'split[-1]'))
    start(chats, init_from='resume').refused('task=vowels: the val questions are not those that chose best.pt')


def test_out_of_memory_says_how_to_go_on(chats):
    """As torch says it, here in the middle of a step."""
    (chats.path / 'tasks' / 'hungry.py').write_text(TASK.replace('reward(example, text) > 0.5', 'False').replace(
        '    return sum', "    import torch\n    raise torch.OutOfMemoryError('out of memory')\n    return sum"))
    start(chats, task='hungry').refused('out of memory at step 0', 'The same steps in smaller pieces:\n  python ',
                                        '--micro_batch_size=16 --rollout_batch_size=32')
    start(chats, task='hungry', micro_batch_size=1, rollout_batch_size=1).refused('Not even one answer fits')


def test_broken_rewards_are_not_learnt_from(chats):
    path = chats.path / 'tasks' / 'vowels.py'
    (chats.path / 'tasks' / 'broken.py').write_text(path.read_text() + '\n\ndef reward(example, text):\n'
                                                    "    return float('nan')\n")
    start(chats, task='broken').refused('step 0: reward() of tasks/broken.py returned nan for an answer')
    assert not (chats.path / 'out' / 'ckpt.pt').exists()
    start(chats, reward_model='nowhere').refused(
        'there is no reward model in nowhere; train one: python -m posttrain.reward')


def test_broken_weights_are_not_saved(chats):
    start(chats, learning_rate=1e30).refused('Stopped without saving', 'Try a lower --learning_rate')
    assert not (chats.path / 'out' / 'ckpt.pt').exists()


@pytest.mark.parametrize('changes, said', [
    ({'algorithm': 'trpo'}, "algorithm=trpo: expected 'grpo', 'reinforce' or 'ppo'"),
    ({'algorithm': 'reinforce', 'divide_by_std': False}, 'divide_by_std=False: expected --algorithm=grpo'),
    ({'algorithm': 'reinforce', 'epochs': 2}, 'epochs=2: expected 1 for reinforce'),
    ({'algorithm': 'reinforce', 'group_size': 1}, 'group_size=1: expected 2 or more for reinforce'),
    ({'reduction': 'sum'}, 'reduction=sum: expected'),
    ({'task': ''}, "task='': expected the name of a task"),
    ({'task': 'none'}, "there is no task 'none'"),
    ({'algorithm': 'ppo', 'skip_equal': True}, 'skip_equal=True: expected --algorithm=grpo'),
    ({'group_size': 1}, 'group_size=1: expected 2 or more for grpo'),
    ({'lam': 1.5}, 'lam=1.5: expected at least 0 and at most 1'),
    ({'out_dir': 'chat'}, "out_dir='chat': expected another folder"),
    ({'max_new_tokens': 30}, 'prompt has room in a context of 32 tokens with max_new_tokens=30; lower that'),
    ({'init_from': 'resume'}, 'no checkpoint at out/ckpt.pt'),
    ({'init_from': 'plain'}, 'the tokenizer of plain has no'),
    ({'init_from': 'endless'}, 'ends an answer with no special token'),
])
def test_refuses(chats, changes, said):
    if changes.get('init_from') in ('plain', 'endless'):
        with_bytes = GPT(GPTConfig(block_size=32, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
        template = '{{ messages[0].content }}' if changes['init_from'] == 'endless' else None
        save_chat_model(chats.path, changes['init_from'], model=with_bytes.state_dict(),
                        model_args=vars(with_bytes.config), tokenizer={'kind': 'byte'}, chat_template=template)
    start(chats, **changes).refused(said)
    assert not (chats.path / 'out').exists()


def test_what_a_tool_says_is_not_learnt(chats):
    """A model that calls all the time: of its answers only what it drew itself counts."""
    save_chat_model(chats.path, 'calls', block_size=256, words=['<|python|>', '<|python_end|>'])
    for algorithm in ('grpo', 'ppo'):
        lengths = []
        for tools in (False, True):
            start(chats, init_from='calls', algorithm=algorithm, tools=tools, max_iters=1, max_new_tokens=16).ok()
            lengths.append(steps_of(chats)[0]['length'])
        assert lengths[1] < lengths[0] - 2  # an 'error', or a number, between two marks


def test_a_split_without_questions(chats):
    task = chats.path / 'tasks' / 'vowels.py'
    task.write_text(TASK.replace('range(n)', "range(n * (split != 'val'))"))
    start(chats, kinds='easy').refused("task=vowels: there is no val question of kinds='easy'")


def test_long_prompts_are_counted(chats):
    """Those that leave too little room for an answer are left out, and the run says how many."""
    task = chats.path / 'tasks' / 'vowels.py'
    task.write_text(TASK.replace("f'{split[0]} {i}'", "'x' * i"))
    assert '27 of 50 train prompts are longer than the 26 tokens' in start(chats, max_iters=1).ok().out
