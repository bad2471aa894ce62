"""
serving/page.html in Chromium: chats, streams, controls, inspector, errors, looks, keys.

The server here is a stand-in that says what a test chose. Run: pytest tests/test_serve_page.py
"""

import html.parser
import re
import signal
import threading

import pytest
from api_server import PAGE, pieces
from chat_models import save_chat_model
from chat_page import ANSWERS, IDLE, ask, contents, press_button
from chromium import ALT, CONTROL, SHIFT
from conftest import Folder


def test_one_style_one_script_and_nothing_from_elsewhere():
    source = PAGE.read_text(encoding='utf-8')
    tags, attributes = [], []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, pairs: (tags.append(tag), attributes.extend(pairs))
    parser.feed(source)
    assert tags.count('style') == tags.count('script') == 1
    assert not [name for name, _ in attributes if name == 'style' or name.startswith('on')]
    assert all(value.startswith(('#', 'data:')) for name, value in attributes if name in ('src', 'href'))
    assert not re.search(r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser|'
                         r'createContextualFragment|setHTML', source)
    assert set(re.findall(r'https?://[\w./]+', source)) == {'http://www.w3.org/2000/svg'}
    assert len(source.encode()) <= 100_000


# chats ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['button', 'Escape'])
def test_answers_stream_and_stop(page, api, how):
    api.reply = ['One ', 'two ', threading.Event(), 'three']
    ask(page, is_awaited=False)
    page.wait(f'{ANSWERS}[0] === "One two"')  # while the server has more
    page.write('typed meanwhile')
    page.press('Enter')  # sends nothing
    if how == 'button':
        page.click('#stop')
    else:
        page.press('Escape')
    page.wait(IDLE)
    assert page.run(ANSWERS) == ['One two'] and 'stopped' in page.text('#messages')
    assert page.run('$("box").value') == 'typed meanwhile' and len(api.requests) == 1
    api.reply[2].set()
    page.run('$("box").value = ""')
    ask(page, 'Go on')
    assert contents(api.requests[1]) == [('user', 'Hi'), ('assistant', 'One two '), ('user', 'Go on')]


@pytest.mark.slow
def test_retry_edit_and_undo(page, api):
    ask(page, 'first')
    api.reply = ['Second answer']
    press_button(page, 'Try again')
    page.wait(f'{IDLE} && {ANSWERS}[0] === "Second answer"')
    ask(page, 'second')
    page.press('ArrowUp')  # edits the last message
    page.press('Escape')
    assert page.run('document.activeElement.id') == 'box'
    press_button(page, 'Edit', "document.querySelector('.user')")
    page.write(' and more')
    api.reply = ['Third answer']
    page.press('Enter')
    page.wait(IDLE)
    assert contents(api.requests[-1]) == [('user', 'first and more')]
    assert page.run(ANSWERS) == ['Third answer']
    press_button(page, 'Undo')  # nothing typed is lost
    assert page.run('state.chat.messages.map(message => message.content)') == [
        'first', 'Second answer', 'second', 'Second answer']


@pytest.mark.slow
def test_an_open_edit_and_a_new_title_are_not_lost(page, api):
    ask(page, 'first')
    press_button(page, 'Edit')
    page.write(' changed')
    api.reply = ['slow ', threading.Event(), 'answer']
    ask(page, 'second', is_awaited=False)
    press_button(page, 'Rename')
    page.write('Half a ti')
    api.reply[1].set()
    page.wait(IDLE)
    page.write('tle')
    page.press('Enter')
    page.reload()
    assert page.text('#chat-list .title') == 'Half a title'
    assert page.run('document.querySelector("#messages textarea").value') == 'first changed'
    page.run('document.querySelector("#messages textarea").focus()')
    page.press('Enter')
    page.wait(IDLE)
    assert contents(api.requests[-1]) == [('user', 'first changed')]


