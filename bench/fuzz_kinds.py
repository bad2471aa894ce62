"""
Make small valid files of every kind, and read them as the scripts do.

    kinds = make_kinds('folder')  # {name: fuzz_cases.Kind}; the folder is for temporary files
"""

import contextlib
import functools
import glob
import io
import json
import os
import pickle
import sys

import numpy as np
import torch

import tokenizer as tokenizers
from bench.fuzz_cases import Kind
from config.presets import PRESETS
from configurator import Settings
from data import datasets, encode
from data import tokens as token_files
from data.chat import prepare as prepare_chat
from data.text import prepare as prepare_text
from flatgpt import (
    checkpoint,
    classify,
    constrain,
    entries,
    huggingface,
    jsonl,
    lora,
    optim,
    outdir,
    parallel,
    pretrained,
)
from flatgpt.cut import cut_step
from model import GPT, GPTConfig
from posttrain import policy, preferences, reward_model
from posttrain.tasks import common as tasks
from tokenizer import SentencePieceTokenizer, chat, formats
from tokenizer.base import FILE_FORMAT, FILE_VERSION

ALONE = parallel.World(0, 0, 1)
TEXT = 'the cat sat on a mat, and who saw it go? no one but me.\n' * 6
BYTES = tokenizers.BPETokenizer([], None, {token: 256 + i for i, token in enumerate(
    chat.SPECIAL_TOKENS)})
BPE = tokenizers.BPETokenizer.train([TEXT], 280, special_tokens=['<|endoftext|>'])
MESSAGES = [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
# the settings of train.py that resuming and the optimizers read
SETTINGS = {
    **{name: field.default for name, field in GPTConfig.__dataclass_fields__.items()},
    'preset': 'gpt2', 'optimizer': 'adamw', 'learning_rate': 1e-3, 'muon_lr': 0.02,
    'embedding_lr': 0.02, 'momentum': 0.95, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95,
    'lora_rank': 0, 'lora_alpha': 16.0, 'lora_targets': 'c_attn', 'lora_bits': 32,
    'shard': 'none', 'eval_tokens': 0, 'extend_context': 0, 'init_from': 'base', 'dataset': 'tiny',
    'task': '', 'algorithm': 'ppo'}


def settings(**changes):
    """Return SETTINGS, of which nobody gave one."""
    return Settings({**SETTINGS, **changes}, set())


def make_model(vocab_size=265, **options):
    """Make a small model, always the same."""
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=8,
                         **options))


def learn(model, optimizer):
    """Take a step, so that the optimizer has moments."""
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.01)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def state_of(model, optimizer, **more):
    """Return the content of a run's checkpoint."""
    return {'version': checkpoint.VERSION, 'model': model.state_dict(),
            'optimizer': optimizer.state_dict(), 'model_args': dict(vars(model.config)),
            'tokenizer': BYTES.to_dict(), 'chat_template': chat.TEMPLATE, 'scaler': {},
            'iter_num': 3, 'best_val_loss': 1.5, 'evals_since_best': 0, 'train_time': 1.0,
            'config': {'init_from': 'base', 'dataset': 'tiny', 'optimizer': 'adamw',
                       'algorithm': 'ppo'}, **more}


