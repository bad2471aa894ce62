"""
Define the GPT: GPT-2's architecture, and an option for each later change.

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, vocab_size=65, block_size=256))
    logits, loss = model(idx, targets)
    model = GPT.from_pretrained('gpt2-xl')  # or a folder in Hugging Face's layout, or a hub id

ops.py computes attention, dropout, GELU and cross-entropy, and chooses how by device and precision.
The parameters have GPT-2's names in every configuration. Sources: "Language Models are Unsupervised
Multitask Learners" (GPT-2, Radford et al. 2019), github.com/openai/gpt-2, and those beside options.

Shapes: B sequences, T positions, S positions with those of a KV cache, C = n_embd channels, H heads
of D channels, G heads of keys and values, V = vocab_size ids.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ops
from configurator import Count, Fraction, Natural, NonNegative, Positive, UserError, check_fields


@dataclass
class GPTConfig:
    """Describe a GPT; default: GPT-2 (124M). Raises UserError outside a field's rule."""

    block_size: Count = 1024  # longest context, tokens
    vocab_size: Count = 50304  # GPT-2's 50257 padded, see padded_vocab_size
    n_layer: Count = 12
    n_head: Count = 12
    n_embd: Count = 768
    dropout: Fraction = 0.0
    bias: bool = True  # biases in the linear layers and LayerNorms, as in GPT-2
    mlp: Literal['gelu', 'gelu_erf', 'swiglu', 'relu2'] = 'gelu'  # tanh form, as GPT-2; _erf: exact
    n_kv_head: Count | None = None  # G, a divisor of n_head; None: n_head
    head_dim: Count | None = None  # D; None: n_embd / n_head
    n_inner: Count | None = None  # channels between the two layers of an MLP; None: see mlp_width
    norm: Literal['layernorm', 'rmsnorm'] = 'layernorm'  # rmsnorm: no centring, no bias
    norm_eps: Positive = 1e-5  # added to the variance
    pos: Literal['learned', 'rope'] = 'learned'  # an embedding, or a rotation of queries and keys
    rope_base: Positive = 10000.0  # RoPE's slowest rotation takes about 2 pi rope_base positions
    rope_scaling: dict | None = None  # slows RoPE down for longer contexts, see GPT.rotation
    qk_norm: bool = False  # RMSNorm of queries and keys in each head, which bounds the scores
    qk_norm_weight: bool = False  # a weight per channel in that norm, as in Qwen3
    qkv_bias: bool | None = None  # biases of queries, keys and values, as in Qwen2; None: bias
    tie_embeddings: bool = True  # the head is the token embedding
    window: Natural = 0  # positions that the S layers of window_pattern see; 0: all
    window_pattern: str = 'S'  # S and L (all positions), repeated; the last layer is always L
    logit_softcap: NonNegative = 0.0  # c: logits become c tanh(logits / c); 0: unchanged
    zero_init: bool = False  # blocks start as the identity, an untied head with equal probabilities
    residual_lambdas: bool = False  # blocks read l0 x + l1 x0 (modded-nanogpt, record 9)
    value_embeddings: bool = False  # in the values of every other layer (record 14)
    head_gates: bool = False  # scale each head's output ("Gated Attention", Qiu et al. 2025)
    value_gates: bool = False  # scale the value embeddings likewise (modded-nanogpt, record 55)

    def __post_init__(self):
        check_fields(self)
        if self.head_dim is None and self.n_embd % self.n_head:
            multiple = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise UserError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}; '
                            f'expected, for example, {multiple}')
        if self.n_head % self.kv_heads:
            raise UserError(f'n_kv_head={self.n_kv_head}: expected a divisor of '
                            f'n_head={self.n_head}')
        if self.pos == 'rope' and self.head_size % 2:
            raise UserError(f"pos='rope' needs an even number of channels in a head, but n_embd="
                            f'{self.n_embd} and n_head={self.n_head} give {self.head_size}')
        if self.rope_scaling is not None and (
                fault := ops.fault_of_scaling(self.rope_scaling, self.pos)):
            raise UserError(fault)
        for name, needed in (('qk_norm_weight', 'qk_norm'), ('value_gates', 'value_embeddings')):
            if getattr(self, name) and not getattr(self, needed):
                raise UserError(f'{name}=True: expected {needed}=True too')
        if not self.window_pattern or set(self.window_pattern) - set('SL'):
            raise UserError(f"window_pattern={self.window_pattern!r}: expected S and L, as 'SSSL'")

    @property
    def head_size(self):
        """Return D, the channels of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self):
        """Return G, the heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self):
        """Return an MLP's inner channels; 2/3 as many for SwiGLU's three matrices."""
        swiglu_width = max(64, round(8 / 3 * self.n_embd / 64) * 64)  # 64s suit matrix units
        return self.n_inner or (swiglu_width if self.mlp == 'swiglu' else 4 * self.n_embd)

    def window_of(self, layer):
        """Return the positions that a layer's query sees, its own included; 0: all."""
        is_short = self.window_pattern[layer % len(self.window_pattern)] == 'S'
        return self.window if is_short and layer < self.n_layer - 1 else 0

    def has_value_embedding(self, layer):
        """Return whether a layer has a value embedding: every second from the last."""
        return self.value_embeddings and (self.n_layer - 1 - layer) % 2 == 0


