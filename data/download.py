"""Download files, resumed after a broken connection, checked by SHA-256.

    download(url, path, sha256, instead)           # one file
    get_shakespeare(given, folder, instead)        # the text of data/shakespeare*
    get_shards(HubFolder(...), out_dir, instead)   # Parquet files of the Hugging Face Hub

`instead` is the command for a machine without a network; errors end with it.
"""

import hashlib
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from tqdm import tqdm

from configurator import UserError
from data.documents import find_files
from flatgpt.files import explain_full_disk, lock_folder, no_link, unlock
from flatgpt.inputs import regular_file

RETRY_SECONDS = 2    # before the next attempt
MOST_BYTES = 10**8   # of one file, so that a download ends whatever the server sends
MOST_SECONDS = 3600  # for one file

SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def download(url: str, path, sha256: str, instead: str):
    """Download a file and check it. An earlier attempt is continued from {path}.part.

    Retries while each attempt brings some bytes. Raises UserError when offline, when the server
    refuses, when the disk is full, beyond MOST_BYTES or MOST_SECONDS, and for another checksum.
    """
    part, ends = f'{path}.part', time.monotonic() + MOST_SECONDS
    size = size_of(part)
    while True:
        try:
            with explain_full_disk(os.path.dirname(os.path.abspath(path)), path):
                total = fetch(url, part, ends)
            if size_of(part) >= total:
                break
            problem = f'it ended at {size_of(part):,} of {total:,} bytes'
        except urllib.error.HTTPError as error:
            raise UserError(f'cannot download {url}: the server answers {error.code} '
                            f'{error.reason}. Try again later, or get the file elsewhere, and '
                            f'then: {instead}') from None
        except (http.client.HTTPException, OSError) as error:
            problem = getattr(error, 'reason', None) or error
        size_before, size = size, size_of(part)
        if size <= size_before:
            kept = f' The first {size:,} bytes are kept; run again to continue.' if size else ''
            raise UserError(f'cannot download {url} ({problem}). Is this machine offline? Get the '
                            f'file on another one, and then: {instead}{kept}')
        print(f'the connection broke ({problem}); continuing at {size:,} bytes', file=sys.stderr)
        time.sleep(RETRY_SECONDS)
    digest = file_sha256(part)
    if digest != sha256:
        os.remove(part)
        raise UserError(f'{url} gave a file with SHA-256 {digest}, expected {sha256}; it was '
                        f'removed. Run again; if this repeats, the file has changed at its '
                        f'source: get the right one, and then: {instead}')
    os.replace(part, path)


def fetch(url, part, ends) -> int:
    """Append to `part` the bytes of url that it lacks; -> the size of the whole.

    ends: the time.monotonic() at which to stop. Raises UserError then, and beyond MOST_BYTES.
    """
    size = size_of(part)
    request = urllib.request.Request(url, headers={'User-Agent': 'flatgpt',
                                                   'Range': f'bytes={size}-'})
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # no bytes after these; the checksum decides
            return size
        raise
    with answer:
        if answer.status != 206:  # the server sends the file from its start
            size = 0
        length = answer.headers.get('Content-Length')
        total = size + int(length) if length else None
        name = os.path.basename(part).removesuffix('.part')
        with open(part, 'ab' if size else 'wb', opener=no_link) as file, tqdm(
                desc=f'downloading {name}', total=total, initial=size, unit='B', unit_scale=True,
                disable=None, leave=False, dynamic_ncols=True) as bar:
            while block := answer.read1(1 << 16):
                file.write(block)
                bar.update(len(block))
                if file.tell() > MOST_BYTES:
                    os.remove(part)
                    raise UserError(f'{url} sends more than {MOST_BYTES:,} bytes, the most that is '
                                    f'taken, so this is not the file; it was removed')
                if time.monotonic() > ends:
                    raise UserError(f'{url} takes longer than {MOST_SECONDS:,} seconds; what is '
                                    f'there is kept, run again to continue')
            file.flush()
            os.fsync(file.fileno())
    return size_of(part) if total is None else total


