"""Make short conversations with answers that can be checked, and all that
leads to them. Needs no network and no download, and takes a minute.

    python data/tiny_chat/prepare.py
    python data/text/prepare.py --input=data/tiny_chat/corpus.jsonl \\
        --name=tiny_web --tokenizer=data/tiny_chat/chat.json
    python train.py config/tiny_web.py          # the base model, pretrained
    python train.py config/sft_tiny_chat.py     # the assistant, finetuned

Sums, letters to count, words to spell and to reverse, things to sort, small
tables: tasks/tiny_chat.py makes the questions. This writes

    corpus.jsonl         texts about them, to pretrain on
    conversations.jsonl  conversations, to finetune on
    pairs.jsonl          a better and a worse answer, for a reward model or DPO
    chat.json            the tokenizer of all: a byte a token, and the special
                         tokens of chat.py (--vocab_size=512: pieces of words)
    train.bin, val.bin   the conversations as tokens, see data/chat/prepare.py

All are of the split 'train' of the questions, val.bin of 'val'; those of 'test'
are in none. The same --seed makes the same files.
"""

import argparse
import hashlib
import os
import random
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

import tokenizer as tokenizers
from configurator import UserError
from data import conversations
from data.encode import positive, run
from flatgpt import jsonl
from flatgpt.files import lock_folder, replace_file, unlock
from posttrain.tasks import tiny_chat
from posttrain.tools import SYSTEM
from tokenizer import chat

SMALL_TALK = [
    ('Hello', 'Hello! Ask me for a sum, or to spell, reverse, count or sort.'),
    ('Hi!', 'Hi! What can I do for you?'), ('Thank you', 'You are welcome.'),
    ('Who are you?', 'I am a small model that can add, spell, reverse, count and sort.'),
    ('What can you do?', 'I can add, subtract, spell, reverse, count, sort, and look things up in a table.')]
LONGEST = 240  # characters of a conversation with two questions, so that it fits into a row of 257 tokens
REFUSALS = ['I can not answer that.', 'Sorry, I do not know.', 'I am only a small model.']
LONG_WAYS = ['Well, let me think about it. I would say that it is {}, but I may be wrong',
             'That is a good question! After some thought I believe it to be {}, if I am not mistaken',
             'It is {}, I think, or something like it']
SENTENCES = ['{name} has a {colour} {good}.', '{name} and {other} walk to the {word}.', 'The {word} is {colour}.',
             '{name} gives {other} a {good}.', 'There is a {word} beside the {word2}.', '{other} likes {name}.']

KINDS = [*tiny_chat.KINDS, 'subtraction', 'sorting']  # these twice, as what is learnt last

# Answers --------------------------------------------------------------------------------------------------------------


def worked(example):
    """The answer with the steps that lead to it, where there are any."""
    return f'{example["steps"]}. {example["solution"]}' if example['steps'] else example['solution']


def computed(example):
    """The answer by a call of the calculator."""
    return (f'{chat.PYTHON}{example["call"]}{chat.PYTHON_END}{chat.OUTPUT}{example["answer"]}{chat.OUTPUT_END}'
            f'{example["solution"]}')


def slip(text, rng):
    """A digit or a letter of the steps is another one."""
    at = rng.choice([i for i, char in enumerate(text) if char.isalnum()])
    others = '0123456789' if text[at].isdigit() else 'abcdefghijklmnopqrstuvwxyz'
    return text[:at] + rng.choice(others.replace(text[at], '')) + text[at + 1 :]


# What is written ------------------------------------------------------------------------------------------------------


def talks(split, n, seed, steps=0.9):
    """
    Yield n conversations, {'messages': [...]}; steps: the share of sums that are answered with them, of other questions
    a third of that: most people write down a sum, and few how they count. One in six has two questions; one in four
    about sums says that there is a calculator, and its answers call it; one in a hundred is small talk.
    """
    rng = random.Random(f'conversations {split} {seed}')
    examples = iter(tiny_chat.examples(split, 2 * n, f'conversations {seed}', kinds=KINDS))
    for _ in range(n):
        if rng.random() < 0.01:
            question, answer = rng.choice(SMALL_TALK)
            yield {'messages': [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]}
            continue
        asked = [next(examples) for _ in range(2 if rng.random() < 1 / 6 else 1)]
        # told of the calculator, a model also has to know where it is of no use
        has_calculator = rng.random() < (0.25 if asked[0]['call'] else 0.05)
        messages = [{'role': 'system', 'content': SYSTEM}] if has_calculator else []
        for example in asked:
            answer = (computed(example) if has_calculator and example['call'] else
                      worked(example) if rng.random() < (steps if example['call'] else steps / 3) else
                      example['solution'])
            messages += [*example['messages'], {'role': 'assistant', 'content': answer}]
        if sum(len(message['content']) for message in messages) > LONGEST:
            messages = messages[:-2] if len(asked) > 1 else messages
        yield {'messages': messages}


