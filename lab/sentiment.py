"""
Classify reviews with 50 to 2,000 labels: pretrained, from scratch, by a prompt.

    $ python -m lab.sentiment             # 5 minutes, and 4 for the base model, which is kept
    $ python -m lab.sentiment --labels=50,200 --seeds=1
    $ python -m posttrain.classify --init_from=out-lab/sentiment/base \\
        --data=out-lab/sentiment/labelled.jsonl --learning_rate=1e-3

GPT-1 was finetuned for each task, with labels. GPT-2 read the task from its prompt, without any.
lab/reviews.py writes reviews whose opinion words are of both kinds; negations and concessions
decide which count. The base model reads 40,000 of them without labels: it learns which words go
together, since a review has one opinion. Then it is finetuned as posttrain.classify does, against
the same network from scratch and against logistic regression on words and pairs of words
(data/classifier.py). The prompt asks the base model itself: is "wonderful" or "terrible" the
likelier word after the review and "the evening was"?

Measured on a busy machine, one thread: of 1,000 test reviews the prompt gets 99.8% right. With 200
labels the pretrained model gets 100.0%, the same network from scratch 74.7% (95%: 72 to 78), words
and pairs of words 79.4%.

Sources: "Improving Language Understanding by Generative Pre-Training", Radford et al. 2018;
"Language Models are Unsupervised Multitask Learners", Radford et al. 2019; "Learning to Generate
Reviews and Discovering Sentiment", Radford et al. 2017. Needs '.[lab]'.
"""

import os
import random
from dataclasses import asdict

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import tokenizer
from bench.common import table
from configurator import Count, NonNegative, Positive, Seed, UserError, override
from data import classifier
from data.shuffle import train_items
from flatgpt import checkpoint, classify, jsonl, optim, pretrained
from flatgpt.files import replace_file
from lab import common, reviews
from model import GPT
from posttrain.tasks.common import loglikelihoods
from tokenizer import WordTokenizer

# Settings -----------------------------------------------------------------------------------------
labels = '50,100,200,500,1000,2000'  # labelled reviews to learn from
seeds: Count = 3  # draws of the labelled reviews
tests: Count = 1000  # reviews to measure on
documents: Count = 40_000  # reviews without labels, to pretrain on
pretrain_steps: Count = 800
n_layer: Count = 2
n_head: Count = 4
n_embd: Count = 128
batch_size: Count = 32  # reviews per step of finetuning
epochs: Positive = 3.0  # of finetuning, as GPT-1, but at least least_steps
least_steps: Count = 60
rate: Positive = 1e-3  # learning rate of finetuning
scratch_rate: Positive = 1e-3
lm_coef: NonNegative = 0.5  # weight of the language-model loss
seed: Seed = 1
out = 'out-lab'  # folder of the picture and the numbers; the rest is in its folder sentiment
config = override(globals())
# --------------------------------------------------------------------------------------------------

BLOCK_SIZE = 256  # tokens: some solved examples and a review
PRETRAIN_BATCH = 48  # reviews
SHOTS = (0, 2, 4)  # solved examples in the prompt
QUESTION, ANSWERS = ' the evening was', (' terrible.', ' wonderful.')  # bad, good
METHODS = {'pretrained': common.BLUE, 'scratch': common.RED, 'words and pairs': common.GREEN}


# Reviews ------------------------------------------------------------------------------------------

def draw(n, name):
    """Return n reviews with labels, [(text, 0 or 1)], the same for a name."""
    rng = random.Random(f'{name} {seed}')
    return [(text, int(is_good)) for text, is_good in (reviews.write(rng) for _ in range(n))]


def encode(rows, words):
    """Return [(ids, label), ...] of reviews, as posttrain.classify encodes them."""
    return [(classify.encode_text(text, words, BLOCK_SIZE)[0], label) for text, label in rows]


# The base model -----------------------------------------------------------------------------------

