"""
Serve a model: a chat page in the browser, and an API in OpenAI's shapes.

    $ python serve.py --out_dir=out-sft
    $ python serve.py --init_from=FOLDER --port=8080
    $ python serve.py --out_dir=out-sft --host=0.0.0.0 --api_key=FILE:key.txt

The page is at http://127.0.0.1:8000, the API at /v1. It answers several people at
once, up to a small group. For many users export the model and serve it with vLLM
(README). Ctrl-C ends it. Needs the extra '.[serve]'.
"""

import gc
import os
import socket
import sys
import threading
import time
from typing import Annotated, Literal

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out

from configurator import Count, Natural, Positive, Probability, Range, UserError, override
from flatgpt import decoding, output, pretrained
from flatgpt.files import read_text
from posttrain.tools import check_tokenizer, toolbox
from serving.engine import Engine, Limits
from serving.pool import bytes_of

output.protect(drop=True)

# settings -----------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume': out_dir; or 'gpt2' to 'gpt2-xl', a Hugging Face folder, a hub id
out_dir = 'out'  # folder of train.py's ckpt.pt and best.pt
which: Literal['best', 'last'] | Count = 'best'  # best.pt if there is one; ckpt.pt; ckpt-STEP.pt
name = ''  # id of the model in the API; '': the name of its folder
tools = 'calculator'  # that it runs for models with calls: calculator,python; '': none
# network
host = '127.0.0.1'  # '0.0.0.0': other machines reach it too
port: Annotated[int, Range(least=0, most=65535)] = 8000  # 0: a free one
api_key = ''  # what clients send as "Authorization: Bearer KEY"; FILE:path of a file; '': none
# limits
max_streams: Count = 16  # answers that run at once; others wait
cache_gb: Positive = 1.0  # memory for their keys and values; may lower max_streams
context: Natural = 0  # tokens of a prompt and its answer; 0: the model's, if four fit in cache_gb
max_queue: Natural = 64  # answers that wait; more are refused (429)
max_seconds: Positive = 600.0  # of an answer; then it ends where it is
guardrail = ''  # FOLDER:LABEL of posttrain.classify: refuse requests and answers of this label
guardrail_max: Probability = 0.5  # greatest probability of the label that passes
# machine
device = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
compile: bool | Literal['auto'] = 'auto'  # compile the code of a step; takes some seconds
config = override(globals())
# --------------------------------------------------------------------------------------------------

try:
    import uvicorn

    from serving.app import Guard, make_app
    from serving.connection import Connection
    from serving.guardrail import Guardrail
    from serving.protocol import Served
except ImportError as error:
    raise UserError(f'{error.name} is not installed: pip install -c constraints.txt -e '
                    f"'.[serve]'") from None

# open the socket, which may fail, before the model
try:
    # asyncio sends small parts at once (TCP_NODELAY) only where the protocol is named
    listener = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET,
                             socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
except OSError as error:
    raise UserError(f'{host}:{port} cannot be used: {error.strerror}; expected another --port, '
                    f'such as {port + 1}') from None

# open the model
model, tokenizer, template, line = pretrained.open_model(init_from, out_dir, which)
toolbox(tools)  # refuses one that cannot run here
if 'tools' in config.given and tools:
    check_tokenizer(tokenizer)
decoding.prepare(model, {**config, 'quantize': ''}, rows=None)


def limits_of(model):
    """Return the Limits: the context and the number of rows that cache_gb holds."""
    # tokens of the cache
    most = int(cache_gb * 1e9 / bytes_of(model.config, 1, model.lm_head.weight.dtype))
    block_size = model.config.block_size
    n = context or min(block_size, most // 4)
    if n > min(block_size, most):
        raise UserError(f'context={context}: expected at most {min(block_size, most):,}, which the '
                        f'model and --cache_gb={cache_gb} hold')
    if n < 2:  # a token of the prompt, and one of the answer
        raise UserError(f'cache_gb={cache_gb}: it holds {most:,} tokens; expected more')
    return Limits(min(max_streams, most // n), n, max_queue)


limits = limits_of(model)
engine = Engine(model, tokenizer, limits)
filter_of_texts = Guardrail(guardrail, guardrail_max, engine) if guardrail else None
if model.has_compiled_step:
    print('compiling the step of one token (--compile=False starts at once)', flush=True)
engine.warm_up()
folder = out_dir if init_from == 'resume' else init_from
served = Served(name or os.path.basename(os.path.abspath(folder)), tokenizer, template,
                limits.context, model.config.vocab_size, max_seconds, tools)
key = read_text(api_key.removeprefix('FILE:')).strip() if api_key.startswith('FILE:') else api_key
if api_key and not key:
    raise UserError(f'{api_key} is empty; expected the API key in it')

gc.freeze()  # else each collection visits all that torch has loaded, 0.3 s for a large body
# serve from a second thread: the model stays with the thread that loaded it
app = make_app(engine, served, Guard({host.lower(), socket.gethostname().lower()}, key),
               filter_of_texts)
server = uvicorn.Server(uvicorn.Config(
    app, http=Connection, log_level='error', access_log=False, server_header=False, ws='none',
    timeout_graceful_shutdown=1))
thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
thread.start()
while thread.is_alive() and not server.started:
    time.sleep(0.01)
shown = f'[{host}]' if ':' in host else host
print(line)
print(f'{limits.max_streams} streams of {limits.context:,} tokens, '
      f'{sum(part.nbytes for part in (engine.pool.k, engine.pool.v)) / 1e6:,.0f} MB of cache')
if host not in ('127.0.0.1', '::1', 'localhost'):
    print(f'WARNING: other machines can reach this server{"" if key else " without an --api_key"}, '
          f'and what they send is not encrypted')
print(f'http://{shown}:{listener.getsockname()[1]}  (Ctrl-C ends it)', flush=True)
try:
    engine.run()
except KeyboardInterrupt:
    engine.stop()
    server.should_exit = True
    thread.join(3)
    print('\nstopped by Ctrl-C')
