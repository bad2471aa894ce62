"""FSDP2 and sharded checkpoints: sharded.py, owners.py, shards.py. Run: pytest tests/test_sharded.py"""

import contextlib
import io
import os
import pickle
import shutil
import signal
import time
import zlib

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import make_state
from tiny_models import ARCHITECTURES, tiny

from configurator import Settings, UserError
from flatgpt import checkpoint, lora, optim, outdir, owners, pretrained, sharded, shards
from flatgpt.parallel import World
from model import GPT, GPTConfig

CPU = torch.device('cpu')
ADAMW = {'optimizer': 'adamw', 'weight_decay': 0.1, 'learning_rate': 1e-2, 'beta1': 0.9, 'beta2': 0.95}


def same_losses(folder, one, many, n, tolerance=1e-5):
    """n: records of both. Each loss and norm of the gradient within the tolerance."""
    logs = [[[line[key] for key in ('step', 'loss', 'grad_norm', 'val_loss') if key in line]
             for line in folder.log(out_dir)] for out_dir in (one, many)]
    assert len(logs[0]) == len(logs[1]) == n
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, abs=tolerance)


# processes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_shards_of_three_processes_equal_one(folder):
    """20 steps of AdamW and of Muon; the matrices have 48, 64 or 16 rows, in parts that differ."""
    changes = {'total_batch_size': 192, 'batch_size': 2, 'preset': 'modern', 'n_layer': 3, 'shard': 'full'}
    one = folder.train(out_dir='one', **changes).ok()
    run = folder.train_two(out_dir='three', **changes, n=3, sample_tokens=3)
    assert 'one process' not in one.out and '---------------' in run.out
    same_losses(folder, 'one', 'three', 23)


@pytest.mark.slow
def test_resume_with_other_processes(folder):
    """A checkpoint of two processes goes on in three, in one, in copies (DDP), and in one file; samples are equal."""
    changes = {'total_batch_size': 192, 'batch_size': 2, 'learning_rate': 1e-3}
    folder.train(out_dir='one', **changes).ok()
    folder.train_two(out_dir='two', **changes, shard='full', max_iters=10)
    assert (folder.path / 'two/shards-10/.metadata').exists()
    for out_dir in ('three', 'single', 'copies'):
        shutil.copytree(folder.path / 'two', folder.path / out_dir)
    changes['init_from'] = 'resume'
    folder.train_two(out_dir='three', **changes, shard='full', n=3)
    folder.train_two(out_dir='copies', **changes)
    run = folder.train(out_dir='single', **changes).ok()
    assert 'iter 10' in run.out and not list((folder.path / 'single').glob('shards-*'))
    for out_dir in ('three', 'single', 'copies'):
        same_losses(folder, 'one', out_dir, 23)
    exported = folder.start('flatgpt.export', out_dir='three', consolidate=True, out='whole').wait().ok()
    assert 'wrote whole/ckpt.pt: one file' in exported.out
    texts = {folder.sample(out_dir=out_dir, max_new_tokens=20, num_samples=1).ok().out.partition(': step 20')[2]
             for out_dir in ('three', 'whole', 'single')}
    assert len(texts) == 1
    # from one file into shards, all the way back
    shutil.copytree(folder.path / 'whole', folder.path / 'again')
    folder.train_two(out_dir='again', **{**changes, 'max_iters': 22}, shard='full')
    assert folder.checkpoint('again')['shards']['folder'] == 'shards-22'


@pytest.mark.slow
@pytest.mark.parametrize('changes', [
    {'preset': 'llama', 'recompute': 'block', 'n_kv_head': 1}, {'compile': True}, {'optimizer': 'muon'},
    {'tie_embeddings': False, 'bias': True, 'dtype': 'bfloat16', 'max_iters': 3}])
@pytest.mark.parametrize('n', [2, 4])
def test_shards_equal_one_process(folder, n, changes):
    changes = {'total_batch_size': 256, 'batch_size': 2, 'learning_rate': 1e-3, **changes}
    folder.train(out_dir='one', **changes).ok()
    folder.train_two(out_dir='many', **changes, shard='full', n=n)
    same_losses(folder, 'one', 'many', changes.get('max_iters', 21) + 2, 0.05 if 'dtype' in changes else 1e-5)