def padded_vocab_size(n_ids):
    """Round a large vocabulary up to a multiple of 64, which matrix units need."""
    return -(-n_ids // 64) * 64 if n_ids >= 1024 else n_ids


class Context(NamedTuple):
    """Hold a block's inputs beside the residual stream, None where an option is off."""

    rotation: Tensor | None = None  # (2, T, 1, D/2) or (2, B, T, 1, D/2), RoPE's cos and sin
    value_embedding: Tensor | None = None  # (B, T, G * D), added to the values
    x0: Tensor | None = None  # (B, T, C), the embeddings
    past: tuple | None = None  # keys and values of earlier tokens, flatgpt's LayerCache
    mask: Tensor | int | None = None  # of ops.attention(); None: the block's window


def rotate(x, rotation):
    """Rotate x (B, T, heads, D) by its positions ("RoFormer", Su et al. 2021).

    Channels i and i + D/2 are a point in the plane, as in Hugging Face's Llama. It turns by the
    position times a frequency, so that query times key depends on their distance alone.
    """
    cos, sin = rotation  # (T, 1, D/2) each
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def gates(x, weight):
    """Return 2 sigmoid(W x) of x's first channels, (B, T, heads, 1); W begins as 0."""
    return 2 * torch.sigmoid(F.linear(x[..., : weight.size(1)], weight)).unsqueeze(-1)


class CausalSelfAttention(nn.Module):
    """Mix the values up to each position, weighted by query times key.

    Options: grouped queries ("GQA", Ainslie et al. 2023); window ("Longformer", Beltagy et al.
    2020); QK-norm ("Scaling Vision Transformers to 22 Billion Parameters", Dehghani et al. 2023).
    """

    def __init__(self, config, window=0, has_values=False):
        super().__init__()
        H, G, D = config.n_head, config.kv_heads, config.head_size
        self.n_head, self.n_kv_head, self.head_size = H, G, D
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.c_attn = nn.Linear(config.n_embd, (H + 2 * G) * D, bias=qkv_bias)  # q, k, v in one row
        self.c_proj = nn.Linear(H * D, config.n_embd, bias=config.bias)
        self.attn_dropout = ops.Dropout(config.dropout)
        self.resid_dropout = ops.Dropout(config.dropout)
        self.qk_norm = config.qk_norm
        self.q_norm, self.k_norm = (
            nn.RMSNorm(D, eps=config.norm_eps) if config.qk_norm_weight else None for _ in 'qk')
        self.window, n_read = window, min(12, config.n_embd)  # 12 suffice in modded-nanogpt
        self.head_gate, self.value_gate = (nn.Parameter(torch.empty(n, n_read)) if has else None
                                           for n, has in ((H, config.head_gates), (G, has_values)))

    def forward(self, x, context):
        B, T, C = x.shape
        H, G, D = self.n_head, self.n_kv_head, self.head_size
        qkv = self.c_attn(x).view(B, T, H + 2 * G, D)
        qk, v = qkv.split((H + G, G), dim=2)  # (B, T, H + G, D), (B, T, G, D)
        if self.q_norm is not None:
            q, k = qk.split((H, G), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        elif self.qk_norm:
            qk = F.rms_norm(qk, (D,), eps=1e-6)
        if context.rotation is not None:
            qk = rotate(qk, context.rotation)
        if context.value_embedding is not None:
            embedding = context.value_embedding.view(v.shape)
            if self.value_gate is not None:
                embedding = gates(x, self.value_gate) * embedding
            v = v + embedding.to(v.dtype)
        q, k = qk.to(v.dtype).split((H, G), dim=2)  # norm and rotation may be in fp32
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, D)
        if context.past is not None:
            k, v = context.past.update(k, v)  # (B, G, S, D)
        mask = self.window if context.mask is None else context.mask
        y = ops.attention(q, k, v, mask, self.attn_dropout.p if self.training else 0.0)
        y = y.transpose(1, 2)  # (B, T, H, D)
        y = y if self.head_gate is None else (y * gates(x, self.head_gate)).to(y.dtype)
        y = y.reshape(B, T, H * D)  # heads side by side
        return self.resid_dropout(self.c_proj(y))  # (B, T, C)


def swiglu(x):
    """Gate half of the channels by the rest ("GLU Variants", Shazeer 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class MLP(nn.Module):
    """Transform each position by two linear layers, wider in between."""

    def __init__(self, config):
        super().__init__()
        n_in = 2 * config.mlp_width if config.mlp == 'swiglu' else config.mlp_width
        self.c_fc = nn.Linear(config.n_embd, n_in, bias=config.bias)
        self.activation = {'gelu': ops.tanh_gelu, 'gelu_erf': F.gelu, 'swiglu': swiglu,
                           # without an exponential ("Primer", So et al. 2021)
                           'relu2': lambda x: F.relu(x).square()}[config.mlp]
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.dropout = ops.Dropout(config.dropout)

    def forward(self, x):
        x = self.activation(self.c_fc(x))  # (B, T, mlp_width)
        return self.dropout(self.c_proj(x))  # (B, T, C)


def norm_of(config):
    """Return a norm over the C channels."""
    if config.norm == 'rmsnorm':  # "Root Mean Square Layer Normalization", Zhang & Sennrich 2019
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """Communicate, then compute: attention, then MLP, add to the residual stream."""

    def __init__(self, config, layer=0):
        super().__init__()
        self.ln_1 = norm_of(config)
        self.attn = CausalSelfAttention(config, config.window_of(layer),
                                        config.value_gates and config.has_value_embedding(layer))
        self.ln_2 = norm_of(config)
        self.mlp = MLP(config)
        self.lambdas = nn.Parameter(torch.empty(2)) if config.residual_lambdas else None  # l0, l1

    def forward(self, x, context):
        if self.lambdas is not None:
            x = self.lambdas[0] * x + self.lambdas[1] * context.x0
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Predict the next token at every position."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.has_compiled_step = self.recompute = False  # flatgpt/quantize.py and train.py set them
        self.masks_documents = False  # ids carry numbers of documents, see ops.split_documents
        # in the order of the optimizer's state in nanoGPT's checkpoints
        self.transformer = nn.ModuleDict({'wte': nn.Embedding(config.vocab_size, config.n_embd)})
        if config.pos == 'learned':
            self.transformer['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer['drop'] = ops.Dropout(config.dropout)
        self.transformer['h'] = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.transformer['ln_f'] = norm_of(config)
        if config.value_embeddings:
            self.transformer['vte'] = nn.ModuleDict({
                str(i): nn.Embedding(config.vocab_size, config.kv_heads * config.head_size)
                for i in range(config.n_layer) if config.has_value_embedding(i)})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:  # "Using the Output Embedding", Press & Wolf 2017
            self.transformer.wte.weight = self.lm_head.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Initialise like GPT-2: matrices and embeddings N(0, 0.02), biases 0, norms 1."""
        for name, p in self.named_parameters():
            is_zero = self.config.zero_init and name.endswith(('c_proj.weight', 'lm_head.weight'))
            if is_zero or name.endswith(('.bias', '_gate')):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # 2 n_layer projections add up in the residual stream
                n_added = 2 * self.config.n_layer if name.endswith('c_proj.weight') else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(n_added))
            elif '.ln_' in name or name.endswith(('q_norm.weight', 'k_norm.weight')):
                nn.init.ones_(p)
            elif name.endswith('.lambdas'):
                p.copy_(torch.tensor([1.0, 0.0]))  # x alone
            else:
                raise AssertionError(f'no initialisation is written for parameter {name}')

    def rotation(self, positions):
        """Return cos and sin of RoPE's angles: positions (..., T) -> (2, ..., T, 1, D/2).

        rope_scaling slows the rotation down for longer contexts, see ops.slow_down(). YaRN also
        multiplies queries and keys by attention_factor.
        """
        half, scaling = self.config.head_size // 2, self.config.rope_scaling
        steps = torch.arange(half, device=positions.device, dtype=torch.float32) / half
        frequencies = self.config.rope_base ** -steps  # (D/2,), angles per position
        if scaling is not None:
            frequencies = ops.slow_down(frequencies, self.config.rope_base, scaling)
        angles = positions[..., None, None].float() * frequencies
        rotation = torch.stack((angles.cos(), angles.sin()))
        is_yarn = scaling is not None and scaling['rope_type'] == 'yarn'
        return scaling['attention_factor'] * rotation if is_yarn else rotation

    def hidden(self, idx, cache=None):
        """Compute all but the head: ids (B, T) -> the output of the last norm, (B, T, C)."""
        (B, T), c = idx.shape, self.config
        n = T if cache is None else cache.length + T
        if n > c.block_size:
            raise UserError(f'a context of {n} tokens is longer than block_size={c.block_size}')
        idx, documents, positions = ops.split_documents(idx, self.masks_documents)
        if cache is not None:
            positions = cache.start(B, T)  # (T,), or (B, T) behind prompts of different lengths
        masks = {w: cache.mask(T, w) if cache is not None else
                 ops.mask_in_window(w, T, c, idx.device, documents) for w in {c.window, 0}}
        rotation = self.rotation(positions) if c.pos == 'rope' else None
        x = self.transformer.wte(idx)  # (B, T, C)
        if c.pos == 'learned':
            x = x + self.transformer.wpe(positions)
        x = self.transformer.drop(x.to(self.transformer.ln_f.weight.dtype))  # wte may be in bf16
        x0 = x.clone() if c.residual_lambdas else None  # x twice would compile twice
        for layer, block in enumerate(self.transformer.h):
            vte = self.transformer.vte[str(layer)](idx) if c.has_value_embedding(layer) else None
            past = None if cache is None else cache.layer(layer, T)
            inputs = x, Context(rotation, vte, x0, past, masks[block.attn.window])
            recomputes = self.recompute and self.training  # "Sublinear Memory", Chen et al. 2016
            x = checkpoint(block, *inputs, use_reentrant=False) if recomputes else block(*inputs)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.advance(T)
        return x

    def logits(self, x):
        """Apply the head: (B, T, C) -> (B, T, V)."""
        return ops.softcapped(self.lm_head(x), self.config.logit_softcap)

    def forward(self, idx, targets=None, cache=None, return_logits=True):
        """Compute (logits, loss) of ids (B, T). Raises UserError beyond block_size.

        With targets (B, T), negative where there is none: logits (B, T, V), or None to save memory
        with return_logits=False, and the mean cross-entropy in nats, 0 if there is no target.
        Without targets: logits (B, 1, V) of the last position, and None. With a KVCache of flatgpt,
        idx continues its tokens.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.logits(x[:, -1:]), None
        if return_logits:
            logits = self.logits(x)
            return logits, ops.cross_entropy(logits, targets)
        return None, ops.head_cross_entropy(x, self.lm_head, targets, self.config.logit_softcap)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue ids (B, T) to (B, T + max_new_tokens). temperature 0: greedy."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1].float()  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                next_id = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                next_id = torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1)
            idx = torch.cat((idx, next_id), dim=1)
        return idx

    def crop_block_size(self, block_size):
        """Set the context, in place; only RoPE's can grow. Raises UserError otherwise."""
        most = self.config.block_size if self.config.pos == 'learned' else math.inf
        if not 1 <= block_size <= most:
            raise UserError(f'block_size={block_size}: expected 1 to {most} positions')
        self.config.block_size = block_size
        if self.config.pos == 'learned':
            wpe = self.transformer.wpe
            wpe.weight.data = wpe.weight.data[:block_size].clone()  # the parameter object stays
            wpe.weight.grad = None
            wpe.num_embeddings = block_size

    def get_num_params(self, non_embedding=True):
        """Count the parameters, by default without learned positions; a tied head once."""
        return sum(p.numel() for name, p in self.named_parameters()
                   if not (non_embedding and name == 'transformer.wpe.weight'))

    def flops_per_token(self):
        """Count the FLOPs of training on a token ("PaLM", Chowdhery et al. 2022, app. B).

        6 for each parameter except embeddings that are only looked up; 12 H D for each position
        that a layer sees in a full context, without a discount for causality.
        """
        c = self.config
        tables = ('wpe', 'vte') if c.tie_embeddings else ('wpe', 'vte', 'wte')
        multiplied = sum(p.numel() for name, p in self.named_parameters()
                         if name.split('.')[1] not in tables)
        seen = sum(min(c.window_of(i) or c.block_size, c.block_size) for i in range(c.n_layer))
        return 6 * multiplied + 12 * c.n_head * c.head_size * seen

    @classmethod
    def from_pretrained(cls, name, override_args=None):
        """Load 'gpt2' to 'gpt2-xl', a folder in Hugging Face's layout, or a hub id."""
        from flatgpt import huggingface  # it imports this module

        if set(override_args or {}) - {'dropout'}:
            raise UserError(f'override_args={override_args}: expected dropout alone')
        return huggingface.load_model(huggingface.find(name), **(override_args or {}))
