"""
Train an assistant in one command, from pretraining to reinforcement learning.

    $ python -m lab.state_of_gpt                 # half an hour on two cores; resumes if killed
    $ python -m lab.state_of_gpt --share=0.02    # a check that all stages run
    $ python -m posttrain.chat --out_dir=out-lab/state_of_gpt/grpo

Each stage is a command of this repository, printed before it runs:

    data         questions with checkable answers: texts, conversations, pairs of answers; a byte
                 is a token, since the questions are about letters and digits
    base         pretraining: a GPT continues texts that spell words and add numbers
    sft          supervised finetuning: the same model answers in conversations
    reward       a reward model learns from pairs which of two answers is better
    ppo          reinforcement learning from the reward model's scores, right or wrong
    grpo         reinforcement learning from a program that checks the answers
    chat         three questions to the last model

All models then answer the same held-out questions. The finetuned model is also measured with
methods that need no training: the vote of several answers (self-consistency), the answer with the
highest reward (best of n), and a calculator.

Expected (two cores of an AMD EPYC), of 700 questions: base 24%, with 4 examples 35%, SFT 87%, one
of its samples 81%, a vote of 8 91%, the best of 8 91%, with a calculator 89%, PPO 96%, GRPO 97%.

Source: "State of GPT", Karpathy 2023. Needs '.[lab]'.
"""

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from typing import Annotated

from bench.common import table as aligned
from configurator import Count, Positive, Range, Seed, UserError, override
from data import download
from data.tiny_chat.prepare import AMOUNTS
from flatgpt import checkpoint, jsonl, outdir
from flatgpt.files import replace_file
from lab import common
from posttrain.tasks.common import wilson

# Settings -----------------------------------------------------------------------------------------
seed: Seed = 1  # of weights, batches and answers; the questions do not depend on it
out = 'out-lab'  # folder of the picture and the numbers; the rest is in its folder state_of_gpt
n: Annotated[int, Range(least=7)] = 700  # held-out questions, a seventh of each kind
num_samples: Annotated[int, Range(least=2)] = 8  # answers per question for the vote and best of n
share: Positive = 1.0  # of the steps of every stage; below 1 also of its data
n_layer: Count | None = None  # of the model; None: that of config/tiny_web.py, as for n_embd
n_embd: Count | None = None
config = override(globals())
# --------------------------------------------------------------------------------------------------

QUESTIONS = ('What is 58 + 67?\nHow many times is the letter e in needle?\n'
             'Write straw from back to front.')
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# The stages ---------------------------------------------------------------------------------------


def script(name, recipe='', **options):
    """Return a script's command, with `share` of the steps of a config/ recipe."""
    recipe = os.path.join(ROOT, 'config', recipe) if recipe else ''
    if recipe and share != 1:
        settings = runpy.run_path(recipe)
        options['max_iters'] = max(2, round(share * settings['max_iters']))
        if share < 1 and 'eval_examples' in settings:
            options['eval_examples'] = max(7, round(share * settings['eval_examples']))
    program = [os.path.relpath(os.path.join(ROOT, name))] if name.endswith('.py') else ['-m', name]
    return ['python', *program, *([os.path.relpath(recipe)] if recipe else []),
            *(f'--{key}={value}' for key, value in options.items() if value is not None)]


def stages(home):
    """Return [(name, command), ...]; 'ask' stages print a last line of JSON."""
    folder = {name: os.path.join(home, name)
              for name in ('data', 'texts', 'base', 'sft', 'reward', 'ppo', 'grpo')}

    def ask(name, **options):
        return script('eval.py', out_dir=folder[name], task='tiny_chat', n=n, **options)

    def learn(name, recipe, start='sft', **options):
        init_from = folder[start] if start else None
        return script(name, recipe, init_from=init_from, seed=seed, **options)

    # at least 400, since a twentieth of the conversations is held out
    amounts = {name: max(400, round(share * amount))
               for name, amount in AMOUNTS.items() if share < 1}
    sampled = {'num_samples': num_samples, 'temperature': 1.0, 'reward_model': folder['reward']}
    return [
        ('data', script('data/tiny_chat/prepare.py', out_dir=folder['data'], **amounts)),
        ('texts', script('data/text/prepare.py', out_dir=folder['texts'],
                         input=os.path.join(folder['data'], 'corpus.jsonl'),
                         tokenizer=os.path.join(folder['data'], 'chat.json'),
                         val_fraction=0.02)),  # evaluated whole: 0.1 would take half a minute
        ('base', learn('train.py', 'tiny_web.py', None, dataset=folder['texts'],
                       out_dir=folder['base'], n_layer=n_layer, n_embd=n_embd)),
        ('ask base', ask('base', shots=0, max_new_tokens=40)),
        ('ask base, 4 shots', ask('base', shots=4, max_new_tokens=40)),
        ('sft', learn('train.py', 'sft_tiny_chat.py', 'base', dataset=folder['data'],
                      out_dir=folder['sft'])),
        ('ask sft', ask('sft')),
        ('ask sft, calculator', ask('sft', tools=True, max_new_tokens=112)),  # a longer prompt
        ('reward', learn('posttrain.reward', 'reward_tiny_chat.py', out_dir=folder['reward'],
                         data=os.path.join(folder['data'], 'pairs.jsonl'))),
        ('ask sft, samples', ask('sft', **sampled)),
        ('ppo', learn('posttrain.rl', 'ppo_tiny_chat.py', reward_model=folder['reward'],
                      out_dir=folder['ppo'])),
        ('ask ppo', ask('ppo')),
        ('grpo', learn('posttrain.rl', 'grpo_tiny_chat.py', out_dir=folder['grpo'])),
        ('ask grpo', ask('grpo')),
        ('chat', script('posttrain.chat', out_dir=folder['grpo'], temperature=0)),
    ]