def test_system_prompt_and_controls_reach_the_server(page, api):
    page.click('#system summary')
    page.run('$("system-box").focus()')
    page.write('Answer in verse')
    page.click('#show-controls')
    values = {'temperature': 0.5, 'top_p': 0.9, 'top_k': 40, 'min_p': 0.05, 'repetition_penalty': 1.1, 'max_tokens': 7,
              'seed': 3}
    for name, value in values.items():
        page.run(f'$("control-{name}").focus()')
        page.write(str(value))
    page.run('$("control-stop").focus()')
    page.write('User:\n\\n\\n')
    ask(page)
    request = api.requests[0]
    assert contents(request) == [('system', 'Answer in verse'), ('user', 'Hi')]
    assert {name: request[name] for name in values} == values
    assert request['stop'] == ['User:', '\n\n'] and request['stream'] and request['model'] == 'out-sft'
    page.reload()
    assert page.run('$("control-top_k").value') == '40' and page.run('$("system-box").value') == 'Answer in verse'
    press_button(page, 'Set all to default')
    ask(page)
    assert not set(values) & set(api.requests[1])
    page.run('$("control-temperature").focus()')
    page.write('3')
    ask(page, 'kept')
    assert len(api.requests) == 2 and page.run('$("box").value') == 'kept'
    assert 'Temperature: expected a number, from 0 to 2' in page.text('#notice')


@pytest.mark.slow
def test_chats_are_kept_renamed_and_deleted(page, api):
    api.reply = ['Half an ', 'answer', threading.Event()]
    ask(page, 'Remember this', is_awaited=False)
    page.wait(f'{ANSWERS}[0] === "Half an answer"')
    page.write('a draft')
    page.reload()  # in the middle of the answer
    api.reply[2].set()
    assert page.run(ANSWERS) == ['Half an answer'] and page.run('$("box").value') == 'a draft'
    page.press('n', ALT)
    assert page.run('$("box").value') == ''
    api.reply = ['Other']
    ask(page, 'Another chat')
    titles = '[...document.querySelectorAll("#chat-list .title")].map(element => element.textContent)'
    assert page.run(titles) == ['Another chat', 'Remember this']
    press_button(page, 'Rename Another chat')
    page.write('Renamed')
    page.press('Enter')
    page.reload()
    assert page.run(titles) == ['Renamed', 'Remember this'] and page.run(ANSWERS) == ['Other']
    press_button(page, 'Delete Renamed')
    assert page.run(titles) == ['Remember this'] and page.run(ANSWERS) == ['Half an answer']
    press_button(page, 'Undo')
    assert page.run(titles) == ['Renamed', 'Remember this'] and page.run(ANSWERS) == ['Other']
    press_button(page, 'Delete Renamed')
    page.reload()
    assert page.run(titles) == ['Remember this']


@pytest.mark.slow
def test_an_answer_goes_on_while_another_chat_is_in_view(page, api):
    api.reply = ['slow ', threading.Event(), 'answer']
    ask(page, 'slow', is_awaited=False)
    page.wait(f'{ANSWERS}[0] === "slow"')
    slow, api.reply = api.reply[1], ['quick']
    page.press('n', ALT)
    ask(page, 'quick', is_awaited=False)
    page.wait(f'{ANSWERS}[0] === "quick" && state.runs.size === 1')
    slow.set()
    page.wait(IDLE)
    assert page.run(ANSWERS) == ['quick']
    press_button(page, 'slow')
    assert page.run(ANSWERS) == ['slow answer']


FORBIDDEN = """for (const name of ['localStorage', 'sessionStorage']) {
  Object.defineProperty(window, name, {get() { throw new DOMException('no', 'SecurityError') }}) }"""
FULL = """localStorage.setItem('x', 'x'.repeat(5 << 20 >> 1))
try { for (;;) localStorage.setItem('y' + localStorage.length, 'x'.repeat(1000)) } catch {}
try { for (;;) localStorage.setItem('z' + localStorage.length, 'x') } catch {}"""


@pytest.mark.parametrize('script', [FORBIDDEN, FULL], ids=['forbidden', 'full'])
def test_without_storage(page, api, script):
    page.call('Page.addScriptToEvaluateOnNewDocument', source=script)
    page.reload()
    ask(page)
    assert page.run(ANSWERS) == ['Hello there!'] and 'full or forbidden' in page.text('#storage')


