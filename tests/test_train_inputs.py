"""What train.py refuses, and the models and data that it takes. Run: pytest tests/test_train_inputs.py"""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    CHARS,
    ROOT,
    TINY,
    copy_scripts,
    encode,
    losses,
    make_text,
    same_state,
    write_dataset,
)

from data import tokens
from model import GPT, GPTConfig

# refusals -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('changes, said', [
    ({'batchsize': 4}, ["unknown setting 'batchsize' (--help lists all); did you mean 'batch_size'?"]),
    ({'batch_size': 'four'}, ["--batch_size=four: expected int"]),
    ({'n_embd': 18, 'n_head': 4}, ['n_embd=18 is not divisible by n_head=4']),
    ({'dropout': 1.5}, ['dropout=1.5']), ({'batch_size': 0}, ['batch_size=0: expected 1 or more']),
    ({'eval_interval': 0}, ['eval_interval=0: expected 1 or more']),
    ({'total_batch_size': -64}, ['total_batch_size=-64']), ({'grad_clip': -1.0}, ['grad_clip=-1.0']),
    ({'beta2': 1.0}, ['beta2=1.0']), ({'max_iters': -1}, ['max_iters=-1']),
    ({'dataset': 'novel'}, ['no dataset in data/novel', 'Datasets here: tiny', 'prepare.py --input=FILE --name=novel']),
    ({'backend': 'foo'}, ["backend=foo: expected 'auto', 'nccl' or 'gloo'"]),
    ({'lr_schedule': 'linear'}, ["lr_schedule=linear: expected 'cosine' or 'wsd'"]),
    ({'preset': 'gpt3'}, ["preset=gpt3: expected 'gpt2', 'llama' or 'modern'"]),
    ({'optimizer': 'sgd'}, ["optimizer=sgd: expected 'adamw' or 'muon'"]), ({'momentum': 1.0}, ['momentum=1.0']),
    ({'optimizer': 'muon', 'learning_rate': 0.0}, ["learning_rate=0: expected above 0 with optimizer=muon"]),
    ({'learning_rate': 1e-4}, ['min_lr=0.001: expected at most learning_rate=0.0001']),
    ({'muon_lr': -1.0}, ['muon_lr=-1.0']), ({'n_kv_head': 3}, ['n_kv_head=3: expected a divisor of n_head=2']),
    ({'window_pattern': 'long'}, ["window_pattern='long'"]), ({'pos': 'sine'}, ["pos=sine: expected 'learned' or"]),
    ({'lr_decay_iters': 1}, ['lr_decay_iters=1: expected at least warmup_iters=2']),
    ({'dtype': 'float8'}, ["dtype=float8: expected 'auto', 'float32', 'bfloat16' or 'float16'"]),
    ({'device': 'gpu'}, ["device='gpu' is no device"]), ({'compile': 'maybe'}, ['compile=maybe: expected bool']),
    ({'init_from': 'gpt3'}, ["init_from='gpt3': expected 'scratch'", 'hub id']),
    ({'init_from': 'resume'}, ['no checkpoint at out/ckpt.pt', 'python train.py CONFIG --out_dir=out']),
    ({'block_size': 400}, ['val.bin has 333 tokens, fewer than block_size + 1 = 401', '--block_size=332'])])
def test_refused(folder, changes, said):
    folder.train(**changes).refused(*said)
    assert not (folder.path / 'out').exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_cuda_without_a_gpu(folder):
    folder.train(device='cuda').refused("device='cuda'", 'no CUDA GPU', '--device=cpu')


@pytest.mark.parametrize('changes, two', [
    ({'total_batch_size': 100}, False), ({'total_batch_size': 5}, False),
    ({'total_batch_size': 16 * 7, 'batch_size': 3}, False), ({'total_batch_size': 16 * 3}, True)])
def test_batch_suggestions_work(folder, changes, two):
    """Batch sizes that do not divide are refused, with others, which do."""
    settings, suggestions = {**changes, 'max_iters': 1}, []
    while True:
        runs = folder.start_two(**settings) if two else [folder.start_train(**settings)]
        if [run.wait().code for run in runs] == [0] * len(runs):
            break
        said = runs[0].refused('not a whole number').out
        suggestions.append(re.search(r'try --(\w+)=(\d+)', said).groups())
        settings.update([suggestions[-1]])
        assert len(suggestions) <= 2, said  # the total first, then its pieces
    assert suggestions