def to_go_on():
    command = shlex.join(['python', '-m', 'lab.state_of_gpt', *sys.argv[1:]])
    return f'the same command goes on from there:\n  {command}'


def run(name, command, can_resume):
    """Run a stage to its end; return the result of an 'ask' stage."""
    if can_resume:
        command = [part for part in command if not part.startswith('--init_from')]
        command.append('--init_from=resume')
    has_result = name.startswith('ask')
    questions = f'echo {shlex.quote(QUESTIONS)} | ' if name == 'chat' else ''
    print(f'\n== {name} {"=" * (76 - len(name))}\n$ {questions}{shlex.join(command)}', flush=True)
    stage = subprocess.Popen([sys.executable, *command[1:]], text=True,
                             stdout=subprocess.PIPE if has_result else None,
                             stdin=subprocess.PIPE if questions else None)
    try:
        printed, _ = stage.communicate(f'{QUESTIONS}\n' if questions else None)
    except KeyboardInterrupt:
        stage.send_signal(signal.SIGINT)  # a stage that trains saves before it ends
        stage.wait()
        raise
    if stage.returncode:
        raise UserError(f'the stage {name!r} ended with exit code {stage.returncode}, see above; '
                        f'{to_go_on()}')
    if has_result:
        *lines, last = printed.splitlines()
        print('\n'.join(lines), flush=True)
        return json.loads(last)


def is_whole(folder):
    """Return whether a run took all its steps, and was not stopped by a signal."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
        max_iters = json.load(file)['max_iters']
    return checkpoint.load(os.path.join(folder, 'ckpt.pt'))['iter_num'] >= max_iters


def recipe_of(command):
    """Return the SHA-256 of the recipe of a stage, or of the scripts of its data."""
    paths = [part for part in command[2:] if part.endswith('.py')]
    if command[1].endswith('prepare.py'):
        paths = [command[1], os.path.join(ROOT, 'posttrain', 'tasks', 'tiny_chat.py')]
    return [download.file_sha256(path) for path in paths]


def builds_on(command, names, home):
    """Return whether a command reads or writes in the folder of one of these stages."""
    folders = {os.path.join(home, name) for name in names}
    values = [part.partition('=')[2] for part in command]
    return any(folders & {value, os.path.dirname(value)} for value in values)


def run_all(home):
    """Run the stages that are not complete by home/stages.json.

    A stage with a changed command or recipe runs again, and so do the stages that build on it.
    Returns {name: {'command', 'recipe', 'seconds', 'found'}}.
    """
    path, plan, done = os.path.join(home, 'stages.json'), stages(home), {}
    if os.path.exists(path):
        with open(path, encoding='utf-8') as file:
            records = json.load(file)
        done = {name: records[name] for name, _ in plan if name in records}

    def save():
        replace_file(path, json.dumps(done, indent=1).encode())

    for name, command in plan:
        folder = os.path.join(home, name)
        ckpt_path = os.path.join(folder, 'ckpt.pt')
        record = done.get(name, {})
        job = {'command': command, 'recipe': recipe_of(command)}
        was_begun = job.items() <= record.items()
        if was_begun and record['seconds'] is not None:
            continue

        # forget this stage and the stages that build on it
        outdated = {name}
        for later, later_command in plan:
            if builds_on(later_command, outdated, home):
                outdated.add(later)
        done = {other: done[other] for other in done if other not in outdated}
        # before the record: a stage killed at once must not resume from an older checkpoint
        if not was_begun and (aside := outdir.put_aside(folder)):
            print(f'the earlier run was moved to {aside}')
        done[name] = {**job, 'seconds': None, 'found': None}
        save()

        # run it
        started = time.perf_counter()
        result = run(name, command, was_begun and os.path.exists(ckpt_path))
        if os.path.exists(ckpt_path) and not is_whole(folder):
            raise UserError(f'the stage {name!r} was stopped; {to_go_on()}')
        done[name].update(seconds=round(time.perf_counter() - started, 1), found=result)
        save()
    return done


# The results --------------------------------------------------------------------------------------


def rows_of(done):
    """Return [(title, right, asked, {kind: accuracy}), ...] in the stages' order."""
    def row(title, stage, key='accuracy', kinds=True):
        result = done[stage]['found']
        by_kind = {kind: of['accuracy'] for kind, of in result['kinds'].items()} if kinds else {}
        return title, round(result[key] * result['n']), result['n'], by_kind

    k = num_samples
    return [row('base', 'ask base'), row('base, 4 examples', 'ask base, 4 shots'),
            row('SFT', 'ask sft'),
            row('SFT, one sample', 'ask sft, samples', 'accuracy_of_one', False),
            row(f'SFT, vote of {k}', 'ask sft, samples', 'accuracy_of_majority', False),
            row(f'SFT, best of {k}', 'ask sft, samples'),
            row('SFT, calculator', 'ask sft, calculator'),
            row('PPO', 'ask ppo'), row('GRPO', 'ask grpo')]