def test_what_fits_is_stored_without_probabilities(page):
    ask(page)
    page.run("localStorage.setItem('x', 'x'.repeat(5 * 1024 * 1024 - JSON.stringify(localStorage).length - 500))")
    ask(page, 'x' * 300)
    page.reload()
    assert page.run(ANSWERS) == ['Hello there!'] * 2


# reading --------------------------------------------------------------------------------------------------------------

CODE = 'def f(x):\n\treturn {"<b>": x}  # **no** `markup`\n'


def test_blocks(page, api):
    api.reply = pieces(f'Some **bold** and `code`.\n\n1. one\n2. two\n\n```python\n{CODE}```\n- a\n- b\n\nend\n```\nopen')
    ask(page)
    tags = page.run('[...document.querySelector(".assistant .content").children].map(element => element.tagName)')
    assert tags == ['P', 'OL', 'DIV', 'UL', 'P', 'DIV']
    assert page.run('[...document.querySelectorAll(".assistant pre code")].map(element => element.textContent)') == [
        CODE.rstrip('\n'), 'open']
    assert page.text('.assistant strong') == 'bold' and page.text('.assistant p code') == 'code'
    page.browser.call('Browser.grantPermissions', permissions=['clipboardReadWrite'], browserContextId=page.context)
    page.click('.code button')
    page.wait('document.querySelector(".code button").textContent === "Copied"')
    assert page.run('navigator.clipboard.readText()') == CODE.rstrip('\n')


def test_calculator(page, api):
    api.models[0]['tools'] = ['calculator']
    page.reload()
    page.wait('state.model')
    text = 'It is <|python|>2+3<|python_end|><|output|>5<|output_end|>, or so.'
    api.reply = pieces(text, 7)
    page.click('#show-controls')
    ask(page)
    assert api.requests[0]['tools'] == [{'type': 'calculator'}]
    assert page.text('.chip') == '2+3 = 5' and page.run(ANSWERS) == ['It is 2+3 = 5, or so.']
    page.press('i', ALT)
    assert page.run(ANSWERS) == [text]
    page.wait('$("seen-count").textContent')  # it moves the controls
    page.click('#control-calculator')
    ask(page)
    # the server sends the result behind the tokens of the call: the model did not draw it
    api.reply = [{'choices': [{'index': 0, 'delta': {'content': f'{call}5<|python_end|><|output|>5<|output_end|>'},
                               'logprobs': {'content': [{'token': call + '5', 'logprob': -1}]}}]}
                 for call in ('<|python|>',)]
    page.click('#control-calculator')
    ask(page)
    assert page.run('[...document.querySelectorAll(".assistant")].at(-1).querySelectorAll(".token").length') == 2
    assert page.run('lastOf(state.chat.messages).tokens.map(token => token.logprob)') == [-1, None]
    assert 'tools' not in api.requests[1] and contents(api.requests[1])[1] == ('assistant', text)