@pytest.mark.slow
def test_kills_while_shards_are_saved(folder):
    """30 kills at random moments of saves: what was reported as saved, or a later step, resumes."""
    changes = {'shard': 'full', 'eval_interval': 1, 'eval_iters': 1, 'max_iters': 10_000, 'eval_tokens': 16,
               'init_from': 'auto', 'total_batch_size': 32, 'batch_size': 1}
    generator, reported = torch.Generator().manual_seed(0), 0
    for _ in range(30):
        runs = folder.start_two(**changes)
        runs[0].wait_for(r'saved .* at step (\d+)')
        time.sleep(0.05 * torch.rand((), generator=generator).item())
        for run in runs:
            run.kill(signal.SIGKILL)
        out = [run.wait() for run in runs][0].out
        reported = max([reported, *(int(line.split('step ')[1].split()[0]) for line in out.splitlines()
                                    if line.startswith('saved '))])
        state = checkpoint.load(str(folder.path / 'out/ckpt.pt'))
        assert state['iter_num'] >= reported and len(state['optimizer']['state']) > 5
    kept = {path.name for path in (folder.path / 'out').glob('shards-*')}
    assert len(kept) <= 4  # of last, best, the save that was killed, and one that was being removed


# one process ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone():
    """A group of one process, whose shards are whole."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    world = World()
    yield world
    dist.destroy_process_group()


def trained(world, config, seed=3, **options):
    """A sharded model and its optimizer after a step."""
    torch.manual_seed(seed)
    with sharded.deferred(True):
        model = GPT(GPTConfig(**{'block_size': 8, 'vocab_size': 11, 'n_layer': 2, 'n_head': 2, 'n_embd': 8, **options}))
    sharded.place(model, 'full', world, 'float32', CPU)
    opt = optim.create(model, config, 'float32', world)
    ids = torch.arange(9)[None] % 11
    model(ids[:, :-1], ids[:, 1:], return_logits=False)[1].backward()
    opt.step()
    return model, opt


@pytest.fixture
def saved(alone, tmp_path):
    """The folder of a run with a sharded checkpoint, of step 7."""
    save(alone, tmp_path / 'out')
    return tmp_path / 'out'


def save(world, folder, step=7, **options):
    """Save a sharded run, as its best too; -> the run, and what it saved."""
    model, opt = trained(world, ADAMW, **options)
    run = checkpoint.Run(str(folder), {'dataset': 'tiny'}, world=world)
    run.step, run.best_val_loss = step, 2.0
    state = {**make_state(0), 'model': model.state_dict(), 'optimizer': opt.state_dict(),
             'model_args': vars(model.config), 'tokenizer': None, 'chat_template': None, 'scaler': {}, 'data': ''}
    run.save(lambda: state, is_best=True)
    run.saver.wait()
    assert run.saved_step == step
    return run, state


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_weights_of_a_sharded_model_are_those_of_a_whole_one(alone, name):
    config = GPTConfig(**{**ARCHITECTURES[name], 'block_size': 8, 'vocab_size': 11, 'n_layer': 2, 'n_head': 2,
                          'n_embd': 8, 'n_kv_head': 1, 'bias': True})
    torch.manual_seed(5)
    whole = GPT(config)
    next_draw = torch.rand(())
    torch.manual_seed(5)
    with sharded.deferred(True):
        model = GPT(config)
    assert all(p.is_meta for p in model.parameters())
    sharded.place(model, 'full', alone, 'float32', CPU)
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q), name
    assert torch.equal(torch.rand(()), next_draw)  # later draws are the same too


def test_float16_and_lora_have_no_shards(alone, monkeypatch):
    model = tiny()
    with pytest.raises(UserError, match='dtype=float16.*--dtype=bfloat16'):
        sharded.place(model, 'full', alone, 'float16', CPU)
    lora.add(model, 2, 4.0, ['c_attn'])
    with pytest.raises(UserError, match='LoRA.*--shard=none'):
        sharded.place(model, 'full', alone, 'float32', CPU)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    with pytest.raises(UserError, match='6 processes are no multiple of 4: use --shard=full'):
        sharded.should_shard({'shard': 'hybrid'}, World(size=6))
    config = {'shard': 'full'}
    assert not sharded.should_shard(config, World()) and config['shard'] == 'none'


@given(n=st.integers(1, 5), rows=st.integers(1, 7), columns=st.integers(1, 3), batches=st.integers(0, 4))
def test_whole_matrices(n, rows, columns, batches):
    """The function of a batch gets its matrices whole; results come back in order."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.randn(batches, n, rows, columns)
        results = list(owners.map_whole(lambda whole, i: whole * 2 + i, [(list(batch), rows) for batch in x], None))
        assert len(results) == batches
        for i, result in enumerate(results):
            assert torch.equal(torch.stack(result), x[i] * 2 + i)
    finally:
        dist.destroy_process_group()


