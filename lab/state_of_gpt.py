"""
"State of GPT" in one command: a base model, and what finetuning, a reward model and reinforcement learning make of it.

    $ python -m lab.state_of_gpt                 # half an hour on two cores; killed, it goes on
    $ python -m lab.state_of_gpt --share=0.02    # that it all works, and nothing more
    $ python sample.py --out_dir=out-lab/state_of_gpt/grpo --chat

Every stage is a command that can be given by hand; each is printed before it runs, in the order of the talk:

    data         questions with answers that can be checked: texts, conversations, pairs of answers; and the tokenizer:
                 a byte is a token, since letters and digits are what is asked about
    base         pretraining: a GPT continues texts, from which it learns how words are spelt and sums are done
    sft          supervised finetuning: the same model answers in conversations
    reward       a reward model learns from pairs which of two answers is the better
    ppo          reinforcement learning: answers that the reward model likes become likelier, be they right or not
    grpo         the same with a program that checks answers in place of the model that judges them
    chat         three questions to the last model

All are then asked the same held-out questions, and the finetuned one in the ways that cost no training either: the vote
of several answers (self-consistency), the one that the reward model likes best (best of n), a calculator.

Expect about this (two cores of an AMD EPYC), of 700 questions: base 24%, with 4 examples 35%, SFT 87%, one of its
samples 81%, a vote of 8 91%, the best of 8 91%, with a calculator 89%, PPO 96%, GRPO 97%.

Source: "State of GPT", Karpathy 2023. Needs '.[lab]'.
"""

import json
import math
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time

from bench.common import table as aligned
from configurator import check, explain_errors, override
from data import download
from flatgpt import checkpoint
from flatgpt.files import replace_file
from lab import common
from posttrain.tasks.common import wilson

# settings ------------------------------------------------------------------------------------------------------------
seed = 1  # of weights, batches and answers; the questions are the same for every seed
out = 'out-lab'  # folder of the picture and the numbers; all else is in its folder state_of_gpt
n = 700  # held-out questions, a seventh of each kind
num_samples = 8  # answers to each that are voted on, and chosen from
share = 1.0  # of the steps of every stage
n_layer: int | None = None  # of the model; None: what config/tiny_web.py says, and so for n_embd
n_embd: int | None = None
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

QUESTIONS = 'What is 58 + 67?\nHow many times is the letter e in needle?\nWrite straw from back to front.'
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# the stages -----------------------------------------------------------------------------------------------------------


def script(name, recipe='', **options):
    """The command of a script, with a recipe of config/, of whose steps `share` are taken."""
    recipe = os.path.join(ROOT, 'config', recipe) if recipe else ''
    if recipe and share != 1:
        options['max_iters'] = max(2, round(share * runpy.run_path(recipe)['max_iters']))
    program = [os.path.relpath(os.path.join(ROOT, name))] if name.endswith('.py') else ['-m', name]
    return ['python', *program, *([os.path.relpath(recipe)] if recipe else []),
            *(f'--{key}={value}' for key, value in options.items() if value is not None)]


def stages(home):
    """[(name, command), ...]; those whose name begins with 'ask' print what they found as a last line of JSON."""
    at = {name: os.path.join(home, name) for name in ('data', 'texts', 'base', 'sft', 'reward', 'ppo', 'grpo')}
    tokens = os.path.join(at['data'], 'chat.json')

    def ask(name, **options):
        return script('eval.py', out_dir=at[name], task='tiny_chat', n=n, **options)

    def learn(name, recipe, start='sft', **options):
        return script(name, recipe, init_from=at[start] if start else None, seed=seed, **options)

    sampled = {'num_samples': num_samples, 'temperature': 1.0, 'reward_model': at['reward']}
    return [
        ('data', script('data/tiny_chat/prepare.py', out_dir=at['data'])),
        ('texts', script('data/text/prepare.py', input=os.path.join(at['data'], 'corpus.jsonl'), out_dir=at['texts'],
                         tokenizer=tokens, val_fraction=0.02)),  # evaluated whole, and 0.1 would take half a minute
        ('base', learn('train.py', 'tiny_web.py', None, dataset=at['texts'], out_dir=at['base'], n_layer=n_layer,
                       n_embd=n_embd)),
        ('ask base', ask('base', shots=0, max_new_tokens=40)),
        ('ask base, 4 shots', ask('base', shots=4, max_new_tokens=40)),
        ('sft', learn('train.py', 'sft_tiny_chat.py', 'base', dataset=at['data'], out_dir=at['sft'])),
        ('ask sft', ask('sft')),
        ('ask sft, calculator', ask('sft', tools=True, max_new_tokens=112)),  # a longer prompt
        ('reward', learn('posttrain.reward', 'reward_tiny_chat.py', data=os.path.join(at['data'], 'pairs.jsonl'),
                         out_dir=at['reward'])),
        ('ask sft, samples', ask('sft', **sampled)),
        ('ppo', learn('posttrain.rl', 'ppo_tiny_chat.py', reward_model=at['reward'], out_dir=at['ppo'])),
        ('ask ppo', ask('ppo')),
        ('grpo', learn('posttrain.rl', 'grpo_tiny_chat.py', out_dir=at['grpo'])),
        ('ask grpo', ask('grpo')),
        ('chat', script('sample.py', chat=True, out_dir=at['grpo'], temperature=0)),
    ]


