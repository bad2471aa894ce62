"""Drive a headless Chromium by the DevTools protocol, over a pipe: JSON that ends in NUL."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
EXECUTABLE = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
         '--disable-background-networking', '--remote-debugging-pipe')
KEYS = {'Enter': (13, '\r'), 'Escape': (27, ''), 'Tab': (9, ''), 'ArrowUp': (38, ''), 'ArrowRight': (39, '')}
ALT, CONTROL, SHIFT = 1, 2, 8


class Chromium:
    """A browser with a profile of its own."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        pipes = os.pipe(), os.pipe()
        (_, self.write), (self.read, _) = pipes
        # the browser reads from 3 and writes to 4, which the pipes themselves may be
        read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (pipes[0][0], pipes[1][1]))
        self.process = subprocess.Popen(
            ['bash', '-c', f'exec "$0" "$@" 3<&{read} 4>&{write}', EXECUTABLE, *FLAGS,
             f'--user-data-dir={self.profile.name}', 'about:blank'],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in (read, write, pipes[0][0], pipes[1][1]):
            os.close(fd)
        self.rest, self.number, self.events = b'', 0, []

    def call(self, method, session=None, **params):
        """Send a command, and return its result."""
        self.number += 1
        message = {'id': self.number, 'method': method, 'params': params}
        content = json.dumps(message | ({'sessionId': session} if session else {})).encode() + b'\0'
        while content:
            content = content[os.write(self.write, content):]
        while True:
            while b'\0' not in self.rest:
                is_ready = select.select([self.read], [], [], 60)[0]
                part = os.read(self.read, 1 << 20) if is_ready else b''
                assert part, 'the browser has ended, or hangs'
                self.rest += part
            content, _, self.rest = self.rest.partition(b'\0')
            message = json.loads(content)
            if message.get('id') == self.number:
                assert 'error' not in message, (method, message['error'])
                return message['result']
            self.events.append(message)

    def open(self, url):
        """Open a page in a context that has stored nothing."""
        context = self.call('Target.createBrowserContext')['browserContextId']
        target = self.call('Target.createTarget', url='about:blank', browserContextId=context)['targetId']
        session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        return Page(self, session, context, url)

    def close(self):
        self.call('Browser.close')
        self.process.wait(30)
        self.profile.cleanup()


class Page:
    """A page, with what a person does to it."""

    def __init__(self, browser, session, context, url):
        self.browser, self.session, self.context = browser, session, context
        for domain in ('Page', 'Runtime', 'Log'):
            self.call(f'{domain}.enable')
        self.resize(1280, 800)
        self.call('Page.navigate', url=url)
        self.wait('location.href !== "about:blank" && document.readyState === "complete"')

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def resize(self, width, height):
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)

    def emulate(self, scheme):
        self.call('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': scheme}])

    def run(self, expression):
        """Return the value of an expression in the page; a promise's value where it is one."""
        result = self.call('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in result, (expression, result['exceptionDetails'])
        return result['result'].get('value')

    def wait(self, expression, seconds=10):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f'Boolean({expression})'):
            assert time.monotonic() < end, f'never true: {expression}\n{self.text()[-2000:]}'
            time.sleep(0.01)

    def text(self, selector='body'):
        return self.run(f'document.querySelector({json.dumps(selector)})?.innerText ?? ""')

    def write(self, text):
        """Type text where the focus is."""
        self.call('Input.insertText', text=text)

    def press(self, key, modifiers=0):
        """Press a key; a letter with its code, as a keyboard has it."""
        number, text = KEYS.get(key, (ord(key[0].upper()), key))
        code = f'Key{key.upper()}' if key.isalpha() and len(key) == 1 else key
        text = '' if modifiers & (ALT | CONTROL) else text
        for kind in ('keyDown', 'keyUp'):
            self.call('Input.dispatchKeyEvent', type=kind, key=key, code=code, modifiers=modifiers, text=text,
                      windowsVirtualKeyCode=number)

    def click(self, selector):
        """Click in the middle of an element, which scrolls into view."""
        x, y = self.run(f'''(() => {{ const element = document.querySelector({json.dumps(selector)})
            element.scrollIntoView({{block: 'nearest'}})
            const box = element.getClientRects()[0]
            return [box.x + box.width / 2, box.y + box.height / 2] }})()''')
        for kind in ('mouseMoved', 'mousePressed', 'mouseReleased'):
            self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, clickCount=1,
                      button='none' if kind == 'mouseMoved' else 'left')

    def reload(self):
        self.run('window.isOld = true')
        self.call('Page.reload')
        self.wait('!window.isOld && document.readyState === "complete"')

    def complaints(self):
        """Return what the browser found wrong: exceptions, and breaches of the content security policy."""
        return [event['params'] for event in self.browser.events if event.get('sessionId') == self.session and (
            event['method'] == 'Runtime.exceptionThrown' or event['method'] == 'Log.entryAdded'
            and event['params']['entry']['source'] in ('security', 'javascript', 'violation'))]

    def close(self):
        self.browser.call('Target.disposeBrowserContext', browserContextId=self.context)
