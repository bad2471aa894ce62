"""Find the main text of HTML pages, for data.clean --html.

    for text in read_documents('crawl/', pages=True): ...  # pages in the encoding they declare
    text = main_text(page)                                 # without menus, adverts and scripts

Resiliparse on the 200 pages of tests/test_pages.py: recall of words 1.00, precision 0.99, 8 MB/s,
2 packages. Trafilatura: recall 0.99, precision 1.00, 2 MB/s, 13 packages (2026-11-30).
"""

import functools
import re
import shlex
import sys

from configurator import UserError
from flatgpt.inputs import open_utf8

FILE_NAME = re.compile(r'\.x?html?(\.(gz|bz2|xz|zst))?$', re.I)
PAGE_BYTES = 1 << 24  # most bytes of a page; its tree takes 23 times as much memory
DEEPEST = 1000        # <div>, <ul> in each other; browsers stop at 512, time grows as the square
OPENING = re.compile(r'<(?:!doctype\s+html|html|head|body)[\s>]', re.I)
NESTING = re.compile(r'<(/?)(?:div|ul)\b', re.I)
SHALLOW = 5           # Resiliparse takes a list that lies less deep for a menu


@functools.cache
def load_resiliparse():
    """Return Resiliparse's functions (parse, extract, detect, decode)."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
        from resiliparse.parse.html import HTMLTree
    except ImportError:
        raise UserError("--html needs resiliparse: pip install -e '.[clean]'") from None
    return HTMLTree.parse, extract_plain_text, detect_encoding, bytes_to_str


def is_page(text: str) -> bool:
    """Return whether a text begins as an HTML page."""
    start = text[:2048].lstrip('\ufeff \t\r\n')
    return start.startswith('<') and OPENING.search(start) is not None


def note_pages(path, files, texts):
    """Print a note if some files are pages by name, or some of the first texts by content."""
    n_pages, total, kind = sum(map(bool, map(FILE_NAME.search, files))), len(files), 'files'
    if not n_pages:
        n_pages, total, kind = sum(map(is_page, texts)), len(texts), 'first documents'
    if n_pages:
        print(f'note: {n_pages:,} of the {total:,} {kind} are HTML pages; their markup is encoded '
              f'as text. For their main text, first: python -m data.clean --html '
              f'--input={shlex.quote(str(path))} --out=clean.jsonl', file=sys.stderr)


def read_page(path) -> str:
    """Read a page in its encoding: of its mark, UTF-8 if valid, as declared, or detected.

    A part of a page gets a first line that marks it as HTML. Raises UserError for a larger file
    than PAGE_BYTES.
    """
    with open_utf8(path) as file:
        content = file.read(PAGE_BYTES + 1)
    if len(content) > PAGE_BYTES:
        raise UserError(f'{path} has more than {PAGE_BYTES:,} bytes, the most of an HTML page; '
                        f'move it out of the input, or rename it to .txt to read it as text')
    text = decode_page(content)
    return text if is_page(text) or not text.strip() else f'<!DOCTYPE html>\n{text}'


def decode_page(content: bytes) -> str:
    """Decode a page. Pages of UTF-8 often declare another encoding, others are rarely valid."""
    _, _, detect, decode = load_resiliparse()
    try:
        if not content.isascii():
            return content.decode()
    except UnicodeDecodeError:
        pass
    return decode(content, detect(content, from_html_meta=True), errors='replace')


def main_text(page: str) -> str:
    """Return the text of a page's main part, '' if there is none or it is too large or deep."""
    parse, extract, *_ = load_resiliparse()
    if len(page) > PAGE_BYTES:
        return ''
    depth = 0
    for match in NESTING.finditer(page):
        depth += -1 if match[1] else 1
        if depth > DEEPEST:
            return ''
    tree = parse(page)
    if tree.body is None:
        return ''
    for element in list(shallow_lists(tree.body)):
        if is_mostly_text(element):
            bury(tree, element)
    return extract(tree, main_content=True, alt_texts=False, comments=False).strip()


# Resiliparse's collections take time that grows as the cube of their length: go from node to node.

def children(element):
    """Yield the nodes directly below an element."""
    node = element.first_child
    while node is not None:
        yield node
        node = node.next_sibling


def shallow_lists(element, depth: int = 1):
    """Yield the lists that Resiliparse takes for menus, without those inside them."""
    for node in children(element):
        if node.tag == 'ul':
            yield node
        elif depth < SHALLOW:
            yield from shallow_lists(node, depth + 1)


def is_mostly_text(element) -> bool:
    """Return whether less than half of a list's characters are links, unlike in a menu."""
    length, nodes = [0, 0], [(element, False)]  # outside of links, inside
    while nodes:
        parent, in_link = nodes.pop()
        in_link = in_link or parent.tag == 'a'
        for node in children(parent):
            if node.tag == '#text':
                length[in_link] += len(node.text.strip())
            else:
                nodes.append((node, in_link))
    return length[0] > length[1]


def bury(tree, element):
    """Put an element deeper into the tree, with the same content."""
    for _ in range(3):
        wrapper = tree.create_element('div')
        element.parent.replace_child(wrapper, element)
        wrapper.append_child(element)
