"""
From logits to text: draw the next token, and the one after it, from a cache of what was computed already.
"""

import codecs

import torch
from torch.nn import functional as F

from model import KVCache


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """
    logits (B, V) -> one id for each row, (B, 1).

    temperature divides the logits; 0 takes the likeliest id. top_k keeps the k likeliest ids, top_p the smallest set of
    likeliest ids that holds probability p ("The Curious Case of Neural Text Degeneration", Holtzman et al. 2020).
    """
    logits = logits.float()
    if temperature < 1e-30:  # 0, or so small that dividing overflows float32 and the likeliest has all probability
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, ids = logits.sort(descending=True)
        before = F.softmax(ordered, dim=-1).cumsum(-1) - F.softmax(ordered, dim=-1)  # probability of all likelier ids
        logits = logits.masked_fill((before >= top_p).scatter(-1, ids, before >= top_p), -torch.inf)
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1, generator=generator)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None, generator=None,
             cache_dtype=None):
    """
    Continue the prompts idx (B, T), T >= 1, of one length; yield the ids of each new position, (B, 1), as they come.

    vocab_size: ids from there on, the padding of the embedding, are never drawn. Up to block_size tokens each costs one
    position; beyond, the context slides and costs a whole forward pass, because learned positions change with it.
    """
    block_size = model.config.block_size
    length = min(block_size, idx.size(1) + max_new_tokens)
    cache = KVCache(model.config, len(idx), idx.device, cache_dtype or model.lm_head.weight.dtype, length)
    new = idx[:, -block_size:]  # what the cache has not seen
    # torch.multinomial on mps can draw ids of probability zero (pytorch issue 192577), so the CPU draws for it
    draw_on = 'cpu' if idx.device.type == 'mps' else idx.device
    for _ in range(max_new_tokens):
        if cache.length < block_size:
            logits = model(new, cache=cache)[0]
        else:
            logits = model(idx[:, -block_size:])[0]
        next_id = sample_next(logits[:, -1, :vocab_size].to(draw_on), temperature, top_k, top_p, generator)
        new = next_id.to(idx.device)
        yield new
        idx = torch.cat((idx, new), dim=1)


def generate_texts(model, tokenizer, prompt, num_samples, max_new_tokens, stop='', seed=1337, **controls):
    """
    Sample num_samples continuations of the text `prompt` as one batch. After every token yield (texts, done): what each
    has so far, in whole characters, and whether it has met the text `stop`, which it then ends before.

    controls: temperature, top_k, top_p and cache_dtype of generate(). A special token such as <|endoftext|> in the
    prompt is that token, since whoever asks wrote the prompt himself. Raises ValueError for an empty prompt or one the
    tokenizer can't encode.
    """
    ids = tokenizer.encode(prompt, allowed_special='all')
    if not ids:
        raise ValueError('the prompt is empty, and the model continues at least one token; try --start="The"')
    device = model.lm_head.weight.device
    generator = torch.Generator('cpu' if device.type == 'mps' else device).manual_seed(seed)
    idx = torch.tensor(ids, device=device).expand(num_samples, -1)
    decoders = [codecs.getincrementaldecoder('utf-8')('replace') for _ in range(num_samples)]
    texts, done = [''] * num_samples, [False] * num_samples
    for next_id in generate(model, idx, max_new_tokens, vocab_size=tokenizer.vocab_size, generator=generator,
                            **controls):
        for row, token in enumerate(next_id[:, 0].tolist()):
            if not done[row]:
                texts[row] += decoders[row].decode(tokenizer.decode_bytes([token]))
                done[row] = stop != '' and stop in texts[row]
                texts[row] = texts[row].split(stop)[0] if done[row] else texts[row]
        yield texts, done
        if all(done):
            return