def goes_on():
    return f'the same command goes on from there:\n  {shlex.join(["python", *sys.argv])}'


def run(name, command, can_resume):
    """Run a stage to its end. -> what it found, of those that ask"""
    if can_resume:
        command = [*(part for part in command if not part.startswith('--init_from')), '--init_from=resume']
    asks, questions = name.startswith('ask'), f'echo {shlex.quote(QUESTIONS)} | ' if name == 'chat' else ''
    print(f'\n== {name} {"=" * (76 - len(name))}\n$ {questions}{shlex.join(command)}', flush=True)
    stage = subprocess.Popen([sys.executable, *command[1:]], stdout=subprocess.PIPE if asks else None, text=True,
                             stdin=subprocess.PIPE if questions else None)
    try:
        printed, _ = stage.communicate(f'{QUESTIONS}\n' if questions else None)
    except KeyboardInterrupt:
        stage.send_signal(signal.SIGINT)  # also where the terminal has told it: one that trains saves before it ends
        stage.wait()
        raise
    if stage.returncode:
        raise SystemExit(f'the stage {name!r} ended with exit code {stage.returncode}, see above; {goes_on()}')
    if asks:
        print(printed[: printed.rstrip().rindex('\n')], flush=True)
        return json.loads(printed.splitlines()[-1])


def is_whole(folder):
    """Whether a run took all its steps: one that a signal has stopped saves and ends like another."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
        return checkpoint.load(os.path.join(folder, 'ckpt.pt'))['iter_num'] >= json.load(file)['max_iters']


def recipe_of(command):
    """The SHA-256 of what else decides about a stage: the recipe of config/, or the scripts that make data."""
    paths = [part for part in command[2:] if part.endswith('.py')]
    if command[1].endswith('prepare.py'):
        paths = [command[1], os.path.join(ROOT, 'posttrain', 'tasks', 'tiny_chat.py')]
    return [download.file_sha256(path) for path in paths]


def builds_on(command, names, home):
    """Whether a command reads or writes in the folder of one of these stages."""
    folders = {os.path.join(home, name) for name in names}
    values = [part.partition('=')[2] for part in command]
    return any(folders & {value, os.path.dirname(value)} for value in values)


def run_all(home):
    """
    Run the stages that are not done yet; home/stages.json says which are. One whose command or recipe is another now is
    run again, and so are those that build on it.
    -> {name: {'command', 'recipe', 'seconds', since it last began, 'found'}}
    """
    path, plan, done = os.path.join(home, 'stages.json'), stages(home), {}
    if os.path.exists(path):
        with open(path, encoding='utf-8') as file:
            records = json.load(file)
        done = {name: records[name] for name, _ in plan if name in records}

    def note():
        replace_file(path, json.dumps(done, indent=1).encode())

    for name, command in plan:
        folder = os.path.join(home, name)
        ckpt_path = os.path.join(folder, 'ckpt.pt')
        record, what = done.get(name, {}), {'command': command, 'recipe': recipe_of(command)}
        was_begun = what.items() <= record.items()
        if was_begun and record['seconds'] is not None:
            continue
        outdated = {name}
        for later, its_command in plan:
            if builds_on(its_command, outdated, home):
                outdated.add(later)
        done = {other: done[other] for other in done if other not in outdated}
        # before the stage is noted as begun: one that is killed at once would go on from another's checkpoint
        if not was_begun and (aside := checkpoint.put_aside(folder)):
            print(f'the run that was there is in {aside}')
        done[name] = {**what, 'seconds': None, 'found': None}
        note()
        started = time.perf_counter()
        found = run(name, command, was_begun and os.path.exists(ckpt_path))
        if os.path.exists(ckpt_path) and not is_whole(folder):
            raise SystemExit(f'the stage {name!r} was stopped; {goes_on()}')
        done[name].update(seconds=round(time.perf_counter() - started, 1), found=found)
        note()
    return done


# what came of it ------------------------------------------------------------------------------------------------------


def rows_of(done):
    """[(what answers, how many are right, of how many, accuracy of each kind), ...] in the order of the talk."""
    def row(title, stage, key='accuracy', kinds=True):
        found = done[stage]['found']
        return (title, round(found[key] * found['n']), found['n'],
                {kind: of['accuracy'] for kind, of in found['kinds'].items()} if kinds else {})

    k = num_samples
    return [row('base', 'ask base'), row('base, 4 examples', 'ask base, 4 shots'), row('SFT', 'ask sft'),
            row('SFT, one sample', 'ask sft, samples', 'accuracy_of_one', False),
            row(f'SFT, vote of {k}', 'ask sft, samples', 'accuracy_of_majority', False),
            row(f'SFT, best of {k}', 'ask sft, samples'), row('SFT, calculator', 'ask sft, calculator'),
            row('PPO', 'ask ppo'), row('GRPO', 'ask grpo')]


def curve(home, name, key):
    """-> steps and values of a key in a run's log"""
    with open(os.path.join(home, name, 'log.jsonl'), encoding='utf-8') as file:
        lines = [json.loads(line) for line in file]
    return zip(*((line['step'], line[key]) for line in lines if key in line), strict=True)


