"""Finetune a model to classify texts, as GPT-1; or label texts with it.

    $ python -m posttrain.classify --init_from=out --data=reviews.jsonl
    $ python -m posttrain.classify --init_from=resume --data=reviews.jsonl
    $ python -m posttrain.classify --predict=new.jsonl --out=labelled.jsonl
    $ torchrun --standalone --nproc_per_node=8 \\
        -m posttrain.classify --data=reviews.jsonl

Each line of the data is {"text": "Lovely, go there.", "label": "good"}; .csv and
.parquet are read too. A label is a text or a whole number. An extract token ends
the text, and a head of K outputs reads the hidden state there. A text longer
than the context keeps its end. The loss is the cross-entropy of the label, and
lm_coef times that of the text's tokens: L = L_task + lambda L_lm ("Improving
Language Understanding by Generative Pre-Training", Radford et al. 2018, 3.2).
Expect a task loss of ln K at first. --lora_rank=8 trains adapters and the head.

Writes the same files as train.py; best.pt has the lowest task loss on held-out
texts. The last line printed is JSON: best.pt's accuracy and expected calibration
error on them, with 95% intervals. Held-out texts choose best.pt, so measure on
others with --predict: where all lines have labels, it ends with the same line.
Lines of --out are those of --predict with "predicted" and "probabilities". The
same command continues a prediction that was killed.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict
from typing import Literal

import torch
from torch.nn import functional as F

import tokenizer as tokenizers
from configurator import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Share,
    UserError,
    fit,
    override,
)
from data.shuffle import train_items
from flatgpt import checkpoint, entries, lora, optim, output, parallel, shares
from flatgpt import classify as classifiers
from flatgpt.pretrained import base_model, check_same, tokenizer_of
from posttrain.labels import describe, predict_file, read_labelled, report
from posttrain.policy import check_out_dir, open_machine

output.protect(drop=True)

# Settings -----------------------------------------------------------------------------------------
# the run
out_dir = 'out-classify'
init_from = 'out'  # a model: an out_dir, a Hugging Face folder or hub id; 'resume'
data = ''  # the labelled texts: FILE.jsonl
val = ''  # held-out labelled texts; '': val_fraction of the data
val_fraction: Share = 0.1  # share of the texts held out
predict = ''  # FILE.jsonl to label with the model in out_dir, in place of training
out = ''  # FILE.jsonl to write the labelled lines to
eval_interval: Count = 50  # steps between evaluations; each is followed by a checkpoint
log_interval: Count = 10  # steps between log lines
max_iters: Count = 300  # steps in all; GPT-1 took 3 epochs
batch_size: Count = 32  # texts per step
micro_batch_size: Natural = 0  # texts at once; 0: all; does not change the mathematics
lm_coef: NonNegative = 0.5  # weight of the language-model loss
dropout: Fraction = 0.1
# LoRA: small matrices beside the frozen model of init_from (flatgpt/lora.py)
lora_rank: Natural = 0  # 8 to 64; 0: train all weights
lora_alpha: Positive = 16.0  # scales the adapters by lora_alpha / lora_rank
lora_targets = 'c_attn,c_fc,c_proj'  # layers with adapters
lora_bits: Literal[32, 8, 4] = 32  # of the frozen weights of these layers
# optimizer
optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon for a model that was pretrained with it
learning_rate: NonNegative = 6.25e-5  # GPT-1's; for a small model 1e-3
muon_lr: NonNegative = 5e-3  # muon: rate of the matrices of the blocks
embedding_lr: NonNegative = 5e-3  # muon: rate of embeddings
warmup_iters: Natural = 20
min_lr: NonNegative = 0.0  # at max_iters, after half a cosine; the other rates fall alike
weight_decay: NonNegative = 0.01  # adamw: matrices and embeddings; muon: the matrices alone
beta1: Fraction = 0.9
beta2: Fraction = 0.999
grad_clip: NonNegative = 1.0  # largest norm of the gradient; 0: no clipping
# machine
seed = 1337  # fixes batches and dropout
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'
config = override(globals())
# --------------------------------------------------------------------------------------------------

# rules between settings
if bool(predict) == bool(data) or bool(predict) != bool(out):
    raise UserError(f'data={data!r}, predict={predict!r}, out={out!r}: expected --data=FILE.jsonl '
                    f'to train, or --predict=IN.jsonl --out=OUT.jsonl')
if optimizer == 'muon' and learning_rate == 0:
    raise UserError('learning_rate=0: expected above 0 with optimizer=muon')
if min_lr > learning_rate:
    raise UserError(f'min_lr={min_lr}: expected at most learning_rate={learning_rate}')
lora.check_settings(config, init_from, out_dir)
if data:
    check_out_dir(out_dir, init_from)

# the machine, which may run this script in several processes
world, torch_device, precision, precision_reason, autocast = open_machine(device, dtype)

# label texts instead of training
if predict:
    classifier = classifiers.load(out_dir, torch_device)
    classifier.autocast = autocast
    print(f'{classifier.line}\ndevice {torch_device}, dtype {precision} ({precision_reason})')
    measures = predict_file(classifier, predict, out, world)
    parallel.disconnect()
    print(f'wrote {out}' + (f'\n{describe(measures)}\n{json.dumps(measures)}' if measures else ''))
    sys.exit()

# the model: a language model with a head beside its own, or the classifier of the run that resumes
texts = read_labelled(data, val, val_fraction)
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
state = {}
if init_from == 'resume':
    state = checkpoint.load(ckpt_path)
    model = classifiers.model_with_head(state, ckpt_path, dropout, entries.Classification)
    tokenizer, init_from = tokenizer_of(state), state['config']['init_from']
    check_same(optimizer, state['config'], ckpt_path)
    lora.check_resumes(state.get('lora'), config, ckpt_path)
    adapters, best_report = state.get('lora'), state['report']
    if state['labels'] != texts.digest():
        raise UserError(f'{data}: the texts to learn from or the held-out texts are not those of '
                        f'{ckpt_path}; resume with its --data, --val and --val_fraction '
                        f'(config.json), or start a new run in another --out_dir')
else:
    model, described = base_model(init_from, dropout)
    if described['tokenizer'] is None:
        raise UserError(f'{init_from} has no tokenizer; expected a model with one')
    tokenizer = tokenizers.from_dict(described['tokenizer'])
    adapters = lora.start(model, config, out_dir) if lora_rank else None
    classifiers.add_head(model, len(texts.classes))
    best_report = {}
if not lm_coef and not model.config.tie_embeddings:
    model.lm_head.requires_grad_(False)  # it has no gradient
model.to(torch_device)
opt = optim.create(model, config, precision, world)
if state:
    entries.load_optimizer(opt, state['optimizer'])
schedule = optim.Schedule(learning_rate, warmup_iters, max_iters, min_lr)

# the texts
encoded = texts.encode(tokenizer, model.config.block_size)
held_out = sorted(encoded['val'], key=lambda item: len(item[0]))
val_labels = torch.tensor([label for _, label in held_out])

# the processes must agree on what they begin with
world.check_alike({'step': state.get('iter_num'), 'weights': lora.digest(model),
                   'texts': texts.digest(), **config, 'dtype': precision})

# the folder of the run
resolved = {**config, 'init_from': init_from, 'device': str(torch_device), 'dtype': precision}
epochs = max_iters * batch_size / len(encoded['train'])
n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(fit(f'device {torch_device}, dtype {precision} ({precision_reason}), {n_trained / 1e6:.2f}M '
          f'of {model.get_num_params() / 1e6:.2f}M parameters learn; {max_iters} steps of '
          f'{batch_size} texts, {epochs:.2f} epochs', indent='  '))
with shares.together(world):
    run = checkpoint.Run(out_dir, resolved, state or None, world)
at_once = micro_batch_size or -(-batch_size // world.size)
run.explain_out_of_memory({'micro_batch_size': at_once // 2} if at_once > 1 else {},
                          'Not even one text fits: shorten the longest ones')
state = None  # the loaded tensors are no longer needed


@torch.no_grad()
def evaluate():
    """Return the mean task loss on the held-out texts, and report() of them."""
    model.eval()
    share, logits = held_out[world.rank :: world.size], []
    for i in range(0, len(share), at_once):
        idx, lengths = classifiers.to_rows([ids for ids, _ in share[i : i + at_once]], torch_device)
        with autocast:
            logits += classifiers.logits_of(model, idx, lengths).tolist()
    model.train()
    logits = torch.tensor(shares.gather(logits, world))
    loss = F.cross_entropy(logits, val_labels).item()
    if not math.isfinite(loss):
        return loss, {}
    return loss, report(logits.softmax(-1).numpy(), val_labels.numpy())


def state_of_run():
    """Return a checkpoint's content beside the numbers of the run."""
    weights = lora.adapters(model) if adapters else model.state_dict()
    described = {'lora': adapters} if adapters else {}
    return {'model': weights, 'model_args': asdict(model.config), 'optimizer': opt.state_dict(),
            'classes': texts.classes, 'labels': texts.digest(), 'report': best_report,
            'tokenizer': tokenizer.to_dict(), **described}


