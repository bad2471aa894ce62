"""lab/learning_to_write.py: what counts as a word, a line and a speech, and that training raises the counts."""

import json
import math
import random

import pytest
from conftest import load_lab, write_dataset

SPEAKERS = ('ROMEO', 'KING LEAR')


def make_play(n, seed=0):
    """n characters of speeches."""
    rng, text = random.Random(seed), ''
    while len(text) < n:
        lines = [' '.join(rng.choices('the cat sat on a mat and ran to its den'.split(), k=5)) for _ in range(2)]
        text += f'{rng.choice(SPEAKERS)}:\n' + '\n'.join(lines) + '\n\n'
    return text[:n]


def test_count_by_hand():
    lab = load_lab('learning_to_write')
    text = "x\n\nROMEO:\nThe cat ran on.\nThe cat rann on.\n\ntis cat's\n\nKing Lear:\nThe"
    known = {'the', 'cat', 'ran', 'on', 'romeo', "cat's"}
    counts = lab.count(text, known)
    # romeo the cat ran | the cat rann | tis cat's king lear; x and the last word may be cut off
    assert counts['words'] == pytest.approx(7 / 11)
    assert counts['lines'] == 1 / 2  # 'tis cat's' has two words
    assert counts['speeches'] == 1 / 2  # the first and the last paragraph may be cut off
    nothing = lab.count('', known)
    assert all(math.isnan(value) for value in nothing.values())


def test_intervals():
    lab = load_lab('learning_to_write')
    counts = [{'words': value, 'lines': math.nan, 'speeches': 1.0} for value in (0.2, 0.4, 0.6, 0.8)]
    counts[0]['lines'] = 0.5
    means = lab.mean_of(counts)
    assert means['words'] == pytest.approx((0.5, 1.96 * 0.2581989 / 2))
    assert means['speeches'] == (1.0, 0.0) and all(math.isnan(value) for value in means['lines'])


def test_chosen_steps():
    lab = load_lab('learning_to_write')
    assert lab.chosen([0, *range(10, 651, 10)]) == [0, 10, 20, 50, 120, 280, 650]
    assert lab.chosen([0]) == [0] and lab.chosen([0, 5]) == [0, 5]


@pytest.mark.slow
def test_a_small_run(folder):
    """Words come back with training; the picture, the page and the numbers are written."""
    texts = make_play(20_000), make_play(3_000, seed=1)
    chars = sorted(set(''.join(texts)))
    write_dataset(folder.path / 'data' / 'plays', *([chars.index(char) for char in text] for text in texts),
                  chars=chars)
    small = '--n_layer=1 --n_head=2 --n_embd=32 --batch_size=16 --dtype=float32 --compile=False --device=cpu'
    folder.start('lab.learning_to_write', dataset='plays', max_iters=120, keep_every=60, n_samples=3, length=150,
                 settings=small).ok()
    out = folder.path / 'out-lab'
    found = json.loads((out / 'learning_to_write.json').read_text())
    assert found['measured'].keys() == {'60', '120'} and found['levels']['val text'] == {
        'words': 1.0, 'lines': 1.0, 'speeches': 1.0}
    words = {step: measured['words'][0] for step, measured in found['measured'].items()}
    assert words['120'] > max(0.5, found['levels']['chance']['words'])
    page = (out / 'learning_to_write.txt').read_text()
    assert page.startswith('step 0\n') and '\nstep 120\n' in page
    assert 'ckpt-60.pt' in folder.sample(out_dir='out-lab/learning_to_write', which=60, num_samples=1).ok().out
    assert (out / 'learning_to_write.png').stat().st_size > 10_000


@pytest.mark.parametrize('setting, said', [
    ({'n_samples': 1}, 'n_samples=1: expected 2 or more'), ({'dataset': 'nothing'}, 'no dataset in'),
    pytest.param({'dataset': 'tiny', 'settings': '--n_heads=2'},
                 'train.py failed; its error is in out-lab/learning_to_write.log', marks=pytest.mark.slow),
])
def test_refuses(folder, setting, said):
    folder.start('lab.learning_to_write', **setting).wait().refused(said)
