"""
The GPT: GPT-2's architecture under GPT-2's parameter names, so that its checkpoints load without renaming; and, each
by a field of GPTConfig, what later models changed about it.

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, vocab_size=65, block_size=256))
    model = GPT(GPTConfig(**{**PRESETS['llama'], 'n_layer': 6, 'n_head': 6, 'n_kv_head': 2, 'n_embd': 384}))
    logits, loss = model(idx, targets)            # train
    model = GPT.from_pretrained('gpt2-xl')        # or a folder in Hugging Face's layout

Shapes: B sequences, T positions, C = n_embd channels, H = n_head heads of D = C / H channels, G = n_kv_head heads of
keys and values, V = vocab_size ids.

Sources: "Language Models are Unsupervised Multitask Learners" (GPT-2, Radford et al. 2019) and its released code
(github.com/openai/gpt-2, src/model.py) for the architecture and the initialisation; an option's is beside it.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from configurator import UserError
from ops import CHUNK, GELU, SHORT, ChunkedCrossEntropy, Dropout, softcapped, visible, window_mask

# kinds of GPTConfig.rope_scaling, and the numbers that each needs
ROPE_SCALINGS = {'linear': ('factor',), 'llama3': ('factor', 'low_freq_factor', 'high_freq_factor',
                                                   'original_max_position_embeddings')}


@dataclass
class GPTConfig:
    """What the network is. The defaults are GPT-2 (124M). Raises ValueError naming the field that can't be."""

    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # GPT-2's 50257 padded, see padded_vocab_size()
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in the linear layers and LayerNorms, as GPT-2 has them
    mlp: str = 'gelu'  # 'gelu': tanh approximation, GPT-2's; 'gelu_erf': exact, nanoGPT's; 'swiglu', 'relu2': see below
    n_kv_head: int | None = None  # heads of keys and values, each shared by n_head / n_kv_head queries; None: n_head
    head_dim: int | None = None  # channels of a head; None: n_embd / n_head
    n_inner: int | None = None  # channels between the MLP's two layers; None: see mlp_width
    norm: str = 'layernorm'  # or 'rmsnorm', which neither centres nor has a bias
    norm_eps: float = 1e-5  # added to the variance
    pos: str = 'learned'  # 'learned': an embedding of the position; 'rope': queries and keys are rotated by it
    rope_base: float = 10000.0  # the slowest of RoPE's rotations takes about 2 pi rope_base positions
    rope_scaling: dict | None = None  # stretches the rotations to longer contexts, see GPT.rope_frequencies()
    qk_norm: bool = False  # RMS norm of queries and keys in each head, so that the scores can't grow without bound
    qk_norm_weight: bool = False  # with a weight for each of its channels, as Qwen3 has it
    qkv_bias: bool | None = None  # biases of queries, keys and values, which Qwen2 alone has; None: as bias says
    tie_embeddings: bool = True  # the head is the token embedding
    window: int = 0  # positions that the S layers of window_pattern see, themselves included; 0: all of the context
    window_pattern: str = 'S'  # S and L (all of the context), repeated over the layers; the last layer is always L
    logit_softcap: float = 0.0  # c: logits are c tanh(logits / c); 0: as they are
    zero_init: bool = False  # blocks start as the identity, and an untied head with equal probabilities
    residual_lambdas: bool = False  # a block reads l0 x + l1 x0, x0 being the embeddings; l0 and l1 are learnt
    value_embeddings: bool = False  # every other layer adds an embedding of the token to its values

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            is_kind = isinstance(value, kind | int if kind is float else kind)
            if not is_kind or (isinstance(value, bool) and kind not in (bool, bool | None)):
                raise UserError(f'{field.name}={value!r}: expected {getattr(kind, "__name__", kind)}')
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) is None or getattr(self, name) < 1:
                raise UserError(f'{name}={getattr(self, name)}: expected 1 or more')
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}; the nearest n_embd that '
                             f'is: {max(1, round(self.n_embd / self.n_head)) * self.n_head}')
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            divisors = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            raise UserError(f'n_kv_head={self.n_kv_head}: expected a divisor of n_head={self.n_head}: '
                             f'{", ".join(map(str, divisors))}; or None for n_head')
        for name in ('head_dim', 'n_inner'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f'{name}={getattr(self, name)}: expected 1 or more, or None')
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f'dropout={self.dropout}: expected a probability, 0 <= dropout < 1')
        for name, choices in (('mlp', ('gelu', 'gelu_erf', 'swiglu', 'relu2')), ('norm', ('layernorm', 'rmsnorm')),
                              ('pos', ('learned', 'rope'))):
            if getattr(self, name) not in choices:
                raise UserError(f'{name}={getattr(self, name)!r}: expected {" or ".join(map(repr, choices))}')
        if self.pos == 'rope' and self.head_size % 2:
            made_of = f'head_dim={self.head_dim}' if self.head_dim else f'n_embd={self.n_embd} / n_head={self.n_head}'
            raise UserError(f"pos='rope' rotates pairs of channels, but {made_of} makes heads of {self.head_size}; "
                             f'expected an even number')
        if not self.rope_base > 1:
            raise UserError(f'rope_base={self.rope_base}: expected more than 1, usually 10000')
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get('rope_type')
            needed = ROPE_SCALINGS.get(kind) if isinstance(kind, str) else None
            if self.pos != 'rope' or needed is None:
                raise UserError(f"rope_scaling={self.rope_scaling}: expected pos='rope', and a rope_type of "
                                 f'{" or ".join(map(repr, ROPE_SCALINGS))}')
            for name in needed:
                value = self.rope_scaling.get(name)
                if not isinstance(value, int | float) or not value > 0:
                    raise UserError(f'rope_scaling={self.rope_scaling}: {name} is {value!r}, expected a number above '
                                     f'0; {kind!r} needs {", ".join(needed)}')
        if not self.norm_eps > 0:
            raise UserError(f'norm_eps={self.norm_eps}: expected more than 0, usually 1e-5 or 1e-6')
        if self.qk_norm_weight and not self.qk_norm:
            raise UserError('qk_norm_weight=True: expected qk_norm=True, whose weights they are')
        if self.window < 0:
            raise UserError(f'window={self.window}: expected a number of positions, or 0 for all')
        if not self.window_pattern or set(self.window_pattern) - set('SL'):
            raise UserError(f"window_pattern={self.window_pattern!r}: expected letters S and L, such as 'SSSL'")
        if not 0 <= self.logit_softcap < math.inf:
            raise UserError(f'logit_softcap={self.logit_softcap}: expected 0 or more')

    @property
    def head_size(self):
        """D, channels of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self):
        """G, heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self):
        """
        Channels between the MLP's two layers. SwiGLU has three matrices where the others have two, so to cost about as
        much it is 2/3 as wide, rounded to a multiple of 64, which matrix units like.
        """
        usual = max(64, round(8 / 3 * self.n_embd / 64) * 64) if self.mlp == 'swiglu' else 4 * self.n_embd
        return self.n_inner or usual

    def window_of(self, layer):
        """How many positions a layer sees, the query's own included; 0: all before it."""
        is_short = self.window_pattern[layer % len(self.window_pattern)] == 'S' and layer < self.n_layer - 1
        return self.window if is_short else 0

    def has_value_embedding(self, layer):
        """Every other layer, counted from the last."""
        return self.value_embeddings and (self.n_layer - 1 - layer) % 2 == 0