def test_read(saved):
    """Whole tensors, the weights alone, or their shapes; a tied head is one tensor."""
    path = str(saved / 'best.pt')
    state, weights, shapes = (checkpoint.load(path, part) for part in ('all', 'model', 'shapes'))
    assert state['iter_num'] == 7 and state['best_val_loss'] == 2.0
    assert state['model']['lm_head.weight'] is state['model']['transformer.wte.weight']
    moments = state['optimizer']['state']
    assert {frozenset(moment) for moment in moments.values()} == {frozenset({'step', 'exp_avg', 'exp_avg_sq'})}
    assert all(torch.equal(weights['model'][name], tensor) for name, tensor in state['model'].items())
    assert all(set(moment) == {'step'} for moment in weights['optimizer']['state'].values())
    assert all(tensor.is_meta and tensor.shape == state['model'][name].shape
               for name, tensor in shapes['model'].items())
    model = pretrained.model_of(state, path, 0.0)
    assert model(torch.tensor([[1, 2]]))[0].isfinite().all()
    assert pretrained.model_of(shapes, path, 0.0).lm_head.weight.is_meta


def test_restore(alone, saved):
    """Weights and moments come back; with other moments in the file they are refused."""
    model, opt = trained(alone, ADAMW)
    other, other_opt = trained(alone, ADAMW, seed=4)
    state = checkpoint.load(str(saved / 'ckpt.pt'), 'shapes')
    pretrained.restore(other, other_opt, None, str(saved / 'ckpt.pt'), state)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())
        assert torch.equal(opt.state[p]['exp_avg_sq'].full_tensor(), other_opt.state[q]['exp_avg_sq'].full_tensor())
    wide, wide_opt = trained(alone, ADAMW, n_embd=16)
    with pytest.raises(UserError, match='cannot be loaded'):
        pretrained.restore(wide, wide_opt, None, str(saved / 'ckpt.pt'), state)


class Harmful:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch harmed',)


def rewrite(saved, content):
    """Give the checkpoint another .metadata, with its right checksum."""
    (saved / 'shards-7/.metadata').write_bytes(content)
    state = torch.load(saved / 'ckpt.pt', weights_only=True)
    state['shards']['checksums']['.metadata'] = zlib.crc32(content)
    torch.save(state, saved / 'ckpt.pt')


