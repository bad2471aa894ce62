"""
Measure a model's accuracy on tasks in each evaluation of train.py.

    evaluation = TaskEvaluation(config, described, template, model, world)
    evaluation.measure(model)  # {'tiny_chat:4': 0.31}

The setting eval_tasks names tasks of posttrain/tasks, separated by commas: NAME, NAME:SHOTS or
NAME:SHOTS=FILE. SHOTS is the number of solved examples before a question, as in eval.py: by default
0 for a chat model, else 4. FILE holds the questions of a task that reads them. Each evaluation asks
the same eval_examples questions of val, or of the file, and takes the likeliest tokens as answers.
"""

import re

import tokenizer
from configurator import UserError
from flatgpt.samples import in_between
from posttrain.tasks import common as tasks

MAX_NEW_TOKENS = 128  # of an answer, as in eval.py; at most half of the context


def parse(eval_tasks):
    """Return {'NAME:SHOTS': (name, shots or None, file or '')}. Raises UserError."""
    parsed = {}
    for part in eval_tasks.split(',') if eval_tasks else ():
        match = re.fullmatch(r'(\w+)(?::(\d{1,3}))?(?:=(.+))?', part.strip())
        if not match:
            raise UserError(f'eval_tasks={eval_tasks!r}: {part.strip()!r} is no task; expected '
                            f'NAME, NAME:SHOTS or NAME:SHOTS=FILE, such as tiny_chat:4')
        name, shots, file = match.groups()
        key = part.strip().partition('=')[0]
        if key in parsed:
            raise UserError(f'eval_tasks={eval_tasks!r} names {key} twice; expected it once')
        parsed[key] = name, None if shots is None else int(shots), file or ''
    return parsed


class TaskEvaluation:
    """Hold the questions of eval_tasks.

    config: train.py's settings. described: the tokenizer, see tokenizer.from_dict(). template: of
    a chat model, or None. The processes of `world` share the questions. Raises UserError for a
    task, a file or a question that the model cannot be asked.
    """

    def __init__(self, config, described, template, model, world):
        self.tasks, block_size, seed = {}, model.config.block_size, config['seed']
        for key, (name, shots, file) in parse(config['eval_tasks']).items():
            if not described:
                raise UserError(f'eval_tasks={key}: the dataset has no tokenizer; leave it out')
            self.tokenizer = tokenizer.from_dict(described)
            task = tasks.load(name)
            selection = tasks.Questions('all' if file else 'val', config['eval_examples'], seed,
                                        file)
            examples = tasks.examples_of(task, selection)
            if not examples:
                raise UserError(f'eval_tasks: {file or name} has no questions')
            shots = (0 if template else 4) if shots is None else shots
            how = tasks.Answering(
                None if shots else template, shots=shots, temperature=0.0, seed=seed, world=world,
                pool=tasks.solved_examples(task, selection) if shots else (),
                max_new_tokens=max(1, min(MAX_NEW_TOKENS, block_size // 2)))
            tasks.encode_questions(examples, block_size, self.tokenizer, how)  # raises UserError
            self.tasks[key] = task, examples, how

    def measure(self, model):
        """Return the accuracy on each task."""
        with in_between(model):
            reports = {key: tasks.measure(task, examples, model, self.tokenizer, how)
                       for key, (task, examples, how) in self.tasks.items()}
        return {key: report['kinds']['all']['accuracy'] for key, report in reports.items()}

    def line(self, accuracies):
        """Return {task: accuracy} as the rest of a line."""
        return ''.join(f', {key} {accuracy:.1%}' for key, accuracy in accuracies.items())
