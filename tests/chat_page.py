"""What a person does on the chat page: ask, press a button, read."""

import json

IDLE = 'state.runs.size === 0 && !document.querySelector(".waiting")'
ANSWERS = '[...document.querySelectorAll(".assistant .content")].map(element => element.innerText.trim())'


def ask(page, text='Hi', is_awaited=True):
    page.run('$("box").focus()')
    page.write(text)
    page.press('Enter')
    if is_awaited:
        page.wait(IDLE)


def press_button(page, label, scope='document'):
    assert page.run(f'''(() => {{ const button = [...{scope}.querySelectorAll('button')].findLast(
        button => button.checkVisibility() && (button.getAttribute('aria-label') ?? button.textContent).startsWith({json.dumps(label)}))
        button?.click()
        return Boolean(button) }})()'''), f'no button {label}'


def contents(request):
    return [(message['role'], message['content']) for message in request['messages']]