def draw(rows, home):
    plt = common.pyplot()
    figure = plt.figure(figsize=(10, 5))
    bars, accuracy, entropy = figure.subplot_mosaic([['bars', 'accuracy'], ['bars', 'entropy']],
                                                    width_ratios=[5, 4]).values()
    colors = {'base': common.BLACK, 'SFT': common.BLUE, 'PPO': common.ORANGE, 'GRPO': common.GREEN}
    for y, (title, right, n_asked, _) in enumerate(rows):
        low, high = wilson(right, n_asked)
        value = right / n_asked
        bars.barh(y, 100 * value, color=colors[title.split(',')[0]], alpha=0.85, height=0.7)
        bars.errorbar(100 * value, y, xerr=[[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]],
                      color='black', lw=1)
        bars.text(100 * high + 1.5, y, f'{value:.0%}', va='center')
    bars.set(yticks=range(len(rows)), yticklabels=[title for title, *_ in rows], xlim=(0, 112),
             xlabel='held-out questions answered right, %', title='The same questions to all')
    bars.invert_yaxis()
    bars.grid(False, axis='y')
    for name in ('ppo', 'grpo'):
        steps, values = curve(home, name, 'val_accuracy')
        accuracy.plot(steps, [100 * value for value in values], 'o-', ms=3, color=colors[name.upper()])
        accuracy.annotate(name.upper(), (steps[-1], 100 * values[-1]), xytext=(4, 0), textcoords='offset points',
                          color=colors[name.upper()], va='center')
        steps, values = curve(home, name, 'entropy')
        entropy.plot(steps, values, color=colors[name.upper()])
    accuracy.set(title='Reinforcement learning', ylabel='val questions right, %')
    entropy.set(xlabel='step', ylabel='entropy, nats a token', ylim=(0, None))
    common.save(figure, out, 'state_of_gpt')


def main():
    check(config, (('n', lambda value: value >= 7, '7 or more, one of each kind'),
                   ('num_samples', lambda value: value >= 2, '2 or more, to choose from'),
                   ('share', lambda value: 0 < value < math.inf, 'more than 0')))
    common.pyplot()  # whether it is there, before and not after the work
    home = os.path.join(out, 'state_of_gpt')
    common.start(home, seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        done = run_all(home)
    except KeyboardInterrupt:
        raise SystemExit(f'stopped; {goes_on()}') from None
    rows = rows_of(done)
    kinds = [kind for kind in done['ask sft']['found']['kinds'] if kind != 'all']
    seconds = sum(record['seconds'] for record in done.values())
    _, entropies = curve(home, 'grpo', 'entropy')
    before, after = (sum(part) / len(part) for part in (entropies[:10], entropies[-10:]))  # of a step alone it is noisy
    _, reward = curve(home, 'reward', 'val_accuracy')

    print(f'\n{n} held-out questions, right in %\n')
    print(aligned([['', 'all', '95%', *(kind[:5] for kind in kinds)]] + [
        [title, f'{100 * right / of:.1f}', '-'.join(f'{100 * end:.0f}' for end in wilson(right, of)),
         *(f'{100 * by_kind[kind]:.0f}' if by_kind else '' for kind in kinds)] for title, right, of, by_kind in rows]))
    print(f'\nThe reward model prefers the right one of {reward[-1]:.1%} of held-out pairs.\n'
          f'Entropy under GRPO: {before:.3f} to {after:.3f} nats a token. All stages: {seconds / 60:.1f} minutes.\n')
    common.record(out, 'state_of_gpt', rows=[row[:3] for row in rows], reward_accuracy=reward[-1], entropies=entropies,
                  seconds={name: record['seconds'] for name, record in done.items()})
    draw(rows, home)
    print(f'talk to it:\n  python sample.py --chat --out_dir={os.path.join(home, "grpo")}')


if __name__ == '__main__':
    sys.excepthook = explain_errors
    main()