def test_inspector(page, api):
    api.reply = ['Hel', 'lo', '\n', ' wor', 'ld']
    ask(page)
    page.press('i', ALT)
    tokens = page.run('[...document.querySelectorAll(".assistant .token")].map(element => [element.innerText, '
                      'element.className, element.getAttribute("aria-label")])')
    assert [text for text, _, _ in tokens] == ['Hel', 'lo', '⏎\n', ' wor', 'ld']
    assert [name.split()[1] for _, name, _ in tokens] == ['p1', 'p2', 'p3', 'p4', 'p0']  # 60%, 30%, 10%, 1%, 97%
    assert [label for _, _, label in tokens] == ['Hel 60.0%', 'lo 30.0%', '⏎ 10.0%', '␣wor 1.0%', 'ld 97.0%']
    page.run('document.querySelector(".assistant .token").focus()')
    page.press('ArrowRight')
    rows = '[...document.querySelectorAll(".likely tr")].map(row => row.innerText.split(/\\s+/).filter(Boolean))'
    assert page.run(rows) == [['lo', '30.0%'], ['␣other', '14.0%'], ['⏎', '7.0%']]
    page.click('.assistant .token:nth-child(4)')
    assert page.run(rows) == [['␣other', '19.8%'], ['⏎', '9.9%'], ['␣wor', '1.0%']]
    assert page.text('.likely .chosen').split() == ['␣wor', '1.0%']
    page.wait('document.querySelector("#seen .special")')
    assert page.text('#seen') == '<|user|>Hi<|assistant|>' and page.text('#seen-count') == '3 tokens'
    assert page.run('[...document.querySelectorAll("#seen .special")].map(element => element.textContent)') == [
        '<|user|>', '<|assistant|>']
    page.reload()  # probabilities are kept too
    assert page.run('document.querySelectorAll(".assistant .token").length') == 5
    assert '5 tokens' in page.text('.assistant .below') and 'tokens/s' in page.text('.assistant .below')
    page.wait('$("chat-context").innerText === "25 of 1,024 tokens"')


def test_parts_of_characters_are_bytes(page, api):
    """A token that is half of an emoji has no text of its own."""
    api.reply = [{'choices': [{'index': 0, 'delta': {'content': text}, 'logprobs': {'content': [
        {'token': '\ufffd', 'logprob': -1, 'bytes': part, 'top_logprobs': []}]}}]}
        for text, part in (('', [0xf0, 0x9f]), ('🙂', [0x99, 0x82]))]
    page.press('i', ALT)
    ask(page)
    assert page.run(ANSWERS) == ['\\xf0\\x9f\\x99\\x82']
    page.press('i', ALT)
    assert page.run(ANSWERS) == ['🙂']


def test_completion(page, api):
    api.models[0]['chat'] = False
    page.run('localStorage.clear(); state.tabModel = ""; store = () => true')
    page.reload()
    page.wait('state.model')
    assert page.run('document.activeElement.id') == 'paper'  # a base model opens there
    api.reply = [' upon', ' a', threading.Event(), ' time\n']
    page.write('Once')
    page.press('Enter', CONTROL)
    page.wait('$("paper").value === "Once upon a"')
    assert page.text('#prompt') == 'Once' and page.text('#continuation') == ' upon a'
    colours = [page.run(f'getComputedStyle($("{name}")).backgroundColor') for name in ('prompt', 'continuation')]
    assert colours[0] != colours[1]
    page.press('Escape')
    page.wait(IDLE)
    api.reply[2].set()
    assert api.requests[0]['prompt'] == 'Once' and 'messages' not in api.requests[0]
    press_button(page, 'Try again')
    page.wait(f'{IDLE} && $("paper").value === "Once upon a time\\n"')
    page.press('i', ALT)
    assert page.run('[...document.querySelectorAll("#mirror .token")].map(element => element.textContent)') == [
        ' upon', ' a', ' time\n']
    page.click('#mirror .token:nth-child(2)')
    assert page.text('.likely .chosen').split() == ['␣a', '30.0%']
    page.run('$("paper").focus(); $("paper").setSelectionRange(99, 99)')
    page.write('there')
    page.press('Enter', CONTROL)
    page.wait(f'{IDLE} && state.completion.prompt === "Once upon a time\\nthere"')
    page.reload()
    assert page.run('$("paper").value') == 'Once upon a time\nthere upon a time\n'
    press_button(page, 'Remove')
    assert page.run('$("paper").value') == 'Once upon a time\nthere'


# errors ---------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize('status, words', [
    (400, 'refused the request: what it says'), (429, 'too much to do'), (503, 'busy or not ready'),
    (404, 'does not have this'), (413, 'too long'), (500, 'failed with status 500')])
def test_errors_are_words_with_a_way_on(page, api, status, words):
    api.failure = status, 'what it says'
    ask(page, 'not lost')
    assert words in page.text('.error') and 'what it says' in page.text('.error')
    page.reload()
    assert page.text('.user .content') == 'not lost' and words in page.text('.error')
    api.failure = None
    press_button(page, 'Try again')
    page.wait(IDLE)
    assert page.run(ANSWERS) == ['Hello there!'] and contents(api.requests[0]) == [('user', 'not lost')]


