"""Files from the network: resumable, checked against a SHA-256, and with a way around for machines without one.

    download(url, path, sha256, ...)       one file
    get_shakespeare(given, folder, ...)    the text of data/shakespeare and data/shakespeare_char
    get_shards(repo, folder, out_dir, ...) Parquet files of a dataset on the Hugging Face Hub, by its plain HTTP API
"""

import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from tqdm import tqdm
from data.documents import find_files
from flatgpt.files import NO_ROOM, lock_folder, replace_file, unlock
from configurator import UserError


RETRY_SECONDS = 2  # between two attempts at a file
BUSY, BUSY_RETRIES = (408, 429, 500, 502, 503, 504), 5  # answers that pass; after each a pause twice as long: 62 s

SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def download(url: str, path, sha256: str, instead: str):
    """Fetch url to path, continuing a broken download (path.part), and check it.

    A connection that breaks is taken up again as long as each attempt brings some bytes. instead: the command for a
    machine without a network. ValueError when offline, the server refuses, the disk is full, or the checksum differs.
    """
    part = f'{path}.part'
    have = size_of(part)
    while True:
        try:
            total = fetch(url, part)
            if size_of(part) >= total:
                break
            problem = f'it ended at {size_of(part):,} of {total:,} bytes'
        except urllib.error.HTTPError as error:
            raise refused(f'cannot download {url}', error, 'the file', instead) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise UserError(f'no room on the disk for {part}: {error.strerror}. What is there is kept; free some '
                                 f'space, and run again to go on') from None
            problem = getattr(error, 'reason', None) or error
        before, have = have, size_of(part)
        if have <= before:
            kept = f' The {have:,} bytes so far are kept; run again to go on.' if have else ''
            raise UserError(f'cannot download {url} ({problem}). Is this machine offline? Get the file on another '
                             f'one, and then: {instead}{kept}')
        print(f'the connection broke ({problem}); going on at {have:,} bytes', file=sys.stderr)
        time.sleep(RETRY_SECONDS)
    found = file_sha256(part)
    if found != sha256:
        os.remove(part)
        raise UserError(f'{url} gave a file with SHA-256 {found}, expected {sha256}; it was removed. Run again; if '
                         f'this repeats, the file has changed at its source: get the right one, and then: {instead}')
    os.replace(part, path)


def fetch(url, part) -> int:
    """Append to the file `part` what it lacks of url; returns the size of the whole, as far as the server tells it."""
    have = size_of(part)
    try:
        answer = open_url(url, {'Range': f'bytes={have}-'})
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is nothing beyond what `part` has; the checksum tells whether it is right
            return have
        raise
    with answer:
        # 206 continues where the .part file ends; with 200 the server sends everything from the start
        mode = 'ab' if answer.status == 206 else 'wb'
        have = have if mode == 'ab' else 0
        length = answer.headers.get('Content-Length')
        total = have + int(length) if length else None
        with open(part, mode) as file, tqdm(desc=f'downloading {os.path.basename(part).removesuffix(".part")}',
                                            total=total, initial=have, unit='B', unit_scale=True, disable=None,
                                            leave=False, dynamic_ncols=True) as bar:
            while block := answer.read(1 << 16):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    return size_of(part) if total is None else total


def open_url(url, headers=None):
    """The server's answer. When it says that it can't answer now, it is asked again, after longer and longer pauses."""
    request = urllib.request.Request(url, headers={'User-Agent': 'flatgpt', **(headers or {})})
    for attempt in range(BUSY_RETRIES + 1):
        try:
            return urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            if error.code not in BUSY or attempt == BUSY_RETRIES:
                raise
            pause = RETRY_SECONDS * 2**attempt
            print(f'{url}: the server says {error.code} {error.reason}; asking again in {pause} s', file=sys.stderr)
            time.sleep(pause)


def refused(what, error, files, instead) -> UserError:
    """For an HTTPError that stays: wait, when it may pass, or else get the files in another way."""
    remedy = (f'It is busy: run again later to go on. Or get {files} elsewhere' if error.code in BUSY else
              f'Get {files} elsewhere')
    return UserError(f'{what}: the server says {error.code} {error.reason}. {remedy}, and then: {instead}')


def size_of(path) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def file_sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def get_shakespeare(given, folder, instead: str) -> str:
    """The file to prepare: `given` (--input=FILE) if there is one, else folder/input.txt, downloaded when not there."""
    path = os.path.join(folder, 'input.txt')
    if not given and not os.path.exists(path):
        lock = lock_folder(folder, 'downloading to')
        try:
            if not os.path.exists(path):  # unless another process has brought it in this moment
                download(SHAKESPEARE, path, SHAKESPEARE_SHA256, instead)
        finally:
            unlock(lock)
    path = given or path
    find_files(path)  # says so when there is no such file, or an empty one
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder; expected one text file. For a folder of your own: '
                         f'python data/text/prepare.py --input={path}')
    found = file_sha256(path)
    if found != SHAKESPEARE_SHA256:
        print(f'note: {path} is not the usual text (SHA-256 {found[:12]}..., usually {SHAKESPEARE_SHA256[:12]}...), '
              f'so the counts will differ', file=sys.stderr)
    return path