def packed(state):
    """Return the bytes of a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def resume(config, described=None):
    """Resume out/ckpt.pt as train.py does; -> its weights after a step."""
    described = described or BYTES.to_dict()
    meta = {'tokenizer': described, 'vocab_size': 265, 'row': None}
    model, state = pretrained.resume('out/ckpt.pt', config, meta, 'data/tiny')
    optimizer = optim.create(model, config, 'float32', ALONE)
    if 'optimizer' in state:
        may_be_empty = bool(state.get('scaler'))
        entries.load_optimizer(optimizer, state['optimizer'], may_be_empty)
    block_size = pretrained.context_of(model, config, 'resume', meta)
    pretrained.change_context(model, optimizer, block_size)
    learn(model, optimizer)
    text_tokenizer = pretrained.tokenizer_of(state).to_dict()
    numbers = [state['iter_num'], float(state['best_val_loss']), state.get('train_time')]
    return [dict(model.state_dict()), text_tokenizer, state.get('chat_template'), numbers]


# Checkpoints --------------------------------------------------------------------------------------

def train_kinds():
    """Make checkpoints with AdamW, with Muon, of nanoGPT, and with adapters."""
    model = make_model()
    adamw = optim.create(model, settings(), 'float32', ALONE)
    learn(model, adamw)
    state = state_of(model, adamw)
    yield Kind('ckpt', {'out/ckpt.pt': packed(state)}, {'out/ckpt.pt': 'torch'},
               lambda: resume(settings()), ('out/ckpt.pt',))

    modern = make_model(**{key: value for key, value in PRESETS['modern'].items()
                           if key in GPTConfig.__dataclass_fields__})
    muon = optim.create(modern, settings(optimizer='muon'), 'float32', ALONE)
    learn(modern, muon)
    config = {'init_from': 'scratch', 'dataset': 'tiny', 'optimizer': 'muon'}
    yield Kind('muon', {'out/ckpt.pt': packed(state_of(modern, muon, config=config))},
               {'out/ckpt.pt': 'torch'}, lambda: resume(settings(optimizer='muon')),
               ('out/ckpt.pt',))

    theirs = {key: state[key] for key in ('model', 'optimizer', 'iter_num')} | {
        'model_args': {name: vars(model.config)[name] for name in pretrained.NANOGPT_FIELDS},
        'best_val_loss': torch.tensor(1.5), 'config': {'dataset': 'tiny', 'init_from': 'scratch'}}
    chars = sorted(map(chr, range(265)))
    meta_pkl = {'vocab_size': 265, 'itos': dict(enumerate(chars)),
                'stoi': {char: i for i, char in enumerate(chars)}}
    described = tokenizers.CharTokenizer(chars).to_dict()
    yield Kind('nanogpt', {'out/ckpt.pt': packed(theirs),
                           'data/tiny/meta.pkl': pickle.dumps(meta_pkl)},
               {'out/ckpt.pt': 'torch'}, lambda: resume(settings(), described), ('out/ckpt.pt',))

    base = packed(state)
    adapted = make_model()
    adapted.load_state_dict(state['model'])
    digest = lora.digest(adapted)
    lora.add(adapted, 2, 16.0, ['c_attn'])
    of_adapters = optim.create(adapted, settings(), 'float32', ALONE)
    learn(adapted, of_adapters)
    described = {'init_from': 'base', 'from_here': '../base', 'digest': digest, 'rank': 2,
                 'alpha': 16.0, 'targets': ['c_attn'], 'bits': 32}
    state = {**state_of(adapted, of_adapters), 'model': lora.adapters(adapted), 'lora': described}
    yield Kind('lora', {'base/ckpt.pt': base, 'out/ckpt.pt': packed(state)},
               {'out/ckpt.pt': 'torch'}, lambda: resume(settings()), ('out/ckpt.pt',))


def posttrain_kinds():
    """Make checkpoints of reward, classify, and rl with a value function."""
    model = make_model()
    critic = reward_model.Critic.from_gpt(model)
    adam = optim.adamw(critic, 0.1, 1e-3, (0.9, 0.95))
    learn(critic, adam)
    state = state_of(critic, adam, reward_model=True, pairs={'sha256': 'a', 'val_fraction': 0.1})

    def score():
        judge, line = reward_model.open_reward_model('out', BYTES, chat.TEMPLATE)
        saved = checkpoint.load('out/ckpt.pt')
        resumed = reward_model.critic_of(saved, 'out/ckpt.pt', 0.0, entries.Posttraining)
        optimizer = optim.create(resumed, settings(), 'float32', ALONE)
        entries.load_optimizer(optimizer, saved['optimizer'])
        learn(resumed, optimizer)
        ratings = reward_model.ratings_of(judge, MESSAGES[:1], ['4', '5'], chat.TEMPLATE, BYTES)
        return [dict(resumed.state_dict()), ratings, line, saved['chat_template'],
                saved['config']['init_from'], saved.get('pairs')]

    yield Kind('reward', {'out/ckpt.pt': packed(state)}, {'out/ckpt.pt': 'torch'}, score,
               ('out/ckpt.pt',))

    labeller = classify.add_head(make_model(), 2)
    adam_of_labels = optim.adamw(labeller, 0.1, 1e-3, (0.9, 0.95))
    learn(labeller, adam_of_labels)
    state = state_of(labeller, adam_of_labels, classes=['bad', 'good'], labels='a',
                     report={'accuracy': 0.5})

    def label():
        opened, saved = classify.load('out'), checkpoint.load('out/ckpt.pt')
        resumed = classify.model_with_head(saved, 'out/ckpt.pt', 0.0, entries.Classification)
        optimizer = optim.create(resumed, settings(), 'float32', ALONE)
        entries.load_optimizer(optimizer, saved['optimizer'])
        learn(resumed, optimizer)
        return [dict(resumed.state_dict()), opened.probabilities(['2+2?']), opened.line,
                saved['config']['init_from'], saved['labels'], saved['report']]

    yield Kind('classify', {'out/ckpt.pt': packed(state)}, {'out/ckpt.pt': 'torch'}, label,
               ('out/ckpt.pt',))

    learner = optim.adamw(model, 0.1, 1e-3, (0.9, 0.95))
    base = packed(state_of(model, learner))
    digest = lora.digest(model)
    learn(model, learner)
    state = state_of(model, learner, reference=digest, judge=None, measure='wrong answers',
                     value_model=critic.state_dict(), value_optimizer=adam.state_dict())

    def go_on():
        saved = policy.resume('out/ckpt.pt', settings())
        opened = policy.open_policy(saved['config'], saved, 'out/ckpt.pt',
                                    torch.device('cpu'), contextlib.nullcontext())
        content = {**saved, 'model': saved['value_model']}
        values = pretrained.build(reward_model.Critic, content, 'out/ckpt.pt', 0.0)
        for learns, key in ((opened.model, 'optimizer'), (values, 'value_optimizer')):
            optimizer = optim.adamw(learns, 0.1, 1e-3, (0.9, 0.95))
            entries.load_optimizer(optimizer, saved[key], key == 'optimizer')
            learn(learns, optimizer)
        return [dict(opened.model.state_dict()), dict(values.state_dict()), opened.template]

    yield Kind('rl', {'base/ckpt.pt': base, 'out/ckpt.pt': packed(state)},
               {'out/ckpt.pt': 'torch'}, go_on, ('out/ckpt.pt',))


# Datasets -----------------------------------------------------------------------------------------

def prepare(module, *arguments):
    """Run a prepare script; -> the files of its dataset."""
    argv, sys.argv = sys.argv, [module.__file__, *arguments, '--out_dir=made']
    try:
        encode.run(module.main)
    finally:
        sys.argv = argv
    return dataset_files('made')


def dataset_files(folder):
    """Return the token files and the tokens, vocabulary and tokenizer of a dataset."""
    meta = datasets.load_meta(folder)
    arrays = {os.path.basename(path): np.fromfile(path, np.uint8)
              for path in sorted(glob.glob(f'{folder}/*.bin'))}
    return [arrays, meta['tokens'], meta['vocab_size'], meta['tokenizer']]


def dataset_kinds():
    """Make datasets: of text, of conversations, nanoGPT's, and half a preparation."""
    def meta_of(split_sizes, **more):
        return json.dumps({'version': 2, 'dtype': 'uint16', 'vocab_size': 265,
                           'tokens': split_sizes, 'tokenizer': BYTES.to_dict(), **more}).encode()

    def read():
        """Open a dataset, and draw a batch of train and all of val."""
        meta = datasets.load_meta('data')
        block_size = meta['row'] - 1 if meta['row'] else 8
        splits = [token_files.open_tokens('data', split, meta, block_size)
                  for split in ('train', 'val')]
        n_ids = min(meta['vocab_size'] or 265, 265)
        cut = cut_step(settings(total_batch_size=0, gradient_accumulation_steps=1, batch_size=4),
                       block_size, 1)
        draw = token_files.Batches(splits[0], cut, 1, n_ids, torch.device('cpu'), ALONE)
        starts = token_files.whole_windows(len(splits[1]), block_size, meta['row'])
        tokenizers.from_dict(meta['tokenizer'])
        return [draw(0), token_files.gather(splits[1], starts, block_size, n_ids)]

    def ids(n):
        return (np.arange(n) % 256).astype('<u2').tobytes()

    files = {'train': [['train.bin', 100], ['train-00001.bin', 50]], 'val': [['val.bin', 30]]}
    yield Kind('meta', {'data/meta.json': meta_of({'train': 150, 'val': 30}, files=files),
                        'data/train.bin': ids(100), 'data/train-00001.bin': ids(50),
                        'data/val.bin': ids(30)},
               {'data/meta.json': 'json', 'data/train.bin': 'bytes'}, read)
    rows = {'data/meta.json': meta_of({'train': 90, 'val': 18}, row=9, chat_template=chat.TEMPLATE),
            'data/train.bin': ids(90), 'data/val.bin': ids(18),
            'data/train_mask.bin': bytes([0, 1, 1] * 30), 'data/val_mask.bin': bytes([0, 1, 1] * 6)}
    yield Kind('rows', rows, {'data/meta.json': 'json', 'data/train_mask.bin': 'bytes',
                              'data/val.bin': 'bytes'}, read)
    chars = sorted(set(TEXT))
    meta_pkl = pickle.dumps({'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
                             'stoi': {char: i for i, char in enumerate(chars)}})
    theirs = bytes(200), bytes(60)
    yield Kind('meta_pkl', {'data/meta.pkl': meta_pkl, 'data/train.bin': theirs[0],
                            'data/val.bin': theirs[1]}, {'data/meta.pkl': 'pickle'}, read)

    documents = b''.join(json.dumps({'text': f'{TEXT[:40]}{i}'}).encode() + b'\n'
                         for i in range(30))

    def continue_preparing():
        return prepare(prepare_text, '--input=in.jsonl', '--shard_tokens=300', '--num_proc=1')

    yield Kind('progress', {'in.jsonl': documents, **half_prepared(documents)},
               {f'made/{encode.PROGRESS}': 'json'}, continue_preparing,
               (f'made/{encode.PROGRESS}',))


