"""lab/look_inside.py: attention weights, the logit lens and the page, of every kind of model."""

import copy
import json
from html.parser import HTMLParser

import pytest
import torch
from conftest import load_lab
from torch.nn import functional as F

import tokenizer
from lab import common
from model import GPT

lab = load_lab('look_inside')
T = 12
SMALL = {'n_layer': 3, 'n_head': 4, 'n_embd': 32, 'vocab_size': 40, 'block_size': T}
KINDS = {'gpt2': {'preset': 'gpt2'}, 'llama': {'preset': 'llama'}, 'modern': {},
         'window': {'n_kv_head': 2, 'window': 5, 'window_pattern': 'SL'},
         'extras': {'preset': 'llama', 'value_embeddings': True, 'residual_lambdas': True, 'qk_norm': True,
                    'qk_norm_weight': True, 'n_kv_head': 1, 'head_dim': 16}}


def random_model(**changes):
    """Untrained, its matrices large enough that no head looks everywhere alike."""
    torch.manual_seed(0)
    model = GPT(common.gpt_config(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


@pytest.mark.parametrize('kind', KINDS)
def test_look(kind):
    model = random_model(**KINDS[kind])
    ids = torch.randint(40, (T + 1,)).tolist()
    # what torch's scaled_dot_product_attention computes in each layer, q, k, v and the result
    sdpa, attended = F.scaled_dot_product_attention, []

    def recording(q, k, v, **options):
        attended.append((q, k, v, sdpa(q, k, v, **options)))
        return attended[-1][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, 'scaled_dot_product_attention', recording)
        weights, streams, own = lab.look(model, ids)
    assert len(attended) == 3
    best, p, loss = lab.logit_lens(model, streams, ids)
    assert weights.shape == (3, 4, T, T) and best.shape == p.shape == loss.shape == (4, T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, T))
    for layer, (_, _, v, y) in enumerate(attended):
        window = model.config.window_of(layer) or T
        behind = torch.arange(T)[:, None] - torch.arange(T)
        assert (weights[layer][:, (behind < 0) | (behind >= window)] == 0).all()
        assert (weights[layer][:, (behind >= 0) & (behind < window)] > 0).all()
        torch.testing.assert_close(weights[layer] @ v[0].repeat_interleave(4 // v.size(1), dim=0), y[0])

    x, y = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    with torch.no_grad():
        logits, mean = model(x, y)
        torch.testing.assert_close(own, logits[0])
        torch.testing.assert_close(loss[-1].mean(), mean)
        for n in range(4):  # what a model says that ends there
            shorter = copy.deepcopy(model)
            shorter.transformer.h = shorter.transformer.h[:n]
            logits = shorter(x, y)[0][0]
            torch.testing.assert_close(loss[n], F.cross_entropy(logits, y[0], reduction='none'))
            torch.testing.assert_close(p[n], logits.softmax(-1).max(-1).values)
            assert torch.equal(best[n], logits.argmax(-1))


def test_roles():
    ids = [5, 6, 7, 5, 8]  # the last is not read
    previous, induction = torch.eye(4).roll(1, dims=0), torch.eye(4)
    previous[0] = torch.eye(4)[0]
    induction[3] = torch.eye(4)[1]  # at the second 5 to the 6 that followed the first
    half = torch.tensor([1, 0.5, 1 / 3, 0.25])[:, None] * torch.ones(4, 4).tril()
    shares = lab.roles(torch.stack((previous, induction, half))[None], ids)
    assert shares['previous'][0].tolist() == pytest.approx([1, 0, (1 / 2 + 1 / 3 + 1 / 4) / 3])
    assert shares['induction'][0].tolist() == pytest.approx([0, 1, 0.25])
    assert shares['itself'][0].tolist() == pytest.approx([0.25, 0.75, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4])
    assert shares['first'][0].tolist() == pytest.approx([0, 0, (1 / 3 + 1 / 4) / 2])
    assert lab.roles(half[None, None], [1, 2, 3, 4, 5])['induction'].item() == 0  # nothing comes twice


class Page(HTMLParser):
    """The tokens of a page: (what their title says, their text), and what is marked beside the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tokens, self.marks = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == 'meta':
            return
        self.open.append(tag)
        if tag == 'span':
            self.tokens.append([attributes['title'], ''])
        elif tag == 'i':
            self.marks.append(attributes['data-shown'])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if 'pre' in self.open:
            self.tokens[-1][1] += data


def test_page():
    text = 'if a < b && "안":\n\tc = \'&amp;\' # <span title="é">\n  '
    byte = tokenizer.load('byte')
    ids = byte.encode_array(text).tolist()
    model = random_model(vocab_size=256, block_size=len(ids))
    _, _, logits = lab.look(model, ids)
    loss = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction='none')
    page = Page(lab.page('a <title>', 'summary', lab.Text(ids, byte), logits, loss))
    assert ''.join(text for _, text in page.tokens) == text
    assert len(page.tokens) == len(ids)
    costs = [float(title.split('loss ')[1].split(' nats')[0]) for title, _ in page.tokens[1:]]
    assert costs == pytest.approx(loss.tolist(), abs=0.005)
    assert page.marks[:3] == ['\\xec', '\\x95', '\\x88'] and page.marks.count('\\n') == 2 and '\\t' in page.marks
    p = logits[0].softmax(-1)
    title = page.tokens[1][0].splitlines()
    assert title[0] == "'f', id 102" and title[2] == f'probability {p[102]:.2%}'
    assert title[3] == f'rank {sorted(p.tolist(), reverse=True).index(p[102].item()) + 1}'
    assert len(title) == 5 + 5 and title[5].startswith(f'{p.max():.1%} ')


@pytest.mark.slow
def test_run_and_evaluate(folder):
    """The losses of the page are those that eval.py sums; a text longer than the context is cut, and said to be."""
    folder.train(preset='modern').ok()
    text = folder.path / 'text.txt'
    text.write_text('the cat ran to it')  # 17 tokens: 16 are read and 16 predicted
    evaluated = folder.start('eval.py', out_dir='out', input='text.txt', device='cpu').ok()
    expected = json.loads(evaluated.out.splitlines()[-1])
    run = folder.start('lab.look_inside', out_dir='out', text='FILE:text.txt', layer=1, out='lab').ok()
    got = json.loads((folder.path / 'lab' / 'look_inside.json').read_text())
    assert got['nats'] == pytest.approx(sum(got['loss']))
    assert got['nats'] / 16 == pytest.approx(expected['loss'], abs=1e-5)
    assert got['bits_per_byte'] == pytest.approx(expected['bits_per_byte'], abs=1e-5)
    assert got['lens_loss'][-1] == pytest.approx(expected['loss'], abs=1e-5) and len(got['lens_loss']) == 3
    assert all(len(heads) == 2 and len(heads[0]) == 2 for heads in got['heads'].values())
    assert max(map(len, run.out.splitlines())) <= 80 and 'first 17' not in run.out
    assert ''.join(text for _, text in Page((folder.path / 'lab' / 'look_inside.html').read_text()).tokens) == \
        text.read_text()
    for name in ('heads', 'layer', 'loss', 'lens'):
        assert (folder.path / 'lab' / f'look_inside_{name}.png').read_bytes().startswith(b'\x89PNG')
    text.write_text('the cat ran to its den')
    assert 'first 17' in folder.start('lab.look_inside', out_dir='out', text='FILE:text.txt').ok().out


def test_refused(folder):
    run = folder.start('lab.look_inside')
    folder.train(max_iters=1).ok()
    run.refused('no checkpoint in out-quickstart', 'python train.py config/quickstart.py')
    runs = [(folder.start('lab.look_inside', out_dir='out', **settings), said) for settings, said in (
        ({'layer': 2}, 'layer=2: expected 0 to 1'), ({'text': 'a'}, 'expected 2 or more'),
        ({'text': 'FILE:no.txt'}, 'no.txt'))]
    for run, said in runs:
        run.refused(said)