@pytest.mark.slow
@pytest.mark.parametrize('broken, words', [
    ('cut', 'connection was lost'), ({'error': {'message': 'out of memory'}}, 'out of memory')])
def test_what_arrived_before_an_error_stays(page, api, broken, words):
    api.reply = ['What arrived', broken]
    ask(page)
    assert page.run(ANSWERS) == ['What arrived'] and words in page.text('.error')
    api.reply = ['Whole']
    press_button(page, 'Try again', 'document.querySelector(".error")')
    page.wait(IDLE)
    assert page.run(ANSWERS) == ['Whole']


def test_no_server(page):
    page.run('window.fetch = () => Promise.reject(new TypeError("Failed to fetch"))')
    ask(page)
    assert 'cannot be reached' in page.text('.error')


def test_the_key_is_asked_for(page, api):
    api.key = 'secret'
    page.reload()
    page.wait('!$("key").hidden')
    ask(page, 'not lost')
    assert 'API key' in page.text('.error')
    for key in ('wrong', 'secret'):
        page.run('$("key-box").focus()')
        page.write(key)
        page.press('Enter')
        page.wait('$("key").hidden')
        page.wait('state.model' if key == 'secret' else '!$("key").hidden')
    press_button(page, 'Try again')
    page.wait(IDLE)
    assert page.run(ANSWERS) == ['Hello there!']
    assert 'secret' not in page.run('JSON.stringify(localStorage)')
    page.reload()  # it lasts as long as the tab
    page.wait('state.model')


# looks, keys, time ----------------------------------------------------------------------------------------------------