def size_of(path) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def file_sha256(path) -> str:
    digest = hashlib.sha256()
    with open(regular_file(path), 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def get_shakespeare(given, folder, instead: str) -> str:
    """Return the path of tiny Shakespeare: `given`, or a downloaded input.txt."""
    path = given or os.path.join(folder, 'input.txt')
    if not given and not os.path.exists(path):
        lock = lock_folder(folder, 'downloading to')
        try:
            if not os.path.exists(path):  # another process may have downloaded it meanwhile
                download(SHAKESPEARE, path, SHAKESPEARE_SHA256, instead)
        finally:
            unlock(lock)
    find_files(path)  # raises for a missing or an empty file
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder; expected one text file. For a folder: '
                        f'python data/text/prepare.py --input={path}')
    digest = file_sha256(path)
    if digest != SHAKESPEARE_SHA256:
        print(f'note: {path} is not the usual text (SHA-256 {digest[:12]}..., usually '
              f'{SHAKESPEARE_SHA256[:12]}...), so the counts will differ', file=sys.stderr)
    return path


@dataclass
class HubFolder:
    """Name the first n_files Parquet files in a folder of a Hub dataset."""

    repo: str
    folder: str
    revision: str = 'main'
    n_files: int | None = None  # None: all


def get_shards(source: HubFolder, out_dir, instead: str) -> tuple[list[str], str]:
    """Download the Parquet files of a HubFolder to out_dir; -> (paths, commit).

    huggingface_hub continues broken downloads and takes a mirror from HF_ENDPOINT. Each file is
    checked against the SHA-256 of the Hub's listing, at every call. Raises UserError when offline,
    when the disk is too small, and for a damaged file.
    """
    try:
        from huggingface_hub.hf_api import HfApi, RepoFile
    except ImportError:
        raise UserError(f"the download needs the package huggingface_hub: pip install -e '.[data]'."
                        f' Or get the files in another way, and then: {instead}') from None
    os.makedirs(out_dir, exist_ok=True)
    lock = lock_folder(out_dir, 'downloading to')
    try:
        api = HfApi()
        commit = api.dataset_info(source.repo, revision=source.revision).sha
        tree = api.list_repo_tree(source.repo, source.folder, revision=commit, repo_type='dataset')
        files = sorted((entry for entry in tree if isinstance(entry, RepoFile)
                        and entry.path.endswith('.parquet')), key=lambda entry: entry.path)
        n_files = len(files) if source.n_files is None else source.n_files
        if not files or n_files > len(files):
            raise UserError(f'{source.repo} has {len(files)} Parquet files in {source.folder} at '
                            f'{source.revision}; expected {n_files or "some"}, see --shards')
        paths = {os.path.join(out_dir, file.path): file for file in files[:n_files]}
        missing = sum(file.size for path, file in paths.items() if size_of(path) != file.size)
        if missing > (free := shutil.disk_usage(out_dir).free):
            raise UserError(f'{out_dir} has {free / 1e9:,.1f} GB free; the download needs '
                            f'{missing / 1e9:,.1f} GB. Free some space, or take fewer shards')
        for path, file in paths.items():
            api.hf_hub_download(source.repo, file.path, repo_type='dataset', revision=commit,
                                local_dir=out_dir)
            if file.lfs and file_sha256(path) != file.lfs.sha256:
                os.remove(path)
                raise UserError(f'{path} was damaged, and is removed; run again to download it')
        return list(paths), commit
    except UserError:
        raise
    except Exception as error:  # huggingface_hub raises errors of several HTTP libraries
        raise UserError(f'cannot download {source.repo} ({type(error).__name__}: '
                        f'{str(error).partition(chr(10))[0]}). Is this machine offline? Get the '
                        f'Parquet files on another one, and then: {instead}') from error
    finally:
        unlock(lock)
