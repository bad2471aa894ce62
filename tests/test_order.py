"""Documents of running text: data/order.py, and attention that ends with them. Run: pytest tests/test_order.py"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_text, same_state
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, sharpened

import ops
from configurator import UserError
from data.order import Aligned, Marked, Shuffled, document_ends
from data.tokens import Shards, count_targets, draw, gather, per_epoch
from model import GPT, GPTConfig

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 9)


def documents_of(lengths):
    """Tokens that are their own positions, and the last position of each document."""
    return np.arange(sum(lengths)), np.cumsum(lengths) - 1


def test_ends(tmp_path):
    """From the lengths beside the tokens, or from the id that ends documents."""
    tokens = np.array([5, 0, 7, 7, 0, 3], np.uint16)
    assert document_ends(tmp_path, 'train', tokens, 0).tolist() == [1, 4, 5]  # the last one has no end
    shards = Shards([tokens, np.array([1, 0], np.uint16)])
    assert document_ends(tmp_path, 'train', shards, 0).tolist() == [1, 4, 7]
    for eot in (9, None):
        with pytest.raises(UserError, match='does not say where its documents end.*train_documents.bin.*=flat'):
            document_ends(tmp_path, 'train', tokens, eot)
    np.array([4, 2], '<u4').tofile(tmp_path / 'train_documents.bin')
    assert document_ends(tmp_path, 'train', tokens, 0).tolist() == [3, 5]
    np.array([2], '<u4').tofile(tmp_path / 'train_documents-00001.bin')
    assert document_ends(tmp_path, 'train', shards, None).tolist() == [3, 5, 7]
    with pytest.raises(UserError, match='train_documents.bin has documents of 8 tokens, expected 6'):
        document_ends(tmp_path, 'train', tokens, 0)


def test_marked_ids():
    """Ids carry the number of their document, also past the end of the tokens; targets do not."""
    tokens, ends = documents_of([3, 4, 2])
    marked = Marked(tokens, ends, 9)
    x, y = gather(marked, np.array([0, 5]), 6, 9)
    assert (x >> 32).tolist() == [[0, 0, 0, 1, 1, 1], [1, 1, 2, 2, 3, 3]]
    assert (x & 0xffffffff).tolist() == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 0, 0]]
    assert y.tolist() == [[1, 2, 3, 4, 5, 6], [6, 7, 8, -1, -1, -1]] and len(marked) == 9


@given(LENGTHS, st.integers(1, 8), st.integers(0, 2**40))
def test_shuffled_documents(lengths, block_size, seed):
    """Documents stay whole and in a new order each epoch, and each token but the first of an epoch is a target."""
    tokens, ends = documents_of(lengths)
    shuffled, n = Shuffled(tokens, ends, len(tokens)), per_epoch(len(tokens), block_size)
    orders = set()
    for epoch in range(6):
        codes = draw(shuffled, epoch * n, n, block_size, seed)
        x, y = gather(shuffled, codes, block_size, len(tokens))
        pairs = set(zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
        steps = dict(pairs)
        assert len(steps) == len(pairs)  # one successor each
        firsts = [0, *(ends[:-1] + 1).tolist()]
        for a, b in pairs:
            assert b == a + 1 if a not in ends else b in firsts
        targets = set(y.flatten().tolist())
        left = set(range(len(tokens))) - targets
        assert len(left) == 1 and left <= set(firsts)  # the first of the stream
        orders.add(tuple(sorted((a, b) for a, b in pairs if a in ends)))
        assert count_targets(shuffled, codes, block_size) == y.numel()
    if len(lengths) > 5:
        assert len(orders) > 1
    # a function of the numbers alone, in any pieces
    again = Shuffled(tokens, ends, len(tokens))
    codes = draw(shuffled, n - 1, 3, block_size, seed)
    pieces = [draw(again, n - 1 + i, 1, block_size, seed) for i in range(3)]
    assert np.array_equal(codes, np.concatenate(pieces))
    assert torch.equal(gather(shuffled, codes, block_size, 999)[0], gather(again, codes, block_size, 999)[0])


@given(LENGTHS, st.integers(2, 12), st.integers(0, 2**40))
def test_rows_begin_at_documents(lengths, block_size, seed):
    """An epoch has each token once, except those that are lost."""
    tokens, ends = documents_of(lengths)
    rows = Aligned(tokens, ends, len(tokens), block_size)
    numbers = draw(rows, 0, len(rows.members), block_size, seed)
    x, y = gather(rows, numbers, block_size, len(tokens))
    firsts, seen = {0, *(ends[:-1] + 1).tolist()}, []
    for inputs, targets in zip(x.tolist(), y.tolist(), strict=True):
        assert inputs[0] in firsts
        n = sum(target >= 0 for target in targets)
        row = [inputs[0], *targets[:n]]
        seen += row
        assert all(target < 0 for target in targets[n:])
        assert inputs[: n + 1] == row[: len(inputs[: n + 1])]
        assert all(b == a + 1 or b in firsts for a, b in zip(row, row[1:], strict=False))
    assert len(seen) == len(set(seen)) == round((1 - rows.lost) * len(tokens))
    assert rows.lost == pytest.approx(1 - sum(min(n, block_size + 1) for n in lengths) / len(tokens))
    assert count_targets(rows, numbers, block_size) == int((y >= 0).sum())


def test_ids_without_an_embedding_are_refused():
    tokens, ends = documents_of([5, 5, 5])
    for source in (Shuffled(tokens, ends, 12), Aligned(tokens, ends, 12, 4)):
        with pytest.raises(UserError, match='has id 1[234]; expected an id below vocab_size=12'):
            gather(source, draw(source, 0, 3, 4, 0), 4, 12)


# attention ------------------------------------------------------------------------------------------------------------


CASES = {**ARCHITECTURES, 'window': {'pos': 'rope', 'window': 5, 'window_pattern': 'SL'}, 'grouped': {'n_kv_head': 1}}


def masked_model(name):
    torch.manual_seed(0)
    options = {'block_size': 24, 'vocab_size': 20, 'n_layer': 2, 'n_head': 2, 'n_embd': 32, **CASES[name]}
    model = sharpened(GPT(GPTConfig(**options)))
    return model


PIECES = (0, 5), (5, 7), (7, 15), (15, 24)  # documents


def texts():
    """24 ids, and the same with the numbers of their documents."""
    idx = torch.randint(20, (1, 24))
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor([b - a for a, b in PIECES]))
    return idx, idx | (7 + numbers) << ops.DOCUMENT


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('name', CASES)
def test_documents_do_not_see_each_other(name, compiled):
    """Logits and gradients are those of separate passes; those of an earlier document are exactly 0."""
    torch._dynamo.reset()
    model, (idx, marked), targets = masked_model(name), texts(), torch.randint(20, (1, 24))
    if compiled:
        for block in model.transformer.h:
            block.forward = torch.compile(block.forward, backend='aot_eager', dynamic=False)
    model.masks_documents = True
    logits, loss = model(marked, targets)
    loss.backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.masks_documents = False
    pieces, total = [], 0
    for a, b in PIECES:
        with torch.compiler.set_stance('force_eager'):  # each length would be compiled
            piece, _ = model(idx[:, a:b], targets[:, a:b])
        pieces.append(piece)
        total = total + torch.nn.functional.cross_entropy(piece[0], targets[0, a:b], reduction='sum')
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits, atol=2e-5, rtol=1e-4)
    (total / 24).backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, together[key], atol=2e-5, rtol=1e-3, msg=key)


def test_gradients_to_earlier_documents_are_zero():
    model, (idx, marked) = masked_model('modern'), texts()
    model.masks_documents = True
    x = model.transformer.wte.weight.detach()[idx].requires_grad_()
    handle = model.transformer.wte.register_forward_hook(lambda module, inputs, output: x)
    logits, _ = model(marked, idx)
    handle.remove()
    gradient, = torch.autograd.grad(logits[:, 15:].pow(2).sum(), x)
    assert (gradient[:, :15] == 0).all() and gradient[:, 15:].abs().sum() > 0


def test_numbers_and_positions():
    numbers = torch.tensor([[0, 0, 1, 2, 2, 2, 3], [8, 9, 9, 9, 9, 9, 9]])
    ids, documents, positions = ops.split_documents(torch.arange(7) | numbers << 32, True)
    assert ids.tolist() == [[*range(7)]] * 2 and torch.equal(documents, numbers)
    assert positions.tolist() == [[0, 1, 0, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4, 5]]
    ids, documents, positions = ops.split_documents(numbers, False)
    assert ids is numbers and documents is None and positions.tolist() == [*range(7)]


# runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stories(folder):
    """The folder with data/stories, 60 documents, as bytes."""
    (folder.path / 'stories').mkdir()
    for seed in range(60):
        (folder.path / f'stories/{seed}.txt').write_text(make_text(80, seed))
    folder.start('data/text/prepare.py', input='stories', out_dir='data/stories', tokenizer='byte',
                 val_fraction=0.3).wait().ok()
    return folder


@pytest.mark.parametrize('documents', ['mask', *(pytest.param(name, marks=pytest.mark.slow) for name in ('shuffle', 'bos'))])
def test_runs(stories, documents):
    """A resumed run has the bits of a whole one, two processes its losses, and a mixture trains."""
    changes = {'dataset': 'stories', 'documents': documents, 'learning_rate': 1e-3}
    run = stories.train(out_dir='whole', **changes).ok()
    assert ('of the tokens of stories are behind the end of a row' in run.out) == (documents == 'bos')
    stories.train(out_dir='half', **changes, max_iters=10).ok()
    stories.train(out_dir='half', **changes, init_from='resume').ok()
    same_state(stories.checkpoint('half'), stories.checkpoint('whole'))
    stories.train_two(out_dir='two', **changes, total_batch_size=128, batch_size=2)
    losses = [[line['loss'] for line in stories.log(out_dir) if 'loss' in line] for out_dir in ('whole', 'two')]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    stories.train(out_dir='flat', **{**changes, 'documents': 'flat'}).ok()
    flat = [line['loss'] for line in stories.log('flat') if 'loss' in line]
    assert flat != losses[0]
    meta = json.loads((stories.path / 'data/stories/meta.json').read_text())
    assert meta['documents']['train'] > 30
    (stories.path / 'data/same').symlink_to('stories')
    stories.train(**{**changes, 'dataset': 'stories:0.5,same:0.5'}).refused('hold the same text')
    shutil.copytree(stories.path / 'data/stories', stories.path / 'data/more')
    meta['sha256'] = 64 * '0'  # another text, for the digest
    (stories.path / 'data/more/meta.json').write_text(json.dumps(meta))
    stories.train(out_dir='mixed', **{**changes, 'dataset': 'stories:0.5,more:0.5'}, max_iters=3).ok()


def test_refusals(stories):
    stories.train(documents='mask').refused('data/tiny does not say where its documents end', '--documents=flat')
    stories.train(documents='paragraph').refused('documents', 'flat')