def test_out_dir_that_can_not_be_written(folder):
    (folder.path / 'file').write_text('')
    folder.train(out_dir='file').refused("out_dir='file' cannot be written", '--out_dir')
    folder.train(out_dir='file/out').refused("out_dir='file/out' cannot be written")
    if os.geteuid() != 0:  # root may write everywhere
        (folder.path / 'locked').mkdir(mode=0o500)
        folder.train(out_dir='locked').refused("out_dir='locked' cannot be written")


def test_architecture_of_a_resumed_run(tiny_run):
    before = (tiny_run.path / 'out' / 'ckpt.pt').read_bytes()
    for key, value in (('n_layer', 3), ('n_head', 4), ('n_embd', 32), ('bias', True)):
        tiny_run.train(init_from='resume', **{key: value}).refused(f'{key}={value}, but out/ckpt.pt has {key}=')
    tiny_run.train(init_from='resume', block_size=32).refused(
        'block_size=32: expected at most 16, the positions of the model of --init_from=resume')
    assert (tiny_run.path / 'out' / 'ckpt.pt').read_bytes() == before
    left_out = {'n_layer': None, 'n_head': None, 'n_embd': None, 'block_size': None}  # then the checkpoint's apply
    tiny_run.train(init_from='resume', max_iters=22, **left_out).ok()
    assert tiny_run.checkpoint()['model_args']['n_layer'] == 2 and tiny_run.checkpoint()['iter_num'] == 22


def test_preset(folder):
    """It sets what is not set, in whatever order; and a run of it is resumed, lengthened, and sampled from as any."""
    (folder.path / 'config.py').write_text("qk_norm = False\npreset = 'modern'\n")
    folder.train('config.py', logit_softcap=7, lr_decay_iters=None).ok()
    config, args = json.loads((folder.path / 'out' / 'config.json').read_text()), folder.checkpoint()['model_args']
    assert args['vocab_size'] == len(CHARS) and all(args[name] == config[name] for name in args.keys() & config.keys())
    assert (args['pos'], args['norm'], args['mlp'], args['tie_embeddings']) == ('rope', 'rmsnorm', 'swiglu', False)
    assert (args['qk_norm'], args['logit_softcap']) == (False, 7.0)  # given in the file, on the command line
    assert (config['optimizer'], config['learning_rate'], config['lr_schedule']) == ('muon', 1e-2, 'wsd')
    resume = {'init_from': 'resume', 'max_iters': 22}
    folder.train('config.py', pos='learned', **resume).refused(
        'pos=learned, but out/ckpt.pt has pos=rope, and its weights fix that. Leave it out')
    folder.train(preset='modern', **resume).refused('qk_norm=True, but out/ckpt.pt has qk_norm=False',
                                                    'It comes from --preset=modern', 'config/shakespeare_char_classic.py')
    folder.train(**resume).refused(
        "optimizer='adamw', but the state in out/ckpt.pt is that of 'muon'", '--optimizer=muon')
    run = folder.train(optimizer='muon', block_size=32, **resume).ok()  # the architecture is the checkpoint's
    # what is given of it may be impossible with the defaults of what is not
    folder.start('train.py', out_dir='out', dataset='tiny', optimizer='muon', device='cpu', init_from='resume',
                 n_layer=2, n_embd=16, eval_only=True).ok()
    assert 'the context changes from 16 to 32 tokens' in run.out and list(losses(run)[0]) == [20, 21]
    assert folder.checkpoint()['model_args'] == {**args, 'block_size': 32}
    assert len(folder.sample(num_samples=1, max_new_tokens=50).ok().out) > 50  # past the end of the context


