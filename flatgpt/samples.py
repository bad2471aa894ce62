"""
Sample from a model while it trains, and at the end of a run.

    samples = Samples(config, described, template)  # raises UserError for a wrong prompt
    print(samples.add(model, run))                  # a line of samples.jsonl; the text to print

A line is {"step": 500, "prompt": "The", "text": " cat sat"}. All samples are drawn with the same
random numbers, so they differ by the weights alone. They are those of the first sample of
sample.py, which draws the same text with --slide=block_size/8. The random state of torch does not
move.
"""

import shlex
from contextlib import contextmanager

import torch

import tokenizer
from configurator import UserError, printable
from flatgpt import pretrained
from flatgpt.generate import generate_texts
from flatgpt.sampling import Sampling
from tokenizer.chat import encode_prompt, find_endings, render

LENGTH = 200  # tokens of a sample where sample_tokens=0


@contextmanager
def in_between(model):
    """Let a model decode between two training steps: in eval mode, and not compiled."""
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance('force_eager'):
            yield
    finally:
        model.train(was_training)


class Samples:
    """Continue a run's sample_prompt with sample_tokens tokens.

    config: train.py's resolved settings. described: the tokenizer, see tokenizer.from_dict().
    template: of a run on conversations, else None; with it the prompt is a user's message, and
    the sample is the answer. Raises UserError if the prompt cannot be encoded.
    """

    def __init__(self, config, described, template):
        if not described:
            raise UserError(f'sample_every={config["sample_every"]}: the dataset has no tokenizer, '
                            f'so there is no text; leave it out')
        self.prompt, self.tokenizer = config['sample_prompt'], tokenizer.from_dict(described)
        self.is_chat = bool(template and self.prompt.strip())  # a blank is no message
        ids, stop_ids, stops = self.prompt, (), ()
        if self.is_chat:
            message = {'role': 'user', 'content': self.prompt}
            ids = render([message], template, self.tokenizer)
            stop_ids, stops = find_endings(template, self.tokenizer)
        self.ids = encode_prompt(ids, self.tokenizer, config['block_size'], crop_prompt=True)
        # beyond the context a pass in `slide` tokens, not one for each
        slide = max(1, config['block_size'] // 8)
        self.sampling = Sampling(config['sample_tokens'] or LENGTH, 0.8, top_k=200, slide=slide,
                                 stop_ids=stop_ids, stops=stops)

    def draw(self, model):
        """Return the text that continues the prompt."""
        with in_between(model):
            *_, samples = generate_texts(model, self.tokenizer, [self.ids], self.sampling)
        return samples[0].text

    def add(self, model, run):
        """Append a sample to the run's samples.jsonl; -> the text to print."""
        try:
            text = self.draw(model)
        except UserError as error:  # logits of NaN, of which the run reports the cause
            return f'no sample: {error}'
        run.append('samples.jsonl', {'step': run.step, 'prompt': self.prompt, 'text': text})
        return f'a sample at step {run.step}:\n{self.framed(text)}'

    def framed(self, text):
        """Return prompt and sample between two lines."""
        whole = f'User: {self.prompt}\nAssistant: {text}' if self.is_chat else self.prompt + text
        return f'---------------\n{printable(whole)}\n---------------'


def print_sample(model, config, described, template):
    """Print a sample of the finished run, or the reason why there is none."""
    if hasattr(model.lm_head.weight, 'device_mesh'):  # this process has a part of the model
        whole = pretrained.open_model('resume', config['out_dir'], 'last')[0]
        model = whole.to(model.lm_head.weight.device)
    try:
        samples = Samples(config, described, template)
        print(samples.framed(samples.draw(model)))
    except UserError as error:  # a run that is done and saved does not fail for a wrong prompt
        print(f'no sample: {error}')


def command_to_try(out_dir, prompt, is_chat):
    """Return the command that chats with a model, or continues a prompt."""
    if is_chat:
        return shlex.join(['python', '-m', 'posttrain.chat', f'--out_dir={out_dir}'])
    start = [f'--start={prompt}'] if prompt.strip() else []
    return shlex.join(['python', 'sample.py', f'--out_dir={out_dir}', *start])
