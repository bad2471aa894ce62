"""lab/thinking.py: documents are right and hide what they should, search finds what is there, steps beat no steps."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import load_lab

from lab import common
from model import GPT

lab = load_lab('thinking', '--length=4', '--modulus=13')


def test_documents_by_hand():
    question = torch.tensor([[lab.VOCAB.index(name) for name in ('+9', '*7', '*12', '+4')]])
    steps = ' '.join(lab.VOCAB[i] for i in lab.steps_of(question)[0])
    assert steps == '+9 =10 *7 =5 *12 =8 +4 =12'  # 1 + 9, 70 - 65, 60 - 52, 8 + 4


def eval_left(question):
    """The id of the result, worked out from the names alone."""
    result = 1
    for name in (lab.VOCAB[i] for i in question):
        result = result + int(name[1:]) if name[0] == '+' else result * int(name[1:])
    return lab.VOCAB.index(f'={result % lab.modulus}')


@pytest.mark.parametrize('step', [0, 1, 2, 403])
def test_targets_are_what_the_model_has_to_write(step):
    x, y = lab.get_batch(step)
    k = 1 + step % 4
    assert x.shape == y.shape == (lab.batch_size, 3 * k)
    for inputs, targets in zip(x.tolist(), y.tolist(), strict=True):
        question, marker, rest = inputs[:k], inputs[k], inputs[k + 1 :]
        assert sum(n * n for n in question) % lab.HELD_OUT and len(set(question)) == k
        results = [eval_left(question[: i + 1]) for i in range(k)]
        assert targets[:k] == [-1] * k
        if marker == lab.AT_ONCE:
            assert targets[k:] == [results[-1]] + [-1] * (2 * k - 1)
        else:
            assert marker == lab.IN_STEPS and targets[k:-1] == rest
            assert targets[k::2] == question and targets[k + 1 :: 2] == results
    markers = x[:, k].tolist()
    assert markers.count(lab.AT_ONCE) == markers.count(lab.IN_STEPS) == lab.batch_size // 2


def test_batches_are_a_function_of_the_step():
    (x, y), (again_x, again_y), (other_x, _) = lab.get_batch(3), lab.get_batch(3), lab.get_batch(7)
    assert torch.equal(x, again_x) and torch.equal(y, again_y) and not torch.equal(x, other_x)


@pytest.mark.parametrize('k', [2, 3, 4])
def test_held_out_questions_are_never_trained_on(k):
    held_out, others = (lab.draw_questions(800, k, kind, np.random.default_rng(9)) for kind in (True, False))
    held_out, others = ({tuple(sorted(row)) for row in rows.tolist()} for rows in (held_out, others))
    assert len(held_out) > 10 and not held_out & others


def test_sample_gives_the_log_probability_of_what_it_drew():
    torch.manual_seed(0)
    model = GPT(common.gpt_config(n_layer=1, n_head=2, n_embd=16, vocab_size=len(lab.VOCAB), block_size=12)).eval()
    prompts = torch.tensor([[1, 2, lab.IN_STEPS], [3, 4, lab.IN_STEPS]])
    ids, logprobs = lab.sample(model, prompts, (3, 4), 1.0, np.random.default_rng(5))
    assert ids.shape == (2, 3, 4) and logprobs.shape == (2, 3)
    assert len({tuple(row) for row in ids.flatten(0, 1).tolist()}) == 6
    whole = torch.cat((prompts[:, None].expand(-1, 3, -1), ids), 2).flatten(0, 1)
    with torch.no_grad():
        logits = model(whole[:, :-1], torch.zeros_like(whole[:, 1:]))[0]
    expected = logits.log_softmax(-1).gather(2, whole[:, 1:, None])[:, 2:, 0].sum(1).view(2, 3)
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)
    greedy = lab.sample(model, prompts, (1, 4), 0.0, np.random.default_rng(6))[0]
    assert torch.equal(greedy, lab.sample(model, prompts, (1, 4), 0.0, np.random.default_rng(7))[0])


def toy(chains, k=3):
    """Every continuation 0 ... k - 1, one token each, at scores that depend on the whole chain."""
    ids = torch.arange(k).expand(len(chains), k)[:, :, None]
    scores = [[-torch.rand((), generator=torch.Generator().manual_seed(hash((*row, i)) % 2**31)).item()
               for i in range(k)] for row in chains.tolist()]
    return ids, torch.tensor(scores)


def score_of(prompt, path):
    return sum(toy(torch.tensor([[*prompt, *path[:i]]]))[1][0, path[i]].item() for i in range(len(path)))


def test_a_wide_beam_is_exhaustive_search_and_a_beam_of_one_is_greedy():
    prompts = torch.tensor([[5, 6], [7, 8], [9, 9]])
    chains, spent = lab.search(toy, prompts, depth=3, beam=27)
    assert spent == 3 + 9 + 27
    greedy, spent = lab.search(toy, prompts, depth=3, beam=1)
    assert greedy.shape == (3, 1, 3) and spent == 3 + 3 + 3
    for row, prompt in enumerate(prompts.tolist()):
        scores = {path: score_of(prompt, path) for path in itertools.product(range(3), repeat=3)}
        assert [tuple(chain) for chain in chains[row].tolist()] == sorted(scores, key=scores.get, reverse=True)
        path = []
        for _ in range(3):
            path.append(toy(torch.tensor([[*prompt, *path]]))[1].argmax().item())
        assert greedy[row, 0].tolist() == path


def test_search_counts_every_token_and_keeps_no_chain_twice():
    def twice_the_same(chains):
        return torch.tensor([[[1, 2], [1, 2], [1, 3]]]).expand(len(chains), -1, -1), torch.zeros(len(chains), 3)

    chains, spent = lab.search(twice_the_same, torch.tensor([[0], [0]]), depth=2, beam=2)
    assert spent == 3 * 2 + 2 * 3 * 2  # three ways to go on with the prompt, then with each of two chains
    for row in chains.tolist():
        assert len({tuple(chain) for chain in row}) == 2


def test_vote():
    total = lab.VOCAB.index('=0')
    answers = [[total + 5, total + 7, total + 7, 0], [total + 1, total + 2, total + 2, total + 1],
               [0, 0, 0, lab.IN_STEPS]]
    assert lab.vote(torch.tensor(answers)).tolist() == [total + 7, total + 1, -1]  # the first of equals; none


@pytest.mark.slow
def test_steps_beat_more_answers_and_votes_beat_one_chain(folder):
    folder.start('lab.thinking', length=4, modulus=11, n_embd=32, max_iters=250, batch_size=128, questions=100).ok()
    measured = json.loads((folder.path / 'out-lab' / 'thinking.json').read_text())
    share = {name: [share for _, _, share, _ in points] for name, points in measured['methods'].items()}
    assert share['steps, vote'][0] > max(share['at once, vote']) + 30  # 8 tokens against up to 128
    assert share['steps, vote'][-1] > share['steps, vote'][0] + 5
    assert share['steps, search'][-1] > share['steps, vote'][0] + 5
    for points in measured['methods'].values():
        assert all(tokens <= 128 for _, tokens, _, _ in points)
    assert (folder.path / 'out-lab' / 'thinking.png').stat().st_size < 100_000


@pytest.mark.parametrize('name, value', [('length', 1), ('modulus', 12), ('temperature', 0),
                                         ('questions', 1), ('direct_share', 2)])
def test_settings_that_can_not_be_are_refused(folder, name, value):
    folder.start('lab.thinking', **{name: value}).refused(f'{name}={value}', ': expected')