@pytest.mark.slow
def test_extended_context(folder):
    """A model of a run reads on with YaRN's rotation, in a run that resumes; others are refused."""
    rope = {'pos': 'rope', 'optimizer': 'adamw'}
    folder.train(**rope).ok()
    longer = {**rope, 'out_dir': 'longer', 'extend_context': 64, 'batch_size': 2, 'eval_iters': 2}
    run = folder.train(**{**longer, 'init_from': 'out', 'max_iters': 2}).ok()
    assert 'the context changes from 16 to 64 tokens' in run.out
    args = folder.checkpoint('longer')['model_args']
    assert args['block_size'] == 64 and args['rope_scaling'] == {
        'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16, 'beta_fast': 32.0,
        'beta_slow': 1.0, 'attention_factor': 0.1 * math.log(4) + 1}
    folder.train(**{**longer, 'init_from': 'resume', 'max_iters': 3}).ok()
    assert folder.checkpoint('longer')['model_args'] == args
    folder.train(**{**longer, 'init_from': 'longer', 'out_dir': 'b', 'extend_context': 48, 'max_iters': 2}).refused(
        'extend_context=48: expected above 64, the context of --init_from=longer')
    folder.train(**{**longer, 'out_dir': 'c'}).refused('extend_context=64: expected the model of another run')


def test_options_of_pretrained_weights(folder):
    """Weights fix the architecture: finetuning takes the optimizer that is asked for, and no other architecture."""
    transformers = pytest.importorskip('transformers')
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(CHARS), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
    )).save_pretrained(folder.path / 'hf')
    folder.train(init_from='hf', pos='rope').refused('pos=rope, but hf has pos=learned', 'Leave it out')
    folder.train(init_from='hf', preset='llama').refused('but hf has')
    run = folder.train(init_from='hf', optimizer='muon', max_iters=10).ok()  # n_layer=2, of the settings, passed over
    _, evals = losses(run)
    assert evals[10][1] < evals[0][1] - 0.3 and folder.checkpoint()['model_args']['n_layer'] == 1


def test_modern_learns(folder):
    """What the preset is for: in the same steps a lower loss than GPT-2's architecture and AdamW reach."""
    sizes = {'max_iters': 100, 'eval_interval': 100, 'n_embd': 32, 'lr_decay_iters': 100, 'log_interval': 100}
    found = {}
    for preset in ('gpt2', 'modern'):
        given = {'learning_rate': None, 'warmup_iters': None, 'min_lr': None} if preset == 'modern' else {}
        run = folder.train(out_dir=preset, preset=preset, **sizes, **given).ok()
        found[preset] = losses(run)[1][100][1]
    assert found['modern'] < found['gpt2'] - 0.2


def test_large_vocabularies_are_padded(folder):
    """To a multiple of 64, and that shows nowhere: ids of the padding are neither taken from the data nor drawn."""
    chars = [chr(0x4E00 + i) for i in range(1100)]
    ids = np.random.default_rng(0).integers(0, 1100, 2000)
    write_dataset(folder.path / 'data' / 'tiny', ids, ids[:300], chars=chars)
    folder.train(max_iters=2, eval_interval=2).ok()
    state = folder.checkpoint()
    assert state['model_args']['vocab_size'] == 1152 and state['model']['transformer.wte.weight'].shape == (1152, 16)
    text = folder.sample(num_samples=1, start=chars[0], max_new_tokens=300, temperature=100.0, top_k=None).ok().out
    assert len(set(text) & set(chars)) > 100
    folder.train(init_from='resume', max_iters=4).ok()
    # a checkpoint whose vocabulary was not padded
    model = GPT(GPTConfig(**{**state['model_args'], 'vocab_size': 1100}))
    torch.save({**{key: value for key, value in state.items() if key != 'optimizer'}, 'model': model.state_dict(),
                'model_args': {**state['model_args'], 'vocab_size': 1100}}, folder.path / 'out' / 'ckpt.pt')
    folder.train(init_from='resume', max_iters=3).ok()
    assert folder.checkpoint()['model_args']['vocab_size'] == 1100
    write_dataset(folder.path / 'data' / 'tiny', np.append(ids, 1100), ids[:300], chars=chars)
    folder.train(out_dir='new', eval_first=False, max_iters=20).refused('has id 1100', 'vocab_size=1100')
    write_dataset(folder.path / 'data' / 'tiny', ids, ids[:300], meta=None)
    (folder.path / 'data' / 'tiny' / 'meta.json').unlink()
    folder.train(init_from='resume', max_iters=4).ok()