def pretrain(texts, folder):
    """Train a GPT to continue reviews, one in a row, and save it as train.py does.

    Rows of several reviews, as for long texts, mix their opinions: after 500 such steps the model
    had not found that a review has one. In rows of one it finds that after 200 to 400.
    """
    words = WordTokenizer.train(texts, 10_000)
    rows = [torch.tensor([words.eot, *words.encode(text), words.eot]) for text in texts]
    torch.manual_seed(seed)
    model = GPT(common.gpt_config(vocab_size=words.vocab_size, block_size=BLOCK_SIZE,
                                  n_layer=n_layer, n_head=n_head, n_embd=n_embd))

    def get_batch(step):
        numbers = train_items(step * PRETRAIN_BATCH, PRETRAIN_BATCH, len(rows), seed)
        batch = pad_sequence([rows[i] for i in numbers], batch_first=True, padding_value=-1)
        return batch[:, :-1].clamp(min=0), batch[:, 1:]

    for step, loss in common.train(model, get_batch, pretrain_steps):
        if (step + 1) % 100 == 0:
            print(f'step {step + 1:4} of {pretrain_steps}: loss {loss:.3f}', flush=True)
    os.makedirs(folder, exist_ok=True)
    checkpoint.save(folder, {
        'model': model.state_dict(), 'model_args': asdict(model.config), 'iter_num': pretrain_steps,
        'best_val_loss': float('inf'), 'config': {'recipe': recipe()},
        'tokenizer': words.to_dict()}, is_best=False)


def recipe():
    """Return a hash of what the base model depends on."""
    sizes = {name: config[name] for name in
             ('documents', 'pretrain_steps', 'n_layer', 'n_head', 'n_embd', 'seed')}
    return tokenizer.digest([sizes, draw(1000, 'texts')])


def open_base(home):
    """Return the base model and its tokenizer, trained if it is not there."""
    folder = os.path.join(home, 'base')
    path = os.path.join(folder, 'ckpt.pt')
    is_made = os.path.exists(path) and checkpoint.load(path)['config'].get('recipe') == recipe()
    if not is_made:
        print(f'pretraining on {documents:,} reviews without labels')
        pretrain([text for text, _ in draw(documents, 'texts')], folder)
    model, words, _, line = pretrained.open_model('resume', folder)
    print(f'{line}; {model.get_num_params():,} parameters')
    return model, words


# The methods --------------------------------------------------------------------------------------

