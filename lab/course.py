"""Make the models of the course once, in a folder that its experiments share.

    course = Course(out='out-lab')
    folders = course.make('sft', 'grpo')    # {'sft': 'out-lab/state_of_gpt/sft', ...}
    folder = course.finetune('reader', start='base', talks=conversations, max_iters=600)

A stage is a command of this repository, printed before it runs. out-lab/state_of_gpt/stages.json
records it. It runs again after a change of the command, its recipe, its data, or of a stage that it
builds on. An interrupted stage resumes.
"""

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

from configurator import UserError
from data import download
from data.tiny_chat.prepare import AMOUNTS
from flatgpt import checkpoint, files, jsonl, outdir

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUESTIONS = ('What is 58 + 67?\nHow many times is the letter e in needle?\n'
             'Write straw from back to front.')


@dataclass(frozen=True)
class Course:
    """Hold the settings of the course's models, by default those of lab.state_of_gpt."""

    out: str = 'out-lab'  # the models are in its folder state_of_gpt
    share: float = 1.0  # of the steps of every stage; below 1 also of its data
    seed: int = 1
    n: int = 700  # questions to each model
    num_samples: int = 8  # answers to a question for the vote and best of n
    n_layer: int | None = None  # None: that of config/tiny_web.py, as for n_embd
    n_embd: int | None = None

    @property
    def home(self):
        """Return the folder of the stages."""
        return os.path.join(self.out, 'state_of_gpt')

    def folder(self, name):
        """Return the folder of a stage."""
        return os.path.join(self.home, name)

    def scaled(self, amount):
        """Return `share` of a number of conversations, at most all of them."""
        # at least 400, since a twentieth of them is held out
        return max(400, round(min(1, self.share) * amount))

    # Commands -------------------------------------------------------------------------------------

    def script(self, name, recipe='', **options):
        """Return a script's command, with `share` of the steps of a config/ recipe."""
        recipe = os.path.join(ROOT, 'config', recipe) if recipe else ''
        if recipe and self.share != 1:
            settings = runpy.run_path(recipe)
            max_iters = options.get('max_iters', settings['max_iters'])
            options['max_iters'] = max(2, round(self.share * max_iters))
            if self.share < 1 and 'eval_examples' in settings:
                options['eval_examples'] = max(7, round(self.share * settings['eval_examples']))
        program = [os.path.relpath(os.path.join(ROOT, name))] if name.endswith('.py') else [
            '-m', name]
        return ['python', *program, *([os.path.relpath(recipe)] if recipe else []),
                *(f'--{key}={value}' for key, value in options.items() if value is not None)]

    def ask(self, name, **options):
        """Return the command that asks a model the held-out questions."""
        return self.script('eval.py', out_dir=self.folder(name), task='tiny_chat', n=self.n,
                           **options)

    def learn(self, name, recipe, start='sft', **options):
        """Return the command that trains from the model of another stage."""
        return self.script(name, recipe, init_from=self.folder(start) if start else None,
                           seed=self.seed, **options)

    def stages(self):
        """Return [(name, command), ...]; 'ask' stages print a last line of JSON."""
        ask, learn, folder, script = self.ask, self.learn, self.folder, self.script
        amounts = {name: self.scaled(amount) for name, amount in AMOUNTS.items() if self.share < 1}
        sampled = {'num_samples': self.num_samples, 'temperature': 1.0,
                   'reward_model': folder('reward')}
        return [
            ('data', script('data/tiny_chat/prepare.py', out_dir=folder('data'), **amounts)),
            ('texts', script('data/text/prepare.py', out_dir=folder('texts'),
                             input=os.path.join(folder('data'), 'corpus.jsonl'),
                             tokenizer=os.path.join(folder('data'), 'chat.json'),
                             val_fraction=0.02)),  # evaluated whole: 0.1 would take half a minute
            ('base', learn('train.py', 'tiny_web.py', None, dataset=folder('texts'),
                           out_dir=folder('base'), n_layer=self.n_layer, n_embd=self.n_embd)),
            ('ask base', ask('base', shots=0, max_new_tokens=40)),
            ('ask base, 4 shots', ask('base', shots=4, max_new_tokens=40)),
            ('sft', learn('train.py', 'sft_tiny_chat.py', 'base', dataset=folder('data'),
                          out_dir=folder('sft'))),
            ('ask sft', ask('sft')),
            ('ask sft, calculator', ask('sft', tools=True, max_new_tokens=112)),  # a longer prompt
            ('reward', learn('posttrain.reward', 'reward_tiny_chat.py', out_dir=folder('reward'),
                             data=os.path.join(folder('data'), 'pairs.jsonl'))),
            ('ask sft, samples', ask('sft', **sampled)),
            ('ppo', learn('posttrain.rl', 'ppo_tiny_chat.py', reward_model=folder('reward'),
                          out_dir=folder('ppo'))),
            ('ask ppo', ask('ppo')),
            ('grpo', learn('posttrain.rl', 'grpo_tiny_chat.py', out_dir=folder('grpo'))),
            ('ask grpo', ask('grpo')),
            ('chat', script('posttrain.chat', out_dir=folder('grpo'), temperature=0)),
        ]

    # Making the models ----------------------------------------------------------------------------

    def make(self, *names):
        """Run the stages of these models that are not complete, and what they build on.

        Returns {name: folder}.
        """
        self.run_stages(self.needed(names))
        return {name: self.folder(name) for name in names}

    def needed(self, names):
        """Return the stages of these models and those that they build on."""
        plan, wanted = [], set(names)
        for name, command in reversed(self.stages()):
            if name in wanted:
                plan.insert(0, (name, command))
                wanted |= {other for other, _ in self.stages()
                           if other != name and builds_on(command, [other], self.home)}
        return plan

    def finetune(self, name, start, talks, recipe='sft_tiny_chat.py', **options):
        """Finetune a model on conversations, if it has not learnt them yet; -> its folder.

        start: the stage that it begins with. talks: iterable of {'messages': [...]}. options: of
        train.py, beside the recipe in config/.
        """
        data = self.folder(f'{name}-data')
        path = self.write(f'{name}-data.jsonl', talks)
        prepare = self.script('data/chat/prepare.py', input=path, out_dir=data,
                              tokenizer=self.folder(start), val_fraction=0.02,
                              block_size=options.get('block_size'))
        learn = self.learn('train.py', recipe, start, dataset=data, out_dir=self.folder(name),
                           **options)
        self.run_stages([*self.needed([start]), (f'{name}-data', prepare), (name, learn)])
        return self.folder(name)

    def write(self, name, rows):
        """Write JSON lines for a stage to read; -> their path."""
        os.makedirs(self.home, exist_ok=True)
        path = self.folder(name)
        files.replace_file(path, b''.join(map(jsonl.to_line, rows)))
        return path

    def run_stages(self, plan):
        """Run the stages [(name, command), ...] that are not complete by stages.json.

        A stage with a changed command, recipe or data runs again, and so do the stages that build
        on it. Returns {name: {'command', 'recipe', 'seconds', 'found'}}.
        """
        os.makedirs(self.home, exist_ok=True)
        path, done = os.path.join(self.home, 'stages.json'), {}
        with alone_in(self.home):
            if os.path.exists(path):
                with open(path, encoding='utf-8') as file:
                    done = json.load(file)
            for name, command in plan:
                self.run_stage(name, command, done, path)
        return {name: done[name] for name, _ in plan}

    def run_stage(self, name, command, done, path):
        """Run a stage unless it is complete; record it in `done` and in the file `path`."""
        ckpt_path = os.path.join(self.folder(name), 'ckpt.pt')
        record = done.get(name, {})
        job = {'command': command, 'recipe': recipe_of(command, self.home)}
        was_begun = job.items() <= record.items()
        if was_begun and record['seconds'] is not None:
            return

        # forget this stage and the stages that build on it
        outdated = {name}
        while new := {other for other in done.keys() - outdated
                      if builds_on(done[other]['command'], outdated, self.home)}:
            outdated |= new
        for other in outdated & done.keys():
            del done[other]
        # before the record: a stage killed at once must not resume from an older checkpoint
        if not was_begun and (aside := outdir.put_aside(self.folder(name))):
            print(f'the earlier run was moved to {aside}')
        remove_results(command, was_begun)
        done[name] = {**job, 'seconds': None, 'found': None}
        files.replace_file(path, json.dumps(done, indent=1).encode())

        # run it
        started = time.perf_counter()
        result = run(name, command, was_begun and os.path.exists(ckpt_path))
        if os.path.exists(ckpt_path) and not is_whole(self.folder(name)):
            raise UserError(f'the stage {name!r} was stopped; {to_go_on()}')
        done[name].update(seconds=round(time.perf_counter() - started, 1), found=result)
        files.replace_file(path, json.dumps(done, indent=1).encode())