def padded_vocab_size(n_ids):
    """How many ids a model has for n_ids of a large vocabulary: a multiple of 64, so that the head's product tiles."""
    return -(-n_ids // 64) * 64 if n_ids >= 1024 else n_ids


def rotate(x, rotation):
    """
    RoPE ("RoFormer", Su et al. 2021): channels i and i + D/2 of x (B, T, heads, D) are a point in the plane, rotated by
    its position times a frequency of its own; rotation: cos and sin of these angles, (2, T, 1, D/2). The product of a
    query and a key then depends on their distance alone. The pairing is Llama's in Hugging Face's layout.
    """
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class CausalSelfAttention(nn.Module):
    """
    Multi-head attention of each position to itself and the positions before it. Options: grouped queries ("GQA",
    Ainslie et al. 2023), a sliding window ("Longformer", Beltagy et al. 2020), QK-norm ("Scaling Vision Transformers to
    22 Billion Parameters", Dehghani et al. 2023; without weights scores stay within the root of D).
    """

    def __init__(self, config, window=0):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = config.n_head, config.kv_heads, config.head_size
        n_out = (self.n_head + 2 * self.n_kv_head) * self.head_size
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.c_attn = nn.Linear(config.n_embd, n_out, bias=qkv_bias)  # heads of q, of k, of v, side by side
        self.c_proj = nn.Linear(self.n_head * self.head_size, config.n_embd, bias=config.bias)
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)
        self.qk_norm = config.qk_norm
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_size, eps=config.norm_eps) if config.qk_norm_weight else None
                                    for _ in range(2))
        self.window = window

    def forward(self, x, past=None, rotation=None, value_embedding=None, window_blocks=None):
        """
        x: (B, T, C). past: (k, v, slots, mask), of this layer's cache the slots so far and new, to the T of which given
        by `slots` the new positions are written; mask: KVCache.mask(). rotation: of the T positions, see rotate().
        value_embedding: (B, T, G * D), added to the values. window_blocks: GPT's.
        """
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_size)
        qk, v = heads.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        if self.q_norm is not None:
            q, k = qk.split((self.n_head, self.n_kv_head), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        elif self.qk_norm:
            qk = F.rms_norm(qk, (self.head_size,), eps=1e-6)
        if rotation is not None:
            qk = rotate(qk, rotation)
        if value_embedding is not None:
            v = v + value_embedding.view(v.shape).to(v.dtype)
        qk = qk.to(v.dtype)  # norm and rotation may be in fp32
        q, k = qk.split((self.n_head, self.n_kv_head), dim=2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        mask = None
        if past is not None:
            past_k, past_v, slots, mask = past
            past_k.index_copy_(2, slots, k.to(past_k.dtype))
            past_v.index_copy_(2, slots, v.to(past_v.dtype))
            q, k, v = q.to(past_k.dtype), past_k, past_v  # (B, G, S, D)
        seen = min(T, self.window or T)
        in_blocks = past is None and x.device.type == 'cpu' and torch.compiler.is_compiling()
        if in_blocks and (seen <= 512 or self.attn_dropout.p > 0):
            y = self.attend_in_blocks(q, k, v)
        elif seen < T and window_blocks is not None:
            y = flex_attention(q, k, v, block_mask=window_blocks, enable_gqa=self.n_kv_head < self.n_head)
        elif past is not None and T == 1 and x.device.type == 'cpu':
            y = self.attend_once(q, k, v, mask)
        else:
            y = self.attend(q, k, v, mask)
        y = y.to(heads.dtype).transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D), heads side by side again
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q, k, v, mask=None):
        """
        Attention by torch's kernels; -> (B, H, T, D). The queries are at the last T of S positions and see the keys up
        to their own, from the window on; or what mask (B or 1, 1, T, S) says.
        """
        T = q.size(2)
        if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and T <= SHORT:  # without gradients too: the same
            with torch.autocast('cpu', enabled=False):
                return self.attend(q.float(), k.float(), v.float(), mask)
        if self.window and mask is None:  # what none of the queries sees need not be read
            k, v = k[:, :, -(T + self.window - 1) :], v[:, :, -(T + self.window - 1) :]
        S = k.size(2)
        # is_causal lets query t see the keys up to t: right without a past. Otherwise a mask says what it sees; a
        # single query sees everything
        is_causal = mask is None and T == S and (not self.window or T <= self.window)
        if mask is None and T > 1 and not is_causal:
            positions = torch.arange(S, device=q.device)
            mask = visible(positions[-T:, None], positions, self.window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal,
                                              dropout_p=self.attn_dropout.p if self.training else 0.0,
                                              enable_gqa=self.n_kv_head < self.n_head)

    def attend_once(self, q, k, v, mask):
        """
        Attention of one query, q (B, H, 1, D), to the slots of mask, written out: what torch has for that on the CPU
        takes several times as long in bf16 (bench/results). -> (B, H, 1, D)
        """
        q = q.unflatten(1, (self.n_kv_head, -1)).squeeze(3)  # (B, G, H / G, D): those that share a head of keys
        if torch.compiler.is_compiling():  # a pass over the keys and one over the values
            scores = (q.unsqueeze(3).float() * k.unsqueeze(2).float()).sum(-1)
        else:
            scores = (q @ k.transpose(2, 3)).float()  # (B, G, H / G, S)
        weights = (scores * self.head_size**-0.5).masked_fill(~mask, -math.inf).softmax(dim=-1)
        if torch.compiler.is_compiling():
            y = (weights.unsqueeze(4) * v.unsqueeze(2).float()).sum(3)
        else:
            y = weights.to(v.dtype) @ v
        return y.flatten(1, 2).unsqueeze(2)

    def attend_in_blocks(self, q, k, v):
        """
        Causal attention written out, for blocks of queries that skip the keys after them, and those before the window.
        Compiled for the CPU its forward and backward take about half the time of torch's flash kernel there up to 512
        positions (bench/results), and of what torch has instead with dropout. It keeps half of the (B, H, T, T) weights
        for the backward pass, which beyond that no longer fit into the cache.
        """
        T, D = q.shape[2:]
        y, start = [], 0
        for q_block in q.split(max(64, T // 8), dim=2):
            n = q_block.size(2)
            first, end = max(0, start - self.window + 1) if self.window else 0, start + n
            keys, values = k[:, :, first:end], v[:, :, first:end]
            # the queries that share a head of keys are rows of one product
            rows = q_block.unflatten(1, (self.n_kv_head, -1)).flatten(2, 3)  # (B, G, H / G * n, D)
            weights = (rows @ keys.transpose(2, 3)).float().unflatten(2, (-1, n)) * D**-0.5  # (B, G, H / G, n, keys)
            positions = torch.arange(first, end, device=q.device)
            hidden = ~visible(positions[-n:, None], positions, self.window)
            weights = self.attn_dropout(weights.masked_fill(hidden, -math.inf).softmax(dim=-1))
            mixed = weights.to(v.dtype).flatten(2, 3) @ values
            y.append(mixed.unflatten(2, (-1, n)).flatten(1, 2))  # (B, H, n, D)
            start = end
        return torch.cat(y, dim=2)


class SwiGLU(nn.Module):
    """silu(gate) * up, of the two halves of what c_fc gives ("GLU Variants Improve Transformer", Shazeer 2020)."""

    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class SquaredReLU(nn.Module):
    """relu(x)^2: no exponential to compute ("Primer", So et al. 2021)."""

    def forward(self, x):
        return F.relu(x).square()


class MLP(nn.Module):
    """Two linear layers, wider in between."""

    def __init__(self, config):
        super().__init__()
        n_in = 2 * config.mlp_width if config.mlp == 'swiglu' else config.mlp_width
        self.c_fc = nn.Linear(config.n_embd, n_in, bias=config.bias)
        self.activation = {'gelu': GELU(approximate='tanh'), 'gelu_erf': GELU(), 'swiglu': SwiGLU(),
                           'relu2': SquaredReLU()}[config.mlp]
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


def norm_of(config):
    """A norm over the channels. RMSNorm: "Root Mean Square Layer Normalization", Zhang & Sennrich 2019."""
    if config.norm == 'rmsnorm':
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """Communicate, then compute; each adds to the residual stream what it reads off its norm."""

    def __init__(self, config, layer=0):
        super().__init__()
        self.ln_1 = norm_of(config)
        self.attn = CausalSelfAttention(config, config.window_of(layer))
        self.ln_2 = norm_of(config)
        self.mlp = MLP(config)
        # of the stream and of the embeddings, x0 (github.com/KellerJordan/modded-nanogpt, record 9)
        self.lambdas = nn.Parameter(torch.empty(2)) if config.residual_lambdas else None

    def forward(self, x, past=None, rotation=None, value_embedding=None, x0=None, window_blocks=None):
        if self.lambdas is not None:
            x = self.lambdas[0] * x + self.lambdas[1] * x0
        x = x + self.attn(self.ln_1(x), past, rotation, value_embedding, window_blocks)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    has_compiled_step = False  # quantize.for_decoding() sets it

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({'wte': nn.Embedding(config.vocab_size, config.n_embd)})
        if config.pos == 'learned':  # in GPT-2's order, which is that of the optimizer's state in nanoGPT's checkpoints
            self.transformer['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer['drop'] = Dropout(config.dropout)
        self.transformer['h'] = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.transformer['ln_f'] = norm_of(config)
        if config.value_embeddings:  # modded-nanogpt, record 14
            self.transformer['vte'] = nn.ModuleDict({
                str(layer): nn.Embedding(config.vocab_size, config.kv_heads * config.head_size)
                for layer in range(config.n_layer) if config.has_value_embedding(layer)})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:  # "Using the Output Embedding", Press & Wolf 2017
            self.transformer.wte.weight = self.lm_head.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        GPT-2's: matrices and embeddings N(0, 0.02), biases 0, norms 1. Projections back into the residual stream are
        scaled by 1 / sqrt(2 * n_layer), because that many of them add up there. With zero_init they, and an untied
        head, are 0.
        """
        for name, p in self.named_parameters():
            if self.config.zero_init and name.endswith(('c_proj.weight', 'lm_head.weight')):
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('.bias'):
                nn.init.zeros_(p)
            elif '.ln_' in name or name.endswith(('q_norm.weight', 'k_norm.weight')):
                nn.init.ones_(p)
            elif name.endswith('.lambdas'):
                p.copy_(torch.tensor([1.0, 0.0]))  # the stream as it comes
            else:
                raise AssertionError(f'no initialisation is written for parameter {name}')

    def rotation(self, positions):
        """cos and sin, (2, ..., T, 1, D/2), of RoPE's angles at the positions (..., T)."""
        angles = positions[..., None, None].float() * self.rope_frequencies(positions.device)
        return torch.stack((angles.cos(), angles.sin()))

    def rope_frequencies(self, device):
        """
        By how much a position turns each of a head's D/2 points: rope_base^(-2i/D). rope_scaling slows them down, so
        that a model of a short context reads a longer one: 'linear' divides all by `factor` ("Extending Context Window
        of Large Language Models via Position Interpolation", Chen et al. 2023); 'llama3' those whose wavelength is
        above original_max_position_embeddings / low_freq_factor, leaves those below .../ high_freq_factor, and goes
        from one to the other in between ("The Llama 3 Herd of Models", 2024, and its released code).
        """
        half, scaling = self.config.head_size // 2, self.config.rope_scaling
        frequencies = self.config.rope_base ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
        if scaling is None:
            return frequencies
        slowed = frequencies / scaling['factor']
        if scaling['rope_type'] == 'linear':
            return slowed
        low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
        turns = scaling['original_max_position_embeddings'] * frequencies / (2 * math.pi)  # in the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * slowed

    def window_blocks(self, T, device):
        """
        FlexAttention's map of which blocks of queries see which blocks of keys in the layers with a window, so that its
        kernel skips the others ("Flex Attention", Dong et al. 2024); a mask of all pairs costs as much as to attend to
        all. None where there is no such kernel: uncompiled, on the CPU, with dropout, for odd sizes of heads.
        """
        c = self.config
        has_kernel = device.type == 'cuda' and torch.compiler.is_compiling() and c.head_size in (16, 32, 64, 128, 256)
        if not has_kernel or not 0 < c.window < T or (self.training and c.dropout > 0):
            return None
        return create_block_mask(window_mask(c.window), None, None, T, T, device)

    def hidden(self, idx, cache=None, window_blocks=None):
        """
        All but the head: ids (B, T) -> what the last norm gives for each, (B, T, C). With a KVCache, idx continues the
        tokens in it. window_blocks: the method of that name, for T, or None. Raises ValueError when the context would
        exceed block_size.
        """
        B, T = idx.shape
        start = 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            raise UserError(f'a context of {start + T} tokens is longer than block_size={self.config.block_size}')
        positions, masks = torch.arange(T, device=idx.device), {}
        if cache is not None:
            cache.make_room(B, T)
            slots = positions = cache.next_slot + positions
            S = cache.k.size(3) if T == 1 else start + T
            masks = {window: cache.mask(T, window) for window in {self.config.window, 0}}
            if cache.padding is not None:
                positions = (slots - cache.padding[:, None]).clamp(min=0)  # (B, T)
        x, rotation = self.transformer.wte(idx), None  # (B, T, C)
        if self.config.pos == 'learned':
            wpe = self.transformer.wpe
            x = x + (wpe.weight[:T] if cache is None else wpe(positions))
        else:
            rotation = self.rotation(positions)
        x = x.to(self.transformer.ln_f.weight.dtype)  # the residual stream is as precise as the norms
        x = self.transformer.drop(x)
        x0 = x.clone() if self.config.residual_lambdas else None  # aliases would be compiled for separately
        for layer, block in enumerate(self.transformer.h):
            past, value_embedding = None, None
            if cache is not None:
                past = cache.k[layer, :, :, :S], cache.v[layer, :, :, :S], slots, masks[block.attn.window]
            if self.config.has_value_embedding(layer):
                value_embedding = self.transformer.vte[str(layer)](idx)
            x = block(x, past, rotation, value_embedding, x0, window_blocks)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.advance(T)
        return x

    def forward(self, idx, targets=None, cache=None, return_logits=True):
        """
        idx: (B, T) ids. -> (logits, loss)

        With targets (B, T), negative where there is none: logits (B, T, V) and their mean cross-entropy in nats, 0 if
        all are negative; whoever needs the loss alone says return_logits=False and gets None and the loss, for which
        all logits need not be in memory at once. Without targets: logits (B, 1, V) of the last position alone, all that
        sampling needs, and None. With a KVCache, idx continues the tokens in it. Raises ValueError when the context
        would exceed block_size.
        """
        window_blocks = None if targets is None or cache is not None else self.window_blocks(idx.size(1), idx.device)
        x = self.hidden(idx, cache, window_blocks)
        if targets is None:
            return self.logits(x[:, -1:]), None
        device, weight = x.device.type, self.lm_head.weight
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        n_targets = (targets >= 0).sum().clamp(min=1)
        is_large = targets.numel() * self.config.vocab_size > CHUNK and type(self.lm_head) is nn.Linear
        if is_large and not return_logits and dtype != torch.float16:  # a GradScaler's factor would come too late
            total = ChunkedCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), self.config.logit_softcap,
                                              dtype, torch.is_grad_enabled(), not weight.requires_grad)
            return None, total / n_targets
        logits = self.logits(x)
        # in fp32: a bf16 log-sum-exp would round the loss itself to three digits
        total = F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1).clamp(min=-1),
                                ignore_index=-1, reduction='sum')
        return logits if return_logits else None, total / n_targets

    def logits(self, x):
        """The head, (B, T, C) -> (B, T, V), softly capped if the config says so."""
        return softcapped(self.lm_head(x), self.config.logit_softcap)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, vocab_size=None):
        """
        Continue idx (B, T) by max_new_tokens sampled ids; -> (B, T + max_new_tokens). temperature 0: the likeliest.
        vocab_size: draw ids below it alone, where the model's vocabulary is padded; None: all.

        The plain definition: the whole context again for every token, its last block_size tokens once it is longer.
        generate.py gives the same greedy tokens from a cache, and has the other controls. Call model.eval() first.
        """
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1, :vocab_size].float()  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                next_id = logits.argmax(-1, keepdim=True)
            else:
                next_id = torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1)
            idx = torch.cat((idx, next_id), dim=1)
        return idx

    def crop_block_size(self, block_size):
        """
        Shorten the context to block_size tokens, forgetting the later positions. The parameter object stays. RoPE has
        no positions to learn or to forget, so with it the context can also grow.
        """
        if block_size < 1 or (block_size > self.config.block_size and self.config.pos == 'learned'):
            raise UserError(f'block_size={block_size}: expected 1 or more, and of this model, whose positions are '
                             f'learned, at most {self.config.block_size}' if self.config.pos == 'learned' else
                             f'block_size={block_size}: expected 1 or more')
        self.config.block_size = block_size
        if self.config.pos == 'learned':
            wpe = self.transformer.wpe
            wpe.weight.data = wpe.weight.data[:block_size].clone()
            wpe.weight.grad = None
            wpe.num_embeddings = block_size

    def get_num_params(self, non_embedding=True):
        """Number of parameters; without the position embeddings unless told. A tied head's count once."""
        count = sum(p.numel() for p in self.parameters())
        return count - self.transformer.wpe.weight.numel() if non_embedding and 'wpe' in self.transformer else count

    def flops_per_token(self):
        """
        FLOPs to train on one token of a full context: 6 for each parameter that is multiplied with it, which a table
        that is only looked up is not, and 12 H D for each position that a layer sees, attention's two products forward
        and backward ("PaLM", Chowdhery et al. 2022, appendix B; nothing off for causality, as is customary).
        """
        c = self.config
        looked_up = [name for name in ('wpe', 'vte') if name in self.transformer] + ['wte'] * (not c.tie_embeddings)
        multiplied = self.get_num_params(non_embedding=False) - sum(
            p.numel() for name in looked_up for p in self.transformer[name].parameters())
        seen = sum(min(c.window_of(layer) or c.block_size, c.block_size) for layer in range(c.n_layer))
        return 6 * multiplied + 12 * c.n_head * c.head_size * seen

    @classmethod
    def from_pretrained(cls, name_or_folder, override_args=None):
        """
        A model of Hugging Face's layout, GPT-2's or Llama's: one of GPT-2's names, 'gpt2' to 'gpt2-xl', a folder, or a
        hub id; see huggingface.py. override_args: {'dropout': p}. ValueError for what can't be read.
        """
        from flatgpt import huggingface  # it imports this module

        unknown = set(override_args or {}) - {'dropout'}
        if unknown:
            raise UserError(f'{sorted(unknown)}: only dropout can be overridden, the weights fix the rest')
        return huggingface.load_model(huggingface.find(name_or_folder), **(override_args or {}))