def test_smaller_block_size_crops(tiny_run):
    before = tiny_run.checkpoint()
    run = tiny_run.train(init_from='resume', block_size=8, max_iters=24, eval_interval=2).ok()
    after = tiny_run.checkpoint()
    assert list(losses(run)[0]) == [20, 21, 22, 23] and after['model_args']['block_size'] == 8
    moved = (after['model']['transformer.wpe.weight'] - before['model']['transformer.wpe.weight'][:8]).abs().max()
    assert after['model']['transformer.wpe.weight'].shape == (8, 16) and 0 < moved < 0.1
    assert after['optimizer']['state'][1]['exp_avg'].shape == (8, 16) and after['optimizer']['state'][1]['step'] == 24
    tiny_run.train(init_from='resume', block_size=8, max_iters=26).ok()


def test_bad_checkpoints(tiny_run):
    path = tiny_run.path / 'out' / 'ckpt.pt'
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    tiny_run.train(init_from='resume').refused('out/ckpt.pt is damaged or truncated', 'best.pt')
    tiny_run.train(init_from='auto').refused('out/ckpt.pt is damaged or truncated')
    assert path.read_bytes() == whole[:-1000]
    shutil.copy(tiny_run.path / 'out' / 'best.pt', path)  # what the message says
    state = tiny_run.checkpoint()
    for change, said in (
            (lambda s: s.pop('iter_num'), 'out/ckpt.pt is no checkpoint'),
            (lambda s: s['model'].pop('transformer.ln_f.weight'), '"transformer.ln_f.weight"'),
            (lambda s: s['model'].update(extra=torch.zeros(1)), '"extra"'),
            (lambda s: s['model_args'].update(n_layer=1), 'transformer.h.1.ln_1.weight'),
            (lambda s: s['model_args'].update(block_size=8), 'transformer.wpe.weight')):
        changed = {**state, 'model': dict(state['model']), 'model_args': dict(state['model_args'])}
        change(changed)
        torch.save(changed, path)
        tiny_run.train(init_from='resume', max_iters=21).refused('out/ckpt.pt', said)
    torch.save(state, path)
    tiny_run.train(init_from='resume', max_iters=21).ok()


def test_other_tokenizer(tiny_run):
    write_dataset(tiny_run.path / 'data' / 'other', encode(make_text(500)), encode(make_text(100)), chars=CHARS[::-1])
    tiny_run.train(init_from='resume', dataset='other').refused('another tokenizer', '--dataset=tiny')


# data -----------------------------------------------------------------------------------------------------------------

def test_bad_data(folder):
    tiny = folder.path / 'data' / 'tiny'
    (tiny / 'prepare.py').write_text('')  # there are .bin files: named, not run
    train = (tiny / 'train.bin').read_bytes()
    (tiny / 'train.bin').write_bytes(train[:-6])
    folder.train().refused('data/tiny/train.bin has 5,994 bytes, expected 6,000', 'python data/tiny/prepare.py')
    ids = np.frombuffer(train, dtype=np.uint16).copy()
    ids[::7] = len(CHARS)
    (tiny / 'train.bin').write_bytes(ids.tobytes())
    folder.train().refused(f'has id {len(CHARS)}; expected an id below vocab_size={len(CHARS)}')
    (tiny / 'meta.json').write_text('{')
    folder.train().refused('data/tiny/meta.json is damaged')


def test_uint32_data(finished, folder):
    write_dataset(folder.path / 'data' / 'wide', encode(make_text(3000)), encode(make_text(333, seed=1)), 'uint32')
    folder.train(dataset='wide').ok()
    same_state(folder.checkpoint(), finished[0].checkpoint())


def test_prepares_what_is_missing(folder):
    data = folder.path / 'data' / 'late'
    data.mkdir()
    (data / 'prepare.py').write_text(
        'import shutil\nprint("preparing")\n'
        'for name in ("meta.json", "val.bin", "train.bin"):\n    shutil.copy(f"data/tiny/{name}", "data/late")\n')
    run = folder.train(dataset='late', max_iters=1).ok()
    assert 'running: python data/late/prepare.py' in run.out and 'preparing' in run.out
    (data / 'val.bin').unlink()
    (data / 'prepare.py').write_text('pass')  # succeeds, but makes nothing
    folder.start_train(dataset='late').wait(10).refused('python data/late/prepare.py', 'val.bin')