# Stages -------------------------------------------------------------------------------------------

def to_go_on():
    """Return the advice how to resume."""
    spec = sys.modules['__main__'].__spec__
    command = shlex.join(['python', '-m', spec.name if spec else 'lab.state_of_gpt', *sys.argv[1:]])
    return f'the same command goes on from there:\n  {command}'


@contextmanager
def alone_in(home):
    """Lock a folder; turn Ctrl-C and SIGTERM into a UserError that says how to resume."""
    lock = files.lock_folder(home, 'making models in')
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise UserError(f'stopped; {to_go_on()}') from None
    finally:
        signal.signal(signal.SIGTERM, before)
        files.unlock(lock)


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


def remove_results(command, was_begun):
    """Remove a command's file --out, and its results so far if it was not begun."""
    for part in command:
        if part.startswith('--out='):
            path = part.removeprefix('--out=')
            for outdated in [path, *([] if was_begun else [f'{path}.part'])]:
                if os.path.exists(outdated):
                    os.remove(outdated)


def is_whole(folder):
    """Return whether a run took all its steps, and was not stopped by a signal."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
        max_iters = json.load(file)['max_iters']
    return checkpoint.load(os.path.join(folder, 'ckpt.pt'))['iter_num'] >= max_iters


def recipe_of(command, home):
    """Return the SHA-256 of the files beside the stages that decide a stage.

    They are its recipe, the scripts that make its data, and what Course.write() wrote for it.
    """
    paths = [part for part in command[2:] if part.endswith('.py')]
    if command[1].endswith('prepare.py'):
        paths = [command[1]]
    if command[1].endswith(('tiny_chat/prepare.py', 'text/prepare.py')):
        paths.append(os.path.join(ROOT, 'posttrain', 'tasks', 'tiny_chat.py'))
    values = [part.partition('=')[2] for part in command]
    paths += [value for value in values if os.path.dirname(value) == home and
              os.path.isfile(value)]
    return [download.file_sha256(path) for path in paths]


def builds_on(command, names, home):
    """Return whether a command reads or writes in the folder of one of these stages."""
    folders = {os.path.join(home, name) for name in names}
    values = [part.partition('=')[2] for part in command]
    return any(folders & {value, os.path.dirname(value)} for value in values)