def curve(home, name, key):
    """Return the steps and the values of a key in a run's log."""
    records = jsonl.read_objects(os.path.join(home, name, 'log.jsonl')).values()
    return zip(*((record['step'], record[key]) for record in records if key in record), strict=True)


def draw(rows, home):
    """Draw the accuracy of each row, and the curves of reinforcement learning."""
    plt = common.pyplot()
    figure = plt.figure(figsize=(10, 5))
    bars, accuracy, entropy = figure.subplot_mosaic(
        [['bars', 'accuracy'], ['bars', 'entropy']], width_ratios=[5, 4]).values()
    colors = {'base': common.BLACK, 'SFT': common.BLUE, 'PPO': common.ORANGE, 'GRPO': common.GREEN}
    for y, (title, right, n_asked, _) in enumerate(rows):
        low, high = (100 * end for end in wilson(right, n_asked))
        value = 100 * right / n_asked
        bars.barh(y, value, color=colors[title.split(',')[0]], alpha=0.85, height=0.7)
        bars.errorbar(value, y, xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                      color='black', lw=1)
        bars.text(high + 1.5, y, f'{value:.0f}%', va='center')
    bars.set(yticks=range(len(rows)), yticklabels=[title for title, *_ in rows], xlim=(0, 112),
             xlabel='held-out questions answered right, %', title='The same questions to all')
    bars.invert_yaxis()
    bars.grid(False, axis='y')
    for name in ('ppo', 'grpo'):
        color = colors[name.upper()]
        steps, values = curve(home, name, 'val_accuracy')
        accuracy.plot(steps, [100 * value for value in values], 'o-', ms=3, color=color)
        accuracy.annotate(name.upper(), (steps[-1], 100 * values[-1]), xytext=(4, 0), color=color,
                          textcoords='offset points', va='center')
        steps, values = curve(home, name, 'entropy')
        entropy.plot(steps, values, color=color)
    accuracy.set(title='Reinforcement learning', ylabel='val questions right, %')
    entropy.set(xlabel='step', ylabel='entropy, nats a token', ylim=(0, None))
    common.save(figure, out, 'state_of_gpt')


def main():
    common.pyplot()  # raises before half an hour of work if matplotlib is missing
    home = os.path.join(out, 'state_of_gpt')
    common.start(home)

    # run the stages
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        done = run_all(home)
    except KeyboardInterrupt:
        raise UserError(f'stopped; {to_go_on()}') from None

    # report
    rows = rows_of(done)
    kinds = [kind for kind in done['ask sft']['found']['kinds'] if kind != 'all']
    seconds = sum(record['seconds'] for record in done.values())
    _, entropies = curve(home, 'grpo', 'entropy')
    before, after = (sum(part) / len(part) for part in (entropies[:10], entropies[-10:]))
    _, reward = curve(home, 'reward', 'val_accuracy')
    cells = [['', 'all', '95%', *(kind[:5] for kind in kinds)]]
    for title, right, n_asked, by_kind in rows:
        interval = '-'.join(f'{100 * end:.0f}' for end in wilson(right, n_asked))
        cells.append([title, f'{100 * right / n_asked:.1f}', interval,
                      *(f'{100 * by_kind[kind]:.0f}' if by_kind else '' for kind in kinds)])
    print(f'\n{n} held-out questions, right in %\n\n{aligned(cells)}')
    print(f'\nThe reward model prefers the right answer in {reward[-1]:.1%} of held-out pairs.\n'
          f'Entropy under GRPO: {before:.3f} to {after:.3f} nats per token. All stages: '
          f'{seconds / 60:.1f} minutes.\n')
    common.record(out, 'state_of_gpt', rows=[row[:3] for row in rows], reward_accuracy=reward[-1],
                  entropies=entropies,
                  seconds={name: record['seconds'] for name, record in done.items()})
    draw(rows, home)
    print(f'talk to it:\n  python -m posttrain.chat --out_dir={os.path.join(home, "grpo")}')


if __name__ == '__main__':
    main()
