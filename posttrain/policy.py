"""Open, sample and resume the chat model that rl and dpo train.

    policy = open_policy(config, state, ckpt_path, device, autocast)
    prompts = policy.prompts_of(task, Questions('val', 200), max_new_tokens, block_size)
    n_right = policy.count_right(task, prompts[world.rank :: world.size], sampling)
"""

import copy
import hashlib
import json
import math
import os
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass

import torch

from configurator import UserError
from data import conversations
from flatgpt import checkpoint, entries, huggingface, lora, runtime, shares
from flatgpt.generate import NotNumbers
from flatgpt.pretrained import kind_of, model_of, open_model, path_in
from model import GPT
from posttrain.rollout_server import RolloutServer
from posttrain.rollouts import draw_answers, logprobs_of
from posttrain.tasks import common as tasks
from posttrain.tools import toolbox
from tokenizer import chat

# a run keeps these settings when it resumes: best.pt is chosen by their questions and answers
KEPT = ('algorithm', 'task', 'kinds', 'eval_examples', 'tools', 'max_new_tokens', 'seed')


@dataclass
class Policy:
    """Hold a chat model that learns, and its reference, the model from before training."""

    model: GPT
    reference: GPT | None  # None with LoRA: the model without its adapters
    digest: str  # SHA-256 of the reference's weights
    tokenizer: object
    template: str
    stop_ids: set  # ids that end an answer
    autocast: AbstractContextManager
    questions: str | None = None  # SHA-256 of the val prompts, which choose best.pt
    server: RolloutServer | None = None  # draws the answers in place of the model
    adapters: dict | None = None  # LoRA's, see lora.start(); None: all weights learn

    def prompts_of(self, task, questions, max_new_tokens, context, tools=False):
        """Return [(example, prompt ids), ...] of a task, for answers of max_new_tokens.

        context: tokens that a prompt and its answer may take. Longer prompts are left out, and
        their number is printed. Raises UserError if no prompt is left, and if the val prompts are
        not those that the run began with.
        """
        name, split, room = task.__name__.split('.')[-1], questions.split, context - max_new_tokens
        functions, keys = ('examples', 'evaluate', 'reward'), ('messages',)
        how = self.template, self.tokenizer, math.inf, tools
        prompts = [(example, tasks.chat_prompt(example, *how))
                   for example in tasks.examples_of(task, questions, functions, keys)]
        if not prompts:
            kinds = f' of kinds={", ".join(questions.kinds)!r}' if questions.kinds else ''
            raise UserError(f'task={name}: there is no {split} question{kinds}; a tenth of a file '
                            f'is val, so it may need more questions')
        fitting = [prompt for prompt in prompts if len(prompt[1]) <= room]
        if len(fitting) < len(prompts):
            print(f'{len(prompts) - len(fitting):,} of {len(prompts):,} {split} prompts are longer '
                  f'than the {room} tokens that an answer leaves, left out')
        if not fitting:
            raise UserError(f'task={name}: no {split} prompt has room in a context of {context} '
                            f'tokens with max_new_tokens={max_new_tokens}; lower that, or take a '
                            f'model with a longer context')
        if split == 'val':
            digest = hashlib.sha256(json.dumps(fitting, default=str).encode()).hexdigest()
            if self.questions not in (None, digest):
                raise UserError(f'task={name}: the val questions are not those that chose best.pt; '
                                f'resume with the former --input, or start a new run in another '
                                f'--out_dir')
            self.questions = digest
        return fitting

    def answer(self, prompts, sampling, u, tools=False, batch_size=256):
        """Answer prompts, lists of ids, in batches; -> (answers, masks, texts).

        masks: 1 for ids that the policy drew, 0 for outputs of a tool. texts: without the ending.
        u: fixes the draws, see draw_answers().
        """
        answers, masks = [], []
        for i in range(0, len(prompts), batch_size):
            batch = prompts[i : i + batch_size], sampling, u[i : i + batch_size]
            with self.autocast:
                if tools:
                    drawn, drawn_masks = toolbox(tools).generate(
                        self.model, self.tokenizer, *batch)
                else:
                    drawn = (self.server.draw(*batch) if self.server else
                             draw_answers(self.model, *batch))
                    drawn_masks = [[1] * len(answer) for answer in drawn]
            answers, masks = answers + drawn, masks + drawn_masks
        return answers, masks, [self.tokenizer.decode([i for i in ids if i not in self.stop_ids])
                                for ids in answers]

    def count_right(self, task, prompts, sampling, tools=False, batch_size=256):
        """Answer prompts of prompts_of(); -> how many are right. sampling: greedy."""
        u = torch.zeros(len(prompts), sampling.max_new_tokens)
        _, _, texts = self.answer([ids for _, ids in prompts], sampling, u, tools, batch_size)
        return sum(bool(task.evaluate(example, text))
                   for (example, _), text in zip(prompts, texts, strict=True))

    def logprobs(self, model, idx, mask, temperature=1.0):
        """Return logprobs_of() the model or the reference, in the run's precision."""
        with self.autocast:
            return logprobs_of(model, idx, mask, self.tokenizer.vocab_size, temperature)

    def reference_logprobs(self, idx, mask, temperature=1.0):
        """Return the reference's log-probabilities, see logprobs_of()."""
        if self.reference:
            return self.logprobs(self.reference, idx, mask, temperature)[0]
        with lora.switched_off(self.model):
            return self.logprobs(self.model, idx, mask, temperature)[0]

    def sizes(self):
        """Return the numbers of parameters in words."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        share = f', {trained:,} of them are trained' if self.adapters else ''
        return f'{self.model.get_num_params() / 1e6:.2f}M parameters{share}'

    def state(self, **more):
        """Return the policy's entries of a checkpoint, and the entries `more`."""
        weights = ({'model': lora.adapters(self.model), 'lora': self.adapters} if self.adapters else
                   {'model': self.model.state_dict()})
        return {**weights, 'model_args': asdict(self.model.config),
                'reference': self.digest, 'questions': self.questions,
                'tokenizer': self.tokenizer.to_dict(), 'chat_template': self.template, **more}


