"""Web pages made from known texts, to measure how well the main text of a page is found."""

import html
import random
import re

from corpora import SENTENCES

# languages by an encoding that a page of them often declares
ENCODINGS = [('utf-8', 'en'), ('utf-8', 'de'), ('utf-8', 'ru'), ('iso-8859-1', 'fr'),
             ('windows-1252', 'es'), ('windows-1251', 'ru'), ('shift_jis', 'ja'), ('gb2312', 'zh'),
             ('utf-16', 'it'), ('iso-8859-2', 'pl')]
NAMED = {'é': '&eacute;', 'ü': '&uuml;', 'è': '&egrave;', 'ñ': '&ntilde;', '’': '&rsquo;',
         'í': '&#237;', 'ó': '&#xF3;', 'ą': '&#261;'}
CHROME = ['Home', 'Products', 'Pricing', 'About us', 'Contact', 'Careers', 'Newsletter', 'Sign in',
          'Subscribe', 'Archive', 'Weather', 'Sports', 'Shop', 'Forum', 'Downloads', 'Press room']


def make_page(seed):
    """Return the bytes of a page, and its main text."""
    rng = random.Random(seed)
    encoding, language = ENCODINGS[seed % len(ENCODINGS)]
    pieces = SENTENCES[language].rstrip('.。').split(' ' if ' ' in SENTENCES[language] else '、')
    texts = []  # of the main part, in order

    def sentence(count):
        chosen = [rng.choice(pieces).strip(',') for _ in range(count)]
        if ' ' in SENTENCES[language]:
            chosen[::5] = [f'{word}{rng.randrange(100)}' for word in chosen[::5]]
            return ' '.join(chosen).capitalize() + '.'
        return '、'.join(chosen[:max(1, count // 5)]) + f'{rng.randrange(1000)}。'

    def markup(text):
        texts.append(text)
        text = html.escape(text, quote=False)
        if rng.random() < 0.5:
            text = ''.join(NAMED.get(char, char) for char in text)
        if rng.random() < 0.4 and ' ' in text:  # a link, or emphasis, in the middle
            words = text.split(' ')
            middle = rng.randrange(len(words))
            tag = rng.choice(['a href="/more?a=1&b=2"', 'b', 'em', 'span class=x'])
            words[middle] = f'<{tag}>{words[middle]}</{tag.split()[0]}>'
            text = ' '.join(words)
        return text

    # the main part
    is_broken = rng.random() < 0.3
    end_of = (lambda tag: '') if is_broken else '</{}>'.format
    parts = [f'<h1>{markup(sentence(8))}</h1>']
    for number in range(rng.randrange(4, 12)):
        kind = rng.choice(['p'] * 6 + ['ul', 'table', 'blockquote', 'h2', 'pre']) if number else 'p'
        if kind == 'p':
            parts.append('<p>' + ' '.join(markup(sentence(rng.randrange(10, 25)))
                                          for _ in range(rng.randrange(2, 6))) + end_of('p'))
        elif kind == 'ul':
            items = ''.join(f'<li>{markup(sentence(9))}{end_of("li")}\n' for _ in range(4))
            parts.append(f'<ul>{items}</ul>')
        elif kind == 'table':
            rows = ''.join('<tr>' + ''.join(f'<td>{markup(sentence(4))}{end_of("td")}'
                                            for _ in range(3)) + end_of('tr') for _ in range(4))
            parts.append(f'<table>{rows}</table>')
        elif kind == 'h2':
            parts.append(f'<h2>{markup(sentence(5))}</h2><p>{markup(sentence(20))}{end_of("p")}')
        elif kind == 'pre':
            parts.append(f'<pre>{markup(sentence(12))}</pre>')
        else:
            parts.append(f'<blockquote><p>{markup(sentence(15))}{end_of("p")}</blockquote>')
    main = '\n'.join(parts)
    wrap = rng.choice(['<article>{}</article>', '<main>{}</main>', '<div id="content">{}</div>',
                       '<div class="post-body entry">{}</div>', '<div role="main">{}</div>', '{}'])

    # what surrounds it
    def links(count):
        return ''.join(f'<li><a href="/{name}">{name}</a></li>'
                       for name in rng.choices(CHROME, k=count))

    def advert():
        return f'Buy {rng.choice(CHROME)} today and save {rng.randrange(90)}%, limited offer!'

    before = rng.sample([
        f'<nav><ul>{links(8)}</ul></nav>',
        f'<div class="navbar menu"><ul>{links(6)}</ul></div>',
        f'<header><a href="/">The Daily {rng.choice(CHROME)}</a><ul>{links(3)}</ul></header>',
        f'<div class="ad-banner advertisement"><p>{advert()}</p></div>',
        '<div id="cookie-banner" class="cookie-consent">We use cookies. <button>Accept</button></div>',
        '<script>var main = "<p>no text</p>"; if (1 < 2 && main) { track(main); }</script>',
        '<form action="/search"><input name="q" value="Search"><button>Go</button></form>',
        '<div style="display:none">A hidden promotion for robots</div>'], 5)
    after = rng.sample([
        f'<aside class="sidebar"><h3>Related</h3><ul>{links(6)}</ul></aside>',
        f'<div id="sidebar"><ul>{links(7)}</ul></div>',
        f'<div class="social-share"><ul>{links(4)}</ul></div>',
        '<!-- a comment with <p>words in it</p> -->',
        f'<aside><p>{advert()}</p></aside>',
        '<noscript>Please enable JavaScript</noscript><script type="application/ld+json">'
        '{"@type": "Article", "body": "machine words"}</script>'], 4)
    footer = (f'<footer><ul>{links(5)}</ul><p>Copyright 2024 The Daily News. All rights reserved.'
              f'</p></footer>')
    charset = rng.choice(['<meta charset="{}">', "<META CHARSET='{}'>",
                          '<meta http-equiv="Content-Type" content="text/html; charset={}">'])
    head = (f'{charset.format(encoding)}<title>{html.escape(texts[0])} - The Daily</title>'
            '<style>p > a { color: red }</style><link rel=stylesheet href=a.css>')
    body = '\n'.join([*before, wrap.format(main), *after, footer])
    page = rng.choice([
        f'<!DOCTYPE html>\n<html lang="{language}"><head>{head}</head><body>{body}</body></html>',
        f'<html>\n<head>\n{head}\n</head>\n<body class=x>\n{body}\n</div></span>',
        f'<!doctype HTML>{head}<body>{body}'])
    return page.encode(encoding, 'xmlcharrefreplace'), '\n'.join(texts)


def words_of(text):
    """The words of a text; each character of Chinese and Japanese is one."""
    return re.findall(r'[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+', text.lower())