# the loop -----------------------------------------------------------------------------------------
model.train()
while True:
    # evaluate and save
    if run.is_due(eval_interval, max_iters):
        val_loss, measures = evaluate()
        if measures:
            print(f'step {run.step}: val loss {val_loss:.4f}, {describe(measures)}')
            if world.is_main:
                run.log(step=run.step, val_loss=val_loss, **measures,
                        train_time=round(run.train_time, 3))
        if run.step and val_loss < run.best_val_loss:
            best_report = {'step': float(run.step), 'val_loss': val_loss, **measures}
        run.evaluated(val_loss, state_of_run)
    if run.step >= max_iters or run.stop_reason:
        break

    # draw this process's texts; batches and dropout are functions of (seed, step) alone
    t0 = time.perf_counter()
    torch.manual_seed(seed + 1_000_003 * (run.step + 1) + world.rank)
    numbers = train_items(run.drawn(batch_size), batch_size, len(encoded['train']), seed)
    batch = sorted((encoded['train'][i] for i in numbers), key=lambda item: len(item[0]))
    n_tokens = sum(len(ids) - 1 for ids, _ in batch)  # those that the language model predicts
    batch = batch[world.rank :: world.size]

    # forward and backward over the micro-batches
    loss, lm_loss, n_right = 0.0, 0.0, 0.0
    for i in range(0, len(batch), at_once):
        sequences, labels = zip(*batch[i : i + at_once], strict=True)
        labels = torch.tensor(labels, device=torch_device)
        rows = classifiers.to_rows(sequences, torch_device)
        with autocast:
            logits, task_part, lm_part = classifiers.losses_of(model, *rows, labels, lm_coef > 0)
        (task_part / batch_size + lm_coef * lm_part / n_tokens).backward()
        loss += task_part.item() / batch_size
        lm_loss += lm_part.item() / n_tokens
        n_right += (logits.argmax(-1) == labels).sum().item()
    shares.add_gradients(model, world)
    loss, lm_loss, n_right = world.sum([loss, lm_loss, n_right])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    if not (math.isfinite(loss + lm_loss) and math.isfinite(norm)):
        run.stop_not_finite(f'loss is {loss + lm_loss}, norm of the gradient {norm}')

    # update
    lr = schedule.cosine(run.step)
    optim.set_rates(opt, lr)
    opt.step()
    opt.zero_grad(set_to_none=True)
    dt = time.perf_counter() - t0
    run.advance(batch_size, dt)
    shares.agree_to_stop(run)

    # report
    step = run.step - 1
    if step % log_interval == 0 or run.step == max_iters:
        accuracy, ms = n_right / batch_size, round(dt * 1e3, 3)
        print(f'iter {step}: loss {loss:.4f}, lm loss {lm_loss:.4f}, accuracy {accuracy:.1%}, '
              f'norm {norm:.2f}, time {ms:.0f}ms')
        if world.is_main:
            run.log(step=step, loss=loss, lm_loss=lm_loss, accuracy=accuracy, grad_norm=norm,
                    lr=lr, ms=ms)

# the end ------------------------------------------------------------------------------------------
is_complete = run.finish(state_of_run)
parallel.disconnect()
if is_complete:
    print(f'{run.step} steps, {run.train_time:.1f} s of training; label texts with:\n  python -m '
          f'posttrain.classify --out_dir={out_dir} \\\n    --predict=IN.jsonl --out=OUT.jsonl')
    print(json.dumps(best_report))
run.close()