def open_chat_model(init_from):
    """Open a model of a run or of Hugging Face; -> (model, tokenizer, template, line).

    The line describes it. A model without a chat template gets chat.TEMPLATE. Raises UserError if
    its tokenizer lacks the tokens for that.
    """
    is_run = os.path.exists(path_in(init_from))
    model, tokenizer, template, line = open_model('resume' if is_run else init_from, init_from)
    if template is None:
        template = chat.TEMPLATE
        conversations.check_tokenizer(tokenizer, f'the tokenizer of {init_from}')
    return model, tokenizer, template, line


def open_policy(config, state, path, device, autocast):
    """Open the reference, and as policy its copy or the checkpoint's model.

    With LoRA the two share one model. config: settings of the run, of which init_from, and with
    LoRA seed and lora_rank etc. are read. state: the checkpoint that was loaded from `path` to
    resume, or {}. Raises UserError if the reference's weights have changed since the run began, or
    if its chat template ends answers without a token.
    """
    init_from = config['init_from']
    if state and not os.path.exists(path_in(init_from)):  # a name that the checkpoint holds
        init_from = huggingface.find(init_from, may_download=False)
    reference, tokenizer, template, line = open_chat_model(init_from)
    print(f'reference: {line}')
    digest = lora.digest(reference)
    if state and state['reference'] != digest:
        raise UserError(f'{path} began with the model that was in {init_from}, which now has other '
                        f'weights; restore that model, or start a new run in another --out_dir')
    stop_ids, _ = chat.find_endings(template, tokenizer)
    if not stop_ids:
        raise UserError(f'the chat template of {init_from} ends an answer with no special token, '
                        f'so a model cannot learn when to stop; expected one, such as <|im_end|>')
    adapters, model = state.get('lora'), reference
    if adapters:
        lora.restore(model, adapters, state['model'])
    elif state:
        model = model_of(state, path, dropout=0.0).eval()
    elif config.get('lora_rank'):
        torch.manual_seed(config['seed'])  # the adapters are the same in all processes
        adapters = lora.start(model, config, os.path.dirname(path))
    else:
        model = copy.deepcopy(reference)
    if model is not reference:
        reference.to(device).requires_grad_(False)
    return Policy(model.to(device), None if adapters else reference, digest, tokenizer, template,
                  stop_ids, autocast, state.get('questions'), adapters=adapters)


def resume(path, config):
    """Load the checkpoint at `path` to continue its run.

    Raises UserError if posttrain.rl or posttrain.dpo did not write it, or if a setting in KEPT
    differs.
    """
    state = checkpoint.load(path)
    if 'reference' not in state:
        raise UserError(f'{path} is {kind_of(state)} of another script, which this command cannot '
                        f'resume; to begin with a language model: --init_from=ITS_FOLDER and '
                        f'another --out_dir')
    entries.check_content(state, entries.Posttraining, path)
    for name in KEPT if config['task'] else KEPT[:2]:
        now = config.get(name)
        if (before := state['config'].get(name, now)) != now:
            raise UserError(f'{name}={now!r}, but {path} is of a run with {name}={before!r}; '
                            f'resume with that, or start a new run in another --out_dir')
    if config['algorithm'] == 'ppo':
        entries.check_content(state, entries.PPO, path)
    return state


def open_machine(device, dtype):
    """Join the processes and set torch up for two settings.

    -> World, device, the name of the dtype, why that, and autocast. float16 is never chosen, since
    posttrain has no gradient scaler. Raises UserError.
    """
    world, torch_device = shares.join(device)
    runtime.use_machine(torch_device)
    precision, reason = runtime.choose_dtype(dtype, torch_device, has_scaler=False)
    return world, torch_device, precision, reason, runtime.autocast(precision, torch_device)


def check_out_dir(out_dir, init_from):
    """Raise UserError if a run would overwrite the model that it begins with."""
    if os.path.abspath(out_dir) == os.path.abspath(init_from):
        raise UserError(f'out_dir={out_dir!r}: expected another folder than --init_from')


@contextmanager
def stop_if_broken(run):
    """Stop the run without saving if its policy's logits are no longer numbers.

    All processes stop if the block raises any error in one of them.
    """
    with shares.together(run.world):
        try:
            yield
        except NotNumbers:
            if run.step == run.start:  # the model was broken before it learned
                raise
            run.stop_not_finite('the logits of the policy are not numbers')
