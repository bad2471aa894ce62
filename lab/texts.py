"""Open the texts of the experiments as bytes."""

import numpy as np

from configurator import UserError
from data import datasets, download
from data import tokens as data


def open_corpus(corpus, block_size):
    """Return a dataset's train and val bytes. Raises UserError without bytes."""
    folder = datasets.folder_of(corpus)
    datasets.prepare_if_missing(folder, is_first=True)
    meta = datasets.load_meta(folder)
    if meta['tokenizer'] != {'kind': 'byte'}:
        kind = (meta['tokenizer'] or {}).get('kind', 'unknown')
        raise UserError(f'corpus={corpus!r} has tokens of kind {kind!r}, expected bytes, so that '
                        f'one model reads both texts: {datasets.prepare_command(folder)} '
                        f'--tokenizer=byte')
    return [data.open_tokens(folder, split, meta, block_size) for split in ('train', 'val')]


def open_text(path, command):
    """Split a file's bytes into nine tenths and the rest.

    path: '' is tiny Shakespeare. command: the one that takes a file, for errors.
    """
    path = download.get_shakespeare(path or None, datasets.folder_of('shakespeare_char'), command)
    text = np.fromfile(path, np.uint8)
    n_train = len(text) * 9 // 10
    return text[:n_train], text[n_train:]
