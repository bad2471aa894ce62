"""Draw answers from a vLLM server, which reads the policy's weights from a folder.

    server = RolloutServer.open('http://localhost:8000/v1', 'rollout-model', policy)
    server.load(policy.model)                     # write its weights; the server reads them
    answers = server.draw(prompts, sampling, u)   # as rollouts.draw_answers()

The folder is one of flatgpt.export, and the server is started with it:

    VLLM_SERVER_DEV_MODE=1 vllm serve rollout-model

Without that variable vLLM has no endpoint that reads weights again. Its numbers differ a little
from ours. Learning uses log-probabilities that our model computes for the drawn tokens.
"""

import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from configurator import UserError
from flatgpt import huggingface, runtime
from flatgpt.files import read_text, sync_folder
from tokenizer.base import temporary_name

AT_ONCE = 128  # requests; vLLM makes batches of them
SECONDS = 1800  # until an answer of the server
PAUSES = 0.5, 2, 0  # seconds after each attempt to reach the server


@dataclass
class RolloutServer:
    """Hold the address of a server, and the folder of the model that it serves."""

    url: str  # http://HOST:PORT/v1
    folder: str
    name: str  # of the model, in requests
    hf: dict  # the folder's config.json
    tokenizer: dict  # describes the policy's
    no_ids: range  # ids of the model that are none of the tokenizer

    @classmethod
    def open(cls, url, folder, policy):
        """Find the server, and check that its folder holds a model of the policy's sizes."""
        if not url.startswith(('http://', 'https://')):
            raise UserError(f'rollout_server={url!r}: expected an address such as '
                            f'http://localhost:8000/v1')
        if not os.path.isfile(os.path.join(folder, 'config.json')):
            raise UserError(f'rollout_folder={folder!r} has no config.json; expected the folder '
                            f'that the server was started with: python -m flatgpt.export '
                            f'--out_dir=ITS_RUN --out={folder}')
        hf = json.loads(read_text(os.path.join(folder, 'config.json')))
        no_ids = range(policy.tokenizer.vocab_size, policy.model.config.vocab_size)
        server = cls(url.rstrip('/'), folder, '', hf, policy.tokenizer.to_dict(), no_ids)
        server.check(policy.model)
        server.name = server.ask('/models')['data'][0]['id']
        return server

    def check(self, model):
        """Raise UserError if the folder's config.json is not the model's.

        Biases that were 0, as in Llama's layout, may have become others.
        """
        for key, value in huggingface.config_json(model, self.tokenizer).items():
            if self.hf.get(key) != value and not key.endswith(('_pdrop', '_dropout')):
                raise UserError(f'rollout_folder={self.folder!r} has {key}={self.hf.get(key)!r}, '
                                f'and the policy {value!r}; expected a folder of the policy: '
                                f'python -m flatgpt.export --out_dir=ITS_RUN --out=FOLDER')

    def load(self, model):
        """Write a model's weights to the folder, and let the server read them."""
        self.check(model)
        temporary = temporary_name(self.folder.rstrip('/'))
        dtype = runtime.DTYPES[self.hf.get('torch_dtype') or 'float32']
        try:
            os.makedirs(temporary)
            shutil.copy(os.path.join(self.folder, 'config.json'), temporary)
            huggingface.write_tensors(huggingface.tensors_of(model, self.hf), temporary, dtype)
            for name in os.listdir(temporary):
                os.replace(os.path.join(temporary, name), os.path.join(self.folder, name))
            sync_folder(self.folder)
        except OSError as error:
            raise UserError(f'rollout_folder={self.folder!r} cannot be written: {error}; free some '
                            f'space and resume') from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.ask('/collective_rpc', {'method': 'reload_weights'})
        self.ask('/reset_prefix_cache', {})  # keys and values of the former weights

    def draw(self, prompts, sampling, u):
        """Draw an answer to each prompt; -> lists of ids, as rollouts.draw_answers().

        u: (n, max_new_tokens), fixes the seed of each answer.
        """
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda prompt, row: self.draw_one(prompt, sampling, row),
                                 prompts, u))

    def draw_one(self, prompt, sampling, row):
        """Draw the ids of an answer, up to and including a stop id. row: of u."""
        digest = hashlib.sha256(row.numpy().tobytes()).digest()
        answer = self.ask('/completions', {
            'model': self.name, 'prompt': prompt, 'max_tokens': sampling.max_new_tokens,
            'temperature': sampling.temperature, 'seed': int.from_bytes(digest[:7]),
            'stop_token_ids': sorted(sampling.stop_ids), 'ignore_eos': True,
            'top_p': 1.0, 'top_k': 0, 'min_p': 0.0, 'repetition_penalty': 1.0,  # not the server's
            'logit_bias': {str(i): -100.0 for i in self.no_ids}, 'return_token_ids': True})
        ids = answer['choices'][0].get('token_ids')
        if not ids or max(ids) >= self.no_ids.start or len(ids) > sampling.max_new_tokens:
            raise UserError(f'{self.url} returned token_ids={str(ids)[:40]}, expected 1 to '
                            f'{sampling.max_new_tokens} ids below {self.no_ids.start}; it needs a '
                            f'vLLM that has return_token_ids, and the tokenizer of the policy')
        return ids

    def ask(self, path, body=None):
        """Send a request, POST with a body, and return the JSON of the answer, or None."""
        # what is not OpenAI's has no /v1
        base = self.url if path in ('/models', '/completions') else self.url.removesuffix('/v1')
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(base + path, data, {'Content-Type': 'application/json'})
        for pause in PAUSES:
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                    content = answer.read()
                return json.loads(content) if content else None
            except urllib.error.HTTPError as error:
                remedy = ('; start it with VLLM_SERVER_DEV_MODE=1' if error.code == 404
                          and base != self.url else '')
                reason = error.read(300).decode(errors='replace')
                raise UserError(f'{base}{path} answers {error.code} {error.reason}: {reason}'
                                f'{remedy}') from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = getattr(error, 'reason', None) or error
            time.sleep(pause)
        raise UserError(f'{base}{path} gives no answer ({why}); start the server: '
                        f'VLLM_SERVER_DEV_MODE=1 vllm serve {self.folder}')