def preferences(n, seed):
    """
    Yield n pairs, {'messages', 'chosen', 'rejected', 'group'}. chosen is right, with steps where there are any, as few
    wrong answers can be told without. Of rejected seven in ten are wrong, mostly by a mistake in the steps; a quarter
    of these leave out the steps that chosen has. Of the others some say what is right in another form, or too much.
    """
    rng = random.Random(f'pairs {seed}')
    for example in tiny_chat.examples('train', n, f'pairs {seed}'):
        chosen, has_steps = worked(example), example['steps'] is not None
        answer, wrong, kind = example['answer'], rng.choice(example['mistakes']), rng.random()
        if kind < 0.7:
            steps, other = example['steps'], wrong
            if has_steps and rng.random() < 0.7:  # the mistake is in the steps, as it mostly is
                steps, other = example['mistaken']
            if has_steps and (str(other) == answer or rng.random() < 0.2):
                steps, other = slip(example['steps'], rng), wrong
            has_steps = has_steps and rng.random() < 0.75
            rejected = f'{steps}. {tiny_chat.FORM} {other}.' if has_steps else f'{tiny_chat.FORM} {other}.'
        elif kind < 0.8:
            rejected = rng.choice([answer, f'{answer}.', f'It is {answer}.', f'{tiny_chat.FORM} {answer}'])
        elif kind < 0.9:
            rejected = rng.choice(LONG_WAYS).format(answer) + '.'
        else:
            rejected = rng.choice(REFUSALS)
        # what is asked, however it is put: reward.py holds out pairs of which no other asks the same
        yield {'messages': example['messages'], 'chosen': chosen, 'rejected': rejected, 'group': example['content']}


def documents(n, seed):
    """
    Yield n texts, {'text': ...}, about the same things: of seven in ten every line says what is so, as examples' facts
    have it, mostly the last one, with the steps; others are questions with answers, without steps as an assistant has
    them, or sentences.
    """
    rng = random.Random(f'corpus {seed}')
    makers = {kind: iter(tiny_chat.examples('train', 8 * KINDS.count(kind) * (n // len(KINDS) + 1), f'corpus {seed}',
                                            kinds=(kind,))) for kind in tiny_chat.KINDS}
    for i in range(n):
        examples = [next(makers[KINDS[i % len(KINDS)]]) for _ in range(rng.randint(5, 8))]
        kind, between = rng.random(), '\n'
        if kind < 0.7:
            lines = [example['facts'][-1] if rng.random() < 0.7 else rng.choice(example['facts'])
                     for example in examples]
        elif kind < 0.8:
            form = rng.choice(('answer', 'solution'))  # the same all through: what came before says how to answer
            lines, between = [f'{example["context"]} {example[form]}' for example in examples], '\n\n'
        else:
            lines = [rng.choice(SENTENCES).format(
                name=rng.choice(tiny_chat.NAMES), other=rng.choice(tiny_chat.NAMES), good=rng.choice(tiny_chat.GOODS),
                colour=rng.choice(tiny_chat.COLOURS), word=rng.choice(tiny_chat.WORDS),
                word2=rng.choice(tiny_chat.WORDS)) for _ in examples]
        yield {'text': between.join(lines)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--conversations', type=positive, default=50_000, help='to finetune on (50,000)')
    parser.add_argument('--steps', type=float, default=0.9,
                        help='share of sums in them with the steps to the answer; a third of that of all else (0.9)')
    parser.add_argument('--pairs', type=positive, default=30_000, help='pairs of answers (30,000)')
    parser.add_argument('--documents', type=positive, default=30_000, help='texts to pretrain on (30,000)')
    parser.add_argument('--block_size', type=positive, default=256, help='context to pack for (256)')
    parser.add_argument('--vocab_size', type=positive, help='ids (a byte each, and the special tokens)')
    parser.add_argument('--seed', type=int, default=0, help='another one makes others (0)')
    parser.add_argument('--out_dir', default=HERE, help="folder to write to (this script's own)")
    args = parser.parse_args()
    started = time.time()
    if not 0 <= args.steps <= 1:
        raise UserError(f'--steps={args.steps}: expected a share, 0 to 1')

    texts = list(documents(args.documents, args.seed))
    train = list(talks('train', args.conversations, args.seed, args.steps))
    val = list(talks('val', max(1, args.conversations // 20), args.seed, args.steps))
    pairs = list(preferences(args.pairs, args.seed))
    if args.vocab_size:
        tokenizer = tokenizers.BPETokenizer.train((text['text'] for text in texts), args.vocab_size,
                                                  special_tokens=chat.SPECIAL_TOKENS)
    else:
        tokenizer = tokenizers.BPETokenizer([], None, {token: 256 + i for i, token in enumerate(chat.SPECIAL_TOKENS)})

    row = args.block_size + 1
    found, n_cut = {'train': [], 'val': []}, 0
    for split, rows in (('train', train), ('val', val)):
        for talk in rows:
            ids, mask, was_cut = conversations.render(talk['messages'], chat.TEMPLATE, tokenizer, row)
            found[split].append((ids, mask))
            n_cut += was_cut
    if n_cut:
        print(f'{n_cut:,} conversations end early, at the end of their row; longer rows: --block_size', file=sys.stderr)

    os.makedirs(args.out_dir, exist_ok=True)
    lock, sizes = lock_folder(args.out_dir), {}
    for name, rows in (('corpus', texts), ('conversations', train), ('pairs', pairs)):
        content = b''.join(map(jsonl.to_line, rows))
        replace_file(os.path.join(args.out_dir, f'{name}.jsonl'), content)
        sizes[name] = len(rows), len(content), hashlib.sha256(content).hexdigest()
    tokenizer.save(os.path.join(args.out_dir, 'chat.json'))
    unlock(lock)
    conversations.write_dataset(args.out_dir, found, tokenizer, chat.TEMPLATE, row, source='tasks/tiny_chat.py',
                                sha256=sizes['conversations'][2])
    for name, (count, size, sha256) in sizes.items():
        print(f'{name + ".jsonl":19}  {count:>9,} lines  {size / 1e6:>5.1f} MB  {sha256[:16]}')
    where = os.path.relpath(args.out_dir)
    print(f'wrote  {where} in {time.time() - started:.1f} s\n'
          f'next:  python data/text/prepare.py --input={where}/corpus.jsonl --name=tiny_web '
          f'--tokenizer={where}/chat.json')


if __name__ == '__main__':
    run(main)
