"""Make conversations with checkable answers, and texts and pairs of answers.

All are about the same questions. It needs no network and takes a minute.

    python data/tiny_chat/prepare.py
    python data/text/prepare.py --input=data/tiny_chat/corpus.jsonl \\
        --name=tiny_web --tokenizer=data/tiny_chat/chat.json
    python train.py config/tiny_web.py          # the base model, pretrained
    python train.py config/sft_tiny_chat.py     # the assistant, finetuned

posttrain/tasks/tiny_chat.py makes the questions: sums, letters to count, words
to spell and to reverse, things to sort, small tables. This script writes

    corpus.jsonl         texts, to pretrain on
    conversations.jsonl  conversations, to finetune on
    pairs.jsonl          a better and a worse answer, for a reward model or DPO
    chat.json            the tokenizer: a byte a token, and the special tokens
                         of a chat (--vocab_size=512: pieces of words)
    train.bin, val.bin   the conversations as tokens, see data/chat/prepare.py

All use questions of the split 'train', but val.bin those of 'val'; no file has
a question of 'test'. The same --seed makes the same files.
"""

import hashlib
import os
import random
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

import tokenizer as tokenizers
from configurator import UserError
from data import conversations, encode
from flatgpt import jsonl
from flatgpt.files import lock_folder, replace_file, unlock
from posttrain.tasks import tiny_chat
from posttrain.tools import SYSTEM
from tokenizer import chat

SMALL_TALK = [
    ('Hello', 'Hello! Ask me for a sum, or to spell, reverse, count or sort.'),
    ('Hi!', 'Hi! What can I do for you?'), ('Thank you', 'You are welcome.'),
    ('Who are you?', 'I am a small model that can add, spell, reverse, count and sort.'),
    ('What can you do?',
     'I can add, subtract, spell, reverse, count, sort, and look things up in a table.')]
AMOUNTS = {'conversations': 50_000, 'pairs': 30_000, 'documents': 30_000}  # by default
LONGEST = 240  # characters of a conversation with two questions, to fit into a row of 257 tokens
REFUSALS = ['I can not answer that.', 'Sorry, I do not know.', 'I am only a small model.']
LONG_ANSWERS = [
    'Well, let me think about it. I would say that it is {}, but I may be wrong',
    'That is a good question! After some thought I believe it to be {}, if I am not mistaken',
    'It is {}, I think, or something like it']
SENTENCES = ['{name} has a {colour} {good}.', '{name} and {other} walk to the {word}.',
             'The {word} is {colour}.', '{name} gives {other} a {good}.',
             'There is a {word} beside the {word2}.', '{other} likes {name}.']
KINDS = [*tiny_chat.KINDS, 'subtraction', 'sorting']  # twice, because models learn these last


# Answers ----------------------------------------------------------------------------------------

def with_steps(example):
    """Return the solution after the steps that lead to it, if there are any."""
    return (f'{example["steps"]}. ' if example['steps'] else '') + example['solution']


def with_call(example):
    """Return the solution after a call of the calculator."""
    return (f'{chat.PYTHON}{example["call"]}{chat.PYTHON_END}{chat.OUTPUT}{example["answer"]}'
            f'{chat.OUTPUT_END}{example["solution"]}')


def slip(text, rng):
    """Replace a digit or a letter of the steps by another one."""
    i = rng.choice([i for i, char in enumerate(text) if char.isalnum()])
    others = '0123456789' if text[i].isdigit() else 'abcdefghijklmnopqrstuvwxyz'
    return text[:i] + rng.choice(others.replace(text[i], '')) + text[i + 1 :]


# Files ------------------------------------------------------------------------------------------

def make_conversations(split, n, seed, steps=0.9):
    """Yield n conversations, {'messages': [...]}.

    steps: the share of sums that are answered with their steps; of other questions a third of
    that. One in six has two questions. One in four about sums has a system message that offers
    a calculator, and answers that call it. One in a hundred is small talk.
    """
    rng = random.Random(f'conversations {split} {seed}')
    examples = iter(tiny_chat.examples(split, 2 * n, f'conversations {seed}', kinds=KINDS))
    for _ in range(n):
        if rng.random() < 0.01:
            question, answer = rng.choice(SMALL_TALK)
            yield {'messages': [{'role': 'user', 'content': question},
                                {'role': 'assistant', 'content': answer}]}
            continue
        questions = [next(examples) for _ in range(2 if rng.random() < 1 / 6 else 1)]
        # a model with a calculator also has to learn where it is of no use
        has_calculator = rng.random() < (0.25 if questions[0]['call'] else 0.05)
        messages = [{'role': 'system', 'content': SYSTEM}] if has_calculator else []
        for example in questions:
            if has_calculator and example['call']:
                answer = with_call(example)
            elif rng.random() < (steps if example['call'] else steps / 3):
                answer = with_steps(example)
            else:
                answer = example['solution']
            messages += [*example['messages'], {'role': 'assistant', 'content': answer}]
        if len(questions) > 1 and sum(len(message['content']) for message in messages) > LONGEST:
            messages = messages[:-2]
        yield {'messages': messages}