CONTRASTS = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true})
  const luminance = ([r, g, b]) => [r, g, b].map(value => value / 255).map(value => (
    value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0)
  const painted = element => {  // the backgrounds of an element and what is around it
    const around = []
    for (let e = element; e; e = e.parentElement) around.unshift(getComputedStyle(e).backgroundColor)
    return around
  }
  const pixel = colours => {
    canvas.clearRect(0, 0, 1, 1)
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1) }
    return canvas.getImageData(0, 0, 1, 1).data
  }
  return [...document.querySelectorAll('body *')].filter(element => element.checkVisibility()
      && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
    .map(element => {
      const below = painted(element), text = getComputedStyle(element).color
      const [a, b] = [pixel(below), pixel([...below, text])].map(luminance).sort((a, b) => b - a)
      return [Math.round(100 * (a + 0.05) / (b + 0.05)) / 100, element.className || element.tagName, element.innerText]
    }).filter(([ratio]) => ratio < 4.5)
})()"""


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_light_and_dark_have_contrast_and_fit(page, api, scheme):
    """WCAG AA: 4.5 for text; and nothing is wider than a phone."""
    page.emulate(scheme)
    api.models[0]['id'] = 'a-model-with-a-long-name/' * 9
    api.reply = pieces(f'Text `code`\n```\n{"long " * 99}\n```\n' + 'x' * 999)
    ask(page, 'y' * 999)
    api.failure = 429, 'z' * 999
    ask(page)
    page.press('i', ALT)
    page.wait('document.querySelector(".tokens")')
    page.press('c', ALT)
    for width, height in ((1280, 800), (390, 844), (768, 1024), (320, 568)):
        page.resize(width, height)
        for tab in ('tab-chat', 'tab-completion'):
            page.run(f'$("{tab}").click()')
            assert page.run(CONTRASTS) == []
            assert page.run('document.documentElement.scrollWidth') <= width
            assert page.run('[...document.querySelectorAll("main > *, .scroll, #box, #send, #paper, #complete, aside")]'
                            '.filter(element => element.checkVisibility() && (element.scrollWidth > element.clientWidth '
                            '&& !element.matches("#model, #paper") || element.getBoundingClientRect().right > innerWidth))'
                            '.map(element => element.id || element.className)') == []
    background = 'getComputedStyle(document.body).backgroundColor'
    before = page.run(background)
    page.run('$("theme").click()')
    assert page.run(background) != before
    page.reload()
    assert page.run(background) != before


@pytest.mark.slow
def test_keys_alone(page, api):
    """Every button and field is reached by Tab, shows that it has the focus, and has a name."""
    api.reply = ['Hel', 'lo there!']
    ask(page)
    page.press('i', ALT)
    page.run('$("box").focus()')
    reached = set()
    for _ in range(40):
        page.press('Tab')
        name, outline = page.run('[document.activeElement.id || document.activeElement.getAttribute("aria-label") || '
                                 'document.activeElement.innerText, getComputedStyle(document.activeElement).outlineStyle]')
        reached.add(name)
        assert outline == 'solid' or page.run('document.activeElement === document.body'), name
    assert {'box', 'send', 'new-chat', 'tab-chat', 'show-controls', 'show-inspector', 'theme', 'help', 'close-inspector',
            'seen', 'Hel 60.0%', 'Copy', 'Edit', 'Try again', 'Hi', 'Rename Hi', 'Delete Hi'} <= reached
    assert page.run('''[...document.querySelectorAll('button, input, textarea, [role=region], [role=log]')].filter(element =>
        !(element.getAttribute('aria-label') || element.innerText.trim() || element.labels?.length)
        && element.checkVisibility()).length''') == 0
    assert page.run('document.querySelector("[aria-live]#spoken").innerText') == 'Hello there!'
    page.run('document.activeElement.blur()')
    page.press('?', SHIFT)
    assert 'Alt R' in page.text('#shortcuts').replace('\n', ' ') and page.run('$("shortcuts").open')
    page.press('Escape')
    page.press('/')
    assert page.run('document.activeElement.id') == 'box' and page.run('$("box").value') == ''
    page.press('r', ALT)
    page.wait('state.runs.size === 0')
    assert len(api.requests) == 2


def test_typing_works_within_300_ms_of_navigation(page, api):
    """The box has the focus, and the page's script has run, before the server says anything of models."""
    api.models_wait = 1
    page.call('Page.addScriptToEvaluateOnNewDocument',
              source='document.addEventListener("focusin", () => { window.readyAt ??= performance.now() })')
    times = []
    for _ in range(3):
        page.reload()
        page.write('x')
        assert page.run('$("box").value').endswith('x') and not page.run('Boolean(state.model)')
        times.append(page.run('Math.max(window.readyAt, performance.getEntriesByType("navigation")[0].domInteractive)'))
    assert min(times) < 300, times


@pytest.mark.slow
def test_with_the_real_server(browser, tmp_path):
    save_chat_model(tmp_path, block_size=512)
    server = Folder(tmp_path).start('serve.py', out_dir='chat', port=0, device='cpu')
    server.wait_for('Ctrl-C ends it')
    page = browser.open(re.search(r'http://\S+', server.out)[0])
    page.wait('state.model')
    page.press('i', ALT)
    ask(page, '<|im_end|> is text here')
    text, tokens = page.run('(({content, tokens}) => [content, tokens])(lastOf(state.chat.messages))')
    assert text == ''.join(token['text'] for token in tokens) and 'error' not in page.text('#messages')
    assert all(len(token['top']) == 8 and token['logprob'] < 0 for token in tokens)
    page.wait('document.querySelector("#seen .special")')
    assert page.run('[...document.querySelectorAll("#seen .special")].map(element => element.textContent)') == [
        '<|endoftext|>', '<|system|>', '<|im_end|>', '<|user|>', '<|im_end|>', '<|assistant|>']
    page.click('#tab-completion')
    page.run('$("paper").focus()')
    page.write('Once')
    page.press('Enter', CONTROL)
    page.wait(f'{IDLE} && state.completion.continuation')
    assert page.run('$("paper").value').startswith('Once') and page.complaints() == []
    page.close()
    assert server.kill(signal.SIGINT).ok()