# Hugging Face ---------------------------------------------------------------------------------------------------------


def hub() -> str:
    """Where the Hub is: HF_ENDPOINT, the variable that names a mirror, or the Hub itself."""
    return os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')


def get_shards(repo: str, folder: str, out_dir, revision: str, n_shards: int | None, instead: str):
    """The first n_shards (None: all) Parquet files of a folder of a dataset repository, downloaded to out_dir.
    Returns their paths and the commit they are of.

    out_dir/listing.json keeps the commit, sizes and SHA-256 as they were the first time, so later calls get and check
    the same bytes. What is complete is checked but not fetched again. instead: the command for a machine without a
    network. ValueError when offline, for a listing that is damaged or of something else, or when the disk is too small.
    """
    os.makedirs(out_dir, exist_ok=True)
    lock = lock_folder(out_dir, 'downloading to')
    try:
        listing = load_listing(repo, folder, out_dir, revision, instead)
        files = listing['files'][:n_shards]
        if n_shards is not None and n_shards > len(files):
            raise UserError(f'--shards={n_shards}, but {repo} has {len(files)} in {folder}; expected at most so many')
        paths = [os.path.join(out_dir, os.path.basename(file['path'])) for file in files]
        missing = sum(file['size'] - size_of(f'{path}.part') for path, file in zip(paths, files, strict=True)
                      if size_of(path) != file['size'])
        free = shutil.disk_usage(out_dir).free
        if missing > free:
            raise UserError(f'{out_dir} has {free / 1e9:,.1f} GB free; the download needs {missing / 1e9:,.1f} GB. '
                             f'Free some space, or take fewer shards')
        if missing:
            print(f'downloading {missing / 1e9:,.1f} GB of {repo}, {len(files)} shards of {folder}, to {out_dir}',
                  file=sys.stderr)
        for path, file in zip(paths, files, strict=True):
            if size_of(path) == file['size']:
                if file_sha256(path) == file['sha256']:
                    continue
                print(f'note: {path} is damaged, so it is fetched again', file=sys.stderr)
            url = f'{hub()}/datasets/{repo}/resolve/{listing["commit"]}/{urllib.parse.quote(file["path"])}'
            download(url, path, file['sha256'], instead)
        return paths, listing['commit']
    finally:
        unlock(lock)


def load_listing(repo, folder, out_dir, revision, instead) -> dict:
    """What out_dir/listing.json says of the shards; asked of the Hub and written there the first time."""
    path = os.path.join(out_dir, 'listing.json')
    wanted = {'repo': repo, 'folder': folder, 'revision': revision}
    if not os.path.exists(path):
        api = f'{hub()}/api/datasets/{repo}'
        try:
            commit = ask(f'{api}/revision/{urllib.parse.quote(revision, safe="")}', instead)[0]['sha']
            entries, page = [], f'{api}/tree/{commit}/{folder}'
            while page:  # each has up to 1,000 entries
                more, page = ask(page, instead)
                entries += more
            files = [{'path': entry['path'], 'size': entry['size'], 'sha256': entry['lfs']['oid']}
                     for entry in entries if entry['path'].endswith('.parquet')]
        except (KeyError, TypeError) as error:
            raise UserError(f'{api} answers in an unknown form ({type(error).__name__}: {error}). Get the Parquet '
                             f'files elsewhere, and then: {instead}') from None
        if not files:
            raise UserError(f'{repo} has no Parquet files in {folder} at {revision}; see what there is on {hub()}')
        listing = {**wanted, 'commit': commit, 'files': sorted(files, key=lambda file: file['path'])}
        replace_file(path, (json.dumps(listing, indent=1) + '\n').encode())
    try:
        with open(path, encoding='utf-8') as file:
            listing = json.load(file)
        differing = [key for key in wanted if listing[key] != wanted[key]]
        files = [{'path': str(file['path']), 'size': int(file['size']), 'sha256': str(file['sha256'])}
                 for file in listing['files']]
        commit = str(listing['commit'])
    except (KeyError, TypeError, ValueError):
        raise UserError(f'{path} is damaged; remove it and run again') from None
    for key in differing:
        raise UserError(f'{path} is of {key} {listing[key]}, expected {wanted[key]}; remove {out_dir} to download '
                         f'anew')
    return {'commit': commit, 'files': files}


def ask(url, instead) -> tuple:
    """The JSON that the Hub answers, and the address of the next page, None after the last one."""
    try:
        with open_url(url) as answer:
            following = re.search(r'<([^<>]*)>; *rel="next"', answer.headers.get('Link') or '')
            return json.load(answer), following and urllib.parse.urljoin(url, following[1])
    except urllib.error.HTTPError as error:
        raise refused(url, error, 'the Parquet files', instead) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise UserError(f'cannot read {url} ({getattr(error, "reason", error)}). Is this machine offline? Get the '
                         f'Parquet files on another one, and then: {instead}') from None