def half_prepared(documents):
    """Return the files that a preparation leaves which stops at the end of its text."""
    with open('in.jsonl', 'wb') as file:
        file.write(documents)
    publish, encode.publish = encode.publish, lambda *_: sys.exit('stopped')
    try:
        with contextlib.suppress(SystemExit):
            prepare(prepare_text, '--input=in.jsonl', '--shard_tokens=300', '--num_proc=1')
    finally:
        encode.publish = publish
    paths = [entry.path for entry in os.scandir('made')]
    return {path: open(path, 'rb').read() for path in paths}


# Texts --------------------------------------------------------------------------------------------

def text_kinds():
    """Make documents and conversations, read by the prepare scripts."""
    rows = [{'text': f'{TEXT[:50]}"{i}", \nend', 'id': i} for i in range(12)]
    lines = b''.join(json.dumps(row).encode() + b'\n' for row in rows)
    csv = 'text,id\n' + ''.join(f'"{row["text"].replace(chr(34), 2 * chr(34))}",{row["id"]}\n'
                                for row in rows)
    contents = {'text.txt': ('bytes', TEXT.encode()), 'lines.jsonl': ('jsonl', lines),
                'table.csv': ('bytes', csv.encode())}
    with contextlib.suppress(ImportError):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), 'table.parquet')
        with open('table.parquet', 'rb') as file:
            contents['table.parquet'] = 'bytes', file.read()
    for name, (form, content) in contents.items():
        yield Kind(name.partition('.')[2], {name: content}, {name: form},
                   lambda name=name: prepare(prepare_text, f'--input={name}', '--num_proc=1'))

    talks = [{'messages': [{**message, 'content': f'{message["content"]}{i}'}
                           for message in MESSAGES]} for i in range(40)]
    talks += [{'conversations': [{'from': 'human', 'value': 'Hello'}, {'from': 'gpt',
                                                                       'value': 'Hi'}]}]
    lines = b''.join(json.dumps(talk).encode() + b'\n' for talk in talks)
    yield Kind('conversations', {'talks.jsonl': lines, 'chat.json': own_file(BYTES)},
               {'talks.jsonl': 'jsonl'},
               lambda: prepare(prepare_chat, '--input=talks.jsonl', '--tokenizer=chat.json'))

    two = [{'messages': [{'role': 'user', 'content': f'{i}?'}], 'chosen': f'{i}', 'rejected': 'no'}
           for i in range(40)]
    lines = b''.join(json.dumps(pair).encode() + b'\n' for pair in two)
    yield Kind('pairs', {'pairs.jsonl': lines}, {'pairs.jsonl': 'jsonl'},
               lambda: preferences.read_pairs('pairs.jsonl', chat.TEMPLATE, BYTES, 32, 0.3))

    gsm8k = b''.join(json.dumps({'question': f'{i} and 2?', 'answer': f'<<{i}+2={i + 2}>>{i + 2}\n'
                                 f'#### {i + 2}'}).encode() + b'\n' for i in range(20))
    choice = b''.join(json.dumps({'question': f'{i}?', 'choices': ['a', 'b', 'c'], 'answer': i % 3,
                                  'subject': 'x'}).encode() + b'\n' for i in range(20))

    def ask(name, path):
        return tasks.examples_of(tasks.load(name), tasks.Questions('all', 50, 0, path))

    yield Kind('tasks', {'gsm8k.jsonl': gsm8k, 'choice.jsonl': choice},
               {'gsm8k.jsonl': 'jsonl', 'choice.jsonl': 'jsonl'},
               lambda: [ask('gsm8k', 'gsm8k.jsonl'), ask('multiple_choice', 'choice.jsonl')])


