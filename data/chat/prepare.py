"""Make a training set of conversations: JSON lines of messages, in OpenAI's
shape or ShareGPT's.

    python data/chat/prepare.py --input=talks.jsonl --tokenizer=out-base
    python train.py config/sft.py --init_from=out-base --dataset=talks

    {"messages": [{"role": "user", "content": "Hello"},
                  {"role": "assistant", "content": "Hi!"}]}
    {"conversations": [{"from": "human", "value": "Hello"},
                       {"from": "gpt", "value": "Hi!"}]}

Writes train.bin and val.bin, beside them train_mask.bin and val_mask.bin (a
byte for each token: 1 for what the assistant says and the token that ends it,
0 for all else, which carries no loss), and meta.json.

Conversations are packed into rows of --block_size + 1 tokens, so that none is
cut: the longest first, each into the fullest row that has room. What remains
is filled up, usually less than one token in fifty. One that is too long ends
where the row does; if no answer begins before that, it is refused.

--tokenizer is that of the model: a run's out_dir, a Hugging Face folder, or a
tokenizer file. The format is the model's own chat template, or that of chat.py,
which needs its special tokens; or --template=FILE, in Jinja. val.bin has every
tenth conversation (--val_fraction), chosen by its content.

An answer with "weight": 0, as OpenAI has it, carries no loss; "system" beside
the turns, as ShareGPT has it, is the first message.

Whatever is no conversation stops everything and is named by its line: a role
that isn't known, two turns of one role in a row, an empty answer.
--skip_bad leaves such lines out and says how many.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from collections import Counter

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

import tokenizer as tokenizers
from configurator import UserError
from data import conversations
from data.documents import check_fraction, text_hash
from data.encode import output_folder, positive, run
from flatgpt import checkpoint, huggingface, jsonl
from flatgpt.pretrained import tokenizer_of
from tokenizer import chat


def open_tokenizer(source):
    """--tokenizer -> (tokenizer, chat template or None, block_size or None): of a run, a model, or a file alone."""
    path = checkpoint.path_in(source)
    if os.path.exists(path):
        state = checkpoint.load(path)
        return tokenizer_of(state), state.get('chat_template'), state['model_args']['block_size']
    if os.path.isfile(os.path.join(source, 'config.json')):
        described = huggingface.load_tokenizer(source)
        if described is None:
            raise UserError(f'{source} has no tokenizer.json; copy that of the model into the folder')
        return tokenizers.from_dict(described), huggingface.load_chat_template(source, described), None
    try:
        return tokenizers.load(source), None, None
    except ValueError as error:
        if os.path.exists(source):
            raise
        raise UserError(f"--tokenizer={source}: there is no run or model in such a folder; {error}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--input', required=True, help='a file of JSON lines')
    parser.add_argument('--name', help='name of the dataset (that of the input)')
    parser.add_argument('--out_dir', help='folder to write to, in place of --name (data/NAME)')
    parser.add_argument('--tokenizer', required=True, help="a run's out_dir, a model's folder, or a tokenizer file")
    parser.add_argument('--template', help="a Jinja file (the model's template, else that of chat.py)")
    parser.add_argument('--block_size', type=positive, help="context to pack for (a run's own, else 256)")
    parser.add_argument('--val_fraction', type=float, default=0.1, help='share of the conversations in val (0.1)')
    parser.add_argument('--skip_bad', action='store_true', help='leave out lines that are no conversation')
    args = parser.parse_args()

    started = time.time()
    check_fraction(args.val_fraction)
    dataset, _, out_dir = output_folder(args.name, args.input, args.out_dir)
    tokenizer, template, block_size = open_tokenizer(args.tokenizer)
    row = (args.block_size or block_size or 256) + 1
    if args.template:
        try:
            with open(args.template, encoding='utf-8-sig') as file:
                template = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'--template={args.template}: {error}') from None
    if template is None:
        template = chat.TEMPLATE
        conversations.check_tokenizer(tokenizer, f'--tokenizer={args.tokenizer}')

    found, bad, n_cut, digest = {'train': [], 'val': []}, [], 0, hashlib.sha256()
    for number, value in jsonl.read_objects(args.input, bad if args.skip_bad else None).items():
        try:
            messages = conversations.messages_of(value)
            ids, mask, was_cut = conversations.render(messages, template, tokenizer, row)
        except ValueError as error:
            if not args.skip_bad:
                raise UserError(f'{args.input}, line {number}: {error} (--skip_bad leaves such lines out)') from None
            bad.append(str(error))
            continue
        n_cut += was_cut
        text = json.dumps(messages)
        digest.update(text.encode())
        split = 'val' if text_hash(text) < args.val_fraction else 'train'
        found[split].append((ids, mask))
    reasons = Counter(reason[:60] for reason in bad)
    for reason, count in reasons.most_common(5):
        print(f'left out {count:,}: {reason}', file=sys.stderr)
    if len(reasons) > 5:
        print(f'left out {len(bad):,} in all', file=sys.stderr)
    if n_cut:
        print(f'{n_cut:,} conversations end early, at the end of their row; longer rows: --block_size', file=sys.stderr)
    if not any(found.values()):
        raise UserError(f'{args.input} has no conversation' + f', and {len(bad):,} lines that are none' * bool(bad))
    conversations.write_dataset(out_dir, found, tokenizer, template, row, source=os.path.basename(args.input),
                                val_fraction=args.val_fraction, sha256=digest.hexdigest())
    start = args.tokenizer if os.path.isdir(args.tokenizer) else 'FOLDER'
    print(f'wrote  {os.path.relpath(out_dir)} in {time.time() - started:.1f} s\n'
          f'next:  python train.py config/sft.py --init_from={shlex.quote(start)} --dataset={shlex.quote(dataset)}')


if __name__ == '__main__':
    run(main)