def finetune(model, items, learning_rate):
    """Train a GPT with a head on [(ids, label), ...], with GPT-1's loss."""
    n_steps = max(least_steps, round(epochs * len(items) / batch_size))
    opt = optim.adamw(model, 0.01, learning_rate, (0.9, 0.999))
    schedule = optim.Schedule(learning_rate, min(20, n_steps // 10), n_steps, 0.0)
    model.train()
    for step in range(n_steps):
        numbers = train_items(step * batch_size, batch_size, len(items), seed)
        sequences, targets = zip(*(items[i] for i in numbers), strict=True)
        rows = classify.to_rows(sequences, 'cpu')
        _, task_loss, lm_loss = classify.losses_of(model, *rows, torch.tensor(targets), lm_coef > 0)
        n_tokens = sum(len(ids) - 1 for ids in sequences)
        (task_loss / batch_size + lm_coef * lm_loss / n_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.set_rates(opt, schedule.cosine(step))
        opt.step()
        opt.zero_grad(set_to_none=True)


@torch.no_grad()
def answers_of(model, items):
    """Return the likelier label of each item, (n,)."""
    model.eval()
    answers = np.zeros(len(items), int)
    order = sorted(range(len(items)), key=lambda i: len(items[i][0]))  # little padding
    for batch in (order[i : i + 100] for i in range(0, len(order), 100)):
        rows = classify.to_rows([items[i][0] for i in batch], 'cpu')
        answers[batch] = classify.logits_of(model, *rows).argmax(1)
    return answers


def new_classifier(base, start):
    """Return a GPT with a head: a copy of the base, or the same from scratch."""
    torch.manual_seed(seed)
    model = GPT(base.config)
    if start == 'pretrained':
        model.load_state_dict(base.state_dict())
    return classify.add_head(model, 2)


def count_words(labelled, asked):
    """Return the answers of logistic regression on words and pairs of words, (n,)."""
    train, test = (classifier.Rows([classifier.features(text) for text, _ in rows])
                   for rows in (labelled, asked))
    targets = np.array([label for _, label in labelled], bool)
    return (test.logits(*classifier.fit(train, targets, 1e-5)) > 0).astype(int)


def prompt(base, words, solved, asked):
    """Return the base model's answers after `solved` examples, (n,)."""
    before = [words.eot]
    for text, label in solved:
        before += [*words.encode(text + QUESTION + ANSWERS[label]), words.eot]
    pairs = [(before + words.encode(text + QUESTION), words.encode(answer))
             for text, _ in asked for answer in ANSWERS]
    return np.array(loglikelihoods(base, pairs)).reshape(-1, 2).argmax(1)


# Results ------------------------------------------------------------------------------------------

def interval(right):
    """Return the mean of right, (draws, reviews), and a 95% interval."""
    return common.interval_of_draws(right, 1000)


def picture(curves, prompts):
    """Draw the accuracy of each method along the number of labels."""
    figure, ax = common.pyplot().subplots(figsize=(8, 4.8))
    for method, points in curves.items():
        sizes, means, lows, highs = np.array(points).T
        ax.plot(sizes, 100 * means, color=METHODS[method], marker='o', markersize=5)
        ax.fill_between(sizes, 100 * lows, 100 * highs, color=METHODS[method], alpha=0.15)
        ax.annotate(method, (sizes[-1], 100 * means[-1]), (8, 0), textcoords='offset points',
                    color=METHODS[method], va='center')
    for shots, (mean, *_) in prompts.items():
        ax.axhline(100 * mean, color=common.PURPLE, linestyle=':')
        ax.annotate(f'prompt, {shots} examples', (sizes[-1], 100 * mean), (0, -4), ha='right',
                    textcoords='offset points', color=common.PURPLE, va='top')
    ax.axhline(50, color='gray', linewidth=1)
    ax.set(xscale='log', xticks=sizes, xticklabels=[f'{size:,.0f}' for size in sizes],
           xlabel='labelled reviews', ylabel='test reviews classified correctly, %', ylim=(45, 102))
    ax.minorticks_off()
    return figure


def main():
    # read the settings
    try:
        sizes = sorted({int(part) for part in labels.split(',')})
    except ValueError:
        sizes = [0]
    if sizes[0] < 10:
        raise UserError(f'labels={labels!r}: expected numbers of 10 or more, such as 50,200')
    home = os.path.join(out, 'sentiment')
    common.start(home, threads=1)

    # make the reviews and the base model
    base, words = open_base(home)
    asked = draw(tests, 'tests')
    truth = np.array([label for _, label in asked])
    encoded = {'asked': encode(asked, words)}
    pools = [draw(sizes[-1], f'labelled {number}') for number in range(seeds)]
    replace_file(os.path.join(home, 'labelled.jsonl'), b''.join(
        jsonl.to_line({'text': text, 'label': ('bad', 'good')[label]}) for text, label in pools[0]))

    # prompt the base model
    prompts = {shots: interval(np.array([prompt(base, words, pool[:shots], asked) == truth
                                         for pool in pools[: seeds if shots else 1]]))
               for shots in SHOTS}
    for shots, (mean, low, high) in prompts.items():
        print(f'prompt with {shots} examples: {mean:.1%} ({low:.1%} to {high:.1%})', flush=True)

    # learn from labels
    rates, rights = {'pretrained': rate, 'scratch': scratch_rate}, {}
    for size in sizes:
        for number, pool in enumerate(pools):
            for method in METHODS:
                if method in rates:
                    model = new_classifier(base, method)
                    finetune(model, encode(pool[:size], words), rates[method])
                    answers = answers_of(model, encoded['asked'])
                else:
                    answers = count_words(pool[:size], asked)
                rights[method, size, number] = answers == truth
        print(f'{size:5} labels: ' + ', '.join(
            f'{method} {np.mean([rights[method, size, i] for i in range(seeds)]):.1%}'
            for method in METHODS), flush=True)

    # report
    curves = {method: [[size, *interval(np.array([rights[method, size, i] for i in range(seeds)]))]
                       for size in sizes] for method in METHODS}
    gains = [interval(np.array([rights['pretrained', size, i] * 1.0 - rights['scratch', size, i]
                                for i in range(seeds)])) for size in sizes]
    rows = [['labels', *METHODS, 'pretrained - scratch']]
    for i, size in enumerate(sizes):
        cells = [[100 * value for value in curves[method][i][1:]] for method in METHODS]
        rows.append([f'{size:,}',
                     *(f'{mean:.1f} ({low:.0f}-{high:.0f})' for mean, low, high in cells),
                     '{:+.1f} ({:+.1f} to {:+.1f})'.format(*(100 * value for value in gains[i]))])
    print(f'\n% of {tests:,} test reviews right, with 95% intervals\n\n{table(rows)}\n')
    common.save(picture(curves, prompts), out, 'sentiment')
    common.record(out, 'sentiment', curves=curves, prompts=prompts,
                  gains=dict(zip(sizes, gains, strict=True)))


if __name__ == '__main__':
    main()