def output_kinds():
    """Make the files of decoding and of logs."""
    prompts = b'{"prompt": "once", "id": 1}\n{"prompt": "upon a", "id": {"b": [2]}}\n'
    results = jsonl.to_line({'digest': 'd'}) + b''.join(
        jsonl.to_line({'line': i, 'result': {'samples': [{'text': 'x', 'finish': 'stop'}]}})
        for i in (1, 2))

    def sample():
        lines = jsonl.read_objects('prompts.jsonl')
        ids = [chat.encode_prompt(value['prompt'], BYTES, 64) for value in lines.values()
               if isinstance(value.get('prompt'), str)]
        done = jsonl.Results('out.jsonl', 'd')
        for number in set(lines) - set(done.done):
            done.add(number, {'samples': []})
        done.finish(lines)
        with open('out.jsonl', 'rb') as file:
            return [ids, file.read()]

    yield Kind('prompts', {'prompts.jsonl': prompts, 'out.jsonl.part': results},
               {'prompts.jsonl': 'jsonl'}, sample)
    yield Kind('part', {'prompts.jsonl': prompts, 'out.jsonl.part': results},
               {'out.jsonl.part': 'jsonl'}, sample)

    schema = {'type': 'object', 'properties': {'name': {'type': 'string', 'maxLength': 5}, 'n': {
        'type': 'integer', 'minimum': 0, 'maximum': 99}, 'kind': {'enum': ['a', 'b']}},
        'required': ['name', 'n'], 'additionalProperties': False}

    def constrained():
        with open('schema.json', encoding='utf-8', errors='surrogateescape') as file:
            constraint = constrain.Constraint(BYTES, json_schema=file.read())
        constraint.check_length(500)

    yield Kind('schema', {'schema.json': json.dumps(schema).encode()}, {'schema.json': 'json'},
               constrained)

    log = b''.join(json.dumps({'step': i, 'loss': 1.5, 'lr': 1e-3}).encode() + b'\n'
                   for i in range(20))

    def trim():
        outdir.keep_lines_until('log.jsonl', 10)
        with open('log.jsonl', 'rb') as file:
            return file.read()

    yield Kind('log', {'log.jsonl': log}, {'log.jsonl': 'jsonl'}, trim)


