"""Prepare conversations of messages, in OpenAI's or ShareGPT's shape.

    python data/chat/prepare.py --input=talks.jsonl --tokenizer=out-base
    python train.py config/sft.py --init_from=out-base --dataset=talks

    {"messages": [{"role": "user", "content": "Hello"},
                  {"role": "assistant", "content": "Hi!"}]}
    {"conversations": [{"from": "human", "value": "Hello"},
                       {"from": "gpt", "value": "Hi!"}]}

The file is JSON lines, a JSON array, or Parquet with such columns.

Writes train.bin and val.bin, the loss masks train_mask.bin and val_mask.bin (a
byte per token: 1 for an answer and the token that ends it, else 0), and
meta.json.

Conversations are packed into rows of --block_size + 1 tokens without cutting
them; padding is usually less than one token in fifty. A conversation longer
than a row is cut at its end, and refused if no answer begins before that.

--tokenizer is that of the model: a run's out_dir, a Hugging Face folder, or a
tokenizer file. The format is the model's chat template, else the default one,
which needs its special tokens, or --template=FILE, in Jinja. val.bin has every
tenth conversation (--val_fraction), chosen by its content.

An answer with "weight": 0, as OpenAI has it, or "loss" or "train" false,
carries no loss; "system" beside the turns is the first message. Content is a
text or a list of parts that are texts.

A line that is not a conversation ends the script with an error that names it:
an unknown role, two turns of one role in a row, an empty answer. --skip_bad
skips such lines and prints their number.
"""

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
from configurator import UserError, printable
from data import conversations, documents, encode
from flatgpt import checkpoint, huggingface
from flatgpt.pretrained import path_in, tokenizer_of
from tokenizer import chat


def open_tokenizer(source):
    """Open the tokenizer of a run, a Hugging Face folder or a file.

    -> (tokenizer, chat template or None, block_size or None)
    """
    path = path_in(source)
    if os.path.exists(path):
        state = checkpoint.load(path)
        block_size = state['model_args'].get('block_size')
        return tokenizer_of(state), state.get('chat_template'), block_size
    if os.path.isfile(os.path.join(source, 'config.json')):
        described = huggingface.load_tokenizer(source)
        if described is None:
            raise UserError(f'{source} has no tokenizer.json; copy the one of the model into it')
        template = huggingface.load_chat_template(source, described)
        return tokenizers.from_dict(described), template, None
    try:
        return tokenizers.load(source), None, None
    except UserError as error:
        if os.path.exists(source):
            raise
        raise UserError(f'--tokenizer={source} is not a folder with a run or a model, nor a '
                        f'tokenizer: {error}') from None


def main():
    parser = encode.make_parser(__doc__)
    add = parser.add_argument
    add('--input', required=True, help='a file of JSON lines, a JSON array, or .parquet')
    add('--name', help='name of the dataset (that of the input)')
    add('--out_dir', help='folder to write to, in place of --name (data/NAME)')
    add('--tokenizer', required=True, help="a run's out_dir, a model's folder, or a tokenizer file")
    add('--template', help="a Jinja file (the model's template, or the default)")
    add('--block_size', type=encode.positive, help="context to pack for (a run's own, else 256)")
    add('--val_fraction', type=float, default=0.1, help='share of conversations in val (0.1)')
    add('--skip_bad', action='store_true', help='skip lines that are not conversations')
    args = parser.parse_args()

    # open the tokenizer and the chat template
    started = time.time()
    documents.check_fraction(args.val_fraction)
    dataset, _, out_dir = encode.output_folder(args.name, args.input, args.out_dir)
    tokenizer, template, block_size = open_tokenizer(args.tokenizer)
    if args.template:
        template = ''.join(documents.read_text(args.template))
    elif template is None:
        template = chat.TEMPLATE
        conversations.check_tokenizer(tokenizer, f'--tokenizer={args.tokenizer}')
    packing = conversations.Packing(tokenizer, template,
                                    (args.block_size or block_size or 256) + 1)

    # render each conversation
    rendered, bad, digest = {'train': [], 'val': []}, [], hashlib.sha256()
    unread = Counter()
    for where, value in documents.read_records(args.input, bad=bad if args.skip_bad else None):
        try:
            messages = conversations.messages_of(value)
            row = conversations.render(messages, packing)
        except ValueError as error:
            if not args.skip_bad:
                raise UserError(f'{where}: {error} (--skip_bad skips such lines)') from None
            bad.append(str(error))
            continue
        unread.update(conversations.unread_keys(value))
        text = json.dumps(messages)
        digest.update(text.encode())
        split = 'val' if documents.text_hash(text) < args.val_fraction else 'train'
        rendered[split].append(row)
    for reason, count in Counter(reason[:60] for reason in bad).most_common(5):
        print(f'skipped {count:,}: {printable(reason)}', file=sys.stderr)
    if unread:
        names = ', '.join(f'{key} ({n:,})' for key, n in unread.most_common(9))
        print(f'not read: {printable(names)}', file=sys.stderr)
    if not any(rendered.values()):
        raise UserError(f'{args.input} has no conversation'
                        + f', and {len(bad):,} lines that are not one' * bool(bad))

    # pack and write
    conversations.write_dataset(out_dir, rendered, packing, source=os.path.basename(args.input),
                                val_fraction=args.val_fraction, sha256=digest.hexdigest())
    model = args.tokenizer if os.path.isdir(args.tokenizer) else 'FOLDER'
    print(f'wrote  {os.path.relpath(out_dir)} in {time.time() - started:.1f} s\n'
          f'next:  python train.py config/sft.py --init_from={shlex.quote(model)} '
          f'--dataset={shlex.quote(dataset)}')


if __name__ == '__main__':
    encode.run(main)