def test_metadata_runs_no_code(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with open(saved / 'shards-7/.metadata', 'rb') as file:
        described = pickle.load(file)  # written by this test
    for content in (Harmful(), {'a': Harmful()}, print, os):
        try:
            data = pickle.dumps(content)
        except TypeError:  # a module
            data = b'cos\nsystem\n(S"touch harmed"\ntR.'
        rewrite(saved, data)
        with pytest.raises(UserError, match='could run code: refused'):
            checkpoint.load(str(saved / 'ckpt.pt'))
    assert not (tmp_path / 'harmed').exists()
    # places outside the folder, tensors larger than the files, other names
    places = dict(described.storage_data)
    for place in described.storage_data.values():
        place.relative_path = '../../other'
    rewrite(saved, pickle.dumps(described))
    with pytest.raises(UserError, match='not in its files'):
        checkpoint.load(str(saved / 'ckpt.pt'))
    described.storage_data = places
    tensor = next(iter(described.state_dict_metadata.values()))
    size, chunks = tensor.size, tensor.chunks
    tensor.size = torch.Size([2**40, 2**10])
    tensor.chunks = [type(chunks[0])(torch.Size([0, 0]), tensor.size)]
    rewrite(saved, pickle.dumps(described))
    with pytest.raises(UserError, match='not in its files'):
        checkpoint.load(str(saved / 'ckpt.pt'))
    tensor.size, tensor.chunks = size, chunks
    described.state_dict_metadata['optimizer.x.exp_avg'] = described.state_dict_metadata.popitem()[1]
    rewrite(saved, pickle.dumps(described))
    with pytest.raises(UserError, match='names optimizer.x.exp_avg, which is no tensor'):
        checkpoint.load(str(saved / 'ckpt.pt'))


def test_chunks_make_up_their_tensor(saved):
    """What a chunk does not fill would be memory of others."""
    content = (saved / 'shards-7/.metadata').read_bytes()
    for change in (lambda tensor: tensor.chunks.clear(), lambda tensor: setattr(tensor, 'size', torch.Size([-5, 8])),
                   lambda tensor: tensor.chunks.append(tensor.chunks[0]),
                   lambda tensor: setattr(tensor.chunks[0], 'offsets', torch.Size([1, 0]))):
        described = pickle.loads(content)  # written by this test
        change(described.state_dict_metadata['model.transformer.wte.weight'])
        rewrite(saved, pickle.dumps(described))
        with pytest.raises(UserError, match='the chunks of model.transformer.wte.weight do not make up'):
            checkpoint.load(str(saved / 'ckpt.pt'))


def test_without_an_optimizer_nothing_is_restored(saved):
    state = torch.load(saved / 'ckpt.pt', weights_only=True)
    del state['optimizer']
    torch.save(state, saved / 'ckpt.pt')
    with pytest.raises(UserError, match='names shards, but has no optimizer'):
        checkpoint.load(str(saved / 'ckpt.pt'))


def test_shards_of_a_named_step_stay(alone, tmp_path):
    """A step that is saved again gets another folder; with an unreadable best.pt nothing is removed."""
    saved = tmp_path / 'out'
    run, content = save(alone, saved)
    run.save(lambda: {**content})
    run.settle()
    assert {path.name for path in saved.glob('shards-*')} == {'shards-7', 'shards-7-2'}
    assert checkpoint.load(str(saved / 'best.pt'))['shards']['folder'] == 'shards-7'
    (saved / 'best.pt').write_text('damaged')
    run.step = 8
    run.save(lambda: {**content})
    run.settle()
    assert len(list(saved.glob('shards-*'))) == 3 and checkpoint.load(str(saved / 'ckpt.pt'))['iter_num'] == 8
    moved_to = outdir.put_aside(str(saved), best_alone=True)
    assert os.listdir(moved_to) == ['best.pt']


@pytest.mark.slow
def test_processes_agree_on_a_save_that_failed(folder):
    """Then they agree on the best, on patience and on when to save: nothing hangs."""
    for shard in ('none', 'full'):
        runs = folder.start_two(out_dir=shard, shard=shard, always_save_checkpoint=False, eval_interval=2,
                                total_batch_size=128, batch_size=2, patience=3, max_iters=30)
        runs[0].wait_for('iter 0')
        with contextlib.suppress(FileExistsError):
            (folder.path / shard / 'ckpt.pt').mkdir()  # in the way, if it comes before the first save
        out = [run.wait(60) for run in runs][0].out
        assert 'Traceback' not in out and all(run.code is not None for run in runs)
        assert out.count('WARNING') == out.count('could not be saved') and 'iter 1:' in out


@pytest.mark.parametrize('name', ['__0_0.distcp', '.metadata'])
def test_damaged_shards(saved, name):
    path, state = saved / 'shards-7' / name, torch.load(saved / 'ckpt.pt', weights_only=True)
    content = path.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2] + b'x' + content[len(content) // 2 + 1 :], b''):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f'{name} has another checksum.*ckpt.pt is damaged'):
            checkpoint.load(str(saved / 'ckpt.pt'))
    path.unlink()
    with pytest.raises(UserError, match=f'{name} is missing'):
        checkpoint.load(str(saved / 'ckpt.pt'))
    for folder, sums in (('../out/shards-7', {}), ('shards-x', {}), ('shards-7', {'../ckpt.pt': 1})):
        torch.save({**state, 'shards': {'folder': folder, 'checksums': sums}}, saved / 'ckpt.pt')
        with pytest.raises(UserError, match='expected shards-STEP'):
            checkpoint.load(str(saved / 'ckpt.pt'))


def test_a_save_that_fails_leaves_the_one_before(alone, tmp_path, capsys, monkeypatch):
    """The disk takes no new folder; the old one stays whole, and the next save removes it."""
    saved = tmp_path / 'out'
    run, content = save(alone, saved)
    run.step = 8
    monkeypatch.setattr(shards, 'checksum', lambda path: open('/nowhere/at/all'))
    run.save(lambda: {**content})
    run.saver.wait()
    assert 'could not be saved at step 8' in capsys.readouterr().out and run.saved_step == 7
    monkeypatch.undo()
    assert checkpoint.load(str(saved / 'ckpt.pt'))['iter_num'] == 7 and not (saved / 'shards-8').exists()
    for step, is_best, expected in ((8, False, [7, 8]), (9, False, [7, 9]), (10, True, [10])):
        run.step = step
        run.save(lambda: {**content}, is_best)
        run.saver.wait()
        assert sorted(saved.glob('shards-*')) == sorted(saved / f'shards-{n}' for n in expected)


def test_shards_are_put_aside(alone, tmp_path):
    """All of a run's; or those of best.pt, which ckpt.pt may share."""
    saved = tmp_path / 'out'
    save(alone, saved)
    moved_to = outdir.put_aside(str(saved), best_alone=True)
    for path in (os.path.join(moved_to, 'best.pt'), str(saved / 'ckpt.pt')):
        assert checkpoint.load(path)['iter_num'] == 7
    moved_to = outdir.put_aside(str(saved))
    assert checkpoint.load(os.path.join(moved_to, 'ckpt.pt'))['iter_num'] == 7
    assert not list(saved.glob('shards-*')) and not (saved / 'ckpt.pt').exists()


def test_context_of_shards(saved):
    """Learned positions are not cut in shards."""
    model = pretrained.model_of(checkpoint.load(str(saved / 'ckpt.pt'), 'shapes'), '', 0.0)
    config = Settings({'block_size': 4, 'shard': 'full', 'extend_context': 0}, {'block_size'})
    with pytest.raises(UserError, match='block_size=4 cuts the 8 positions.*--shard=none'):
        pretrained.context_of(model, config, 'resume', {'row': None})
    config['shard'] = 'none'
    assert pretrained.context_of(model, config, 'resume', {'row': None}) == 4


def test_output_is_plain(saved):
    """ckpt.pt holds plain values and small tensors alone."""
    buffer = io.BytesIO((saved / 'ckpt.pt').read_bytes())
    assert torch.load(buffer, weights_only=True)['model'] == {} and (saved / 'ckpt.pt').stat().st_size < 20_000


@pytest.mark.parametrize('name', ['gpt2', 'modern'])
def test_blocks_of_a_sharded_model_compile_once(alone, name):
    """The hooks of FSDP stay outside: one whole graph for each kind of block, over steps and an evaluation."""
    torch._dynamo.reset()
    with sharded.deferred(True):
        model = GPT(GPTConfig(**{**ARCHITECTURES[name], 'vocab_size': 64, 'block_size': 32, 'n_layer': 5, 'n_head': 2,
                                 'n_embd': 16, 'window': 8, 'window_pattern': 'SL'}))
    sharded.place(model, 'full', alone, 'bfloat16', CPU)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for block in model.transformer.h:
        block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True, backend=backend)
    idx = torch.randint(64, (2, 32))
    for _ in range(3):
        with torch.autocast('cpu', torch.bfloat16):
            model(idx, idx, return_logits=False)[1].backward()
        assert len(graphs) == 2  # with the window, and without
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad(), torch.compiler.set_stance('force_eager'), torch.autocast('cpu', torch.bfloat16):
        assert model.eval()(idx, idx)[1].isfinite()