# Tokenizers and Hugging Face ----------------------------------------------------------------------

def own_file(text_tokenizer):
    """Return the content of a tokenizer file of this program."""
    described = text_tokenizer.to_dict()
    return json.dumps({'format': FILE_FORMAT, 'version': FILE_VERSION, **described,
                       'sha256': tokenizers.digest(described)}).encode()


def tokenizer_kinds():
    """Make the tokenizer files of five programs."""
    def load(path):
        opened = tokenizers.load(path)
        ids = opened.encode(TEXT, allowed_special='all')
        return [opened.to_dict(), ids, opened.decode(ids)]

    yield Kind('tokenizer', {'own.json': own_file(BPE)}, {'own.json': 'json'},
               lambda: load('own.json'), ('own.json',))
    formats.write_tokenizer_json(BPE.to_dict(), 'tokenizer.json')
    with open('tokenizer.json', 'rb') as file:
        theirs = file.read()
    yield Kind('tokenizer_json', {'tokenizer.json': theirs}, {'tokenizer.json': 'json'},
               lambda: load('tokenizer.json'))
    formats.write_tiktoken(BPE.to_dict(), 'ranks.tiktoken')
    with open('ranks.tiktoken', 'rb') as file:
        ranks = file.read()
    yield Kind('tiktoken', {'ranks.tiktoken': ranks}, {'ranks.tiktoken': 'bytes'},
               lambda: load('ranks.tiktoken'))
    model = json.loads(theirs)['model']
    merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
    yield Kind('gpt2_files', {'encoder.json': json.dumps(model['vocab']).encode(),
                              'vocab.bpe': '\n'.join(['#version: 0.2', *merges, '']).encode()},
               {'encoder.json': 'json', 'vocab.bpe': 'bytes'}, lambda: load('vocab.bpe'))

    pieces = SentencePieceTokenizer.train(TEXT * 9, 300, ['<|endoftext|>'], 1).to_dict()
    formats.write_model(pieces, 'tokenizer.model')
    formats.write_tokenizer_json(pieces, 'pieces.json')
    for name, path, form in (('sentencepiece', 'tokenizer.model', 'bytes'),
                             ('sentencepiece_json', 'pieces.json', 'json')):
        with open(path, 'rb') as file:
            content = file.read()
        yield Kind(name, {path: content}, {path: form}, functools.partial(load, path))

    def render():
        with open('template.jinja', encoding='utf-8', errors='surrogateescape') as file:
            template = file.read()
        return [chat.render(MESSAGES[:1], template, BYTES), *chat.find_endings(template, BYTES)]

    yield Kind('template', {'template.jinja': chat.TEMPLATE.encode()}, {'template.jinja': 'bytes'},
               render)