def make_pairs(n, seed):
    """Yield n pairs of answers, {'messages', 'chosen', 'rejected', 'group'}.

    chosen is right, with steps if there are any. Seven in ten of rejected are wrong, mostly by a
    mistake in the steps; a quarter of these leave the steps out. The others are right in another
    form, too long, or refusals. group is the question, however it is put: posttrain/reward.py
    holds out whole groups.
    """
    rng = random.Random(f'pairs {seed}')
    for example in tiny_chat.examples('train', n, f'pairs {seed}'):
        has_steps = example['steps'] is not None
        answer, wrong, kind = example['answer'], rng.choice(example['mistakes']), rng.random()
        if kind < 0.7:
            steps, other = example['steps'], wrong
            if has_steps and rng.random() < 0.7:  # the mistake is mostly in the steps
                steps, other = example['mistaken']
            if has_steps and (str(other) == answer or rng.random() < 0.2):
                steps, other = slip(example['steps'], rng), wrong
            has_steps = has_steps and rng.random() < 0.75
            rejected = f'{steps}. ' * has_steps + f'{tiny_chat.FORM} {other}.'
        elif kind < 0.8:
            rejected = rng.choice([answer, f'{answer}.', f'It is {answer}.',
                                   f'{tiny_chat.FORM} {answer}'])
        elif kind < 0.9:
            rejected = rng.choice(LONG_ANSWERS).format(answer) + '.'
        else:
            rejected = rng.choice(REFUSALS)
        yield {'messages': example['messages'], 'chosen': with_steps(example),
               'rejected': rejected, 'group': example['content']}


def make_texts(n, seed):
    """Yield n texts, {'text': ...}.

    Seven in ten are lines of facts, mostly the last fact of an example, which has the steps. One
    in ten has questions with answers. The others are sentences about the same words.
    """
    rng = random.Random(f'corpus {seed}')
    n_rounds = n // len(KINDS) + 1
    makers = {kind: iter(tiny_chat.examples('train', 8 * KINDS.count(kind) * n_rounds,
                                            f'corpus {seed}', kinds=(kind,)))
              for kind in tiny_chat.KINDS}
    for i in range(n):
        examples = [next(makers[KINDS[i % len(KINDS)]]) for _ in range(rng.randint(5, 8))]
        kind, between = rng.random(), '\n'
        if kind < 0.7:
            lines = [example['facts'][-1] if rng.random() < 0.7 else rng.choice(example['facts'])
                     for example in examples]
        elif kind < 0.8:
            form = rng.choice(('answer', 'solution'))  # one form for all answers of a text
            lines = [f'{example["context"]} {example[form]}' for example in examples]
            between = '\n\n'
        else:
            lines = [rng.choice(SENTENCES).format(
                name=rng.choice(tiny_chat.NAMES), other=rng.choice(tiny_chat.NAMES),
                good=rng.choice(tiny_chat.GOODS), colour=rng.choice(tiny_chat.COLOURS),
                word=rng.choice(tiny_chat.WORDS), word2=rng.choice(tiny_chat.WORDS))
                for _ in examples]
        yield {'text': between.join(lines)}


def main():
    parser = encode.make_parser(__doc__)
    add, count = parser.add_argument, encode.positive
    for name, what in (('conversations', 'to finetune on'), ('pairs', 'pairs of answers'),
                       ('documents', 'texts to pretrain on')):
        add(f'--{name}', type=count, default=AMOUNTS[name], help=f'{what} ({AMOUNTS[name]:,})')
    add('--block_size', type=count, default=256, help='context to pack for (256)')
    add('--steps', type=float, default=0.9,
        help='share of sums with steps, a third elsewhere (0.9)')
    add('--vocab_size', type=count, help='ids (a byte each, and the special tokens)')
    add('--seed', type=int, default=0, help='of all files (0)')
    add('--out_dir', default=HERE, help="folder to write to (the script's)")
    args = parser.parse_args()
    started = time.time()
    if not 0 <= args.steps <= 1:
        raise UserError(f'--steps={args.steps}: expected a share, 0 to 1')

    # make the texts, conversations and pairs
    n, seed = args.conversations, args.seed
    print(f'making {args.documents:,} texts, {n:,} conversations and {args.pairs:,} pairs; the '
          f'defaults take about a minute', flush=True)
    texts = list(make_texts(args.documents, seed))
    talks = {'train': list(make_conversations('train', n, seed, args.steps)),
             'val': list(make_conversations('val', max(1, n // 20), seed, args.steps))}
    pairs = list(make_pairs(args.pairs, seed))

    # make the tokenizer
    if args.vocab_size:
        tokenizer = tokenizers.BPETokenizer.train((text['text'] for text in texts), args.vocab_size,
                                                  special_tokens=chat.SPECIAL_TOKENS)
    else:
        tokenizer = tokenizers.BPETokenizer(
            [], None, {token: 256 + i for i, token in enumerate(chat.SPECIAL_TOKENS)})

    # render
    packing = conversations.Packing(tokenizer, chat.TEMPLATE, args.block_size + 1)
    rendered = {split: [conversations.render(talk['messages'], packing) for talk in talks[split]]
                for split in talks}

    # write
    os.makedirs(args.out_dir, exist_ok=True)
    lock, lines, digests = lock_folder(args.out_dir), [], {}
    for name, rows in (('corpus', texts), ('conversations', talks['train']), ('pairs', pairs)):
        content = b''.join(map(jsonl.to_line, rows))
        replace_file(os.path.join(args.out_dir, f'{name}.jsonl'), content)
        digests[name] = hashlib.sha256(content).hexdigest()
        lines.append(f'{name + ".jsonl":19}  {len(rows):>9,} lines  {len(content) / 1e6:>5.1f} MB  '
                     f'{digests[name][:16]}')
    tokenizer.save(os.path.join(args.out_dir, 'chat.json'))
    unlock(lock)
    conversations.write_dataset(args.out_dir, rendered, packing, source='tasks/tiny_chat.py',
                                sha256=digests['conversations'])
    print('\n'.join(lines))
    folder = os.path.relpath(args.out_dir)
    print(f'wrote  {folder} in {time.time() - started:.1f} s\n'
          f'next:  python data/text/prepare.py --input={folder}/corpus.jsonl --name=tiny_web '
          f'--tokenizer={folder}/chat.json')


if __name__ == '__main__':
    encode.run(main)
