"""
Write a trained model as a folder in Hugging Face's layout: config.json,
safetensors, tokenizer.json, generation_config.json.

    $ python -m flatgpt.export --out_dir=out-shakespeare-char --out=shakespeare-hf
    $ python -m flatgpt.export --out_dir=out --which=last --dtype=bfloat16 --out=my-gpt

transformers loads it with the same logits. GPT-2's layout has models with
learned positions, LayerNorm and GELU; Llama's (Qwen's with QK-norm) those with
RoPE, RMSNorm and SwiGLU, such as --preset=llama. What neither has, such as
logit_softcap, is refused by name.
"""

import os
import sys
import textwrap

from configurator import check, explain_errors, override
from flatgpt import huggingface, runtime
from flatgpt.pretrained import open_model

sys.stdout.reconfigure(errors='replace')  # a terminal that can't show a character still gets the rest

# settings ------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume': a checkpoint in out_dir; or a Hugging Face folder, a hub id, 'gpt2' to 'gpt2-xl'
out_dir = 'out'  # where train.py wrote ckpt.pt and best.pt
which = 'best'  # 'best': best.pt where there is one, else ckpt.pt; 'last': ckpt.pt
out = ''  # the folder to write; it must not be there yet
dtype = 'float32'  # of the weights in it: 'float32', as they are; 'bfloat16' or 'float16', half as large
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

sys.excepthook = explain_errors
check(config, (
    ('out', bool, 'the folder to write, such as --out=my-gpt'),
    ('which', lambda value: value in ('best', 'last'), "'best' or 'last'"),
    ('dtype', lambda value: value in runtime.DTYPES, ' or '.join(map(repr, runtime.DTYPES))),
))

model, text_tokenizer, chat_template, line = open_model(init_from, out_dir, which)
print(line)
hf = huggingface.save(model, text_tokenizer.to_dict(), chat_template, out, runtime.DTYPES[dtype])
size = sum(os.path.getsize(os.path.join(out, file)) for file in os.listdir(out))
print(textwrap.fill(f'wrote {out}: {hf["architectures"][0]}, {model.get_num_params(False) / 1e6:.2f}M parameters in '
                    f'{dtype}, {text_tokenizer.kind} tokenizer, {size / 1e6:.1f} MB', 80, break_on_hyphens=False))
print(f"""next:
  in Python:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained({out!r})
    tokenizer = AutoTokenizer.from_pretrained({out!r})
  to serve it:
    vllm serve {out}
  for llama.cpp, whose script knows published vocabularies, such as GPT-2's:
    python convert_hf_to_gguf.py {out} --outfile {out}.gguf""")