def huggingface_kinds():
    """Make folders in the layouts of GPT-2 and of Qwen3."""
    def load():
        model, described, template = huggingface.load('model')
        logits, _ = model.eval()(torch.arange(8)[None])
        return [dict(model.state_dict()), described, template, logits]

    for name, options in (('hf_gpt2', {}), ('hf_llama', {
            'norm': 'rmsnorm', 'pos': 'rope', 'mlp': 'swiglu', 'bias': False, 'n_kv_head': 1,
            'tie_embeddings': False, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}})):
        huggingface.save(make_model(280, **options), BPE.to_dict(), None, name)
        files = {}
        for entry in os.scandir(name):
            with open(entry, 'rb') as file:
                files[f'model/{entry.name}'] = file.read()
        files['model/tokenizer_config.json'] = json.dumps(
            {'chat_template': chat.TEMPLATE, 'eos_token': '<|endoftext|>'}).encode()
        yield Kind(name, files, {
            'model/config.json': 'json', 'model/model.safetensors': 'safetensors',
            'model/tokenizer.json': 'json', 'model/tokenizer_config.json': 'json'}, load)


def make_kinds(folder):
    """Return {name: Kind} of all kinds. folder: empty, for temporary files."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        return {kind.name: kind for make in (
            train_kinds, posttrain_kinds, dataset_kinds, text_kinds, output_kinds, tokenizer_kinds,
            huggingface_kinds) for kind in make()}
    finally:
        os.chdir(here)