def test_dataset_beside_the_script(folder, tmp_path):
    """From another folder: data/ of the current one comes first, then the one beside train.py."""
    home = tmp_path / 'home'
    home.mkdir()
    copy_scripts(home)
    other = folder.path / 'data' / 'other'
    write_dataset(home / 'data' / 'other', encode(make_text(3000)), encode(make_text(333, seed=1)))
    settings = {**TINY, 'dataset': 'other', 'max_iters': 1}
    run = folder.start('train.py', home=home, env={'PYTHONPATH': ''}, **settings).ok()
    assert 'step 1' in run.out and not other.exists() and (folder.path / 'out' / 'ckpt.pt').exists()
    write_dataset(other, encode(make_text(30)), encode(make_text(5)))
    folder.start('train.py', home=home, env={'PYTHONPATH': ''}, **settings).refused('data/other/val.bin has 5 tokens')


# nanoGPT's habits -----------------------------------------------------------------------------------------------------

def nanogpt_checkpoint(path, dataset='tiny'):
    """A ckpt.pt as nanoGPT's train.py saves it after two steps of a compiled model. -> that model."""
    args = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'bias': False, 'vocab_size': len(CHARS),
            'dropout': 0.1}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**args, 'dropout': 0.0}, mlp='gelu_erf'))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{'params': [p for p in params if p.dim() >= 2], 'weight_decay': 0.1},
                                   {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}],
                                  lr=1e-3, betas=(0.9, 0.99))
    ids = torch.from_numpy(encode(make_text(17 * 4))).view(4, 17)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        optimizer.step()
    torch.save({'model': {f'_orig_mod.{name}': t for name, t in model.state_dict().items()},
                'optimizer': optimizer.state_dict(), 'model_args': args, 'iter_num': 2,
                'best_val_loss': torch.tensor(2.9), 'config': {'dataset': dataset, 'batch_size': 12, 'device': 'cuda'}},
               path)
    return model


def test_nanogpts_checkpoint_and_data(folder):
    """Evaluated, resumed and sampled as they are: uint16 files and meta.pkl, ckpt.pt of a compiled model."""
    write_dataset(folder.path / 'data' / 'tiny', encode(make_text(3000)), encode(make_text(333, 1)), meta='pkl')
    (folder.path / 'data' / 'tiny' / 'meta.json').unlink()
    (folder.path / 'out').mkdir()
    model = nanogpt_checkpoint(folder.path / 'out' / 'ckpt.pt')
    ids = torch.from_numpy(encode(make_text(333, 1))[:321]).long()
    run = folder.train(init_from='resume', eval_only=True).ok()
    assert losses(run)[0] == {}
    expected = model(ids[:-1].view(20, 16), ids[1:].view(20, 16))[1].item()
    assert losses(run)[1][2][1] == pytest.approx(expected, abs=0.03)  # but for the last 12 targets
    nanogpts = (folder.path / 'out' / 'ckpt.pt').read_bytes()
    run = folder.train(init_from='resume', max_iters=3, eval_interval=100, learning_rate=1.0).ok()
    # that step made it worse: the state which nanoGPT saved remains the best, its file untouched
    assert losses(run)[1][3][1] > 2.9 and (folder.path / 'out' / 'best.pt').read_bytes() == nanogpts
    (folder.path / 'out' / 'best.pt').rename(folder.path / 'out' / 'ckpt.pt')
    run = folder.train(init_from='resume', max_iters=4, eval_interval=2).ok()
    assert list(losses(run)[0]) == [2, 3]
    state = folder.checkpoint()
    assert state['optimizer']['state'][0]['step'] == 4 and state['model_args']['mlp'] == 'gelu_erf'
    assert state['tokenizer'] == {'kind': 'char', 'chars': ''.join(CHARS)}
    run = folder.sample(num_samples=1, max_new_tokens=20, which='last').ok()
    assert 'step 4' in run.out
    nanogpt_checkpoint(folder.path / 'out' / 'ckpt.pt')
    (folder.path / 'out' / 'best.pt').unlink(missing_ok=True)
    run = folder.sample(num_samples=2, max_new_tokens=20, start='the').ok()
    assert 'step 2, lowest val loss so far 2.9' in run.out and run.out.count('the') >= 2


def test_resuming_nanogpts_optimizer(folder):
    """The first update after resuming is the one that torch's AdamW would have made."""
    (folder.path / 'out').mkdir()
    model = nanogpt_checkpoint(folder.path / 'out' / 'ckpt.pt')
    saved = folder.checkpoint()
    optimizer = torch.optim.AdamW([{'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': 0.1},
                                   {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0}])
    optimizer.load_state_dict(saved['optimizer'])
    for group in optimizer.param_groups:
        group['lr'] = 5e-3
    folder.train(init_from='resume', max_iters=3, decay_lr=False, learning_rate=5e-3, min_lr=1.0, beta2=0.99,
                 grad_clip=0.0, weight_decay=0.1).ok()  # nothing comes near min_lr
    ids = encode(make_text(3000)).astype(np.uint16)
    starts = tokens.train_windows(2 * 8, 8, len(ids), 16, 1337)
    optimizer.zero_grad()
    model(*tokens.gather(ids, starts, 16, len(CHARS)))[1].backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(folder.checkpoint()['model'][name], tensor, atol=2e-5, rtol=0)


SMALL = {**TINY, 'total_batch_size': 96, 'batch_size': 2, 'max_iters': 4, 'warmup_iters': 1, 'eval_interval': 4, 'eval_iters': 1,
         'log_interval': 1, 'sample_tokens': 0}
for name in ('gradient_accumulation_steps', 'dropout', 'learning_rate', 'lr_decay_iters', 'min_lr'):
    del SMALL[name]  # the recipe's own


# those of reward.py, rl.py and LoRA need a model to begin with: tests/test_tiny_chat.py, tests/test_lab_state_of_gpt.py
@pytest.mark.parametrize('config', [path.name for path in sorted((ROOT / 'config').glob('*.py')) if not
                                    path.name.startswith(('_', 'dr_grpo_', 'eval_', 'finetune_', 'grpo_', 'lora_', 'ppo_', 'presets', 'reinforce_',
                                                         'reward_'))])
def test_recipes(folder, config):
    """Each of config/ with a small model and few steps on top: it trains, with finite losses and its own settings."""
    source = (ROOT / 'config' / config).read_text()
    begins = {'init_from': 'scratch'} if 'init_from' in source else {}  # of those that go on from another's model
    run = folder.start('train.py', ROOT / 'config' / config, **SMALL, **begins).ok()
    assert all(math.isfinite(loss) for loss in losses(run)[0].values()) and len(losses(run)[0]) == 4
    assert f"preset = '{folder.checkpoint()['config']['preset']}'" in source or 'classic' in config
    assert f'train.py config/{config}' in source  # its docstring says how to run it
    rates = [line['lr'] for line in folder.log() if 'lr' in line]
    if 'classic' not in config:
        assert rates[-1] < max(rates)  # the schedule ends with the run, however many steps it has


def test_nanogpts_config_file(folder):
    """As its config/ has them: computed values, imports, comments; then overrides on the command line."""
    (folder.path / 'config.py').write_text('''\
# train a miniature character-level model
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_tiny.py
import time

out_dir = 'out-tiny'
eval_interval = 5 # keep frequent because we'll overfit
wandb_log = False # override via command line if you like
wandb_run_name='ft-' + str(time.time())
dataset = 'tiny'
batch_size = 2
block_size = 16
gradient_accumulation_steps = 5 * 8
n_layer = 1
n_head = 2
n_embd = 16
max_iters = 1000
# on macbook also add
# device = 'cpu'  # run on cpu only
# compile = False # do not torch compile the model
''')
    done = subprocess.run([sys.executable, str(ROOT / 'train.py'), 'config.py', '--device=cpu', '--compile=False',
                           '--max_iters=5', '--eval_iters=1', '--dtype=float32'], cwd=folder.path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'step 5: train loss' in done.stdout and '40 micro-batch(es) x 2 x 16' in done.stdout
    state = folder.checkpoint('out-tiny')
    assert state['iter_num'] == 5 and re.fullmatch(r'ft-\d+[.]\d+', state['config']['wandb_run_name'])
